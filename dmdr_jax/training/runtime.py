"""The processes of a run: how they join, stop together, and end when one of them is lost.

On several hosts one process runs on each, all with the same command. `joined` surrounds the run: where the command line
or the environment says that there are several processes it joins them, and a process that cannot join ends; it never
goes on alone. What it yields says at which step to stop: at SIGTERM, which is how a spot machine is taken away, all
processes stop at the same step, as the one that was told tells the others (`multihost_utils`).

A process that fails leaves at once, without waiting for the others. They learn of it from a broken connection or, where
they wait for the devices, from missing heartbeats; jax then ends them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dmdr_jax.accelerators import has_tpu
from dmdr_jax.errors import UserError, causes
from dmdr_jax.workdir import COMPILED

JOIN_SECONDS = 300
"""How long a process waits for the others when it starts."""
HEARTBEAT_SECONDS = 100
"""How long a process may give no sign of life until the others take it for dead."""
LEAVE_SECONDS = 30
"""How long a process that ends waits for the others to end as well."""
MOMENT_SECONDS = 5.0
"""And one with an error that may be its own alone."""

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit statuses, as `dmdr_jax.cli` has them

# What jax says when the other end of a connection is gone, in lower case.
_GONE = ("connection", "socket", "heartbeat", "unavailable", "deadline_exceeded", "barrier", "peer", "coordination")


class OthersLost(Exception):
    """Other processes of the run did not come, or are gone: one sentence. Nothing was wrong with what was asked for."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of its run; what is None the cluster's environment tells jax.

    Attributes:
      coordinator: address and port of process 0.
      processes: how many there are.
      process_id: which of them this is.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


# --- joining -------------------------------------------------------------------------------------------------------


