"""Operations of the traced steps, at full size, against the hand count of docs/speed.md, within 5 %."""

import functools
from typing import NamedTuple

import jax
import pytest

from benchmarks.workload import Workload
from dmdr_jax.objectives.base import active_terms
from dmdr_jax.planning.work import count
from dmdr_jax.training.abstract import AbstractRun
from dmdr_jax.training.step import fake_step, generator_step

TERA, UPDATES = 1e12, 5


class Forward(NamedTuple):
    """One forward of a denoiser on one image, two operations to a multiply-add.

    Attributes:
      linear: products with weights, convolutions.
      attention: products of activations.
      adapter: of a LoRA on the attention's projections, per unit of rank.
    """

    linear: float
    attention: float
    adapter: float

    def __add__(self, other: "Forward") -> "Forward":
        return Forward(*(a + b for a, b in zip(self, other)))

    def forward(self, rank: int) -> float:
        return self.linear + self.attention + rank * self.adapter

    def update(self, rank: int) -> float:
        """Forward, and backward to the adapter: the frozen weights get no gradient, both sides of a product do."""
        return 2 * self.linear + 3 * self.attention + 3 * rank * self.adapter


def mmdit(tokens: int, width: int, layers: int) -> Forward:
    """A joint transformer: in each block 12 d^2 multiply-adds a token, 4 of them in projections, and attention."""
    return Forward(
        2 * 12 * width**2 * tokens * layers, 4 * tokens**2 * width * layers, 4 * 2 * 2 * width * tokens * layers
    )


def resnet(before: int, after: int, pixels: int) -> Forward:
    shortcut = 0 if before == after else before * after
    return Forward(2 * pixels * (9 * before * after + 9 * after**2 + shortcut), 0, 0)


def conv(before: int, after: int, pixels: int) -> Forward:
    return Forward(2 * pixels * 9 * before * after, 0, 0)


def transformer(width: int, pixels: int, depth: int, text: int = 77, text_width: int = 2048) -> Forward:
    """SDXL's: entry and exit, and in each block self-attention, attention to the text, a gated feed-forward layer."""
    linear = pixels * 18 * width**2 + 2 * text * text_width * width
    attention = 2 * pixels**2 * width + 2 * pixels * text * width
    adapter = 6 * pixels * 2 * width + 2 * text * (text_width + width)
    return Forward(2 * (depth * linear + 2 * pixels * width**2), 2 * depth * attention, 2 * depth * adapter)


def unet() -> Forward:
    """SDXL's U-Net at 1024 px: 128 x 128 latents at 320 features, 64 x 64 at 640, 32 x 32 at 1280."""
    top, middle, bottom = 128**2, 64**2, 32**2
    parts = [
        *(conv(4, 320, top), resnet(320, 320, top), resnet(320, 320, top), conv(320, 320, middle)),
        *(resnet(320, 640, middle), resnet(640, 640, middle), *[transformer(640, middle, 2)] * 2),
        *(conv(640, 640, bottom), resnet(640, 1280, bottom), resnet(1280, 1280, bottom)),
        *[transformer(1280, bottom, 10)] * 2,
        *(resnet(1280, 1280, bottom), transformer(1280, bottom, 10), resnet(1280, 1280, bottom)),
        *(resnet(2560, 1280, bottom), resnet(2560, 1280, bottom), resnet(1920, 1280, bottom)),
        *(*[transformer(1280, bottom, 10)] * 3, conv(1280, 1280, middle)),
        *(resnet(1920, 640, middle), resnet(1280, 640, middle), resnet(960, 640, middle)),
        *(*[transformer(640, middle, 2)] * 3, conv(640, 640, top)),
        *(resnet(960, 320, top), resnet(640, 320, top), resnet(640, 320, top), conv(320, 4, top)),
    ]
    return functools.reduce(Forward.__add__, parts)


NETWORKS = {"sd3": mmdit(4096 + 77 + 256, 1536, 24), "sdxl": unet()}
GENERATOR_RANK, FAKE_RANK, STEPS = 64, 32, 4


def by_hand(one: Forward, reuse: bool, shared: bool) -> dict[str, float]:
    student, fake = one.forward(GENERATOR_RANK), one.update(FAKE_RANK)
    scored = one.update(GENERATOR_RANK) + 3 * one.forward(FAKE_RANK)
    spared = (STEPS - 1) / 2 * student if shared else 0
    if reuse:
        return {"generator": STEPS * student + scored + UPDATES * fake - spared}
    return {"fake": STEPS * student + fake - spared, "generator": (STEPS - 1) * student + scored - spared}


@pytest.mark.parametrize("size", NETWORKS)
def test_one_forward(size):
    linear, attention, _ = NETWORKS[size]
    published = {"sd3": (6.02, 2.89), "sdxl": (5.97, 0.79)}[size]
    assert (linear / TERA, attention / TERA) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("size", ["sd3", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "reuse, shared",
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["apart", "reuse", "shared_index", "both"],
)
def test_the_steps_do_what_was_counted(size, reuse, shared):
    config = Workload(size, batch=1).config()
    config.rollout.reuse, config.student.shared_index = reuse, shared
    run = AbstractRun.of(config)
    inputs, terms = (run.state, run.frozen, run.batch), active_terms(run.terms, 0)
    programs = {"fake": functools.partial(fake_step, run.plan)}
    programs |= {"generator": functools.partial(generator_step, run.plan, terms)}
    for name, expected in by_hand(NETWORKS[size], reuse, shared).items():
        assert count(jax.make_jaxpr(programs[name])(*inputs)) == pytest.approx(expected, rel=0.05), name
