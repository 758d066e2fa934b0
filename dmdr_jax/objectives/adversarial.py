"""The generator's side of DMD2's discriminator (`dmdr_jax.distill.gan`)."""

import dataclasses

import jax

from dmdr_jax.distill.gan import generator_loss
from dmdr_jax.objectives.base import ADVERSARY, Context, Metrics

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """``weight * mean softplus(-D(renoised x0))``; gradient flows through the fake score's network to x0."""

    weight: float = 5e-3
    name: str = "adversarial"
    needs: frozenset[str] = frozenset({ADVERSARY})

    def active(self, step: int) -> bool:
        return self.weight != 0.0

    def __call__(self, ctx: Context) -> tuple[Array, Metrics]:
        loss = self.weight * generator_loss(ctx.realness)
        return loss, {"gan/generator_loss": loss, "gan/student_logit": ctx.realness.mean()}
