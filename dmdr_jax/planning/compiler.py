"""libtpu's compiler, asked what memory a program takes and what it sends, and not for machine code.

Machine code is most of its work and says nothing of this. So the compiler is made to write down what it knows once it
has assigned memory, and nobody waits for the rest: `ask` is for a process that ends when it has its answer.
"""

import contextlib
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from dmdr_jax.planning import buffers

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is found there has nothing written about it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any will do
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations at a time
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""For libtpu in a process without a TPU; it would ask the network for one."""

# Products overlapped with their gathers would otherwise be written as loops of permutations, which cannot be counted.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

BEFORE = "after_optimizations_before_buffer_assignment.txt"  # is written some time before the next
UNREAD = "after_optimizations-buffer-assignment-values.txt"  # each value with its uses: 0.9 GB and 13 s for SDXL
LAST = "memory-usage-report.txt"  # is written after all that is read here
CODE = 20
"""Bytes of machine code for each byte of the optimised program's text; an estimate from above (docs/tpu.md)."""
_POLL = 0.05


class Compiled(NamedTuple):
    """What the compiler makes of a program.

    Attributes:
      text: the optimised program, HLO.
      arguments: bytes of what it is given, padded.
      temp: bytes that it needs besides: results that take no argument's place, temporary values, machine code.
      peak: bytes of arguments, results, code, and of the temporary values that are in use at one time.
    """

    text: str
    arguments: int
    temp: int
    peak: int


def ask(traced: Any) -> Compiled:
    """Lowers a traced program for TPUs and compiles it as far as memory is assigned.

    The compiler goes on in a thread that cannot be stopped, and writes into a folder of the default place for temporary
    files: leave with ``os._exit``, and let the parent process remove that place.

    Raises:
      RuntimeError: of XLA, where the compiler refuses the program.
    """
    lowered = traced.lower(lowering_platforms=("tpu",))
    folder = Path(tempfile.mkdtemp())
    options = {**OPTIONS, "xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    done = _in_background(lambda: lowered.compile(compiler_options=options))
    while not (_report(folder) or done.done()):
        _forbid_unread(folder)
        time.sleep(_POLL)
    return _read(folder) or _of_executable(done.result())


def _in_background(function: Any) -> Future[Any]:
    """The result of a function that is called in a thread which does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _forbid_unread(folder: Path) -> None:
    """Puts a folder where the compiler would write what nobody reads, once its name is known; it goes on without."""
    for path in folder.glob(f"*.{BEFORE}"):
        with contextlib.suppress(FileExistsError):
            Path(str(path).removesuffix(BEFORE) + UNREAD).mkdir()


def _report(folder: Path) -> Path | None:
    """What the compiler writes once it has assigned memory."""
    return next(folder.glob(f"*-{LAST}"), None)


def _read(folder: Path) -> Compiled | None:
    """What the compiler has written; None where it has not, or otherwise than is known here."""
    report = _report(folder)
    if report is None:
        return None
    stem = str(report).removesuffix(f"-{LAST}")
    assignment, lives, text = (Path(f"{stem}{end}") for end in ("-buffer-assignment.txt", "-live-range.txt", ".txt"))
    found = buffers.parse(assignment.read_text(), lives.read_text())
    if found is None:
        return None
    program = text.read_text()
    code = CODE * len(program)
    return Compiled(program, found.arguments, found.results + found.temp + code, found.peak + code)


def _of_executable(compiled: Any) -> Compiled:
    """The same of a program compiled to its end, by a libtpu that does not write down what is read here.

    Its temporary memory is counted higher: see docs/tpu.md.
    """
    memory = compiled.memory_analysis()
    temp = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    temp += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(compiled.as_text(), memory.argument_size_in_bytes, temp, memory.peak_memory_in_bytes)
