"""Hub ids and URLs: which files are asked for, and what is said when they cannot be had."""

import fnmatch
import json
import shutil
import uuid

import fsspec
import httpx2
import pytest
from huggingface_hub import errors

from dmdr_jax.diffusers_io import hub, lora_file, remote
from dmdr_jax.errors import UserError

SD3 = "StableDiffusion3Pipeline"
# As the SD3.5 repositories are laid out, with an encoder whose variant is not sharded and one that is.
REPOSITORY = [
    "README.md",
    "sd3_medium.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.fp16-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
]
SMALL = {f for f in REPOSITORY if "/" in f and not f.endswith((".safetensors", ".bin"))} | {"model_index.json"}
NAME = "someone/some-model"


def content(file):
    if file == hub.INDEX:
        return {"_class_name": SD3}
    if ".index." not in file:
        return {}
    tag = ".fp16" if "fp16" in file else ""
    return {
        "weight_map": {"a": f"model{tag}-00001-of-00002.safetensors", "b": f"model{tag}-00002-of-00002.safetensors"}
    }


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A stand-in for the hub; records the files it was asked for."""
    fetched = set()

    def snapshot_download(name, allow_patterns):
        assert name == NAME
        for file in REPOSITORY:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                fetched.add(file)
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text(json.dumps(content(file)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def weights(fetched):
    return fetched - SMALL


def test_only_what_is_needed_is_fetched(repository, tmp_path):
    assert hub.locate(NAME, ["transformer", "text_encoder_3"]) == tmp_path
    assert repository == SMALL | {
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model-00002-of-00002.safetensors",
    }


def test_a_variant_is_fetched_where_there_is_one(repository):
    hub.locate(NAME, variant="fp16")
    assert weights(repository) == {
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_configurations_alone(repository, tmp_path):
    assert hub.locate_configs(NAME) == tmp_path and repository == SMALL
    assert hub.locate_configs(str(tmp_path)) == tmp_path


def test_single_networks_and_loras(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.locate_network("someone/taesdxl", also=["vocab.json"]) == tmp_path
    names = ["diffusion_pytorch_model.safetensors", "model.safetensors"]
    assert asked == [("someone/taesdxl", ["*.json", "vocab.json"]), ("someone/taesdxl", names)]
    assert hub.locate_lora("someone/lora") == tmp_path
    assert asked[2] == ("someone/lora", [*lora_file.FILE_NAMES, lora_file.CONFIG_NAME])


def test_a_folder_is_itself(tmp_path):
    for locate in (hub.locate, hub.locate_configs, hub.locate_network, hub.locate_lora):
        assert locate(str(tmp_path)) == tmp_path
        with pytest.raises(UserError, match=r"there is no folder .*nowhere; give .* hub id such as owner/model"):
            locate(str(tmp_path / "nowhere"))


# --- no access -------------------------------------------------------------------------------------------------------


def refused(kind, status):
    request = httpx2.Request("GET", "https://huggingface.co/api/models/x")
    return kind(f"{status} Client Error", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    "error, words",
    [
        (
            refused(errors.GatedRepoError, 403),
            r"it is gated; accept its licence at https://huggingface.co/NAME and run",
        ),
        (refused(errors.GatedRepoError, 403), r"`hf auth login` \(or set HF_TOKEN\)"),
        (refused(errors.RepositoryNotFoundError, 401), "no such model, or it is private; check the spelling"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached, or HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("no snapshot"), "the hub cannot be reached, or HF_HUB_OFFLINE is set"),
        (errors.IncompleteSnapshotError("2 missing", "/x"), r"its cache lacks some of the files \(2 missing\)"),
        (ConnectionError("no route\nto host"), r"ConnectionError: no route to host\); run again, it goes on where it"),
        (refused(errors.HfHubHTTPError, 500), "HfHubHTTPError: 500 Client Error; run again"),
    ],
)
@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-3.5-large", "someone/model"])
def test_without_access_the_model_the_reason_and_the_command_are_named(monkeypatch, name, error, words):
    def snapshot_download(name, allow_patterns):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=words.replace("NAME", name)) as raised:
        hub.locate(name, variant="fp16")
    message = str(raised.value)
    assert "\n" not in message and f"the model {name} cannot" in message
    command = message.split("`")[-2]
    assert command.startswith(f"hf download {name} --include model_index.json ") and command.endswith("--local-dir DIR")


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-3.5-large", NAME])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_command_fetches_what_would_have_been_fetched(repository, name, variant):
    hub.locate(NAME, variant=variant)
    patterns = hub.needed(hub._known_family(name), None, variant)
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in repository)
    left = {file for file in REPOSITORY if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)}
    assert {"sd3_medium.safetensors", "vae/diffusion_pytorch_model.bin", "README.md"} <= left
    assert variant or "text_encoder_3/model.fp16-00001-of-00002.safetensors" in left


def test_offline_for_real():
    """The tests run with HF_HUB_OFFLINE: the hub's own client says no."""
    with pytest.raises(
        UserError, match=r"someone/never-cached.*HF_HUB_OFFLINE is set.*hf download someone/never-cached"
    ):
        hub.locate("someone/never-cached")


