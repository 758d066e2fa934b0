"""The TPU's life and the run's, script by script, with programs that stand in for Google's (programs/)."""

import os
import subprocess
import time

import pytest

AWKWARD = [
    "--config=configs/a file.py",
    "--workdir=gs://my-bucket/runs/it's first",
    '--config.prompts=a "red" circle; $HOME `x` * & two  spaces\n',
    "--config.empty=",
]


def until(condition, seconds=60.0):
    """Waits for what happens on a worker."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def states(desk, *arguments) -> list[str]:
    """The workers' lines in status.sh, without the host."""
    lines = desk.good("status.sh", *arguments).splitlines()
    return [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("==")]


# --- creating and deleting ---


def test_create_waits_and_is_idempotent(desk):
    desk.google.states = [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]
    assert "pod is READY" in desk.good("create.sh")
    assert "pod is there" in desk.good("create.sh")
    (create,) = desk.calls("create")
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "pod"]
    assert set(create[5:]) == {
        "--project=my-project",
        "--zone=us-west4-a",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pod",
    }


def test_create_on_demand(desk):
    desk.variables.update(TPU_QUEUED="no", TPU_SPOT="yes", TPU_CREATE_FLAGS=["--labels=a=b c"])
    desk.google.states = [["READY"]]
    desk.good("create.sh")
    (create,) = desk.calls("create")
    assert create[2:5] == ["tpu-vm", "create", "pod"]
    assert {"--version=v2-alpha-tpuv5-lite", "--spot", "--labels=a=b c"} <= set(create)


def test_create_goes_on_waiting_for_a_request_that_is_there(desk):
    desk.google.states = [["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE"]]
    create = ["compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--project=p", "--zone=z"]
    desk.google.answer("gcloud", create)
    assert "pod is on its way" in desk.good("create.sh")
    assert desk.calls("create") == [create]


def test_create_makes_nothing_on_a_guess(desk):
    desk.google.failing = {"value(state.state)": "UNAVAILABLE"}
    assert desk.run("create.sh").returncode == 1
    assert not desk.calls("create")


@pytest.mark.parametrize("ended", ["SUSPENDED", "FAILED"])
def test_create_makes_anew_what_has_ended(desk, ended):
    desk.google.states = [["ACTIVE", ended], ["WAITING_FOR_RESOURCES", "ACTIVE"]]
    desk.good("create.sh")
    desk.good("create.sh")
    (delete,) = desk.calls("delete")
    assert "--force" in delete and "--quiet" in delete
    assert len(desk.calls("create")) == 2


def test_create_waits_for_the_deletion_under_way(desk):
    desk.google.states = [["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED"], ["ACTIVE"]]
    desk.good("create.sh")
    desk.good("create.sh")
    assert len(desk.calls("create")) == 2


def test_create_says_why_a_request_failed(desk):
    desk.google.states = [["WAITING_FOR_RESOURCES", "FAILED"]]
    result = desk.run("create.sh")
    assert result.returncode == 1 and "the request for pod failed: the reason" in result.stderr


def test_create_ends_when_the_tpu_never_shows(desk):
    desk.google.failing = {"describe": "NOT_FOUND: Resource was not found"}
    result = desk.run("create.sh")
    assert result.returncode == 1 and "pod is ABSENT after 3 looks" in result.stderr


def test_a_preempted_node_shows_before_the_queued_resource_does(desk):
    desk.up(slices=2)
    desk.google.set_state("tpu-vm", "pod-1", "PREEMPTED")
    assert "TPU pod: GONE" in desk.good("status.sh")


def test_delete_twice(desk):
    desk.good("create.sh")
    assert "pod is deleted" in desk.good("delete.sh")
    assert "there is no TPU pod" in desk.good("delete.sh")
    assert len(desk.calls("delete")) == 1 and not (desk.google.disk / "nodes/pod").exists()


@pytest.mark.parametrize("message", ["NOT_FOUND: Project 'typo' was not found", "Zone us-nowhere1-a not found"])
def test_a_misspelt_project_is_not_an_absent_tpu(desk, message):
    desk.good("create.sh")
    desk.google.failing = {"describe": message}
    result = desk.run("delete.sh")
    assert result.returncode == 1 and message in result.stderr and not desk.calls("delete")


def test_delete_keeps_a_run_that_lies_on_the_tpu_alone(desk):
    desk.variables["RUN_ARGUMENTS"] = ["--config=a.py", "--workdir", "runs/x"]
    desk.good("create.sh")
    result = desk.run("delete.sh")
    assert result.returncode == 1 and "runs/x lies on the TPU's disk" in result.stderr and not desk.calls("delete")
    desk.good("delete.sh", "--yes")


def test_setup_makes_the_bucket_once(desk):
    desk.variables["RUN_BUCKET"] = "gs://my-bucket/some/folder"
    desk.good("setup.sh")
    desk.good("setup.sh")
    (create,) = desk.calls("buckets", "create")
    assert "gs://my-bucket" in create and "--location=us-west4" in create
    assert "--member=serviceAccount:123456-compute@developer.gserviceaccount.com" in desk.calls("buckets")[-1]
    desk.variables["TPU_CREATE_FLAGS"] = ["--service-account=me@x"]
    desk.good("setup.sh")
    assert "--member=serviceAccount:me@x" in desk.calls("buckets")[-1]


