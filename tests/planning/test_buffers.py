"""What a program's memory is, read from the compiler's own account of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmdr_jax.accelerators import has_libtpu
from dmdr_jax.planning import buffers

ROOT = Path(__file__).parents[2]

# Three values of 100 bytes share two places; a fourth lives in a small memory.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <1 param.0 @0> (size=4096,offset=0): f32[1024]{0:T(1024)}
allocation 1: size 512, parameter 1, shape |f32[3]| at ShapeIndex {}:
 value: <2 param.1 @0> (size=512,offset=0): f32[3]{0:T(128)}
allocation 2: size 256, output shape is |(f32[1024], f32[])|, maybe-live-out:
 value: <3 tuple.1{} @0> (size=256,offset=0): (f32[1024], f32[])
allocation 3: size 32, constant:
 value: <4 constant.7 @0> (size=32,offset=0): f32[]{:T(128)}
allocation 4: size 70000, color 6, preallocated-temp:
 value: <5 small @6> (size=70000,offset=0): s32[]{:T(128)S(6)}
allocation 5: size 300, preallocated-temp:
 value: <6 first{0} @0> (size=100,offset=0): f32[25]{0}
 value: <7 second @0> (size=100,offset=200): f32[25]{0}
 value: <8 third{} (phi) @0> (size=100,offset=200): f32[25]{0}
 value: <9 fourth @0> (size=40,offset=100): f32[10]{0}

Total bytes used: 75196 (73.4KiB)

Used values:
<6 first @0>
 positions:
  first
"""
LIVES = """HloLiveRange (max 40):
  InstructionSequence:
    0:first
  BufferLiveRange:
    param.0{}:0-40
    first{0}:3-9
    second{}:5-8
    third{}:8-12
    fourth{}:10-11
  Live ranges at 8 (peak):
    first{0}: 100 bytes (cumulative: 100 bytes)
"""


def test_places_are_counted_once_and_other_memories_not():
    found = buffers.parse(ASSIGNMENT, LIVES)
    assert (found.arguments, found.results) == (4096 + 512, 256)
    assert found.temp == 32 + 300
    # At most two hundred bytes are in use: of the first place and of the one that second and third share.
    assert found.peak == found.arguments + 256 + 32 + 200


def test_a_value_ends_before_the_next_begins():
    later = LIVES.replace("fourth{}:10-11", "fourth{}:9-11")
    assert buffers.parse(ASSIGNMENT, later).peak == buffers.parse(ASSIGNMENT, LIVES).peak + 40


@pytest.mark.parametrize("assignment, lives", [("", LIVES), (ASSIGNMENT, ""), ("allocation 0: 3 bytes", "0-3")])
def test_what_is_written_otherwise_is_not_guessed_at(assignment, lives):
    assert buffers.parse(assignment, lives) is None


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed")
def test_a_stopped_compilation_says_what_a_whole_one_does(tmp_path):
    """A scan over layers with recomputation on a mesh, compiled to its end and as far as memory is assigned."""
    line = [sys.executable, "-m", "tests.planning.compiler_program"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    result = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told, fits, refused, executable, again = json.loads(result.stdout)
    assert told["sent"] == executable["sent"] and min(told["sent"]) > 0
    assert told["arguments"] == executable["arguments"]
    assert told["peak"] - told["code"] == pytest.approx(executable["peak"], rel=0.01)
    assert 0.2 < told["code"] / executable["code"] < 5
    assert again == executable  # what is said where the compiler writes nothing down
    # By what is told here the compiler refuses, and not by what it says of an executable.
    limit = 15.75 * 2**30
    assert fits["told"] < limit < fits["said"]
    assert limit < refused["told"] and f"({refused['told'] / 2**30:.2f}G) exceeds" in refused["refused"]
