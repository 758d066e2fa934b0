"""Several processes as one run: joining, equal losses, stopping together, and what happens when one is lost."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dmdr_jax.errors import UserError
from dmdr_jax.training import runtime
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.metrics import read_metrics
from dmdr_jax.training.runtime import Place, cluster_size, find_place
from tests.rewards.test_clip_reward import make_folder

ROOT = Path(__file__).parents[2]
FIELDS = ("generator", "fake", "ema", "generator_opt", "fake_opt", "step", "inner", "key")
LONG = 100_000  # steps of a run that is going to be stopped


class Group:
    """Processes that run the same program, each told its place, with so many devices in all."""

    def __init__(self, count: int, program: list[str], folder: Path, devices: int = 8):
        self.logs = [folder / f"log_{time.monotonic_ns()}_{i}.txt" for i in range(count)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // count),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        self.processes = []
        for i, log in enumerate(self.logs):
            place = {runtime.ADDRESS: address, runtime.COUNT: str(count), runtime.INDEX: str(i)}
            with open(log, "w") as file:
                own = environment | (place if count > 1 else {})
                self.processes.append(subprocess.Popen(program, cwd=ROOT, env=own, stdout=file, stderr=file))

    def text(self, i: int = 0) -> str:
        return self.logs[i].read_text()

    def wait(self, seconds: float = 600) -> list[int]:
        """The exit statuses, once all have ended."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("still running: " + "\n".join(map(self.text, range(len(self.logs))))) from None
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def check(self) -> None:
        assert self.wait() == [0] * len(self.processes), "\n".join(map(self.text, range(len(self.logs))))


@pytest.fixture
def train(teacher, prompts_file, tmp_path):
    """Starts the tiny run in a workdir with so many processes."""
    groups = []

    def start(count: int, workdir: Path, steps: int, *more: str, every: int = 1000, images: int = 2, devices: int = 8):
        config = f"--config=tests/training/tiny_config.py:{teacher},{prompts_file}"
        size = ["--config.batch=8", f"--config.steps={steps}", f"--config.checkpoint.every={every}"]
        size += [f"--config.preview.images={images}"]
        program = [sys.executable, "-m", "dmdr_jax.train", config, f"--workdir={workdir}", *size, *more]
        groups.append(Group(count, program, tmp_path, devices))
        return groups[-1]

    yield start
    for group in groups:
        group.kill()


def wait_for_rows(workdir: Path, count: int, group: Group) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        file = workdir / "metrics.jsonl"
        if file.exists() and len(read_metrics(workdir)) >= count:
            return
        assert all(process.poll() is None for process in group.processes), group.text()
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps in time: {group.text()}")


def assert_same_losses(workdir: Path, other: Path) -> None:
    rows, expected = read_metrics(workdir), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected):
        assert row.keys() == wanted.keys()
        for name in row:
            np.testing.assert_allclose(row[name], wanted[name], rtol=2e-3, atol=1e-5, err_msg=f"{name}, {row['step']}")


def test_two_processes_train_as_one(train, tmp_path):
    """Equal losses on one device and on two processes with four each, which go on from the one's checkpoint.

    The other way round: `test_checkpoints_of_two_processes_restore_in_one_and_back`.
    """
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    train(1, whole, 3, every=1, images=0, devices=1).check()
    shutil.copytree(whole, changing)
    for step in (2, 3):
        shutil.rmtree(changing / "checkpoints" / str(step))
    group = train(2, changing, 3)
    group.check()
    assert "8 cpu device(s) of 2 processes" in group.text()
    assert_same_losses(changing, whole)
    assert {p.name for p in (changing / "samples").iterdir()} == {"prompts.txt", "teacher.png", "student_000003.png"}
    assert json.loads((changing / "config.json").read_text())["processes"] == 2
    trees, meta = load_trained(changing, FIELDS)
    expected, _ = load_trained(whole, FIELDS)
    assert meta["step"] == 3 and int(trees["inner"]) == int(expected["inner"])


@pytest.mark.slow
def test_two_and_eight_devices_train_as_one(train, tmp_path):
    """Of one process; pytest -m slow tests/training/test_processes.py: a minute of one core."""
    for devices in (1, 2, 8):
        group = train(1, tmp_path / str(devices), 3, images=0, devices=devices)
        group.check()
        assert f"{devices} cpu device(s)" in group.text()
        assert_same_losses(tmp_path / str(devices), tmp_path / "1")


