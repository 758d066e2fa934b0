"""The methods: each a preset, a list of terms with weights and schedules; there is one train step for all.

``--config.method=NAME`` chooses one. A key of `configs/base.py` that is None there is the method's to say
(`Method.settings`, then `DEFAULTS`); what a configuration file or the command line sets is kept. Settings of a group
that the method does not read are refused when they are not the defaults: they would change nothing.

What the terms compute stands in `dmdr_jax.objectives`, how they are put together in `dmdr_jax.training.compose`.

**Passes.** `Method.passes` is the hand count of network passes in one generator step, per row of the batch, with
rewards active (`Passes`); `Method.cold_passes` that of the cold start. K is the student's steps, G rows per prompt, M
policy steps, U updates per rollout, S draws, E fake updates on the rollout. The texts say it for U = 1: more updates
on a rollout multiply the student's updates, the scores and the last step's reward gradient, nothing else (but for
denoising DPO's reference, whose noise is new each time). Fake updates in programs of their own are not in it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dmdr_jax.errors import UserError

DEFAULTS: dict[str, Any] = {
    "dm.weight": 1.0,
    "dm.form": "plain",
    "dynamics.dg": 0.5,
    "dynamics.rs": "dynamic",
    "fake.updates": 5,
    "group.size": 1,
    "rollout.updates": 1,
    "policy.weight": 1.0,
    "policy.kl": 0.0,
    "policy.steps": 0,
    "policy.shared_noise": False,
    "policy.clip": 1e-4,
    "policy.balance": 0.0,
    "dpo.beta": 50.0,
    "dpo.weight": 1.0,
}
"""What a None key means where the method does not say otherwise."""

FORM_GROUPS = {"split": "split", "boundary": "boundary", "renoise_group": "gndm", "prompt_group": "gndm"}
"""Which group belongs to which form of distribution matching, whatever the method."""

OWN_GROUPS = ("policy", "dpo", "gdmd", "gndm", "split", "boundary", "augmentation", "last_step", "drpo", "gan", "srpo")
"""Groups of keys that only some methods read."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers that passes depend on: see the module's text."""

    K: int = 4
    G: int = 1
    M: int = 3
    U: int = 1
    S: int = 1
    E: int = 0
    W: int = 0  # DrPO: anchored by the reference's drift (1) or by distribution matching (0); DMD2: images (1)


@dataclasses.dataclass(frozen=True)
class Passes:
    """Passes of networks per row in one generator step.

    Attributes:
      student: forwards of the student (or its reference) without gradient.
      student_update: forwards and backwards with respect to the student's weights.
      score: forwards of the frozen base with the guidance LoRA.
      score_gradient: forwards and backwards of it with respect to its input.
      fake_update: forwards and backwards with respect to the guidance LoRA.
      reward: decodings and rewards.
      reward_gradient: the same with the backward pass, decodings computed twice.
    """

    student: float = 0.0
    student_update: float = 0.0
    score: float = 0.0
    score_gradient: float = 0.0
    fake_update: float = 0.0
    reward: float = 0.0
    reward_gradient: float = 0.0


def matching(n: Sizes) -> Passes:
    """Distribution matching alone, which is also most methods' cold start."""
    return Passes(student=n.K - 1, student_update=1, score=3)


@dataclasses.dataclass(frozen=True)
class Method:
    """A preset.

    Attributes:
      doc: what it is, which reading was taken, its passes.
      passes: the hand count.
      cold_passes: the same before the first reward starts.
      settings: values of keys that are None in the configuration.
      groups: its own groups of keys.
      rewards: "none", "optional" or "required".
      gradient: whether the rewards must be differentiable.
    """

    doc: str
    passes: Callable[[Sizes], Passes]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: tuple[str, ...] = ()
    rewards: str = "required"
    gradient: bool = False
    cold_passes: Callable[[Sizes], Passes] = matching


