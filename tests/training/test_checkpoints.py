"""Checkpoints: exact round trips, and what happens when something goes wrong at the worst moment."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.training import checkpoints
from dmdr_jax.training.checkpoints import Checkpoints, load_trained

ROOT = pathlib.Path(__file__).parents[2]
META = {"model": {"family": "sd3", "transformer": {"num_layers": 4, "width": 8}}, "config": {"steps": 3}}


class State(NamedTuple):
    step: Any
    generator: Any
    optimiser: Any
    ema: Any
    key: Any


def make_state(seed=0, rank=2, ema=True):
    rng = np.random.default_rng(seed)
    generator = {
        "transformer_blocks.0:4": {"attn.to_out.0": {"a": jnp.asarray(rng.normal(size=(4, 99, rank)), jnp.float32)}},
        "norm.out": {"scale": jnp.asarray(rng.normal(size=3), jnp.bfloat16)},
        "empty": {},
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(generator)
    key = jax.random.key_data(jax.random.key(seed))
    return State(jnp.int32(seed), generator, optimiser, generator if ema else None, key)


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def saved(directory, steps=(1, 2), **options):
    with Checkpoints(directory, **options) as ckpt:
        for step in steps:
            ckpt.save(step, make_state(step), META)
    return directory


# --- the ordinary way ---


def test_round_trip_is_exact(tmp_path):
    """Types, optimiser containers, None, empty dicts and keys with dots and colons come back as they were."""
    saved(tmp_path / "c")
    with Checkpoints(tmp_path / "c") as ckpt:
        assert ckpt.latest() == 2
        assert_same(ckpt.restore(abstract(make_state()), META), make_state(2))
        assert_same(ckpt.restore(abstract(make_state()), step=1), make_state(1))
        assert ckpt.meta() == META


def test_state_without_ema(tmp_path):
    state = make_state(ema=False)
    with Checkpoints(tmp_path) as ckpt:
        ckpt.save(1, state)
    with Checkpoints(tmp_path) as ckpt:
        assert_same(ckpt.restore(abstract(state)), state)
    assert set(load_trained(tmp_path)[0]) == {"generator"}


def test_the_state_may_change_as_soon_as_save_returns(tmp_path):
    """As a train step does that donates its state."""
    state = make_state(5)
    with Checkpoints(tmp_path) as ckpt:
        ckpt.save(5, state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    with Checkpoints(tmp_path) as ckpt:
        assert_same(ckpt.restore(abstract(make_state())), make_state(5))


def test_a_save_under_way_is_finished_when_an_error_ends_the_run(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as ckpt:
        ckpt.save(3, make_state(3))
        raise ZeroDivisionError
    assert_same(restore_latest(tmp_path), make_state(3))


def test_what_is_kept(tmp_path):
    saved(tmp_path, steps=range(1, 8), keep=2, keep_every=3)
    assert sorted(int(child.name) for child in tmp_path.iterdir()) == [3, 6, 7]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(tmp_path) as ckpt:
        ckpt.save(4, make_state(1))
        ckpt.wait()
        ckpt.save(4, make_state(2))
    with Checkpoints(tmp_path) as ckpt:
        assert_same(ckpt.restore(abstract(make_state())), make_state(1))


def test_an_empty_directory_holds_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as ckpt:
        assert ckpt.latest() is None
        with pytest.raises(UserError, match="holds no checkpoint"):
            ckpt.restore(abstract(make_state()))


def test_checksums_do_not_depend_on_where_they_are_computed():
    leaves = [*jax.tree.leaves(make_state()), jnp.array([True, False, True]), jnp.float32(jnp.nan), jnp.zeros((0, 3))]
    on_device = np.asarray(checkpoints._device_checksums(leaves)).tolist()
    assert on_device == checkpoints.checksums(leaves)
    flipped = np.asarray(make_state().key).copy()
    flipped[1] ^= 1 << 7
    assert checkpoints._host_checksum(flipped) != checkpoints._host_checksum(np.asarray(make_state().key))


# --- export and sampling ---


def test_load_trained_takes_workdir_folder_and_step(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    for path, step in ((tmp_path, 2), (folder, 2), (folder / "2", 2), (folder / "1", 1)):
        trees, meta = load_trained(path)
        assert meta == {**META, "step": step}
        assert set(trees) == {"generator", "ema"}
        assert_same(trees["generator"], jax.tree.map(np.asarray, make_state(step).generator))
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(trees))
    assert trees["generator"]["norm.out"]["scale"].dtype == ml_dtypes.bfloat16


def test_load_trained_reads_other_fields_on_demand(tmp_path):
    saved(tmp_path)
    trees, _ = load_trained(tmp_path, fields=("key",))
    np.testing.assert_array_equal(trees["key"], make_state(2).key)


def test_load_trained_does_not_disturb_a_run_that_is_saving(tmp_path):
    saved(tmp_path)
    unfinished = tmp_path / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert load_trained(tmp_path)[1]["step"] == 2
    assert unfinished.exists()


def test_load_trained_refuses_everything_else(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="holds no checkpoint; give a run's workdir"):
        load_trained(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_trained(tmp_path / "absent")
    with pytest.raises(UserError, match="holds none of teacher"):
        load_trained(saved(tmp_path / "checkpoints"), fields=("teacher",))


# --- another model ---


def change(meta, **transformer):
    return {**meta, "model": {**meta["model"], "transformer": {**meta["model"]["transformer"], **transformer}}}


@pytest.mark.parametrize(
    "meta, difference",
    [
        (change(META, width=16), "model.transformer.width is 8 there and 16 here"),
        (change(META, depth=1), "model.transformer.depth is absent there and 1 here"),
        ({"model": {"family": "sdxl"}}, 'model.family is "sd3" there and "sdxl" here'),
    ],
)
def test_checkpoint_of_another_model(tmp_path, meta, difference):
    saved(tmp_path)
    with Checkpoints(tmp_path) as ckpt, pytest.raises(UserError, match="belongs to another model") as error:
        ckpt.restore(abstract(make_state()), meta)
    assert difference in str(error.value)


def test_other_metadata_may_differ(tmp_path):
    saved(tmp_path)
    with Checkpoints(tmp_path) as ckpt:
        ckpt.restore(abstract(make_state()), {**META, "config": {"steps": 99}})


@pytest.mark.parametrize(
    "state, difference",
    [
        (make_state(rank=4), r"to_out.0/a is float32\[4, 99, 2\] there and float32\[4, 99, 4\] here"),
        (make_state(ema=False), "its ema/norm.out/scale has no place here"),
        (make_state()._replace(ema={"new": jnp.ones(2)}), "it has no ema/new"),
        (make_state()._replace(step=jnp.float32(1)), r"step is int32\[\] there and float32\[\] here"),
    ],
)
def test_checkpoint_of_other_shapes(tmp_path, state, difference):
    saved(tmp_path)
    with Checkpoints(tmp_path) as ckpt, pytest.raises(UserError, match=difference):
        ckpt.restore(abstract(state))


# --- damage ---


def damage(folder, how):
    """Damage one finished checkpoint on disk, as `how` says."""
    data = max((file for file in folder.rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size)
    bits = bytearray(data.read_bytes())
    if how == "flipped bit in the weights":
        bits[len(bits) // 2] ^= 0x10
        data.write_bytes(bits)
    elif how == "truncated weights":
        data.write_bytes(bits[: len(bits) // 2])
    elif how == "missing weights":
        data.unlink()
    elif how == "missing index":
        (folder / "state" / "manifest.ocdbt").unlink()
    elif how == "cut metadata":
        (folder / "meta" / "metadata").write_text('{"format": 1, "le')
    elif how == "missing metadata":
        shutil.rmtree(folder / "meta")
    elif how == "missing state":
        shutil.rmtree(folder / "state")


HOW = [
    "flipped bit in the weights",
    "truncated weights",
    "missing weights",
    "missing index",
    "cut metadata",
    "missing metadata",
    "missing state",
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_latest_checkpoint_ends_the_run(tmp_path, how):
    """It is named, with what to do; neither an older checkpoint nor a fresh start is taken silently."""
    saved(tmp_path)
    damage(tmp_path / "2", how)
    for restore in (restore_latest, load_trained):
        with pytest.raises(UserError, match=f"checkpoint {tmp_path}/2 is damaged .*continue from step 1"):
            restore(tmp_path)
    shutil.move(tmp_path / "2", tmp_path / "away")
    assert_same(restore_latest(tmp_path), make_state(1))


def restore_latest(directory):
    with Checkpoints(directory) as ckpt:
        return ckpt.restore(abstract(make_state()))


def test_the_only_checkpoint_damaged(tmp_path):
    saved(tmp_path, steps=(7,))
    damage(tmp_path / "7", "cut metadata")
    with pytest.raises(UserError, match="move that folder away to start again from nothing"):
        restore_latest(tmp_path)


def test_a_checkpoint_from_the_future(tmp_path):
    saved(tmp_path)
    file = tmp_path / "2" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": checkpoints.FORMAT + 1}))
    with pytest.raises(UserError, match="newer version"):
        restore_latest(tmp_path)


# --- disks ---


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch, error, reason, where):
    saved(tmp_path)
    ckpt = Checkpoints(tmp_path)

    def fail(*_, **__):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a thread failed") from cause  # as deep inside Orbax

    monkeypatch.setattr(ckpt._manager, where, fail)
    with pytest.raises(UserError, match=f"{reason}.*the checkpoint of step 2 is whole"):
        ckpt.save(3, make_state(3))
        ckpt.wait()


def test_other_failures_are_not_dressed_up_as_full_disks(tmp_path, monkeypatch):
    ckpt = Checkpoints(tmp_path)
    monkeypatch.setattr(ckpt._manager, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ckpt.save(1, make_state())


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpoints(tmp_path / "c")


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def noise(step):
    return {"generator": {"w": jnp.asarray(np.random.default_rng(step).normal(size=(160, 1000)), jnp.float32)}}


@pytest.mark.parametrize("keep", [1, 3])
def test_a_disk_that_fills_up(tiny_disk, keep):
    """640 kB per checkpoint, 1 MB of disk: the second cannot be finished, the first survives whole."""
    ckpt = Checkpoints(tiny_disk / "c", keep=keep)
    ckpt.save(1, noise(1))
    ckpt.wait()
    with pytest.raises(UserError, match="the disk is full; the checkpoint of step 1 is whole, so make room"):
        ckpt.save(2, noise(2))
        ckpt.wait()
    with Checkpoints(tiny_disk / "c", keep=keep) as again:
        assert again.latest() == 1
        assert_same(again.restore(abstract(noise(1))), noise(1))


# --- kill -9 ---

KILLS = 12

KILL_WHILE_SAVING = """
    import os, random, signal, sys, time
    import jax, numpy as np
    from etils import epath
    from dmdr_jax.errors import UserError
    from dmdr_jax.training.checkpoints import Checkpoints, _finished_steps

    directory, kills, keep = epath.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    moments = random.Random(keep)

    def state(step):
        return {"generator": {str(i): np.full(100_000, step + i, np.int32) for i in range(8)}}

    def save_forever(pipe):
        ckpt = Checkpoints(directory, keep=keep)
        first = (ckpt.latest() or 0) + 1
        for step in range(first, first + 10_000):
            os.write(pipe, b".")
            ckpt.save(step, jax.device_put(state(step)))  # waits for the save before, as a run's next save would

    def check(finished):
        with Checkpoints(directory, keep=keep) as ckpt:
            latest = ckpt.latest() or 0
            assert latest >= finished, f"step {finished} was there, now {latest}"
            for step in _finished_steps(directory):
                try:
                    restored = ckpt.restore(jax.eval_shape(lambda: state(step)), step=step)
                except UserError:  # killed while it was being removed; later ones are there
                    assert step < latest
                else:
                    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
            ckpt.save(latest + 1, jax.device_put(state(latest + 1)))
        assert not list(directory.glob("*tmp*")), "what the killed run left is cleaned up"

    def child(function, argument):
        # A fork of a program that has imported everything and computed nothing: many kills cost little.
        pid = os.fork()
        if pid == 0:
            try:
                function(argument)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return pid

    in_the_middle = 0
    for _ in range(kills):
        read, write = os.pipe()
        saver = child(save_forever, write)
        for _ in range(moments.randint(1, 3)):
            os.read(read, 1)
        time.sleep(moments.uniform(0, 0.3))
        finished = max(_finished_steps(directory), default=0)
        os.kill(saver, signal.SIGKILL)
        assert os.waitpid(saver, 0)[1] == signal.SIGKILL, "the saving program ended by itself"
        in_the_middle += bool(list(directory.glob("*tmp*")))
        if os.waitpid(child(check, finished), 0)[1]:
            sys.exit("a checkpoint is not what was saved")
    print(in_the_middle)
"""


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_9_while_saving(tmp_path, keep):
    """At random moments, many times: the latest restores, nothing restores wrongly, and saving goes on."""
    arguments = [str(tmp_path / "c"), str(KILLS), str(keep)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILL_WHILE_SAVING), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= KILLS // 4, "too few kills came in the middle of a save"