@pytest.mark.slow
def test_two_processes_are_rewarded_and_watched_as_one(train, reward_folder, tmp_path):
    """Calibration, rewards, held-out judge and canaries; pytest -m slow tests/training/test_processes.py.

    Of weights that lie on devices of both, each process can score by itself.
    """
    make_folder(tmp_path / "judge", image_size=24)
    reward = {"path": reward_folder, "weight": 0.3, "units": "z", "margin": 100.0, "start": 0}
    more = [f"--config.rewards.clip.{key}={value}" for key, value in reward.items()]
    more += ["--config.calibration=4", "--config.watch.every=1", "--config.watch.count=2"]
    more += [f"--config.watch.rewards.judge.path={tmp_path / 'judge'}", "--config.fake.updates=1"]
    for count in (1, 2):
        train(count, tmp_path / str(count), 2, *more, images=0, devices=4).check()
    assert_same_losses(tmp_path / "2", tmp_path / "1")
    row = read_metrics(tmp_path / "2")[-1]
    assert {"reward/loss", "reward/clip", "watch/reward_gap"} <= row.keys()
    found, expected = (json.loads((tmp_path / str(n) / "calibration.json").read_text())["scores"] for n in (2, 1))
    np.testing.assert_allclose(found["clip"], expected["clip"], rtol=1e-4)


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_a_death_ends_both(train, tmp_path):
    """pytest -m slow tests/training/test_processes.py: a minute of one core."""
    group = train(2, tmp_path / "run", LONG)
    wait_for_rows(tmp_path / "run", 2, group)
    group.processes[1].send_signal(signal.SIGTERM)
    group.check()
    rows = read_metrics(tmp_path / "run")
    assert load_trained(tmp_path / "run")[1]["step"] == rows[-1]["step"] == len(rows)
    for i in range(2):
        assert f"stopped by SIGTERM after step {len(rows)}" in group.text(i)

    for victim in (1, 0):
        group = train(2, tmp_path / "run", LONG)
        wait_for_rows(tmp_path / "run", len(rows) + 2, group)
        group.processes[victim].kill()
        started = time.monotonic()
        statuses = group.wait(runtime.HEARTBEAT_SECONDS)
        assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] not in (0, 2), group.text(1 - victim)
        assert time.monotonic() - started < runtime.HEARTBEAT_SECONDS
        assert "has lost others" in group.text(1 - victim) or "another task died" in group.text(1 - victim)
        assert load_trained(tmp_path / "run")[1]["step"] == len(rows), "the last checkpoint is as it was"


# --- parts of it ---


def run_script(count: int, folder: Path, body: str, *arguments: str) -> Group:
    """`body` in each process, with `folder`, the process's number `index`, and runtime imported."""
    head = """
        import sys, os, time
        import jax, numpy as np
        from pathlib import Path
        from dmdr_jax.errors import UserError
        from dmdr_jax.training import runtime
        folder = Path(sys.argv[1])
    """
    program = textwrap.dedent(head) + textwrap.dedent(body)
    return Group(count, [sys.executable, "-c", program, str(folder), *arguments], folder)


SAVE_OR_RESTORE = """
    from dmdr_jax.training.checkpoints import Checkpoints
    from dmdr_jax.training.layout import Layout

    def tree(layout, step):
        values = np.random.default_rng(step).normal(size=(512, 256)).astype(np.float32)
        wanted = {"generator": {"w": values, "b": values[0, :3]}, "step": np.int32(step)}
        return wanted, layout.abstract_state(wanted)

    with runtime.joined():
        layout = Layout.make(2, 4)
        first = int(sys.argv[2])
        with Checkpoints(folder / "checkpoints") as checkpoints:
            for step in (first, first + 1):
                if step > 1:
                    wanted, abstract = tree(layout, step - 1)
                    restored = checkpoints.restore(abstract)
                    assert restored["generator"]["w"].sharding.spec == jax.sharding.PartitionSpec("fsdp")
                    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted)):
                        for shard in a.addressable_shards:
                            np.testing.assert_array_equal(shard.data, b[shard.index])
                values, abstract = tree(layout, step)
                checkpoints.save(step, jax.tree.map(lambda x, a: jax.make_array_from_callback(
                    x.shape, a.sharding, lambda i: x[i]), values, abstract))
                checkpoints.wait()
"""


def test_checkpoints_of_two_processes_restore_in_one_and_back(tmp_path):
    """Split over the devices of both, with other devices in the middle, bit for bit."""
    for count, first in ((2, 1), (1, 3), (2, 5)):
        run_script(count, tmp_path, SAVE_OR_RESTORE, str(first)).check()
    trees, meta = load_trained(tmp_path)
    assert meta["step"] == 6
    expected = np.random.default_rng(6).normal(size=(512, 256)).astype(np.float32)
    np.testing.assert_array_equal(trees["generator"]["w"], expected)


def test_a_process_that_cannot_join_says_so(tmp_path):
    body = "with runtime.joined('127.0.0.1:1', 2, 1, timeout=3): print('alone')"
    started = time.monotonic()
    group = run_script(1, tmp_path, body)
    (status,) = group.wait(120)
    assert status == 1 and "alone" not in group.text()
    sentence = "error: this process could not join the 2 processes of its run through 127.0.0.1:1 within 3 s"
    assert sentence in group.text() and "Terminating process" not in group.text()
    assert time.monotonic() - started < 60