# --- code and packages ---


@pytest.mark.parametrize("git", [True, False])
def test_copy_brings_every_worker_up_to_date(desk, git):
    if git:
        subprocess.run(["git", "init", "--quiet"], cwd=desk.repository, check=True)
        (desk.repository / ".gitignore").write_text("*.pyc\n")
    (desk.repository / "module.pyc").write_text("") if git else None
    desk.variables["TPU_SLICES"] = "2"
    desk.google.workers = 2
    desk.good("create.sh")
    desk.good("copy.sh")
    homes = [desk.home(f"pod-{node}", worker) for node in range(2) for worker in range(2)]
    for home in homes:
        assert (home / "dmdr/code/a file's name.txt").read_text() == "text\n"
        assert not (home / "dmdr/code/module.pyc").exists()
        (home / "dmdr/code/runs/kept").write_text("")
        (home / "dmdr/code/notes").write_text("not ours")
    (desk.repository / "a file's name.txt").unlink()
    (desk.repository / "requirements.txt").write_text("jax\nflax\n")
    desk.good("copy.sh")
    for home in homes:
        code = home / "dmdr/code"
        assert not (code / "a file's name.txt").exists() and (code / "notes").exists() and (code / "runs/kept").exists()
        assert (code / "requirements.txt").read_text() == "jax\nflax\n"
        assert not list(home.glob("*.tgz"))
    assert not list(desk.google.disk.glob("dmdr-code*"))  # nor here


def test_install_once_for_the_same_requirements(desk):
    (desk.google.disk / "bucket/my-bucket/model/unet").mkdir(parents=True)
    (desk.google.disk / "bucket/my-bucket/model/unet/config.json").write_text("{}")
    (desk.google.disk / "bucket/my-bucket/prompts.txt").write_text("a circle\n")
    desk.variables["RUN_DATA"] = ["gs://my-bucket/model/", "gs://my-bucket/prompts.txt"]
    for script in ("create.sh", "copy.sh", "install.sh"):
        desk.good(script)
    installs = desk.calls("pip", program="uv")
    assert len(installs) == 1
    assert [word for word in installs[0] if word.endswith("requirements.txt")] == [
        f"{desk.home()}/dmdr/code/requirements.txt",
        f"{desk.home()}/dmdr/code/launch/tpu/requirements.txt",
    ]
    data = desk.home() / "dmdr/code/data"
    assert (data / "model/unet/config.json").exists() and (data / "prompts.txt").read_text() == "a circle\n"
    desk.good("install.sh")
    assert len(desk.calls("pip", program="uv")) == 1
    (desk.repository / "requirements.txt").write_text("jax\nflax\n")
    desk.good("copy.sh")
    desk.good("install.sh")
    assert len(desk.calls("pip", program="uv")) == 2
    assert len(desk.calls("venv", program="uv")) == 1


# --- running ---


def test_run_hands_the_arguments_on_as_they_are(desk):
    desk.variables["RUN_ARGUMENTS"] = AWKWARD
    desk.google.runs, desk.google.workers = ["wait"], 2
    desk.up(slices=2)
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 4)
    assert desk.starts() == [["-m", "dmdr_jax.train", *AWKWARD]] * 4
    assert all(folder == f"{home}/dmdr/code" for home, folder, *_ in desk.google.trained)
    assert states(desk) == ["running -"] * 4
    desk.google.released.set()
    until(lambda: states(desk) == ["finished 0"] * 4)


def test_run_twice_is_once_and_another_run_is_refused(desk):
    desk.google.runs = ["wait"]
    desk.up()
    desk.good("run.sh")
    assert "already running" in desk.good("run.sh")
    result = desk.run("run.sh", "--", "--config=b.py", "--workdir=gs://b/x")
    assert result.returncode == 1 and "another run is under way: --config=configs/a.py" in result.stderr
    assert states(desk, "--", "--config=b.py", "--workdir=gs://b/x") == ["busy -"]
    assert len(desk.starts()) <= 1


def test_run_outlives_the_connection_and_stop_lets_it_save(desk):
    desk.google.runs = ["wait"]
    desk.up()
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 1)
    pid = int((desk.home() / "dmdr/train.pid").read_text())
    assert os.getsid(pid) == pid != os.getsid(0)  # a session of its own
    desk.good("stop.sh")
    assert states(desk) == ["stopped 0"]
    log = (desk.home() / "dmdr/train.log").read_text()
    assert "training\nsaved\n" in log
    desk.good("stop.sh")  # nothing is running
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 2)
    assert desk.starts()[0] == desk.starts()[1]


