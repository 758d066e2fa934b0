"""What the curves of a run are called and what they say: for the console, TensorBoard and the report.

docs/training.md tells how to read them, docs/methods.md what each is, with its equation.
"""

import re
from typing import NamedTuple


class Name(NamedTuple):
    """A metric in words.

    Attributes:
      title: as a heading has it.
      text: what it is, and what to look for.
    """

    title: str
    text: str


NAMES = {
    "dm/score_gap": Name(
        "score gap",
        "Mean |x0 fake - x0 real|, guidance included: the signal of distribution matching. Bounded and not 0 while "
        "there is guidance; a steady rise says that the student runs away from the fake score.",
    ),
    "dm/distribution_gap": Name(
        "distribution gap",
        "Mean |x0 fake - x0 real without guidance|: how far student and teacher are apart as the fake score sees "
        "it. 0 at the start, then rises, then falls.",
    ),
    "dm/guidance_gap": Name(
        "guidance gap",
        "Mean |what guidance adds to the real score|. Far above the distribution gap for long: the fake score has "
        "stayed the teacher.",
    ),
    "dm/normaliser": Name(
        "normaliser",
        "What the gradient is divided by, mean |x0 - x0 real|. Near its floor the gradient is amplified noise.",
    ),
    "dm/gradient_norm": Name(
        "matching gradient",
        "Norm of distribution matching's gradient per sample, before the network.",
    ),
    "dm/loss": Name(
        "matching loss (means nothing)",
        "Half the mean square of a gradient divided by its own scale: it need not fall when the student gets "
        "better. Read the gaps.",
    ),
    "dm/importance_distance": Name(
        "importance distance",
        "Mean |importance weight - 1| of samples of an earlier update.",
    ),
    "fake/loss": Name(
        "fake loss",
        "Denoising loss of the fake score on the student's samples. Its level depends on the noise levels drawn: "
        "compare within fake_by_noise/.",
    ),
    "fake/gradient_norm": Name("fake gradient", "Global gradient norm of the fake score's update, before clipping."),
    "fake/consistency": Name("fake consistency", "Consistency term of the fake score on the bridge."),
    "generator/loss": Name("generator loss (means nothing)", "The sum of all terms; it has the matching loss in it."),
    "generator/gradient_norm": Name(
        "generator gradient",
        "Global gradient norm of the student's update, before clipping. Above config.optim.clip all the time: the "
        "clip sets the rate.",
    ),
    "reward/loss": Name("reward loss", "Weighted sum of relu(margin - score): falls as rewards rise."),
    "reward/clipped_values": Name(
        "clipped pixels",
        "Share of decoded values outside [0, 1]. Rising: saturation, where rewards have no gradient.",
    ),
    "policy/loss": Name("policy loss", "Clipped surrogate: near 0 by construction on the first update of a rollout."),
    "policy/ratio_distance": Name(
        "policy ratio",
        "Mean |likelihood ratio - 1|: how far the student moved on one rollout.",
    ),
    "policy/clipped": Name("clipped ratios", "Share of likelihood ratios beyond the clip."),
    "policy/advantage_size": Name("advantage size", "Mean |advantage|. 0: all samples of a group score alike."),
    "policy/balance": Name("policy balance", "Factor that brings the policy gradient to the size of matching's."),
    "policy/kl": Name("KL to reference", "Of the policy to the student of the end of the cold start."),
    "dpo/loss": Name("preference loss (weighted)", "Of each group's best against its worst, times its weight."),
    "dpo/preference": Name("preference loss", "0.693 at the start: no preference beyond the reference's."),
    "dpo/right": Name(
        "preferences right", "Share of pairs whose winner became likelier than the loser; half of those that are even."
    ),
    "gdmd/loss": Name("target preference loss", "Of the samples against their implicit targets."),
    "gdmd/optimality": Name("optimality", "Mean weight of the implicit targets; 1/2: rewards see no difference."),
    "gdmd/better": Name("better targets", "Share of implicit targets that score above their samples."),
    "gan/loss": Name("discriminator loss", "1.386 (two coin tosses) where it cannot tell, times its weight."),
    "gan/right": Name("discriminator right", "Share of real and drawn images that it tells apart."),
    "gan/gradient_norm": Name("discriminator gradient", "Norm of its head's gradient."),
    "gan/generator_loss": Name("adversarial loss", "Of the student against the discriminator, times its weight."),
    "gan/student_logit": Name(
        "student's logit",
        "What the discriminator says of the student; above 0: taken for real.",
    ),
    "drift/loss": Name("drift loss", "Hardly changes by construction: watch the rewards."),
    "drift/distance_to_reference": Name("distance to reference", "Of the student's features to the reference's."),
    "augmentation/dose_size": Name("dose of guidance", "Mean |shift + kappa advantage|."),
    "anchor/distance": Name("distance to anchor", "Mean square distance to the student of the end of the cold start."),
    "last_step/loss": Name("last step's loss", "Reward gradient of the last sampler step, weighted."),
    "ode/loss": Name("regression loss", "Of the student on the teacher's pairs of noise and latents, before the run."),
    "ode/error": Name("regression error", "Mean square error of the student's latents on the pairs."),
    "ode/gradient_norm": Name("regression gradient", "Global gradient norm, before clipping."),
    "skipped/steps": Name("skipped steps", "Updates so far whose gradient was not finite and was not applied."),
    "watch/z_trained": Name(
        "trained rewards, z", "Of the canaries, in the teacher's standard deviations above its mean."
    ),
    "watch/z_held_out": Name("held-out rewards, z", "The same of the rewards never trained on: this one counts."),
    "watch/reward_gap": Name(
        "reward gap",
        "Trained minus held-out rewards, in the teacher's standard deviations. Opening while the held-out ones fall: "
        "reward hacking.",
    ),
    "watch/clipped_more": Name(
        "clipped pixels, above the teacher's", "Share of the canaries' pixels, minus its share."
    ),
    "watch/alarm": Name("alarm", "1 from the step on at which the run counts as over-optimised."),
    "samples/canary": Name("canaries", "The averaged student at the prompts and noise of the watch."),
    "samples/canary_teacher": Name("canaries, teacher", "The teacher at the prompts and noise of the watch."),
    "samples/student": Name("student", "The averaged student at fixed prompts and noise."),
    "samples/teacher": Name("teacher", "The teacher at the same prompts and noise, with guidance."),
}
"""By the metric's key in metrics.jsonl, which is also its tag in TensorBoard."""