METHODS: dict[str, Method] = {
    "dmd": Method(
        """Distribution matching with backward simulation, and nothing else: no rewards, no dynamic cold start.

        Passes: K - 1 student forwards for the input, 1 student update, 3 score forwards.""",
        matching,
        {"dynamics.dg": 0.0, "dynamics.rs": "uniform"},
        rewards="none",
    ),
    "dmd2": Method(
        """DMD2 (2405.14867): `dmd`, and with ``gan.images`` a discriminator on the fake score's features.

        The head is ours, see `dmdr_jax.distill.gan`; DMD2's one grid index per batch is ``student.shared_index``.
        Passes: as `dmd`; with images 1 score pass with gradient more.""",
        lambda n: Passes(student=n.K - 1, student_update=1, score=3, score_gradient=n.W),
        {"dynamics.dg": 0.0, "dynamics.rs": "uniform"},
        ("gan",),
        rewards="none",
    ),
    "dmdr_refl": Method(
        """DMDR (2511.13649) with reward feedback learning: the default.

        Passes: K - 1 student forwards, 1 student update, 3 score forwards, 1 reward with gradient.""",
        lambda n: Passes(student=n.K - 1, student_update=1, score=3, reward_gradient=1),
        rewards="optional",
        gradient=True,
    ),
    "dmdr_srpo": Method(
        """DMDR's unpublished variant: `dmdr_refl` with a contrast of texts (SRPO, 2509.06942) in the HPS reward.

        The authors' words, k = 0.1, for the rewards in ``srpo.rewards`` (by default those with "hps" in their name)
        that have no words of their own; they ran 200 to 300 steps of it with weights .1 for CLIP and 5 for HPS. The
        embedded world's rewards, which cannot read those words, have others (`shapes.contrast_words`).
        Passes: as `dmdr_refl`.""",
        lambda n: Passes(student=n.K - 1, student_update=1, score=3, reward_gradient=1),
        groups=("srpo",),
        gradient=True,
    ),
    "dmdr_grpo": Method(
        """DMDR with GRPO: few-step policy gradient, distribution matching in place of the KL term.

        The paper names Flow-GRPO and says no more; the authors answered that GRPO is kept as it is with DM for the KL.
        The kernel is the student's own (renoise or cps): the published SDE leaves too much noise in four steps
        (`dmdr_jax.diffusion.kernels`; ``rollout.kernel="flow_sde(0.7)"`` has it).
        Passes: K student forwards, 1 + M student updates, 3 score forwards, 1 reward.""",
        lambda n: Passes(student=n.K, student_update=n.U * (1 + n.M), score=3 * n.U, reward=1),
        {"group.size": 8},
        ("policy",),
    ),
    "dmdr_dpo": Method(
        """DMDR with online DPO: best against worst of each group, the reference is the student after the cold start.

        The paper names Diffusion-DPO; the authors advise the transition form (PSO) for distilled students, the default;
        ``dpo.form="denoising"`` is the other (beta 100 there), ``dpo.refresh`` renews the reference. With beta = 50 the
        preference's gradient at an estimate is some 200 times distribution matching's until the clip stops it (both
        by their formulas, eight samples a prompt), so its weight is .01 here; ``dpo_only`` has 1.
        Passes: K + 2M/G student forwards, 1 + 2M/G student updates, 3 score forwards, 1 reward (denoising: M = 1).""",
        lambda n: Passes(
            student=n.K + 2 * n.M / n.G, student_update=n.U * (1 + 2 * n.M / n.G), score=3 * n.U, reward=1
        ),
        {"group.size": 8, "dpo.weight": 0.01},
        ("dpo", "policy"),
    ),
    "ddmd": Method(
        """Decoupled DMD (2511.22677): matching and guidance augmentation at renoise levels of their own.

        Passes: as `dmd`, with 4 score forwards. With rewards in ``dmdr_refl``: ``dm.form="split"`` there.""",
        lambda n: Passes(student=n.K - 1, student_update=1, score=4),
        {"dm.form": "split", "dynamics.dg": 0.0, "dynamics.rs": "uniform"},
        rewards="none",
    ),
    "ddmd_adv": Method(
        """Decoupled DMD with the augmentation weighted by the advantage, as DMDR's authors advise.

        Passes: K - 1 student forwards, 1 student update, 4 score forwards, 1 reward.""",
        lambda n: Passes(student=n.K - 1, student_update=1, score=4, reward=1),
        {"dm.form": "split", "group.size": 8},
        ("augmentation",),
        cold_passes=lambda n: Passes(student=n.K - 1, student_update=1, score=4),
    ),
    "gdmd": Method(
        """GDMD (2604.19009): rewards judge the implicit targets of distribution matching.

        No code and no numbers are public; readings in `dmdr_jax.objectives.target`. One generator step is a block of
        U = ``fake.updates`` fake updates and as many student updates; no cold start is needed, and g is the teacher's
        own. The matching part keeps DMD's form, g_i at the student's estimate of now: Algorithm 1's regression onto the
        fixed target would add x - x_old to it, which (2) there has as its proximal pull.
        Passes: K student forwards, U student updates, 3U score forwards, U fake updates, 1 + U rewards.""",
        lambda n: Passes(student=n.K, student_update=n.U, score=3 * n.U, fake_update=n.E, reward=1 + n.U),
        {"dynamics.dg": 0.0, "dynamics.rs": "uniform"},
        ("gdmd",),
    ),
    "gndm": Method(
        """GNDM (2603.28460): distribution matching normalised over a group; our reading of an abstract.

        ``gndm.mode``: "renoise" (a group of S renoised points of one sample), "prompt" (one normaliser per prompt) or
        "scalar" (R_dm as a reward of a policy gradient). See `dmdr_jax.distill.dm`.
        Passes: renoise K - 1 student forwards, 1 student update, 3S score forwards; prompt the same with S = 1;
        scalar K student forwards, M student updates, 3S score forwards. With U > 1 updates per rollout the first two
        take K + U student forwards, U updates and U times the score forwards.""",
        lambda n: Passes(student=n.K - 1 if n.U == 1 else n.K + n.U, student_update=n.U, score=3 * n.S * n.U),
        {"dynamics.dg": 0.0, "dynamics.rs": "uniform"},
        ("gndm", "policy"),
        rewards="none",
    ),
    "gndmr": Method(
        """GNDMR: `gndm` with rewards, each normalised in its group, in a policy gradient beside it.

        ``policy.balance`` = 1: the policy gradient is scaled to the size of distribution matching's at the student's
        estimates, our reading of "adaptive weights".
        Passes: K student forwards, 1 + M student updates, 3S score forwards, 1 reward (scalar: M updates). With U > 1
        updates per rollout U student forwards more, for the likelihood of the student's input.""",
        lambda n: Passes(
            student=n.K + (n.U if n.U > 1 else 0), student_update=n.U * (1 + n.M), score=3 * n.S * n.U, reward=1
        ),
        {"dynamics.dg": 0.0, "dynamics.rs": "uniform", "group.size": 8, "policy.balance": 1.0},
        ("gndm", "policy"),
        cold_passes=lambda n: Passes(student=n.K - 1, student_update=1, score=3 * n.S),
    ),
    "rtdmd": Method(
        """RTDMD (2605.26108): AC-DMD as the cold start, then SubGRPO and the last step's reward gradient.

        The rollouts' kernel is the student's own, renoise by default; ``rollout.kernel="cps(0.9)"`` is the code's.
        Paper and code disagree. The bridge's variance is the code's (the paper's has the wrong noise level); the
        second stage matches at every step of the grid as eq. 18 says (``last_step.every_step``; the code only at the
        last, which leaves the earlier steps to the reward alone); the fake's consistency jumps are the code's
        (``boundary.times="grid"`` for the paper's), and so is one choice of policy steps for all prompts
        (``policy.steps_of="prompt"``). The bridge that is printed has no switch: its latents are at other noise levels
        than the networks would be told.
        Passes, stage 2: K student forwards, 1 + M student updates, 3 score forwards, E fake updates of 3 forwards and
        backwards each (1 with ``boundary.consistency=0``), 1 reward, 1 reward with gradient.""",
        lambda n: Passes(
            student=n.K,
            student_update=n.U * (1 + n.M),
            score=3 * n.U,
            fake_update=3 * n.E,
            reward=1,
            reward_gradient=n.U,
        ),
        {
            "dm.form": "boundary",
            "dynamics.dg": 0.0,
            "dynamics.rs": "uniform",
            "fake.updates": 10,
            "group.size": 16,
            "policy.steps": 2,
            "policy.shared_noise": True,
            "policy.clip": 1e-5,
        },
        ("policy", "last_step"),
        gradient=True,
    ),
    "drpo": Method(
        """DrPO (2606.02521): after a cold start by distribution matching, drifts in feature space by rank.

        Made for one-step students (``student.steps=1``); with more, all rows of a prompt share a grid index. Readings
        in `dmdr_jax.objectives.drift`.
        Passes: K - 1 student forwards and W of the reference, 1 student update, 1 base pass with gradient, W base
        forwards, 1 reward (W = 1 with the reference drift; 0 with ``drpo.anchor="dm"``, and 3 score forwards).""",
        lambda n: Passes(
            student=n.K - 1 + n.W, student_update=1, score=n.W + 3 * (1 - n.W), score_gradient=1, reward=1
        ),
        {"group.size": 16},
        ("drpo",),
    ),
    "refl_only": Method(
        """The paper's row "ReFL only": rewards alone after the cold start; the hinge is ReFL's own regulariser.

        ``refl.anchor`` adds a pull to the student of the end of the cold start.
        Passes: K - 1 student forwards, 1 student update, 1 reward with gradient (anchored: K forwards).""",
        lambda n: Passes(student=n.K - 1, student_update=1, reward_gradient=1),
        gradient=True,
    ),
    "dpo_only": Method(
        """The paper's row "DPO only": DPO alone after the cold start, held by its reference.

        Passes: K + 2M/G student forwards, 2M/G student updates, 1 reward.""",
        lambda n: Passes(student=n.K + 2 * n.M / n.G, student_update=n.U * 2 * n.M / n.G, reward=1),
        {"group.size": 8},
        ("dpo", "policy"),
    ),
    "grpo_only": Method(
        """The paper's row "GRPO only": GRPO alone after the cold start, with its KL term (Flow-GRPO's .04).

        Passes: K + M student forwards, M student updates, 1 reward.""",
        lambda n: Passes(student=n.K + n.M, student_update=n.U * n.M, reward=1),
        {"group.size": 8, "policy.kl": 0.04},
        ("policy",),
    ),
}