def find_place(
    coordinator: str | None, processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> Place | None:
    """This process's place by the command line, else the environment; None where it is alone.

    Raises:
      UserError: what is given is no place, or not all of it is given where no cluster tells the rest.
    """
    coordinator = coordinator or environ.get(ADDRESS) or None
    processes = _number(COUNT, environ) if processes is None else processes
    process_id = _number(INDEX, environ) if process_id is None else process_id
    place = Place(coordinator, processes, process_id)
    _check(place)
    if processes == 1:
        return None
    absent = [f"--{name}" for name, value in dataclasses.asdict(place).items() if value is None]
    in_cluster = cluster_size(environ) if absent else 1
    if not absent or in_cluster > 1:
        return dataclasses.replace(place, processes=processes or in_cluster)
    if len(absent) == len(dataclasses.fields(place)):
        return None
    raise UserError(
        f"{' and '.join(absent)} must be given too (or {ADDRESS}, {COUNT}, {INDEX}): nothing else tells this process"
        " its place among those of the run."
    )


def _check(place: Place) -> None:
    if place.processes is not None and place.processes < 1:
        raise UserError(f"--processes must be at least 1, not {place.processes}.")
    if place.processes is not None and place.process_id is not None and place.process_id >= place.processes:
        raise UserError(f"--process_id={place.process_id} is not one of {place.processes} processes, counted from 0.")
    if place.coordinator is not None and not place.coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={place.coordinator} has no port; give HOST:PORT of process 0.")


def _number(name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name, "")
    if text and not text.isdigit():
        raise UserError(f"the environment variable {name} must be a number, not {text!r}.")
    return int(text) if text else None


def cluster_size(environ: Mapping[str, str]) -> int:
    """How many processes the cluster that jax would find has: Slurm, Open MPI, Cloud TPU; 1 where there is none."""
    if "SLURM_STEP_NODELIST" in environ:
        return _number("SLURM_NTASKS", environ) or 1
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return _number("OMPI_COMM_WORLD_SIZE", environ) or 1
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = environ.get("MEGASCALE_NUM_SLICES")
    if not hosts and has_tpu() and "TPU_SKIP_MDS_QUERY" not in environ:
        hosts, slices = tpu_metadata("worker-network-endpoints", environ), slices or _slices(environ)
    return len(hosts.split(",")) * int(slices or 1) if hosts else 1


def tpu_metadata(key: str, environ: Mapping[str, str]) -> str | None:
    """An attribute of this TPU VM, from the server that Google Cloud has for it; None where it does not answer."""
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return None


def _slices(environ: Mapping[str, str]) -> str | None:
    """Of the metadata's lines ``NAME: 'VALUE'`` the one that counts the slices."""
    lines = (tpu_metadata("tpu-env", environ) or "").splitlines()
    values = {name.strip(): value.strip().strip("'") for name, _, value in (line.partition(":") for line in lines)}
    return values.get("MEGASCALE_NUM_SLICES") or None


def join(place: Place | None, timeout: int = JOIN_SECONDS, heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Starts jax's distributed runtime; returns when all processes are there.

    Args:
      timeout: seconds to wait for the others.
      heartbeat: seconds without a sign of life after which a process counts as dead.

    Raises:
      OthersLost: they did not come in time, or others came than were expected.
    """
    if place is not None:
        _initialize(place, timeout, heartbeat)
    expected, found = 1 if place is None else place.processes, jax.process_count()
    if found != expected:
        raise OthersLost(
            f"the devices are those of {found} processes, and {expected} were expected; start one on every host, with"
            f" {ADDRESS}, {COUNT} and {INDEX} where they do not find each other by themselves."
        )


def _initialize(place: Place, timeout: int, heartbeat: int) -> None:
    where = f" through {place.coordinator}" if place.coordinator else ""
    failed = f"this process could not join the {place.processes} processes of its run{where}"
    mend = "start all of them, each with the same command and its own number"
    # jax would abort the process in the end, with many words.
    alarm = threading.Timer(timeout, _exit, (FAILED, f"error: {failed} within {timeout} s; {mend}."))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process_id,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except Exception as error:  # of many kinds: sockets, name servers, metadata, jax's own
        raise OthersLost(f"{failed} ({first_line(error)}); {mend}.") from error
    finally:
        alarm.cancel()


# --- stopping ------------------------------------------------------------------------------------------------------


class Stop:
    """Called with every step: whether the run is to end there, as one of its processes was sent SIGTERM.

    It listens from when it is made until the process ends, so that another SIGTERM does not disturb the end.
    """

    def __init__(self) -> None:
        self._asked, self._calls = False, 0
        # Of several processes jax's own listens: see `jax.distributed.initialize`.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)

    def __call__(self, step: int) -> bool:
        """Whether to stop before the step after ``step``; the same in all processes, which all ask equally often."""
        if jax.process_count() > 1:
            # The processes agree on one of the numbers that they pass here, the next that none has passed yet.
            self._calls += 1
            self._asked = self._asked or multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked

    def rest(self) -> None:
        """To the very end: Python takes its own handlers away some time before the process is gone."""
        if signal.getsignal(signal.SIGTERM) == self._ask:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _ask(self, *_: object) -> None:
        self._asked = True


def never(step: int) -> bool:
    """In place of a `Stop`."""
    return False


# --- the whole -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = JOIN_SECONDS,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> Iterator[Callable[[int], bool]]:
    """Around a program's run: joins the processes, yields when to stop, and sees to it that all of them end.

    The arguments are those of `find_place` and `join`. Of several processes, one that ends in an error does not come
    back from here: it says why and exits, as it must not wait for others that wait for it.

    Raises:
      UserError: the arguments are no place among processes.
    """
    place = find_place(coordinator, processes, process_id, os.environ)
    try:
        join(place, timeout, heartbeat)
        stop = Stop()
        yield stop
        sync("the end of the run")
        stop.rest()
    except OthersLost as error:
        _exit(FAILED, f"error: {error}")
    except BaseException as error:
        if place is None:
            raise
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    """Ends this process of several: says why, and gives the others a moment where they may end for the same reason."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        # Where it is this process's error alone the others never come, and the wait would end in an abort.
        threading.Timer(MOMENT_SECONDS, _exit, (BAD_INPUT,)).start()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        _exit(BAD_INPUT)
    if isinstance(error, KeyboardInterrupt):
        _exit(INTERRUPTED, "interrupted")
    if isinstance(error, SystemExit):
        _exit(error.code if isinstance(error.code, int) else FAILED if error.code else 0)
    if is_loss(error):
        _exit(
            FAILED,
            f"error: {who} has lost others ({first_line(error)}); their logs say why. The same command, on all hosts,"
            " goes on from the last checkpoint.",
        )
    traceback.print_exception(error)
    _exit(FAILED, f"error: {who} has failed (above), and with it the run")


def _exit(status: int, text: str = "") -> NoReturn:
    """Ends the process without what Python does at its end, such as waiting for threads that wait for others."""
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_loss(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that other processes of the run are gone or out of reach."""
    return jax.process_count() > 1 and any(
        isinstance(one, jax.errors.JaxRuntimeError) and any(word in str(one).lower() for word in _GONE)
        for one in causes(error)
    )


def first_line(error: BaseException, limit: int = 200) -> str:
    """What an error says, short enough for a sentence."""
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return line if len(line) <= limit else line[:limit] + "..."


# --- among several -------------------------------------------------------------------------------------------------


def keep_compiled(folder: str, workdir: epath.Path) -> None:
    """Has XLA keep compiled programs from process to process, so that a run that goes on does not compile again.

    Args:
      folder: where; "": beside the run, which a preempted run's next machine can read too, unless the environment
        variable JAX_COMPILATION_CACHE_DIR says where; "none": nowhere. On CPU the empty name means nowhere: programs
        compile quickly there, and another machine of the same kind may lack instructions that they use.
    """
    if folder == "none":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder and (chosen or jax.default_backend() == "cpu"):
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(workdir / COMPILED))


def is_first() -> bool:
    """Whether this is process 0, the one that writes files."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """What the first process has, on all; it must be such as JSON can hold."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, data.size)] = data[:size]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def sync(where: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def check_shared(folder: epath.Path) -> None:
    """UserError where the processes do not all see what the first writes into ``folder``, as a checkpoint needs."""
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(int.from_bytes(os.urandom(3), "big"))
    file = folder / f".seen_by_all_{int(token)}"
    if is_first():
        file.write_text("")
    sync("a file in the workdir")
    seen = multihost_utils.process_allgather(file.exists())
    if is_first():
        file.unlink()
    if not seen.all():
        blind = ", ".join(str(i) for i, one in enumerate(seen) if not one)
        raise UserError(
            f"the workdir {folder} is not the same folder on all hosts: process {blind} does not see what process 0"
            " writes there; give a gs:// folder, or one on a disk that all of them share."
        )
