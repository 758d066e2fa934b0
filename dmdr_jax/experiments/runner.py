"""Runs jobs: several at a time on cores of their own, past failures, and so that a kill at any moment costs little.

One process looks after all: it starts a job's next command, polls, and notes what ended. Nothing is remembered that is
not in the jobs' folders, so the same call goes on after any interruption. Every job's lock is a file lock that its
children inherit: what an earlier, killed sweep left running keeps it, and is waited for rather than started twice.
"""

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr_jax.errors import UserError
from dmdr_jax.experiments.jobs import LOCK_FILE, TRAIN, Job, Step

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # for a run to save its checkpoint after an interrupt

ENVIRONMENT = {
    # Big buffers come and go in every step on a CPU: glibc should keep them rather than fault them in anew.
    "MALLOC_MMAP_THRESHOLD_": "2147483648",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "TOKENIZERS_PARALLELISM": "false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "2",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # jobs may share an accelerator
}


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job that did not come to its end."""

    job: Job
    why: str


@dataclasses.dataclass
class _Active:
    """A command that runs."""

    job: Job
    step: Step
    process: subprocess.Popen
    lock: int
    cores: frozenset[int]
    started: float
    first: int  # generator step at its start
    steady: tuple[float, int] | None = None  # time and step of the first update seen


class Runner:
    """Runs jobs to their end.

    Args:
      jobs: in the order of preference.
      parallel: how many at a time; with more than one each keeps to its share of the cores.
      finished: called with a job whose commands are all done, when that is seen first.
      show: called after every change and now and then, with the runner.
      environment: more variables for the commands.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        parallel: int = 1,
        finished: Callable[[Job], Any] = lambda job: None,
        show: Callable[["Runner", str], Any] = lambda runner, event: None,
        environment: Mapping[str, str] | None = None,
    ):
        self.jobs = list(jobs)
        self.failures: list[Failure] = []
        self.done: set[Path] = set()
        self.active: list[_Active] = []
        self.held: set[Path] = set()
        self._parallel, self._finished, self._show = parallel, finished, show
        self._environment = {**ENVIRONMENT, **os.environ, **(environment or {})}
        self._shares = core_shares(parallel)

    def run(self) -> list[Failure]:
        """Until nothing is left to run; returns what failed. On an interrupt everything is stopped in good order."""
        try:
            while True:
                self._start_what_can()
                if not self.active and not self.held:
                    return self.failures
                time.sleep(POLL_SECONDS)
                self._collect()
                self._show(self, "")
        except BaseException:
            self._stop()
            raise

    # --- what may run ------------------------------------------------------------------------------------------------

    def state(self, job: Job) -> str:
        """``done``, ``failed``, ``running``, ``held`` by another sweep, ``blocked`` by a failure, or ``waiting``."""
        if job.folder in self.done:
            return "done"
        if any(failure.job.folder == job.folder for failure in self.failures):
            return "failed"
        if any(active.job.folder == job.folder for active in self.active):
            return "running"
        if job.folder in self.held:
            return "held"
        parent = job.parent
        if parent is not None and self.state(parent) in ("failed", "blocked"):
            return "blocked"
        return "waiting"

    def _start_what_can(self) -> None:
        self.held.clear()
        for job in self.jobs:
            if len(self.active) >= self._parallel:
                return
            parent = job.parent
            if self.state(job) == "waiting" and (parent is None or self.state(parent) == "done"):
                self._take(job)

    def _take(self, job: Job) -> None:
        """Locks the job and starts its next command; where there is none left, it is done."""
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(job.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            self.held.add(job.folder)
            return
        self._next(job, lock, self._free_cores())

    def _next(self, job: Job, lock: int, cores: frozenset[int]) -> None:
        try:
            step = job.next_step()
            if step is None:
                self._finished(job)
                self.done.add(job.folder)
                self._show(self, f"{job.name}: done")
                os.close(lock)
                return
            job.prepare(step)
            process = self._start(job, step, lock, cores)
        except Exception as error:  # whatever is wrong with this job, the others go on
            os.close(lock)
            self._fail(job, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            return
        self.active.append(_Active(job, step, process, lock, cores, time.monotonic(), job.progress()))
        self._show(self, f"{job.name}: {step.name}")

    def _free_cores(self) -> frozenset[int]:
        taken = [active.cores for active in self.active]
        return next(share for share in self._shares if taken.count(share) < self._shares.count(share))

    # --- processes ---------------------------------------------------------------------------------------------------

    def _start(self, job: Job, step: Step, lock: int, cores: frozenset[int]) -> subprocess.Popen:
        with open(job.log, "ab") as log:
            log.write(f"\n$ {' '.join(step.command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=(lock,),
                start_new_session=True,  # an interrupt at the terminal is ours to pass on
            )
        if cores and self._parallel > 1:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, cores)  # before its threads are there; they inherit it
        return process

    def _collect(self) -> None:
        """Notes how far the commands are and what has ended, and goes on with the jobs whose command ended well."""
        for active in list(self.active):
            if active.step.name == TRAIN and active.steady is None and active.job.progress() > active.first:
                active.steady = time.monotonic(), active.job.progress()
            pid, status, usage = os.wait4(active.process.pid, os.WNOHANG)
            if pid:
                self._ended(active, os.waitstatus_to_exitcode(status), usage)

    def _ended(self, active: _Active, code: int, usage: Any) -> None:
        active.process.returncode = code  # it was waited for here
        self.active.remove(active)
        job, step = active.job, active.step
        well = code == 0 and step.product.exists()
        job.note(step, done=well, **self._spent(active, usage))
        if well:
            self._next(job, active.lock, active.cores)
            return
        os.close(active.lock)
        self._fail(job, f"{step.name} {reason(code, job.log, step)}")

    def _spent(self, active: _Active, usage: Any) -> dict[str, Any]:
        """Amounts of this attempt, to be added up; the timed updates and seconds are without start and compiling."""
        now = time.monotonic()
        spent: dict[str, Any] = {
            "seconds": round(now - active.started, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "attempts": 1,
        }
        if active.step.name == TRAIN:
            spent["updates"] = active.job.progress() - active.first
        if active.steady is not None:
            since, first = active.steady
            spent |= {"timed_seconds": round(now - since, 1), "timed_updates": active.job.progress() - first}
        return spent

    def _fail(self, job: Job, why: str) -> None:
        self.failures.append(Failure(job, why))
        self._show(self, f"{job.name}: failed: {why}")

    def _stop(self) -> None:
        """Interrupts what runs, waits for it to save, kills what is left, and notes what was spent."""
        for active in self.active:
            _signal(active.process, signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for active in self.active:
                usage = _wait(active.process, deadline)
                active.job.note(active.step, **self._spent(active, usage))
        finally:  # also when a second interrupt does not want to wait
            for active in self.active:
                if active.process.returncode is None:
                    _signal(active.process, signal.SIGKILL)
                os.close(active.lock)
            self.active.clear()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # each is the leader of its own session


def _wait(process: subprocess.Popen, deadline: float) -> Any:
    """The resources of a process that was asked to end, killed at the deadline."""
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        if time.monotonic() > deadline:
            _signal(process, signal.SIGKILL)
        time.sleep(0.05)


def reason(code: int, log: Path, step: Step) -> str:
    """Why a command failed, in a line."""
    if code == 0:
        return f"ended without making {step.product}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = next((line for line in reversed(lines[-50:]) if line.startswith("error:")), lines[-1])
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    return f"{ending}: {last.removeprefix('error: ')[:300]}"


def core_shares(parallel: int) -> list[frozenset[int]]:
    """The cores of each of ``parallel`` jobs: equal shares, and shared cores where there are too few.

    Empty sets where the system does not say which cores there are.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [frozenset()] * parallel
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // parallel)
    return [frozenset(cores[(i * each + j) % len(cores)] for j in range(each)) for i in range(parallel)]
