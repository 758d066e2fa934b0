"""What the updates work with: the static plan, the frozen networks, a batch, and how keys are made."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import optax

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.diffusion.kernels import Kernel
from dmdr_jax.distill.bridge import Boundary
from dmdr_jax.distill.features import FeatureSpec
from dmdr_jax.distill.gan import GanSpec
from dmdr_jax.distill.schedules import RenoiseTimes
from dmdr_jax.distill.simulate import Simulation
from dmdr_jax.distill.split import SplitTimes
from dmdr_jax.models.autoencoder import AutoencoderKL
from dmdr_jax.models.conditioning import Conditioning, map_rows
from dmdr_jax.objectives.advantages import Advantages
from dmdr_jax.rewards.base import Reward
from dmdr_jax.training.state import TrainState, purpose_key, with_buffers

Array = jax.Array
Tree = Any
Keys = Callable[[str], Array]
"""The key of a purpose."""

FAKE_DATA = ("student_x0", "simulated")


@dataclasses.dataclass(frozen=True)
class MethodPlan:
    """How a method samples and reuses: what its terms need beyond one student call and one draw.

    Attributes:
      group: rows per prompt where a term needs groups.
      shared_start: the rollouts of a group start from one noise.
      policy_kernel: of the stored rollouts; None: the student's own.
      policy_steps: how many stochastic steps of a rollout get a policy gradient, drawn anew each time; 0: all.
      steps_of: "batch", the same steps for all prompts, or "prompt", each one's own.
      shared_noise: the other steps share their noise within a group (SubGRPO).
      density: "gaussian", or "rtdmd" for log-probabilities without 1 / (2 std^2).
      kl_form: "gaussian", or "flow_grpo" for a KL over s^2 in place of s^2 |dt|.
      updates: generator updates per rollout, where a term can reuse one.
      fake_updates: fake updates on the rollout, where the generator's program makes them.
      draws: renoised points per sample: of a draw, and of the distribution matching reward.
      draw_mode: how a draw is normalised: by itself, over its renoised points, or over the rows of a prompt.
      draw_rms: over renoised points, by their root mean square; else by the mean of their own normalisers.
      targets: GDMD's group of implicit targets: over renoise draws, over versions of the fake score, or both.
      targets_normalised: they are at DMD's normalised gradient; else at the bare difference of estimates.
      old: GDMD's old student: of the "block"'s start, or the run's "average".
      spread_decay: of the running spread of reward gains; 0: the batch's own.
      ranking: what makes winner and loser of a group.
      keeps: what the state holds beside: "reference", "spread", "gan".
      reference_start, reference_refresh: step at which the reference is the student, and then every so many; 0: never.
      split: Decoupled DMD's renoise times; None: coupled.
      boundary: matching of realised latents (AC-DMD); None: of x0.
      features: of x0, for the drift.
      gan: the discriminator; None: there is none.
    """

    group: int = 1
    shared_start: bool = False
    policy_kernel: Kernel | None = None
    policy_steps: int = 0
    steps_of: str = "batch"
    shared_noise: bool = False
    density: str = "gaussian"
    kl_form: str = "gaussian"
    updates: int = 1
    fake_updates: int = 1
    draws: int = 1
    draw_mode: str = "sample"
    draw_rms: bool = True
    targets: str = "both"
    targets_normalised: bool = True
    old: str = "block"
    spread_decay: float = 0.99
    ranking: Advantages | None = None
    keeps: frozenset[str] = frozenset()
    reference_start: int = 0
    reference_refresh: int = 0
    split: SplitTimes | None = None
    boundary: Boundary | None = None
    features: FeatureSpec | None = None
    gan: GanSpec | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything static about a run's updates; compared by identity.

    Attributes:
      generator_lora_scale: effective scale (alpha / rank) of the generator's LoRA, or None for a full tree.
      fake_scale, dg_initial: effective LoRA scales of the fake score and, at step 0, of the real score.
      dynamic_steps: S of DynaDG.
      guidance, guidance_jitter: classifier-free guidance of the real score and half its range.
      fake_data: what the fake score trains on: the student's x0 at (z_i, t_i), or the simulated sample.
      latent_shape: ``(h, w, c)``.
      normaliser_floor: see `dmdr_jax.distill.dm`.
      reward_microbatch: images of each device that are decoded and scored at a time; 0: all.
      decode_split: one image at a time is decoded by all devices along fsdp, some of its rows by each.
      method: what only some methods use.
    """

    denoiser: Denoiser
    vae: AutoencoderKL
    rewards: tuple[Reward, ...]
    simulation: Simulation
    renoise: RenoiseTimes
    generator_lora_scale: float | None
    fake_scale: float
    dg_initial: float
    dynamic_steps: int
    guidance: float
    guidance_jitter: float
    fake_data: str
    latent_shape: tuple[int, int, int]
    generator_tx: optax.GradientTransformation
    fake_tx: optax.GradientTransformation
    ema_decay: float
    normaliser_floor: float = 1e-3
    reward_microbatch: int = 0
    decode_split: bool = False
    method: MethodPlan = MethodPlan()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        factor = self.vae.config.downsampling
        return self.latent_shape[0] * factor, self.latent_shape[1] * factor

    @property
    def rollout_kernel(self) -> Kernel:
        """The kernel of stored rollouts."""
        return self.method.policy_kernel or self.simulation.kernel

    @property
    def fake_simulation(self) -> Simulation:
        """Where the student is called for the fake score's samples: at inputs such as the generator's updates have."""
        kernel = self.method.policy_kernel
        return self.simulation if kernel is None else dataclasses.replace(self.simulation, mode=str(kernel))

    @property
    def policy_steps(self) -> int:
        """How many steps of a rollout get a policy gradient; the last step is deterministic."""
        return self.method.policy_steps or self.simulation.steps - 1


@flax.struct.dataclass
class RealImages:
    """Latents of real images ``[n, h, w, c]`` with their captions, for a discriminator."""

    latents: Array
    cond: Conditioning


@flax.struct.dataclass
class Frozen:
    """Networks that are read and never changed, the unconditional prompt (one row), and real images if there are."""

    base: Tree
    vae: Tree
    rewards: dict[str, Tree]
    uncond: Conditioning
    real: RealImages | None = None


@flax.struct.dataclass
class Batch:
    """One batch of prompts, encoded: for the denoiser, and for each reward ``[b, d]``."""

    cond: Conditioning
    reward_text: dict[str, Array]


def generator_weights(plan: Plan, trained: Tree, base: Tree) -> Weights:
    """The student: a LoRA on the frozen base, or a full tree with the base's buffers."""
    if plan.generator_lora_scale is None:
        return Weights(with_buffers(trained, base))
    return Weights(base, trained, plan.generator_lora_scale)


def keys_of(state: TrainState, fold: Array | int | None = None) -> Keys:
    """The keys of one update by purpose; ``fold`` tells apart several updates on one rollout."""

    def key(purpose: str) -> Array:
        own = purpose_key(state, state.inner, purpose)
        return own if fold is None else jax.random.fold_in(own, fold)

    return key


def grouped(batch: Batch, group: int) -> Batch:
    """The batch with the first prompt of every ``group`` consecutive rows in all of them."""
    if group == 1:
        return batch

    def repeat(x: Array) -> Array:
        firsts = x.reshape(-1, group, *x.shape[1:])[:, :1]
        return jax.numpy.broadcast_to(firsts, (firsts.shape[0], group, *x.shape[1:])).reshape(x.shape)

    return Batch(map_rows(repeat, batch.cond), jax.tree.map(repeat, batch.reward_text))
