"""The settings that all of the authors' text-to-image runs share; see the package's docstring."""

from ml_collections import ConfigDict

from configs import base

STAGES = ("cold", "joint")


def get_config(stage: str, *, cold_steps: int, reward_weight: float) -> ConfigDict:
    """The base of a file's `get_config`.

    Args:
      stage: "cold", distribution matching alone, or "joint", with the rewards.
      cold_steps: generator updates of the cold start.
      reward_weight: of each of the two rewards.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; write FILE.py:cold or FILE.py:joint")
    c = base.get_config()
    c.compute_dtype = c.base_dtype = "bfloat16"
    c.seed = 30
    c.ema = 0.0
    c.fake.data = "simulated"
    c.dynamics.tau_low, c.dynamics.tau_high = 1e-3, 1.0
    c.dm.normaliser_floor = 1e-8
    c.optim.generator.weight_decay, c.optim.fake.weight_decay = 0.01, 0.0
    c.t5_length = 128
    if stage == "joint":
        c.rewards.clip = base.reward("", weight=reward_weight, kind="dfn", start=cold_steps)
        c.rewards.hps = base.reward("", weight=reward_weight, kind="hps", start=cold_steps)
        c.rewards.hps.prompt_prefix = "Realistic photo "
        c.watch.rewards.pick = base.judge("", kind="pickscore")  # ours: held out, watched where its path is given
    return c
