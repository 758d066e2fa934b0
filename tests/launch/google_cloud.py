"""As much of Google Cloud as the scripts in launch/tpu meet: what `gcloud` says, and what the workers' disks have.

The programs in programs/ stand in for the real ones: each asks the test's process, over a local socket, what to do. A
worker is a folder; `ssh` runs its line there with bash, so what runs on the workers runs for real.
"""

from __future__ import annotations

import re
import shutil
import socketserver
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Answer = tuple[int, str, str]
"""Exit status, what to do with the text (`out`, `err` or `ssh`), the text."""

# The flags of each command as in Google Cloud SDK 528.
_WIDE = "project zone quiet format"
_CREATE = "accelerator-type spot service-account network subnetwork internal-ips reserved labels tags"
_ALPHA = "tunnel-through-iap batch-size"
COMMANDS = {
    "compute tpus queued-resources create": f"{_CREATE} runtime-version node-id node-count node-prefix guaranteed",
    "compute tpus queued-resources describe": "",
    "compute tpus queued-resources delete": "async force",
    "compute tpus tpu-vm create": f"{_CREATE} version preemptible",
    "compute tpus tpu-vm describe": "",
    "compute tpus tpu-vm delete": "async",
    "compute tpus tpu-vm ssh": "worker internal-ip command",
    "compute tpus tpu-vm scp": "worker internal-ip recurse",
    "alpha compute tpus tpu-vm ssh": f"worker internal-ip command {_ALPHA}",
    "alpha compute tpus tpu-vm scp": f"worker internal-ip recurse {_ALPHA}",
    "compute tpus tpu-vm service-identity create": "",
    "compute tpus tpu-vm accelerator-types list": "",
    "compute tpus tpu-vm versions list": "",
    "compute tpus queued-resources list": "",
    "services enable": "",
    "projects describe": "",
    "storage buckets describe": "",
    "storage buckets create": "location uniform-bucket-level-access",
    "storage buckets add-iam-policy-binding": "member role",
    "storage rsync": "recursive exclude",
    "storage cp": "recursive",
    "storage ls": "",
}


class Refused(Exception):
    """gcloud ends with this message."""


