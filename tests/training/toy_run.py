"""A whole run over the smallest networks, made of nothing: for tests of every method's steps."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import base
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.training import setup
from dmdr_jax.training.plan import Batch, Frozen, Plan
from dmdr_jax.training.state import TrainState
from tests.distill import toy

START = 2
"""The step at which rewards begin."""


class Vae(nn.Module):
    """Latents to images twice their size."""

    config: Any

    @nn.compact
    def decode(self, x):
        x = nn.Dense(12, name="up")(x)
        b, h, w, _ = x.shape
        return x.reshape(b, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class ToyReward:
    """A smooth function of the image and the prompt, of some cost."""

    spec: RewardSpec
    params: Any
    differentiable: bool = True

    def score(self, params, images, text):
        params, text = jax.lax.stop_gradient((params, text))
        hidden = jnp.tanh(images.reshape(images.shape[0], -1) @ params["w"])
        return hidden.mean(-1) + text.mean(-1)


def config(method="dmdr_refl", **changes):
    """A configuration of the toy run; ``changes`` are keys with ``__`` for the dot."""
    c = base.get_config()
    c.method, c.model = method, "toy"
    c.generator.kind = "lora"
    c.generator.lora.rank, c.generator.lora.alpha = 2, 4.0
    c.fake.lora.rank, c.fake.lora.alpha = 2, 2.0
    c.generator.lora.targets = c.fake.lora.targets = "wide"
    c.guidance.scale = 3.0
    c.optim.generator.lr = c.optim.fake.lr = 1e-2
    c.optim.clip = 1e6
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = c
        for group in groups:
            node = node[group]
        node[last] = value
    for name in ("first", "hps"):
        c.rewards[name] = base.reward("", weight=0.5, start=START)
    return c


def rewards(c, latent):
    specs = [RewardSpec(name=name, **c.rewards[name].to_dict()) for name in sorted(c.rewards)]
    keys = [jax.random.key(50 + i) for i in range(len(specs))]
    size = 4 * latent[0] * latent[1] * 3
    return tuple(ToyReward(s, {"w": jax.random.normal(k, (size, 256))}) for s, k in zip(specs, keys))


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run's pieces."""

    config: Any
    plan: Plan
    terms: tuple
    state: TrainState
    frozen: Frozen
    batch: Batch

    def active(self, step):
        return tuple(t for t in self.terms if t.active(step))


def make(method, module, latent, cond, real=None, **changes) -> Run:
    """The run of a transformer, with student and fake score away from the teacher.

    Args:
      latent: shape ``(h, w, c)``.
      cond: from a number of rows to a conditioning.
    """
    c = config(method, **changes)
    scorers, vae = rewards(c, latent), Vae(SimpleNamespace(downsampling=2, scaling_factor=1.0, shift_factor=0.0))
    z, one = jnp.zeros((1, *latent)), cond(1)
    params = jax.jit(module.init)(jax.random.key(0), z, jnp.zeros(1), one.prompt_embeds, one.pooled)["params"]
    pipeline = SimpleNamespace(modules={"transformer": module, "vae": vae}, process=Flow(), denoiser="transformer")
    terms, plan = setup.make_terms(c, scorers), setup.make_plan(c, pipeline, scorers)
    state = setup.make_state(c, "sd3", plan, params)
    moved = [toy.noisy(tree, jax.random.key(7 + i), 0.1) for i, tree in enumerate((state.generator, state.fake))]
    state = state._replace(generator=moved[0], fake=moved[1])
    drawn = vae.init(jax.random.key(5), z, method="decode")["params"]
    frozen = Frozen(params, drawn, {r.spec.name: r.params for r in scorers}, one, real)
    text = {r.spec.name: jax.random.normal(jax.random.key(60), (c.batch, 4)) for r in scorers}
    return Run(c, plan, terms, state, frozen, Batch(cond(c.batch), text))
