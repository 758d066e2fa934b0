"""A world with a closed form: a Gaussian teacher, a linear student, a quadratic reward, in two dimensions.

The teacher's data are N(m, diag v). Its denoiser is exact, and so is the fake score's, whose LoRA moves mean and
logarithm of the deviation. The student's estimates are linear in its input, with coefficients of their own for the
first step and for the others. Latents are [b, 1, 1, 2], and so are images.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.training import setup
from dmdr_jax.training.plan import Batch, Frozen
from dmdr_jax.training.state import new_state

MEAN = np.array([0.5, -0.5])
VARIANCE = np.array([1.0, 0.8])
CENTRE = np.array([1.5, 0.0])
CURVATURE = np.array([0.5, 0.7])
"""The reward is -sum q (x - c)^2 / 2."""


class Features(nn.Module):
    """A fixed nonlinear view of latents."""

    @nn.compact
    def __call__(self, x):
        return jnp.sin(x @ jnp.array([[1.0, 0.3, -0.5], [0.2, -1.0, 0.7]]))


class LinearGaussian(nn.Module):
    """Velocity of the teacher (or of the fake score, with a delta), or of the student where there is no delta."""

    config: Any
    remat: str = "none"

    @nn.compact
    def __call__(self, z, timestep, prompt_embeds, pooled, lora_scale=None):
        t = (timestep / 1000.0)[:, None, None, None]
        mean = self.param("mean", nn.initializers.zeros, (2,))
        log_std = self.param("log_std", nn.initializers.zeros, (2,))
        own = {
            name: self.param(name, nn.initializers.zeros, (2,))
            for name in ("first_bias", "first_scale", "later_bias", "later_scale")
        }
        Features(name="norm_out")(z.reshape(z.shape[0], 1, 2))
        scored = self.has_variable("lora", "mean")
        if scored:
            scale = jnp.broadcast_to(lora_scale, z.shape[:1])[:, None, None, None]
            mean = mean + scale * self.get_variable("lora", "mean") + pooled[:, None, None]
            log_std = log_std + scale * self.get_variable("lora", "log_std")
        alpha, variance = 1.0 - t, jnp.exp(2.0 * log_std)
        gain = alpha * variance / (alpha**2 * variance + t**2)
        x0 = mean + gain * (z - alpha * mean)
        if not scored:
            first = t > 0.99
            bias = jnp.where(first, own["first_bias"], own["later_bias"])
            slope = jnp.where(first, own["first_scale"], own["later_scale"])
            x0 = jnp.where(first, mean, 0.0) + bias + slope * z
        return (z - x0) / t


class Vae(nn.Module):
    """Images are twice the latents less one half, so that `decode_images` gives the latents back."""

    config: Any

    def decode(self, x):
        return 2.0 * x - 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Quadratic:
    """The reward."""

    spec: RewardSpec
    params: Any
    differentiable: bool = True

    def score(self, params, images, text):
        x = images[:, 0, 0]
        return -0.5 * (params["curvature"] * (x - params["centre"]) ** 2).sum(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A run's pieces."""

    config: Any
    plan: Any
    terms: tuple
    state: Any
    frozen: Any
    batch: Any


TRAINED = ("first_bias", "first_scale", "later_bias", "later_scale")


def configuration(method, batch=8, **changes):
    """A configuration; ``changes`` are keys with ``__`` for the dot."""
    c = base.get_config()
    c.method, c.model, c.batch = method, "gaussian", batch
    c.student.steps, c.student.shift = 2, 1.0
    c.generator.kind = "full"
    c.guidance.scale, c.guidance.jitter = 1.0, 0.0
    c.fake.scale, c.fake.lora.rank, c.fake.lora.alpha = 1.0, 1, 1.0
    c.optim.generator.weight_decay, c.optim.clip = 0.0, 1e9
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = c
        for group in groups:
            node = node[group]
        node[last] = value
    return c


def make(
    method, batch=8, start=0, reward=1.0, trained=TRAINED, later=None, grid=None, tx=None, real=None, **changes
) -> World:
    """The world of a method.

    Args:
      start, reward: step at which the two equal rewards begin, and the sum of their weights.
      trained: what the student trains of its coefficients; the others stay.
      later: slope of the later steps, without a bias.
      grid, tx: times and optimisers (generator's, fake's) in place of the configuration's.
    """
    c = configuration(method, batch, **changes)
    for name in ("first", "hps"):
        c.rewards[name] = base.reward("", weight=0.5 * reward, start=start)
        c.rewards[name].margin = 1e6
    specs = [RewardSpec(name=name, **c.rewards[name].to_dict()) for name in sorted(c.rewards)]
    params = {"centre": jnp.asarray(CENTRE, jnp.float32), "curvature": jnp.asarray(CURVATURE, jnp.float32)}
    rewards = tuple(Quadratic(spec, params) for spec in specs)
    shape = SimpleNamespace(sample_size=1, patch_size=1, in_channels=2, width=3)
    module, vae = LinearGaussian(shape), Vae(SimpleNamespace(downsampling=1, scaling_factor=1.0, shift_factor=0.0))
    pipeline = SimpleNamespace(modules={"net": module, "vae": vae}, process=Flow(), denoiser="net")
    terms, plan = setup.make_terms(c, rewards), setup.make_plan(c, pipeline, rewards)
    if grid is not None:
        plan = dataclasses.replace(plan, simulation=dataclasses.replace(plan.simulation, grid=grid))
    if tx is not None:
        plan = dataclasses.replace(plan, generator_tx=tx[0], fake_tx=tx[1])
    teacher = {
        "mean": jnp.asarray(MEAN, jnp.float32),
        "log_std": jnp.asarray(0.5 * np.log(VARIANCE), jnp.float32),
        **{name: jnp.zeros(2) for name in TRAINED},
    }
    student = {
        "first_bias": jnp.array([0.2, 0.1]),
        "first_scale": jnp.asarray(np.sqrt(VARIANCE), jnp.float32),
        "later_bias": jnp.array([0.1, -0.1]),
        "later_scale": jnp.array([0.8, 0.9]),
    }
    if later is not None:
        student |= {"later_bias": jnp.zeros(2), "later_scale": jnp.full(2, later)}
    teacher |= {name: value for name, value in student.items() if name not in trained}
    generator = {name: student[name] for name in trained}
    fake = {"mean": jnp.array([0.1, 0.2]), "log_std": jnp.array([0.1, -0.1])}
    state = _state(c, plan, generator, fake)
    frozen = Frozen(teacher, {}, {r.spec.name: params for r in rewards}, conditioning(1, 0.3), real)
    text = {r.spec.name: jnp.zeros((batch, 1)) for r in rewards}
    return World(c, plan, terms, state, frozen, Batch(conditioning(batch), text))


def _state(c, plan, generator, fake):
    from dmdr_jax.training import compose

    extra = compose.extra_state(plan, jax.random.key(1), generator)
    return new_state(c.seed, generator, fake, plan.generator_tx, plan.fake_tx, extra)


def conditioning(b, shift=0.0):
    """Prompts that move the teacher's mean by ``shift``."""
    return Conditioning(jnp.zeros((b, 1, 1)), jnp.full((b, 1), shift))