def method_of(config: Any) -> Method:
    """The configuration's method; UserError names the choices."""
    if config.method not in METHODS:
        raise UserError(f"config.method is {config.method!r}; choose one of: {', '.join(METHODS)}.")
    return METHODS[config.method]


def resolve(config: Any) -> Any:
    """A copy of the configuration in which the method has filled in what was None.

    Raises:
      UserError: the method does not exist, or settings are given that it does not read.
    """
    method, resolved = method_of(config), config.copy_and_resolve_references()
    settings = settings_of(config)
    _refuse_idle(config, method, settings)
    with resolved.unlocked():
        for key, value in settings.items():
            group, name = key.rsplit(".", 1)
            if resolved[group][name] is None:
                resolved[group][name] = value
        if config.method == "dmdr_srpo":
            _contrast(resolved)
    return resolved.lock() if config.is_locked else resolved


def settings_of(config: Any) -> dict[str, Any]:
    """What the keys that are None without it are by the configuration's method."""
    settings = DEFAULTS | dict(method_of(config).settings)
    if config.method in ("gndm", "gndmr"):
        settings |= gndm_settings(config.gndm.mode)
    if config.dpo.form == "denoising":
        settings["dpo.beta"] = 100.0
    return settings


def gndm_settings(mode: str) -> dict[str, Any]:
    """What GNDM's modes mean for other keys; UserError for an unknown one."""
    forms = {"renoise": "renoise_group", "prompt": "prompt_group", "scalar": "plain"}
    if mode not in forms:
        raise UserError(f"config.gndm.mode is {mode!r}; choose one of: {', '.join(forms)}.")
    return {"dm.form": forms[mode]} | ({} if mode == "renoise" else {"group.size": 8})


