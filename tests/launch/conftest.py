"""A copy of launch/ in a repository with an awkward name, and a Google Cloud for it to work with."""

import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.google_cloud import GoogleCloud, Server

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"

VARIABLES = {
    "TPU_PROJECT": "my-project",
    "TPU_ZONE": "us-west4-a",
    "TPU_NAME": "pod",
    "TPU_TYPE": "v5litepod-16",
    "TPU_RUNTIME": "v2-alpha-tpuv5-lite",
    "RUN_BUCKET": "gs://my-bucket",
    "RUN_ARGUMENTS": ["--config=configs/a.py", "--workdir=gs://my-bucket/runs/first"],
    "POLL_SECONDS": "0.05",
    "PATIENCE": "3",
}


class Desk:
    """Where the scripts are called.

    Attributes:
      google: the cloud they work with.
      repository: has launch/ and a few files to copy.
      variables: what the variables file says.
    """

    def __init__(self, google: GoogleCloud, repository: Path, port: int):
        self.google, self.repository, self.port = google, repository, port
        self.variables = dict(VARIABLES)

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        """bash launch/tpu/SCRIPT with the variables as they are now."""
        file = self.repository / "my variables.sh"
        values = {k: f"({shlex.join(v)})" if isinstance(v, list) else shlex.quote(v) for k, v in self.variables.items()}
        file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        environment = {
            # The stand-ins come first, and the rest is what it is, so that a stray call would be noticed.
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "HOME": str(self.google.disk),
            "TMPDIR": str(self.google.disk),
            "CLOUD_PORT": str(self.port),
        }
        command = ["bash", f"launch/tpu/{script}", f"--variables={file}", *arguments]
        return subprocess.run(
            command, cwd=self.repository, env=environment, capture_output=True, text=True, timeout=120
        )

    def good(self, script: str, *arguments: str) -> str:
        """Output of a script that must succeed."""
        result = self.run(script, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def up(self, slices: int = 1) -> None:
        """The TPU is there, as create.sh, copy.sh and install.sh leave it."""
        self.variables["TPU_SLICES"] = str(slices)
        for node in self.google.up("pod", slices):
            for worker in range(self.google.workers):
                code = self.home(node, worker) / "dmdr/code"
                shutil.copytree(self.repository / "launch", code / "launch")
                (code.parent / "runs").mkdir()
                (code / "runs").symlink_to("../runs")
                self.google.answer("uv", ["venv", str(code.parent / "venv")])

    def calls(self, *words: str, program: str = "gcloud") -> list[list[str]]:
        """The calls so far that have these words."""
        return [call for call in self.google.calls[program] if all(word in call for word in words)]

    def starts(self) -> list[list[str]]:
        """What every start of training was given."""
        return [words[3:] for words in self.google.trained]

    def home(self, node: str = "pod", worker: int = 0) -> Path:
        """A worker's home directory."""
        return self.google.disk / "nodes" / node / f"worker-{worker}"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    repository = tmp_path / "it's a repository"
    shutil.copytree(ROOT / "launch", repository / "launch")
    (repository / "requirements.txt").write_text("jax\n")
    (repository / "a file's name.txt").write_text("text\n")
    (tmp_path / "disk").mkdir()
    google = GoogleCloud(tmp_path / "disk")
    with Server(google) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Desk(google, repository, server.server_address[1])
        google.released.set()  # what still waits on a worker comes to its end
        server.shutdown()
        thread.join()
