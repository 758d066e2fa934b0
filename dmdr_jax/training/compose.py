"""A method put together: from its settings to terms, to what the plan holds for them, and to what the state keeps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmdr_jax import methods
from dmdr_jax.diffusion.denoiser import Denoiser
from dmdr_jax.diffusion.kernels import parse_kernel
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.distill.bridge import CONSISTENCY_TIMES, Boundary
from dmdr_jax.distill.bridge import NORMALISERS as BOUNDARY_NORMALISERS
from dmdr_jax.distill.features import FeatureSpec, feature_layers, feature_width
from dmdr_jax.distill.gan import GanSpec, init_head
from dmdr_jax.distill.simulate import Simulation
from dmdr_jax.distill.split import NORMALISERS as SPLIT_NORMALISERS
from dmdr_jax.distill.split import SCHEDULES, SplitTimes
from dmdr_jax.errors import UserError
from dmdr_jax.objectives.advantages import COMBINE, NORMALISE, Advantages
from dmdr_jax.objectives.adversarial import Adversarial
from dmdr_jax.objectives.anchor import Anchor
from dmdr_jax.objectives.augmentation import AdvantageAugmentation
from dmdr_jax.objectives.base import (
    DM_REWARD,
    FAKE_ON_ROLLOUT,
    FAKE_SCORE_NEEDS,
    GROUPS,
    IMPORTANCE,
    LAST_STEP,
    MATCHING,
    PAIRS,
    REFERENCE,
    REUSE,
    SAMPLE_NEEDS,
    TARGETS,
    TRANSITIONS,
    Term,
    needs_of,
)
from dmdr_jax.objectives.dm import DistributionMatching
from dmdr_jax.objectives.dpo import FORMS, PairPreference
from dmdr_jax.objectives.drift import Drift
from dmdr_jax.objectives.last_step import LastStepReward
from dmdr_jax.objectives.policy import PolicyGradient
from dmdr_jax.objectives.refl import ReFL
from dmdr_jax.objectives.target import TargetPreference
from dmdr_jax.rewards.base import Reward, RewardSpec, require_gradient
from dmdr_jax.training.plan import MethodPlan, Plan

Array = jax.Array
Tree = Any
Specs = tuple[RewardSpec, ...]

DRAWS = {"plain": "sample", "split": "sample", "boundary": "sample"} | dict.fromkeys(("renoise_group", "prompt_group"))
DENSITIES = ("gaussian", "rtdmd")
KL_FORMS = ("gaussian", "flow_grpo")
STEPS_OF = ("batch", "prompt")
TARGET_GROUPS = ("both", "renoise", "fake")
OLD_STUDENTS = ("block", "average")
ANCHORS = ("reference", "dm")


def make_terms(config: Any, rewards: Sequence[Reward]) -> tuple[Term, ...]:
    """The generator's objective.

    Raises:
      UserError: nothing is trained, or the rewards are not what the method needs.
    """
    config = methods.resolve(config)
    method = methods.method_of(config)
    specs = tuple(reward.spec for reward in rewards) if method.rewards != "none" else ()
    if method.rewards == "required" and not specs:
        raise UserError(f"the method {config.method!r} needs a reward: give one in config.rewards a weight.")
    if method.gradient:
        require_gradient(rewards, f"the method {config.method!r}")
    terms = tuple(term for term in BUILDERS[config.method](config, specs) if term is not None)
    if not terms:
        raise UserError("nothing to train: config.dm.weight is 0 and no reward has a weight.")
    if not any(term.active(0) for term in terms):
        raise UserError("no term is active at step 0: give a reward start=0, or config.dm.weight a positive value.")
    return terms


def _start(specs: Specs) -> int:
    """The end of the cold start: the first step with a reward."""
    return min((spec.start for spec in specs), default=0)


def _dm(config: Any, **own: Any) -> DistributionMatching | None:
    weight, extra = own.pop("weight", config.dm.weight), own.pop("extra", frozenset())
    if config.dm.form == "prompt_group":
        extra |= {GROUPS}
    if config.rollout.reuse:
        extra |= {FAKE_ON_ROLLOUT}
    return DistributionMatching(weight, extra=extra, **own) if weight else None


def _cold_start(config: Any, specs: Specs) -> DistributionMatching | None:
    """Distribution matching until the rewards start."""
    return _dm(config, until=_start(specs)) if _start(specs) else None


def advantages(config: Any, specs: Specs) -> Advantages:
    group = config.group
    _choice("group.normalise", group.normalise, NORMALISE)
    _choice("group.combine", group.combine, COMBINE)
    return Advantages(specs, group.normalise, group.combine, group.limit)


def _policy(config: Any, specs: Specs, **own: Any) -> PolicyGradient:
    settings = {"kl": config.policy.kl, "balance": config.policy.balance * config.dm.weight} | own
    return PolicyGradient(advantages(config, specs), config.policy.weight, config.policy.clip, **settings)


def _dpo(config: Any, specs: Specs) -> PairPreference:
    dpo = config.dpo
    _choice("dpo.form", dpo.form, FORMS)
    return PairPreference(advantages(config, specs), dpo.form, dpo.beta, dpo.clip, dpo.weight)


def _adversarial(config: Any) -> Adversarial | None:
    return Adversarial(config.gan.weight) if config.gan.images and config.gan.weight else None


def _refl(specs: Specs) -> ReFL | None:
    return ReFL(specs) if specs else None


def _augmented(config: Any, specs: Specs) -> tuple[Term | None, ...]:
    settings = config.augmentation
    term = AdvantageAugmentation(advantages(config, specs), config.dm.weight, settings.kappa, settings.shift)
    return _cold_start(config, specs), term


def _gndm(config: Any, specs: Specs) -> tuple[Term | None, ...]:
    importance = config.gndm.importance if config.rollout.updates > 1 else 0.0
    if config.gndm.mode == "scalar":
        return _cold_start(config, specs), _policy(config, specs, dm_weight=config.gndm.share, balance=0.0)
    policy = _policy(config, specs) if specs else None
    return _dm(config, importance=importance), policy


def _rtdmd(config: Any, specs: Specs) -> tuple[Term | None, ...]:
    settings = config.last_step
    extra = {FAKE_ON_ROLLOUT} | (set() if settings.every_step else {LAST_STEP})
    joint = _dm(config, weight=settings.dm_weight, start=_start(specs), extra=frozenset(extra))
    last = LastStepReward(specs, settings.weight, settings.margin, not settings.every_step)
    return _cold_start(config, specs), joint, _policy(config, specs), last if settings.weight else None


def _drpo(config: Any, specs: Specs) -> tuple[Term | None, ...]:
    drpo = config.drpo
    anchor = _choice("drpo.anchor", drpo.anchor, ANCHORS)
    best, worst, towards, away = drpo.weights
    term = Drift(
        advantages(config, specs),
        drpo.count or config.group.size // 2,
        drpo.weight,
        tuple(drpo.radii),
        best,
        worst,
        towards,
        away,
        drpo.reference_weight if anchor == "reference" else 0.0,
    )
    return _dm(config) if anchor == "dm" else _cold_start(config, specs), term


def _refl_only(config: Any, specs: Specs) -> tuple[Term | None, ...]:
    anchor = Anchor(config.refl.anchor, _start(specs)) if config.refl.anchor else None
    return _cold_start(config, specs), _refl(specs), anchor


def _gdmd(config: Any, specs: Specs) -> tuple[Term | None, ...]:
    _choice("gdmd.group", config.gdmd.group, TARGET_GROUPS)
    return _dm(config), TargetPreference(specs, config.gdmd.beta, config.gdmd.weight)


BUILDERS: dict[str, Callable[[Any, Specs], tuple[Term | None, ...]]] = {
    "dmd": lambda c, s: (_dm(c),),
    "dmd2": lambda c, s: (_dm(c), _adversarial(c)),
    "dmdr_refl": lambda c, s: (_dm(c), _refl(s)),
    "dmdr_srpo": lambda c, s: (_dm(c), _refl(s)),
    "dmdr_grpo": lambda c, s: (_dm(c), _policy(c, s)),
    "dmdr_dpo": lambda c, s: (_dm(c), _dpo(c, s)),
    "ddmd": lambda c, s: (_dm(c),),
    "ddmd_adv": _augmented,
    "gdmd": _gdmd,
    "gndm": _gndm,
    "gndmr": _gndm,
    "rtdmd": _rtdmd,
    "drpo": _drpo,
    "refl_only": _refl_only,
    "dpo_only": lambda c, s: (_cold_start(c, s), _dpo(c, s)),
    "grpo_only": lambda c, s: (_cold_start(c, s), _policy(c, s)),
}
"""The terms of each method, of its resolved configuration and the rewards' specs."""