def uses_rewards(config: Any) -> bool:
    """Whether the method reads rewards; those of a configuration are left unread where it does not."""
    return method_of(config).rewards != "none"


def _refuse_idle(config: Any, method: Method, settings: Mapping[str, Any]) -> None:
    """Refuses settings without effect."""
    from configs import base

    plain, used = base.get_config(), {*method.groups, FORM_GROUPS.get(config.dm.form or settings["dm.form"])}
    for group in set(OWN_GROUPS) - used:
        for key, value in config[group].items():
            if is_set(group, key, value, plain, settings):
                raise UserError(
                    f"config.{group}.{key} is set, but the method {config.method!r} does not read config.{group}: leave"
                    f" it out, or choose {_or(name for name, m in METHODS.items() if group in m.groups)}."
                )


def is_set(group: str, key: str, value: Any, plain: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a value is neither the default nor the method's own (``settings``, of `settings_of`)."""
    return value not in (plain[group][key], settings.get(f"{group}.{key}"))


def _or(names: Any) -> str:
    names = list(names)
    return f"config.method={' or '.join(names)}" if names else "another config.dm.form"


def _contrast(config: Any) -> None:
    """Gives the chosen rewards the contrast of texts, where they have none."""
    from dmdr_jax.rewards import contrast
    from dmdr_jax.shapes import assets, contrast_words

    chosen = tuple(config.srpo.rewards) or tuple(name for name in config.rewards if "hps" in name)
    if missing := [name for name in chosen if name not in config.rewards]:
        raise UserError(f"config.srpo.rewards names {missing[0]!r}; the rewards are {', '.join(config.rewards)}.")
    if not chosen:
        raise UserError("the method dmdr_srpo contrasts the texts of a reward: name it in config.srpo.rewards.")
    for name in chosen:
        reward = config.rewards[name]
        if not reward.get("positive_words"):
            words = contrast_words if reward.path.startswith(assets.PREFIX) else contrast
            reward.positive_words = tuple(config.srpo.positive or words.POSITIVE)
            reward.negative_words = tuple(config.srpo.negative or words.NEGATIVE)
            reward.contrast = config.srpo.contrast