def parse(words: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """Command, positional arguments and flags of a gcloud command line.

    Raises:
      Refused: gcloud has no such command or flag, or wants one that is not there.
    """
    line = " ".join(words)
    names = [name for name in COMMANDS if f"{line} ".startswith(f"{name} ")]
    if not names:
        raise Refused(f"Invalid choice: {line}")
    name = max(names, key=len)
    positional, flags = [], {}
    for word in words[len(name.split()) :]:
        flag, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif flag in f"{COMMANDS[name]} {_WIDE}".split():
            flags[flag] = value
        else:
            raise Refused(f"unrecognized arguments: {word}")
    if "compute tpus" in name and not (flags.get("zone") and flags.get("project")):
        raise Refused(f"{name} needs a zone and a project")
    return name, positional, flags


@dataclass
class GoogleCloud:
    """What is there, and how things go.

    Attributes:
      disk: holds nodes/NODE/worker-K, the workers' home directories, and bucket/, for gs://.
      workers: of each node.
      states: for every creation in turn (the last for all later ones) the states it goes through, one for each look.
      failing: words of a command -> the message with which gcloud fails when the command has them.
      runs: for every start of a worker's training in turn: finish, wait, preempt, or an exit status.
      calls: program -> the arguments of each call.
      trained: of each start of training: home directory, current directory, $TOKEN, arguments.
    """

    disk: Path
    workers: int = 1
    states: Sequence[Sequence[str]] = (("WAITING_FOR_RESOURCES", "ACTIVE"),)
    failing: dict[str, str] = field(default_factory=dict)
    runs: Sequence[str] = ("finish",)
    calls: dict[str, list[list[str]]] = field(default_factory=lambda: defaultdict(list))
    trained: list[list[str]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._created = 0
        self._resources: dict[tuple[str, str], list[str]] = {}  # (group, name) -> states still to go through
        self._nodes_of: dict[str, list[str]] = {}
        self._preempt = False

    def set_state(self, group: str, name: str, *states: str) -> None:
        """From now on a queued resource (group `queued-resources`) or node (`tpu-vm`) is so."""
        self._resources[group, name] = list(states)

    def up(self, name: str, slices: int) -> list[str]:
        """Makes an active queued resource; returns its nodes."""
        self._resources["queued-resources", name] = ["ACTIVE"]
        self._nodes_of[name] = [name] if slices == 1 else [f"{name}-{index}" for index in range(slices)]
        self._make_nodes(name)
        return self._nodes_of[name]

    def answer(self, program: str, words: list[str]) -> Answer:
        """What a program does."""
        with self._lock:
            self.calls[program].append(words)
            if program == "gcloud":
                return self._gcloud(words)
            if program == "uv":
                return self._uv(words)
        if program == "train":
            return self._train(words)
        return 127, "err", f"{program} should not be called"

    def _gcloud(self, words: list[str]) -> Answer:
        try:
            name, positional, flags = parse(words)
            for part, message in self.failing.items():
                if part in " ".join(words):
                    raise Refused(message)
            group, verb = name.split()[-2:]
            if group in ("storage", "buckets"):
                self._storage(verb, positional, flags)
            elif group in ("queued-resources", "tpu-vm"):
                return self._tpu(group, verb, positional, flags)
            return 0, "out", "123456" if name == "projects describe" else ""
        except Refused as error:
            return 1, "err", f"ERROR: (gcloud) {error}"

    def _tpu(self, group: str, verb: str, positional: list[str], flags: dict[str, str]) -> Answer:
        name = positional[0]
        if verb == "ssh":
            return 0, "ssh", "".join(f"{home}\n" for home in self._homes(name, flags["worker"]))
        if verb == "scp":
            node, _, path = positional[1].partition(":")
            for home in self._homes(node, flags["worker"]):
                shutil.copy(name, home / path)
        elif verb == "create":
            self._create(group, name, flags)
        elif verb == "describe":
            state = self._look(group, name)
            return 0, "out", "the reason" if "failedData" in flags["format"] else state
        elif verb == "delete":
            self._find(group, name)
            if group == "queued-resources" and "force" not in flags and self._nodes(name):
                raise Refused("FAILED_PRECONDITION: the queued resource has nodes")
            self._remove_nodes(name)
            del self._resources[group, name]
        return 0, "out", ""

    def _find(self, group: str, name: str) -> list[str]:
        if (group, name) not in self._resources:
            raise Refused(f"NOT_FOUND: Resource 'projects/p/locations/z/{group}/{name}' was not found")
        return self._resources[group, name]

    def _create(self, group: str, name: str, flags: dict[str, str]) -> None:
        if (group, name) in self._resources:
            raise Refused(f"ALREADY_EXISTS: {name}")
        states = list(self.states[min(self._created, len(self.states) - 1)])
        self._created += 1
        self._resources[group, name] = states
        if "node-count" in flags:
            names = [f"{flags['node-prefix']}-{index}" for index in range(int(flags["node-count"]))]
        else:
            names = [flags.get("node-id", name)]
        self._nodes_of[name] = names
        if group == "tpu-vm":
            self._make_nodes(name)
            self._resources[group, name] = states

    def _look(self, group: str, name: str) -> str:
        states = self._find(group, name)
        if group == "queued-resources" and states[0] == "ACTIVE":
            if self._preempt:
                self._preempt = False
                self._remove_nodes(name)
                states[:] = ["SUSPENDING", "SUSPENDED"]
            elif not self._nodes(name):
                self._make_nodes(name)
        return states.pop(0) if len(states) > 1 else states[0]

    def _nodes(self, name: str) -> list[str]:
        return [node for node in self._nodes_of[name] if ("tpu-vm", node) in self._resources]

    def _make_nodes(self, name: str) -> None:
        for node in self._nodes_of[name]:
            self._resources["tpu-vm", node] = ["READY"]
            for worker in range(self.workers):
                (self.disk / "nodes" / node / f"worker-{worker}").mkdir(parents=True)

    def _remove_nodes(self, name: str) -> None:
        """Their folders are taken away at once: what still runs there may write until it ends."""
        for node in self._nodes(name):
            gone = Path(tempfile.mkdtemp(dir=self.disk))
            (self.disk / "nodes" / node).rename(gone / node)
            shutil.rmtree(gone, ignore_errors=True)
            if node != name or ("queued-resources", name) in self._resources:
                del self._resources["tpu-vm", node]

    def _homes(self, node: str, worker: str) -> list[Path]:
        self._find("tpu-vm", node)
        return [self.disk / "nodes" / node / f"worker-{k}" for k in range(self.workers) if worker in ("all", str(k))]

    def _storage(self, verb: str, positional: list[str], flags: dict[str, str]) -> None:
        source = self.disk / "bucket" / positional[0].removeprefix("gs://").rstrip("/")
        if verb in ("ls", "describe") and not source.is_dir():
            raise Refused("HTTPError 404: not found")
        if verb == "create":
            source.mkdir(parents=True)
        elif verb == "cp":
            shutil.copy(source, positional[1])
        elif verb == "rsync":
            exclude = re.compile(flags.get("exclude", "(?!)"))
            for file in filter(Path.is_file, source.rglob("*")):
                path = file.relative_to(source)
                if not exclude.match(str(path)):
                    (Path(positional[1]) / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, Path(positional[1]) / path)

    def _uv(self, words: list[str]) -> Answer:
        if words[0] == "venv":
            python = Path(words[-1]) / "bin/python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text('#!/bin/sh\nexec train-python "$@"\n')
            python.chmod(0o755)
        return 0, "out", ""

    def _train(self, words: list[str]) -> Answer:
        """Answers when the run is to end."""
        with self._lock:
            past = [run for run in self.trained if run[0] == words[0]]
            act = self.runs[min(len(past), len(self.runs) - 1)]
            self.trained.append(words)
            # When all workers of all nodes are at it.
            nodes = sum(group == "tpu-vm" for group, _ in self._resources)
            self._preempt |= act == "preempt" and len(self.trained) == self.workers * nodes
        if act not in ("wait", "preempt"):
            return 0 if act == "finish" else int(act), "out", ""
        while not self.released.wait(0.02):
            if not Path(words[0]).exists():
                return 1, "out", ""
        return 0, "out", ""


class Server(socketserver.ThreadingTCPServer):
    """Answers programs/ask: the number of words, then the program and its words, each ended by a zero byte."""

    daemon_threads = True

    def __init__(self, cloud: GoogleCloud):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cloud = cloud


class _Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        count = int(self.rfile.readline())
        data = b""
        while data.count(b"\0") < count:
            data += self.rfile.read1()
        program, *words = data.decode().split("\0")[:-1]
        status, use, text = self.server.cloud.answer(program, words)
        self.wfile.write(f"{status} {use}\n{text}".encode())
