"""`python -m dmdr_jax.plan` behind its command line."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dmdr_jax.accelerators import has_libtpu
from dmdr_jax.errors import UserError
from dmdr_jax.planning import runner, table, topology
from dmdr_jax.planning.judge import Answer
from dmdr_jax.planning.request import Request
from dmdr_jax.planning.sweep import IMAGES, sweep

STDOUT = "-"


def run(
    config: str,
    overrides: Sequence[str],
    topologies: Sequence[str],
    images: Sequence[str],
    json_file: str,
    sweeping: bool,
    prices: Sequence[str],
    compile_it: bool,
) -> None:
    """Plans, and prints a table or JSON.

    Raises:
      UserError: something that was asked for is refused.
    """
    compiled = compile_it and has_libtpu()
    counts = [_number("--images_per_chip", text) for text in images]
    base = Request(config, tuple(overrides), "", 0, compiled)
    if sweeping:
        kinds = [_kind(name) for name in topologies] or list(topology.CHIPS)
        answers = sweep(base, kinds, counts or IMAGES, _telling, compiled, _prices(prices))
    else:
        requests = [
            Request(config, tuple(overrides), str(topology.parse(name)), count, compiled)
            for name in topologies
            for count in counts or [0]
        ]
        if not requests:
            raise UserError("nothing to plan for: give --topology=v5e:2x4, or --sweep.")
        answers = [_telling(request) for request in requests]
    _write(answers, json_file)


def _telling(request: Request) -> Answer:
    """Answers, and on a terminal says what takes the time."""
    if request.compiled and sys.stderr.isatty():
        count = f", {request.images_per_chip} images a chip" if request.images_per_chip else ""
        print(f"compiling for {request.topology}{count} ...", file=sys.stderr)
    return runner.answer(request)


def _write(answers: Sequence[Answer], json_file: str) -> None:
    document = json.dumps([answer.to_dict() for answer in answers], indent=1)
    if json_file == STDOUT:
        print(document)
        return
    print(table.report(answers))
    if json_file:
        try:
            Path(json_file).write_text(document, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {json_file}: {error.strerror}.") from error


def _number(flag: str, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise UserError(f"{flag} takes whole numbers from 1 on, not {text!r}.")
    return int(text)


def _kind(name: str) -> str:
    kind = topology.kind_of(name)
    if kind is None:
        raise UserError(f"--sweep takes kinds of chip ({', '.join(topology.CHIPS)}), not {name!r}.")
    return kind


def _prices(given: Sequence[str]) -> dict[str, float]:
    prices = {}
    for text in given:
        name, _, price = text.partition("=")
        try:
            prices[_kind(name)] = float(price)
        except ValueError:
            raise UserError(f"--prices takes KIND=PRICE, not {text!r}.") from None
    return prices
