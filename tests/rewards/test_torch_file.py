"""Files of torch.save read without torch: both forms, views and types, and pickles that would run something."""

import io
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.lazy_tensor import LazyTensor
from dmdr_jax.rewards.torch_file import read_torch_file

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def save(value, file, zipped=True):
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file


@FORMS
def test_values_types_views_and_containers(tmp_path, zipped):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in TYPES}
    tensors |= {
        "permuted": base.permute(2, 0, 1),
        "part": base[1, 1:, ::2],
        "same": base,
        "expanded": torch.arange(3.0).expand(4, 3),
        "parameter": torch.nn.Parameter(base[0].t()),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(2.5),
    }
    plain = {
        "epoch": 3,
        "lr": 1e-4,
        "names": ["a", ("b", None, True)],
        "raw": b"\xff\x00",
        "large": 2**70,
        "set": {1, 2},
    }
    tree = read_torch_file(save(plain | {"state_dict": OrderedDict(tensors)}, tmp_path / "f.pt", zipped))
    held = tree.pop("state_dict")
    assert tree == plain
    assert list(held) == list(tensors)
    for name, tensor in tensors.items():
        value = held[name].load()
        assert isinstance(held[name], LazyTensor) and held[name].shape == value.shape == tuple(tensor.shape), name
        assert str(value.dtype) == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(value.astype(np.float64), tensor.detach().to(torch.float64).numpy(), name)


@FORMS
def test_a_module_state_dict_with_buffers_and_metadata(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)).half()
    held = read_torch_file(save(module.state_dict(), tmp_path / "m.bin", zipped))
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(held[name].load(), tensor.numpy(), name)


def test_types_and_sizes_beside_the_weights_are_names_and_tuples(tmp_path):
    value = {"dtype": torch.float16, "size": torch.Size([1, 2]), "device": torch.device("cpu")}
    tree = read_torch_file(save(value, tmp_path / "f.pt"))
    assert tree["size"] == (1, 2) and tree["device"] == "cpu" and tree["dtype"].name == "float16"


def test_an_archive_packed_anew_with_compression(tmp_path):
    weights = {"w": torch.randn(50, 3)}
    with zipfile.ZipFile(save(weights, tmp_path / "a.pt")) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    np.testing.assert_array_equal(read_torch_file(tmp_path / "b.pt")["w"].load(), weights["w"].numpy())


@FORMS
def test_tensors_of_one_storage_share_its_memory(tmp_path, zipped):
    base = torch.arange(12.0).reshape(3, 4)
    tree = read_torch_file(save({"whole": base, "row": base[1], "other": torch.ones(3)}, tmp_path / "f.pt", zipped))
    whole, row, other = (tree[name].load() for name in ("whole", "row", "other"))
    assert np.shares_memory(whole, row) and not np.shares_memory(whole, other)
    assert not whole.flags.writeable


class Runs:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(flag):
    command = f"touch {flag}"
    return {
        "os.system": Runs(os.system, command),
        "builtins.eval": Runs(eval, f"open({str(flag)!r}, 'w')"),
        "subprocess.Popen": [{"deep": (1, Runs(subprocess.Popen, ["touch", str(flag)]))}],
        "nested": Runs(Runs, os.system, command),
        "builtins.getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "as a key": {Runs(os.system, command): 1},
        "in a tensor": {"w": torch.nn.Parameter(torch.ones(2)), "x": Runs(os.system, command)},
    }


@FORMS
@pytest.mark.parametrize("name", hostile(""))
def test_pickled_code_is_named_and_not_run(tmp_path, zipped, name):
    flag = tmp_path / "it_ran"
    file = save({"state_dict": {"w": torch.ones(2)}, "x": hostile(flag)[name]}, tmp_path / "f.pt", zipped)
    with pytest.raises(UserError, match=r"refused: it names (posix\.system|builtins|subprocess|tests)"):
        read_torch_file(file)
    assert not flag.exists()


