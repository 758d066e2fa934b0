"""watch.sh: a run comes to its end whatever happens to the TPU under it."""

import os
import subprocess
import threading

from tests.launch.test_tpu import until


def in_background(desk, *arguments):
    """watch.sh in a thread; the function that is returned waits for its result."""
    results: list[subprocess.CompletedProcess] = []
    thread = threading.Thread(target=lambda: results.append(desk.run("watch.sh", *arguments)))
    thread.start()

    def result():
        thread.join(120)
        return results[0]

    return result


def test_from_nothing_to_the_end_and_away(desk):
    output = desk.good("watch.sh", "--delete-when-done")
    assert "the run has finished: gs://my-bucket/runs/first" in output
    assert len(desk.calls("create")) == len(desk.calls("delete")) == 1 and len(desk.starts()) == 1


def test_preemption_makes_the_tpu_anew_and_runs_the_same_command(desk):
    desk.variables.update(TPU_SPOT="yes", TPU_SLICES="2")
    arguments = ["--config=configs/a file.py", "--workdir=gs://my-bucket/runs/it's", "--config.prompts=$x *"]
    desk.google.runs, desk.google.workers = ["preempt", "finish"], 2
    output = desk.good("watch.sh", "--", *arguments)
    assert "TPU pod: GONE" in output or "TPU pod: LEAVING" in output
    first, second = desk.calls("queued-resources", "create")
    assert first == second and "--spot" in first and "--node-count=2" in first
    assert len(desk.calls("delete")) == 1
    assert desk.starts() == [["-m", "dmdr_jax.train", *arguments]] * 8  # 2 slices of 2 workers, twice


def test_it_can_be_started_again_and_leaves_a_run_alone(desk):
    desk.google.runs = ["wait"]
    desk.up()
    desk.good("run.sh")
    until(lambda: len(desk.starts()) == 1)
    result = in_background(desk)
    before = len(desk.calls())
    until(lambda: len(desk.calls()) > before + 6)
    desk.google.released.set()
    assert result().returncode == 0 and len(desk.starts()) == 1
    assert "finished" in desk.good("watch.sh")  # nothing left to do


def test_a_worker_that_restarts_has_all_start_anew(desk):
    desk.google.runs, desk.google.workers = ["wait"], 2
    result = in_background(desk)
    until(lambda: len(desk.starts()) == 2)
    os.killpg(int((desk.home(worker=1) / "dmdr/train.pid").read_text()), 9)
    until(lambda: len(desk.starts()) == 4)
    desk.google.released.set()
    assert result().returncode == 0
    assert "saved" in (desk.home(worker=0) / "dmdr/train.log").read_text()  # the other was asked to end


def test_it_ends_when_somebody_stops_the_run(desk):
    desk.google.runs = ["wait"]
    result = in_background(desk)
    until(lambda: len(desk.starts()) == 1)
    desk.good("stop.sh")
    assert result().returncode == 0 and "the run was stopped" in result().stdout
    assert len(desk.starts()) == 1
    desk.google.released.set()
    desk.good("watch.sh")  # goes on with it
    assert len(desk.starts()) == 2


def test_bad_arguments_are_not_tried_again(desk):
    desk.google.runs = ["2"]
    result = desk.run("watch.sh")
    assert result.returncode == 1 and "the run was refused" in result.stderr and "training" in result.stdout
    assert len(desk.starts()) == 1


def test_a_run_that_fails_is_started_again_so_many_times(desk):
    desk.variables["RUN_RESTARTS"] = "1"
    desk.google.runs = ["1"]
    result = desk.run("watch.sh")
    assert result.returncode == 1 and "the run failed 2 times in a row" in result.stderr
    assert len(desk.starts()) == 2


def test_a_failure_that_passes(desk):
    desk.google.runs = ["1", "finish"]
    assert "starting it again, 1 of 3 times" in desk.good("watch.sh")


def test_google_cloud_is_given_some_patience(desk):
    desk.google.failing = {"describe": "UNAVAILABLE"}
    result = desk.run("watch.sh")
    assert result.returncode == 1 and "gcloud does not answer, 3 times in a row" in result.stderr


def test_a_request_that_fails_is_made_again(desk):
    desk.google.states = [["WAITING_FOR_RESOURCES", "FAILED"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]
    desk.good("watch.sh")
    assert len(desk.calls("create")) == 2 and len(desk.calls("delete")) == 1


def test_another_run_is_left_alone(desk):
    desk.google.runs = ["wait"]
    desk.up()
    desk.good("run.sh", "--", "--config=b.py", "--workdir=gs://b/x")
    result = desk.run("watch.sh")
    assert result.returncode == 1 and "another run is under way on pod" in result.stderr


def test_its_own_stop_is_not_somebodys(desk):
    """A worker out of reach for a moment, between the stop of what is left of a run and the next start."""
    desk.google.runs = ["wait"]
    result = in_background(desk)
    until(lambda: len(desk.starts()) == 1)
    desk.google.failing = {"scp": "connection refused"}
    os.killpg(int((desk.home() / "dmdr/train.pid").read_text()), 9)
    copies = len(desk.calls("scp"))
    until(lambda: len(desk.calls("scp")) > copies)
    desk.google.failing = {}
    until(lambda: len(desk.starts()) == 2)
    desk.google.released.set()
    assert result().returncode == 0 and "the run has finished" in result().stdout


def test_what_a_preemption_begins_with_is_no_failure_of_the_run(desk):
    desk.google.runs, desk.variables["RUN_RESTARTS"] = ["wait"], "0"
    result = in_background(desk)
    until(lambda: len(desk.starts()) == 1)
    os.kill(int((desk.home() / "dmdr/train.pid").read_text()), 15)
    until(lambda: len(desk.starts()) == 2)
    desk.google.released.set()
    assert result().returncode == 0


def test_a_run_that_would_go_with_the_tpu_is_refused(desk):
    desk.variables["RUN_ARGUMENTS"] = ["--config=a.py", "--workdir=runs/x"]
    result = desk.run("watch.sh", "--delete-when-done")
    assert result.returncode == 1 and "which --delete-when-done deletes" in result.stderr and not desk.calls("create")