PATTERNS = {
    r"reward/(.+)/weight": Name("{} weight", "The reward's weight in the loss: the ramp after its start."),
    r"reward/(.+)/beyond_margin": Name(
        "{} beyond margin",
        "Share of samples that reached the margin and get no gradient. Near 1: the reward has stopped training.",
    ),
    r"reward/(.+)": Name(
        "{}",
        "Mean raw score of the student's x0 at all its steps. Rising is meant; rising while the images get worse "
        "is hacking.",
    ),
    r"fake_by_noise/tau_(.+)_(.+)": Name(
        "fake loss, noise {} to {}",
        "Fake loss where the noise level fell between. All levels rising: the fake score is left behind. High "
        "levels alone falling for long: the samples become alike.",
    ),
    r"watch/reward/(.+)": Name("{}, canaries", "Mean raw score, of fixed prompts and noise, of a reward trained on."),
    r"watch/judge/(.+)": Name(
        "{}, canaries", "Mean raw score, of fixed prompts and noise, of a reward never trained on."
    ),
    r"watch/(.+)_share": Name("{}, to the teacher's", "Mean of the canaries, over that of the teacher's canaries."),
    r"watch/(.+)": Name("{}, canaries", "Mean over the canaries: fixed prompts and noise."),
    r"gdmd/spread/(.+)": Name("{} spread", "Running deviation of the reward's gains."),
}


def name_of(metric: str) -> Name | None:
    """The metric in words; None of one that has none."""
    if metric in NAMES:
        return NAMES[metric]
    for pattern, name in PATTERNS.items():
        if found := re.fullmatch(pattern, metric):
            return name._replace(title=name.title.format(*found.groups()))
    return None


def short(metric: str) -> str:
    """The metric's title; where it has none the last part of its key."""
    name = name_of(metric)
    return name.title if name else metric.rpartition("/")[2]