def crafted(pickled: bytes, file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("f/data.pkl", pickled)
        archive.writestr("f/data/0", np.arange(4, dtype=np.float32).tobytes())
    return file


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"


def test_a_crafted_tensor_is_read(tmp_path):
    whole = REBUILD + STORAGE + b"K\x01(K\x02t(K\x02tI00\n}tR."
    np.testing.assert_array_equal(read_torch_file(crafted(whole, tmp_path / "f.pt")).load(), [1.0, 3.0])


@pytest.mark.parametrize(
    "pickled",
    {
        "a known name is changed": REBUILD + b"}U\x05_callU\x01xsb.",
        "a type is called": b"ctorch\nFloatStorage\n(tR.",
        "a tensor is changed": REBUILD + STORAGE + b"K\x01(K\x02t(K\x02tI00\n}tR}U\x04loadNsb.",
        "no storage": REBUILD + b"(NK\x00(K\x02t(K\x01tI00\n}tR.",
        "a negative stride": REBUILD + STORAGE + b"K\x03(K\x02t(J\xff\xff\xff\xfftI00\n}tR.",
        "no types": REBUILD + STORAGE + b"K\x00(U\x01xt(K\x01tI00\n}tR.",
        "another class": b"cbuiltins\nset\n)\x81.",
        "another encoding": b"c_codecs\nencode\n(U\x01aU\x05rot13tR.",
        "not a storage": b"((U\x06moduleNNNNtQ.",
        "cut off": REBUILD + STORAGE,
    }.values(),
)
def test_a_pickle_that_misuses_what_is_known_is_refused(tmp_path, pickled):
    with pytest.raises(UserError, match=r"f\.pt is damaged"):
        read_torch_file(crafted(pickled, tmp_path / "f.pt"))


def test_a_tensor_beyond_its_storage_is_not_read(tmp_path):
    beyond = REBUILD + STORAGE + b"K\x02(K\x03t(K\x01tI00\n}tR."
    tensor = read_torch_file(crafted(beyond, tmp_path / "f.pt"))
    with pytest.raises(UserError, match="beyond its storage"):
        tensor.load()


@FORMS
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, zipped, share):
    file = save({f"w{i}": torch.randn(40, 10) for i in range(5)}, tmp_path / "cut.pt", zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"cut\.pt is damaged or truncated"):
        read_torch_file(file)


def test_other_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt cannot be read"):
        read_torch_file(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt is no file of torch\.save"):
        read_torch_file(tmp_path / "text.pt")
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(UserError, match="is no file of torch"):
        read_torch_file(plain)
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(UserError, match=r"has no data\.pkl"):
        read_torch_file(tmp_path / "z.pt")
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    (tmp_path / "jit.pt").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="TorchScript"):
        read_torch_file(tmp_path / "jit.pt")


@FORMS
def test_a_damaged_file_gives_numbers_or_one_sentence(tmp_path, zipped):
    """Bytes changed, cut off or put in between, anywhere: never another error."""
    state = {f"layers.{i}.weight": torch.randn(3, 4) for i in range(3)} | {"scale": torch.ones(()).half()}
    data, rng = save({"state_dict": state}, tmp_path / "f.pt", zipped).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        damaged, place = bytearray(data), rng.randrange(len(data))
        match rng.choice(["change", "cut", "insert"]):
            case "change":
                damaged[place] = rng.randrange(256)
            case "cut":
                del damaged[place:]
            case "insert":
                damaged[place:place] = rng.randbytes(3)
        (tmp_path / "f.pt").write_bytes(damaged)
        try:
            tree = read_torch_file(tmp_path / "f.pt")
            for tensor in tree.get("state_dict", {}).values() if isinstance(tree, dict) else ():
                tensor.load() if isinstance(tensor, LazyTensor) else None
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 80


def test_torch_is_not_imported(tmp_path):
    file = save({"w": torch.ones(2)}, tmp_path / "f.pt")
    program = (
        "import sys; from dmdr_jax.rewards.torch_file import read_torch_file;"
        f"assert read_torch_file({str(file)!r})['w'].load().sum() == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