def test_a_repository_that_is_no_pipeline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    with pytest.raises(UserError, match=r"someone/model is not a diffusers pipeline: it has no model_index.json"):
        hub.locate("someone/model")
    (tmp_path / hub.INDEX).write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match=r"someone/model holds a FluxPipeline; supported are StableDiffusion3Pipeline"):
        hub.locate("someone/model")


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The repository in fsspec's memory; gives its URL."""
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    url = f"memory://bucket-{uuid.uuid4().hex}/model"
    for file in REPOSITORY:
        with fsspec.open(f"{url}/{file}", "w") as stream:
            stream.write(json.dumps(content(file)))
    return url


def files_below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def test_a_url_is_copied_as_far_as_needed(bucket, capsys):
    folder = hub.locate(bucket, ["transformer"])
    assert files_below(folder) == SMALL | {"transformer/diffusion_pytorch_model.safetensors"}
    assert json.loads((folder / hub.INDEX).read_text()) == {"_class_name": SD3}
    assert "copying memory://" in capsys.readouterr().err
    assert hub.locate(f"{bucket}/", ["transformer"]) == folder and "copying" not in capsys.readouterr().err
    hub.locate(bucket, ["text_encoder_3"], variant="fp16")
    assert "text_encoder_3/model.fp16-00002-of-00002.safetensors" in files_below(folder)
    assert "text_encoder_3/model-00002-of-00002.safetensors" not in files_below(folder)


def test_what_has_changed_or_is_lost_is_copied_again(bucket):
    folder = hub.locate(bucket, ["vae"])
    file = "vae/diffusion_pytorch_model.safetensors"
    before = (folder / file).stat().st_mtime_ns
    assert hub.locate(bucket, ["vae"]) == folder and (folder / file).stat().st_mtime_ns == before
    with fsspec.open(f"{bucket}/{file}", "w") as stream:
        stream.write("other weights")
    hub.locate(bucket, ["vae"])
    assert (folder / file).read_text() == "other weights"
    (folder / file).unlink()
    (folder / ".known.json").write_text("[")
    hub.locate(bucket, ["vae"])
    assert (folder / file).read_text() == "other weights"


def test_an_interrupted_copy_leaves_nothing_half(bucket, monkeypatch, tmp_path):
    def lost(*_):
        raise OSError("connection lost")

    folder = hub.locate(bucket, [])
    with monkeypatch.context() as broken:
        broken.setattr("os.replace", lost)
        with pytest.raises(UserError, match=r"memory://.* cannot be read \(OSError: connection lost\)"):
            hub.locate(bucket, ["vae"])
    assert files_below(folder) == SMALL and not list(folder.rglob("*.part"))
    assert "vae/diffusion_pytorch_model.safetensors" in files_below(hub.locate(bucket, ["vae"]))


def test_a_lora_behind_a_url(bucket, tmp_path):
    with fsspec.open(f"{bucket}/lora/mine.safetensors", "w") as stream:
        stream.write("weights")
    assert hub.locate_lora(f"{bucket}/lora/mine.safetensors").read_text() == "weights"


def test_urls_that_lead_nowhere(bucket):
    with pytest.raises(UserError, match="does not exist, or is empty; check the address"):
        hub.locate(f"{bucket}/not-there")
    with pytest.raises(UserError, match="xyz:// is not a protocol that fsspec knows"):
        hub.locate("xyz://bucket/model")
    with pytest.raises(UserError, match=r"is not a diffusers pipeline: it has no model_index.json"):
        hub.locate(f"{bucket}/vae")


def test_a_protocol_whose_package_is_absent(monkeypatch):
    def absent(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(UserError, match=r"gs://bucket/model needs a package for gs:// .* pip install gcsfs"):
        hub.locate("gs://bucket/model")
    with pytest.raises(UserError, match=r"odd:// that is not installed: Please install gcsfs"):
        hub.locate("odd://bucket/model")


def test_a_pipeline_is_read_through_a_url(tmp_path, monkeypatch):
    """The same numbers as from the folder."""
    torch = pytest.importorskip("torch")
    import jax
    import numpy as np

    from dmdr_jax.diffusers_io.pipeline import load_pipeline
    from tests import tiny_pipelines

    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tiny_pipelines.save(tmp_path / "sdxl", "sdxl", dtype=torch.float16, max_shard_size="40KB")
    url = f"memory://{uuid.uuid4().hex}/sdxl"
    files = fsspec.filesystem("memory")
    files.put(str(folder), url.removeprefix("memory:/"), recursive=True)
    wanted = load_pipeline(folder).params
    shutil.rmtree(folder)
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(url).params, wanted)
