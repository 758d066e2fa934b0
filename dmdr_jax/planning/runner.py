"""Surveys in processes of their own, as many at a time as there are cores for."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmdr_jax.errors import UserError
from dmdr_jax.planning import topology
from dmdr_jax.planning.compiler import ENVIRONMENT
from dmdr_jax.planning.judge import Answer, judge
from dmdr_jax.planning.request import DRAWING, PROGRAMS, UPDATES, Facts, Request

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
TIMEOUT = 3600


def answer(request: Request) -> Answer:
    """Surveys one run on one slice, its programs side by side, and judges it.

    Raises:
      UserError: what was asked is refused, or the compiler died.
    """
    where = topology.parse(request.topology)
    if request.compiled:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(lambda name: _survey(request, (name,)), (*UPDATES, DRAWING)))
            found += pool.map(lambda name: _survey(request, (name,)), found[0].before)  # most runs have none
    else:
        found = [_survey(request, PROGRAMS)]
    programs = {name: program for facts in found for name, program in facts.programs.items()}
    facts = Facts.from_dict({**vars(found[0]), "programs": {}})  # the fake score's process knows the stages
    facts.programs.update(programs)
    return judge(facts, where, request.compiled)


def _survey(request: Request, names: Sequence[str]) -> Facts:
    command = [sys.executable, "-m", "dmdr_jax.planning.survey", *names]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    environment.pop("XLA_FLAGS", None)  # flags for another compiler
    with tempfile.TemporaryDirectory(prefix="dmdr_plan_") as environment["TMPDIR"]:
        done = subprocess.run(
            command,
            input=request.to_json(),
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise UserError(f"planning {request.config} on {request.topology} failed in {' and '.join(names)}: {last}")
    found = json.loads(lines[-1])
    if "refused" in found:
        raise UserError(f"{request.topology}: {found['refused']}")
    return Facts.from_dict(found["facts"])
