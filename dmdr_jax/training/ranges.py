"""Which numbers of a configuration mean something."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dmdr_jax.errors import UserError


class Range(NamedTuple):
    """Keys whose numbers must all lie somewhere; one that is not set (a method does not read it) is not asked."""

    told: str
    holds: Callable[[float], bool]
    keys: str


RANGES = (
    Range(
        "must be at least 1",
        lambda x: x >= 1,
        """
        steps batch student.steps generator.lora.rank fake.lora.rank fake.updates calibration group.size rollout.updates
        preview.every preview.teacher_steps checkpoint.every checkpoint.keep watch.count watch.per_prompt watch.patience
        gndm.draws drpo.cells last_step.fake_updates
        """,
    ),
    Range(
        "must not be negative",
        lambda x: x >= 0,
        """
        seed height width reward_microbatch preview.images watch.every ode.steps ode.guidance ode.lr ode.warmup
        ode.weight_decay guidance.scale guidance.jitter dynamics.steps dynamics.dg dm.weight dm.normaliser_floor
        optim.generator.lr optim.generator.warmup optim.generator.weight_decay
        optim.fake.lr optim.fake.warmup optim.fake.weight_decay watch.fall watch.gap watch.chroma watch.clipped
        policy.weight policy.clip policy.kl policy.steps policy.balance policy.refresh group.limit
        dpo.weight dpo.beta dpo.clip dpo.refresh refl.anchor gdmd.weight gndm.importance gndm.share
        last_step.weight last_step.dm_weight boundary.consistency drpo.weight drpo.count drpo.reference_weight
        gan.weight gan.fake_weight gan.lr
        """,
    ),
    Range(
        "must be above 0",
        lambda x: x > 0,
        "t5_length student.shift generator.lora.alpha fake.lora.alpha optim.clip gdmd.beta",
    ),
    Range(
        "must be at least 0 and below 1",
        lambda x: 0 <= x < 1,
        "ema ode.ema optim.b1 optim.b2 gdmd.spread",
    ),
    Range(
        "must lie between 0 and 1",
        lambda x: 0 <= x <= 1,
        "dynamics.tau_low dynamics.tau_high watch.diversity boundary.jump drpo.time",
    ),
)
ODE = Range("must be at least 1", lambda x: x >= 1, "ode.pairs ode.batch ode.teacher_steps")
"""Where ``ode.steps`` is."""


def check_ranges(config: Any) -> None:
    """UserError names the first number that means nothing; ``config`` as its method resolves it."""
    for told, holds, keys in (*RANGES, ODE) if config.ode.steps else RANGES:
        for key in keys.split():
            value: Any = config
            for name in key.split("."):
                value = value[name]
            if value is not None and not holds(value):
                raise UserError(f"config.{key} {told}, and is {value}.")
    low, high = config.dynamics.tau_low, config.dynamics.tau_high
    if low > high:
        raise UserError(f"config.dynamics.tau_low must not be above tau_high, {high}, and is {low}.")