def test_the_first_process_does_not_go_on_alone(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = run_script(1, tmp_path, f"with runtime.joined('127.0.0.1:{port}', 2, 0, timeout=3): print('alone')")
    (status,) = group.wait(120)
    assert status == 1 and "alone" not in group.text()
    assert "error: this process could not join the 2 processes of its run" in group.text()


def test_an_error_in_one_process_ends_both(tmp_path):
    """Process 1 waits for a collective that process 0 never takes part in."""
    body = """
        from jax.experimental import multihost_utils
        with runtime.joined(heartbeat=20):
            if jax.process_index() == 0:
                raise ValueError("a bug")
            multihost_utils.process_allgather(np.zeros(3))
    """
    group = run_script(2, tmp_path, body)
    statuses = group.wait(120)
    assert statuses[0] == 1 and statuses[1] not in (0, 2)
    assert "ValueError: a bug" in group.text(0) and "process 0 of 2 has failed" in group.text(0)
    assert "has lost others" in group.text(1) or "another task died" in group.text(1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_noticed_without_a_word(tmp_path, victim):
    """By a process that is busy with something else, as one that waits for its devices is."""
    body = f"""
        with runtime.joined(heartbeat=5):
            if jax.process_index() == {victim}:
                os.kill(os.getpid(), 9)
            time.sleep(300)
    """
    group = run_script(2, tmp_path, body)
    statuses = group.wait(150)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] not in (0, 2)
    assert "another task died" in group.text(1 - victim)


def test_bad_input_is_bad_input_in_all_processes(tmp_path):
    group = run_script(2, tmp_path, "with runtime.joined(): raise UserError('the batch is odd.')")
    assert group.wait(120) == [2, 2]
    assert all("error: the batch is odd.\n" in group.text(i) for i in range(2))


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])  # half a minute until 0 notices
def test_bad_input_of_one_is_bad_input_and_ends_the_other(tmp_path, victim):
    body = f"""
        with runtime.joined():
            if jax.process_index() == {victim}:
                raise UserError('there is no such file here.')
            runtime.sync("what never comes")
    """
    group = run_script(2, tmp_path, body)
    statuses = group.wait(60)
    assert statuses[victim] == 2 and "error: there is no such file here.\n" in group.text(victim)
    assert statuses[1 - victim] not in (0, 2)


def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    body = """
        from etils import epath
        with runtime.joined():
            mine = folder / f"host{jax.process_index()}"
            mine.mkdir()
            runtime.check_shared(epath.Path(folder))
            runtime.check_shared(epath.Path(mine))
    """
    group = run_script(2, tmp_path, body)
    assert group.wait(120) == [2, 2]
    assert "process 1 does not see what process 0 writes there" in group.text(0)
    assert not list(tmp_path.glob("**/.seen*"))


# --- where a process finds its place ---


@pytest.mark.parametrize(
    "given, environ, place",
    [
        ((None, None, None), {}, None),
        (("h:1", 2, 1), {}, Place("h:1", 2, 1)),
        ((None, 1, None), {}, None),
        ((None, None, None), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
         Place("h:1", 4, 0)),
        ((None, None, 3), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"},
         Place("h:1", 4, 3)),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, Place(None, 6, None)),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (("h:1", None, None), {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}, Place("h:1", 16, None)),
        ((None, None, None), {"SLURM_NTASKS": "16"}, None),  # an allocation in which nothing was started with srun
        ((None, None, None), {"OMPI_MCA_orte_hnp_uri": "u", "OMPI_COMM_WORLD_SIZE": "2"}, Place(None, 2, None)),
    ],
)  # fmt: skip
def test_place(given, environ, place):
    assert find_place(*given, environ) == place


@pytest.mark.parametrize(
    "given, environ, message",
    [
        ((None, 2, None), {}, "--coordinator and --process_id must be given too"),
        (("h:1", None, None), {}, "--processes and --process_id must be given too"),
        (("h", 2, 0), {}, "--coordinator=h has no port"),
        (("h:1", 2, 2), {}, "--process_id=2 is not one of 2 processes"),
        (("h:1", 0, 0), {}, "--processes must be at least 1"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a number, not 'two'"),
    ],
)
def test_half_a_place_is_refused(given, environ, message):
    with pytest.raises(UserError, match=message):
        find_place(*given, environ)


@pytest.fixture
def metadata_server():
    """What Google Cloud has on a TPU VM; yields its address and the attributes to fill in."""
    attributes: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(value.encode() if known else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", attributes
        server.shutdown()


@pytest.mark.parametrize(
    "hosts, slices, size", [("a,b,c,d", None, 4), ("a:0:10.0.0.1,b:1:10.0.0.2", "2", 4), ("a", None, 1)]
)
def test_tpu_vm(metadata_server, monkeypatch, hosts, slices, size):
    address, attributes = metadata_server
    monkeypatch.setattr(runtime, "has_tpu", lambda: True)
    environ = {"GCE_METADATA_IP": address}
    assert cluster_size(environ) == 1  # a TPU VM of another kind, which has no such server
    attributes["worker-network-endpoints"] = hosts
    attributes["tpu-env"] = "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n" if slices else "ZONE: 'z'\n"
    assert cluster_size(environ) == size
    assert cluster_size({**environ, "TPU_SKIP_MDS_QUERY": "1"}) == 1
    monkeypatch.setattr(runtime, "has_tpu", lambda: False)
    assert cluster_size(environ) == 1