def make_method_plan(
    config: Any, denoiser: Denoiser, simulation: Simulation, rewards: Sequence[Reward], optimiser: Callable[[Any], Any]
) -> MethodPlan:
    """What the plan holds for the method's terms.

    Args:
      optimiser: from settings with ``lr``, ``weight_decay`` and ``warmup`` to an optimiser.

    Raises:
      UserError: sizes, kernel or choices do not fit.
    """
    config = methods.resolve(config)
    terms = make_terms(config, rewards)
    needs, specs = needs_of(terms), tuple(reward.spec for reward in rewards)
    form = _choice("dm.form", config.dm.form, tuple(DRAWS))
    _check(config, terms, needs, simulation, denoiser)
    _check_reuse(config, terms)
    keeps = {REFERENCE: "reference", TARGETS: "spread"}
    gan = _gan_spec(config, denoiser, optimiser)
    kept = {name for need, name in keeps.items() if need in needs} | ({"gan"} if gan else set())
    is_gdmd = TARGETS in needs
    return MethodPlan(
        group=config.group.size,
        shared_start=config.group.shared_start,
        policy_kernel=parse_kernel(config.rollout.kernel) if config.rollout.kernel else None,
        policy_steps=config.policy.steps,
        steps_of=_choice("policy.steps_of", config.policy.steps_of, STEPS_OF),
        shared_noise=config.policy.shared_noise,
        density=_choice("policy.density", config.policy.density, DENSITIES),
        kl_form=_choice("policy.kl_form", config.policy.kl_form, KL_FORMS),
        updates=config.fake.updates if is_gdmd else config.rollout.updates,
        fake_updates=config.fake.updates if is_gdmd or config.rollout.reuse else config.last_step.fake_updates,
        draws=config.gndm.draws,
        draw_mode=DRAWS[form] or form,
        draw_rms=config.gndm.rms,
        targets=config.gdmd.group,
        targets_normalised=config.gdmd.normalised,
        old=_choice("gdmd.old", config.gdmd.old, OLD_STUDENTS),
        spread_decay=config.gdmd.spread,
        ranking=advantages(config, specs) if specs else None,
        keeps=frozenset(kept),
        reference_start=_start(specs),
        reference_refresh=max(config.dpo.refresh, config.policy.refresh),
        split=_split(config, denoiser) if form == "split" else None,
        boundary=_boundary(config, simulation.grid) if form == "boundary" else None,
        features=FeatureSpec(feature_layers(denoiser.module, wide=True), config.drpo.time, config.drpo.cells),
        gan=gan,
    )


