"""Which slice, and how many images on a chip: the cheapest that fits, of each kind of chip.

What a run costs at best is arithmetic and hardly depends on the slice; whether it fits needs the compiler. So for each
kind of chip the slices are tried from the cheapest on: first with the most images on a chip, which is the cheapest; if
that does not fit, with the fewest, without which the slice is given up; then with those between, until one is green.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from dmdr_jax.errors import UserError
from dmdr_jax.planning.judge import GREEN, RED, Answer
from dmdr_jax.planning.request import Request
from dmdr_jax.planning.topology import CHIPS, Chip, parse, smaller_and_larger

IMAGES = (1, 2, 4, 8)
LARGEST = 256
TRIES = 9
"""Compilations for one kind of chip; each takes most of a minute."""


def sweep(
    request: Request,
    kinds: Sequence[str],
    images: Sequence[int],
    ask: Callable[[Request], Answer],
    compiled: bool,
    prices: Mapping[str, float],
) -> list[Answer]:
    """Answers for what was tried, the cheapest that fits first, those that do not fit last.

    Args:
      kinds: of chips.
      prices: of a chip-hour by kind of chip; 1 where it is not given.

    Raises:
      UserError: nothing that could fit was found.
    """
    found: list[Answer] = []
    for kind in kinds:
        found += _sweep_kind(request, CHIPS[kind], images, ask, compiled)
    if not found:
        raise UserError(f"{request.config} fits no slice of {', '.join(kinds)} of up to {LARGEST} chips.")
    return sorted(found, key=lambda a: (a.verdict != GREEN, cost(a, prices)))


def cost(answer: Answer, prices: Mapping[str, float]) -> float:
    """Of the whole run, in chip-hours or in the prices' currency."""
    return answer.chip_hours * prices.get(parse(answer.facts.topology).chip.name, 1.0)


def _sweep_kind(
    request: Request, chip: Chip, images: Sequence[int], ask: Callable[[Request], Answer], compiled: bool
) -> Iterator[Answer]:
    estimates = []
    for where in smaller_and_larger(chip, LARGEST):
        for count in images:
            asked = dataclasses.replace(request, topology=str(where), images_per_chip=count, compiled=False)
            try:
                estimate = ask(asked)
            except UserError:  # a batch that does not divide into groups, say
                continue
            if estimate.verdict != RED:
                estimates.append(estimate)
    estimates.sort(key=lambda a: (round(a.chip_hours, 2), a.facts.chips, -a.images_per_chip))
    if not compiled:
        yield from estimates[:1]
        return
    left = iter(range(TRIES))
    for place in dict.fromkeys(estimate.facts.topology for estimate in estimates):
        counts = sorted({int(e.images_per_chip) for e in estimates if e.facts.topology == place}, reverse=True)
        fits = False
        for answer in _sweep_slice(dataclasses.replace(request, topology=place), counts, ask, left):
            yield answer
            fits |= answer.verdict == GREEN
        if fits:
            return


def _sweep_slice(
    request: Request, counts: Sequence[int], ask: Callable[[Request], Answer], left: Iterator[int]
) -> Iterator[Answer]:
    """A slice with so many images on a chip (descending): the most, the fewest, those between; ``left`` are tries."""
    for count in dict.fromkeys((counts[0], counts[-1], *counts[1:-1])):
        if next(left, None) is None:
            return
        try:
            answer = ask(dataclasses.replace(request, images_per_chip=count))
        except UserError:
            continue
        yield answer
        # Settled by the fewest that do not fit, and by any more that do.
        if (answer.verdict == GREEN) != (count == counts[-1]):
            return