def test_stop_ends_a_run_that_does_not_end(desk):
    desk.up()
    python = desk.home() / "dmdr/venv/bin/python"
    python.write_text(f"#!/bin/bash\ntrap '' TERM\ntouch '{desk.google.disk}/deaf'\nsleep 20 & wait\nsleep 20\n")
    desk.good("run.sh")
    until((desk.google.disk / "deaf").exists)
    assert "is ended" in desk.good("stop.sh", "--seconds=0.1")
    assert states(desk) == ["stopped 137"]


def test_states_of_a_run(desk):
    desk.google.runs = ["3", "wait"]
    desk.up()
    assert states(desk) == ["none -"]
    desk.good("run.sh")
    until(lambda: states(desk) == ["failed 3"])
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 2)
    os.kill(int((desk.home() / "dmdr/train.pid").read_text()), 15)  # as at the machine's shut-down
    until(lambda: states(desk) == ["killed 0"])
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 3)
    os.killpg(int((desk.home() / "dmdr/train.pid").read_text()), 9)  # as when it loses power
    until(lambda: states(desk) == ["killed -"])


def test_a_signal_does_not_hide_how_training_ended(desk):
    desk.up()
    home = desk.home() / "dmdr"
    python = home / "venv/bin/python"
    python.write_text(f"#!/bin/bash\ntrap 'exit 3' TERM\ntouch '{home}/up'\nwhile :; do :; done\n")
    for _ in range(50):  # the ending falls now before, now after the supervisor's next look
        supervisor = subprocess.Popen(["bash", home / "code/launch/tpu/worker.sh", "supervise", ""])
        until((home / "up").exists)
        supervisor.terminate()
        assert supervisor.wait(60) == 0
        assert (home / "train.ending").read_text() == "killed 3\n"
        (home / "up").unlink()


def test_the_environment_file_reaches_the_run_and_no_command_line(desk):
    secrets = desk.google.disk / "my secrets.env"
    secrets.write_text("# for the hub\nTOKEN=hf_'$a b\n")
    desk.variables["RUN_ENV_FILE"] = str(secrets)
    desk.up()
    desk.good("copy.sh")
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 1)
    assert {token for _, _, token, *_ in desk.google.trained} == {"hf_'$a b"}
    assert "hf_" not in str(desk.google.calls["gcloud"])
    assert (desk.home() / "dmdr-run.env").stat().st_mode & 0o777 == 0o600


def test_run_wants_a_tpu_and_an_environment(desk):
    assert "the TPU pod is ABSENT, not READY" in desk.run("run.sh").stderr
    desk.up()
    (desk.home() / "dmdr/venv/bin/python").unlink()
    result = desk.run("run.sh")
    assert result.returncode == 1 and "run install.sh first" in result.stderr


def test_one_slice_out_of_reach_fails_the_start(desk):
    desk.up(slices=2)
    desk.google.failing = {"ssh pod-1": "connection refused"}
    assert desk.run("run.sh").returncode == 1
    assert desk.run("status.sh").returncode == 1


def test_connection_flags_go_to_the_track_that_has_them(desk):
    desk.variables["TPU_SSH_FLAGS"] = ["--tunnel-through-iap"]
    desk.up()
    desk.good("copy.sh")
    assert desk.calls("ssh") and all(c[0] == "alpha" for c in desk.calls("ssh") + desk.calls("scp"))


# --- looking and fetching ---


def test_logs(desk):
    desk.up(slices=2)
    assert "nothing has run yet" in desk.run("logs.sh", "--once").stderr
    desk.good("run.sh")
    until(lambda: states(desk) == ["finished 0"] * 2)
    assert "training" in desk.good("logs.sh", "--once", "--slice=1", "--worker=all")
    assert desk.calls("ssh", "pod-1")[-1][-1].endswith("log 100")
    assert "there is no slice 2" in desk.run("logs.sh", "--slice=2").stderr
    assert desk.good("logs.sh", "--dry-run").rstrip().endswith("log 100 follow'")


def test_fetch_from_the_bucket_needs_no_tpu(desk):
    source = desk.google.disk / "bucket/my-bucket/runs/first"
    for name in ("metrics.jsonl", "samples/a b.png", "checkpoints/250/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    desk.good("fetch.sh")
    assert (desk.repository / "runs/first/samples/a b.png").exists()
    assert not (desk.repository / "runs/first/checkpoints").exists()
    desk.good("fetch.sh", "--checkpoints", f"--to={desk.google.disk}/other place")
    assert (desk.google.disk / "other place/checkpoints/250/x").exists()


def test_fetch_from_the_tpu(desk):
    desk.variables["RUN_ARGUMENTS"] = ["--config=a.py", "--workdir=runs/it's one"]
    desk.up()
    source = desk.home() / "dmdr/runs/it's one"
    for name in ("metrics.jsonl", "samples/a.png", "checkpoints/250/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    desk.good("fetch.sh")
    got = desk.repository / "runs/it's one"
    assert (got / "samples/a.png").read_text() == "samples/a.png" and not (got / "checkpoints").exists()
    desk.good("fetch.sh", "--checkpoints")
    assert (got / "checkpoints/250/x").exists()