def _split(config: Any, denoiser: Denoiser) -> SplitTimes:
    split, student = config.split, config.student
    shifted = isinstance(denoiser.process, Flow) and not student.timesteps
    return SplitTimes(
        _choice("split.schedule", split.schedule, SCHEDULES),
        student.shift if shifted else 1.0,
        config.dynamics.tau_low,
        config.dynamics.tau_high,
        _choice("split.normaliser", split.normaliser, SPLIT_NORMALISERS),
        config.dynamics.rs == "uniform",
    )


def _boundary(config: Any, grid: tuple[float, ...]) -> Boundary:
    boundary = config.boundary
    normaliser = _choice("boundary.normaliser", boundary.normaliser, BOUNDARY_NORMALISERS)
    times = _choice("boundary.times", boundary.times, CONSISTENCY_TIMES)
    low, high = config.dynamics.tau_low, config.dynamics.tau_high
    return Boundary(normaliser, boundary.consistency, boundary.jump, low, high, grid if times == "grid" else ())


def _gan_spec(config: Any, denoiser: Denoiser, optimiser: Callable[[Any], Any]) -> GanSpec | None:
    if config.method != "dmd2" or not config.gan.images:
        return None
    from ml_collections import ConfigDict

    tx: optax.GradientTransformation = optimiser(ConfigDict(dict(lr=config.gan.lr, weight_decay=0.0, warmup=0)))
    return GanSpec(feature_layers(denoiser.module), config.gan.fake_weight, tx)


def _check(
    config: Any, terms: Sequence[Term], needs: frozenset[str], simulation: Simulation, denoiser: Denoiser
) -> None:
    """Refuses what would fail later, or act in silence."""
    size, steps = config.group.size, simulation.steps
    if GROUPS in needs:
        if size < 2:
            raise UserError(f"the method {config.method!r} compares samples of a prompt: config.group.size is {size}.")
        if config.batch % size:
            raise UserError(f"config.batch {config.batch} must be a multiple of config.group.size {size}.")
    elif size != 1:
        raise UserError(f"config.group.size is {size}, but the method {config.method!r} has no groups: leave it at 1.")
    if config.method == "drpo" and config.drpo.count > size // 2:
        raise UserError(f"config.drpo.count {config.drpo.count} is more than half of config.group.size {size}.")
    kernel = parse_kernel(config.rollout.kernel) if config.rollout.kernel else simulation.kernel
    kernel.check(denoiser.process)
    if needs & {TRANSITIONS, PAIRS, IMPORTANCE}:
        if not kernel.stochastic:
            raise UserError(
                f"the method {config.method!r} needs a sampler with randomness, and {kernel} has none: take"
                " config.student.simulation=renoise or cps(0.9), or give config.rollout.kernel."
            )
        if steps < 2 or config.policy.steps > steps - 1:
            raise UserError(
                f"config.student.steps {steps} leaves {steps - 1} steps for a policy gradient, as the last is"
                f" deterministic, and config.policy.steps asks for {config.policy.steps or 'all of them'}."
            )
    if config.dm.form == "boundary" and kernel.family != "cps":
        raise UserError(f"config.dm.form=boundary needs the kernel ode, renoise or cps(eta), not {kernel}.")
    if DM_REWARD in needs and config.dm.form != "plain":
        raise UserError(
            f"config.gndm.mode=scalar judges whole samples: leave config.dm.form plain, not {config.dm.form}."
        )
    if TARGETS in needs and config.dm.form not in ("plain", "split"):
        raise UserError(
            f"GDMD judges one target after the other: config.dm.form is plain or split, not {config.dm.form}."
        )
    if needs & SAMPLE_NEEDS and simulation.mode == "ode_final" and not config.rollout.kernel:
        raise UserError(
            f"the method {config.method!r} keeps whole rollouts, among whose states the student's inputs then are:"
            " config.student.simulation=ode_final renoises instead; take renoise, ode or cps(0.9)."
        )
    _refuse_unread(config, terms, needs)


def _refuse_unread(config: Any, terms: Sequence[Term], needs: frozenset[str]) -> None:
    """Refuses keys, of groups that a method reads in part, that are set and would change nothing."""
    from configs import base

    unread = {
        "group": () if GROUPS in needs else ("normalise", "combine", "limit", "shared_start"),
        "rollout": (
            *(() if needs & SAMPLE_NEEDS else ("kernel",)),
            *(() if needs & REUSE and TARGETS not in needs else ("updates",)),
        ),
        "policy": (
            ()
            if any(isinstance(term, PolicyGradient) for term in terms)
            else ("weight", "clip", "kl", "kl_form", "balance", "refresh")
        ),
        "refl": () if config.method == "refl_only" else ("anchor",),
    }
    plain, settings = base.get_config(), methods.settings_of(config)
    for group, names in unread.items():
        for name in names:
            if methods.is_set(group, name, config[group][name], plain, settings):
                key = f"config.{group}.{name}"
                raise UserError(f"{key} is set, but the method {config.method!r} does not read it here: leave it out.")


def _check_reuse(config: Any, terms: Sequence[Term]) -> None:
    """Fake updates on the generator's rollout are there wherever the distribution is matched, and nowhere else."""
    if not config.rollout.reuse:
        return
    others = [t.name for t in terms if t.needs & FAKE_SCORE_NEEDS and t.name not in MATCHING]
    if others or config.method == "rtdmd":
        raise UserError(
            "config.rollout.reuse is for methods whose fake score serves distribution matching alone;"
            f" {config.method!r} trains it in a way of its own: leave it out."
        )


def check_groups(config: Any, devices: int) -> None:
    """UserError where a group of rows would be split over devices."""
    config = methods.resolve(config)
    own = config.batch // devices
    if own % config.group.size:
        raise UserError(
            f"each of {devices} devices has {own} rows of config.batch {config.batch}, not a multiple of"
            f" config.group.size {config.group.size}: take another batch or size."
        )


def extra_state(plan: Plan, key: Array, generator: Tree) -> Tree:
    """What `TrainState.extra` holds at the start, where ``MethodPlan.keeps`` has its name."""
    extra: dict[str, Tree] = {}
    if "reference" in plan.method.keeps:
        extra["reference"] = jax.tree.map(jnp.copy, generator)
    if "spread" in plan.method.keeps:
        extra["spread"] = {reward.spec.name: jnp.zeros(2) for reward in plan.rewards}
    if "gan" in plan.method.keeps:
        spec, width = plan.method.gan, feature_width(plan.denoiser.module)
        head = init_head(key, dict.fromkeys(spec.layers, width), spec.width)
        extra["gan"] = {"head": head, "opt": spec.tx.init(head)}
    return extra


def _choice(key: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UserError(f"config.{key} is {value!r}; choose one of: {', '.join(known)}.")
    return value
