"""When a reward is pushed beyond what it means: the gap between trained and held-out rewards, and an alarm.

A reward is a stand-in. Pushed far enough it keeps rising while what it stood for falls: held-out rewards, the
diversity of the images, their likeness to the teacher's. In z-units (the teacher's mean and standard deviation on the
same prompts) the *gap* is

    mean over trained rewards of z  -  mean over held-out rewards of z

for each image; 0 for the teacher. Equal gains of both leave it at 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

TRAINED, HELD_OUT = "reward/", "judge/"
"""How keys of the two kinds of rewards begin."""

GAP = "reward_gap"


def reward_gap(scores: Mapping[str, np.ndarray], teacher: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gap ``[n]`` of each image, under its name; nothing unless there are both kinds of rewards.

    Args:
      scores: by key, ``[n]``; what is no reward is passed over.
      teacher: the teacher's on the same prompts. A reward that does not vary there is left out.
    """
    z = {prefix: [_z(scores[k], teacher[k]) for k in scores if _varies(k, prefix, teacher)] for prefix in _KINDS}
    if not (z[TRAINED] and z[HELD_OUT]):
        return {}
    return {GAP: np.mean(z[TRAINED], 0) - np.mean(z[HELD_OUT], 0)}


_KINDS = (TRAINED, HELD_OUT)


def _varies(key: str, prefix: str, teacher: Mapping[str, np.ndarray]) -> bool:
    return key.startswith(prefix) and key in teacher and np.std(teacher[key]) > 0


def _z(values: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float64) - np.mean(teacher)) / np.std(teacher)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """When the alarm is raised.

    Attributes:
      gap: in z-units, above which the trained rewards have left the held-out ones behind.
      fall: in z-units, of the held-out rewards below their best so far.
      diversity: share of the teacher's below which diversity counts as lost.
      chroma: times the teacher's, above which images count as gaudy; 0: not watched.
      clipped: share of clipped pixels above the teacher's that counts as too much; 0: not watched.
      patience: measurements in a row that must be beyond a threshold.
    """

    gap: float = 1.0
    fall: float = 0.3
    diversity: float = 0.7
    chroma: float = 0.0
    clipped: float = 0.0
    patience: int = 2


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known of a student at one step, on a fixed set of prompts and noise; None: not measured.

    Attributes:
      trained, held_out: mean z of the two kinds of rewards.
      diversity, chroma: as a share of the teacher's.
      clipped: share of clipped pixels, the teacher's taken off.
    """

    step: int
    trained: float | None = None
    held_out: float | None = None
    diversity: float | None = None
    chroma: float | None = None
    clipped: float | None = None

    @property
    def gap(self) -> float | None:
        """Trained over held-out rewards; None unless both are measured."""
        return None if self.trained is None or self.held_out is None else self.trained - self.held_out


@dataclasses.dataclass(frozen=True)
class Alarm:
    """An alarm.

    Attributes:
      step: at which it was raised.
      best: the last observed step before the gap opened (or something else was lost): the state to keep. None where
        no step was without fault.
      reason: in a sentence.
    """

    step: int
    best: int | None
    reason: str


def find_alarm(history: Sequence[Observation], thresholds: Thresholds = Thresholds()) -> Alarm | None:
    """The first alarm of a run, or None.

    It is raised where, in `Thresholds.patience` observations in a row, either the gap is too wide and the held-out
    rewards have fallen from their best, or diversity is lost, or images have become gaudy or clipped. A wide gap alone
    is none: trained rewards may well gain more than held-out ones while both rise.

    Args:
      history: observations in the order of their steps.
    """
    since: int | None = None
    best_judge = -np.inf
    for i, seen in enumerate(history):
        best_judge = best_judge if seen.held_out is None else max(best_judge, seen.held_out)
        reasons = [*_fallen_behind(seen, best_judge, thresholds), *_lost(seen, thresholds)]
        if not reasons:
            since = None
            continue
        since = i if since is None else since
        if i - since + 1 >= thresholds.patience:
            return Alarm(seen.step, last_good(history[: since + 1], thresholds), f"{' and '.join(reasons)}.")
    return None


def last_good(history: Sequence[Observation], thresholds: Thresholds = Thresholds()) -> int | None:
    """The last step at which no gap was open and nothing else lost; None if there is none."""
    for seen in reversed(history):
        if (seen.gap is None or seen.gap <= thresholds.gap) and not _lost(seen, thresholds):
            return seen.step
    return None


def best_step(history: Sequence[Observation], thresholds: Thresholds = Thresholds()) -> int | None:
    """The step to keep: before the first alarm where there is one, else the last good one."""
    alarm = find_alarm(history, thresholds)
    return last_good(history, thresholds) if alarm is None else alarm.best


def _fallen_behind(seen: Observation, best_judge: float, thresholds: Thresholds) -> list[str]:
    if seen.gap is None or seen.held_out is None:
        return []
    fallen = best_judge - seen.held_out
    if not (seen.gap > thresholds.gap and fallen > thresholds.fall):
        return []
    return [
        f"trained rewards are {seen.gap:.2f} standard deviations ahead of held-out ones, which fell by {fallen:.2f}"
    ]


def _lost(seen: Observation, thresholds: Thresholds) -> list[str]:
    """What is wrong with the images, whatever their rewards."""
    reasons = []
    if seen.diversity is not None and seen.diversity < thresholds.diversity:
        reasons.append(f"diversity is down to {seen.diversity:.2f} of the teacher's")
    if thresholds.chroma and seen.chroma is not None and seen.chroma > thresholds.chroma:
        reasons.append(f"chroma is {seen.chroma:.2f} times the teacher's")
    if thresholds.clipped and seen.clipped is not None and seen.clipped > thresholds.clipped:
        reasons.append(f"{seen.clipped:.1%} more of the pixels are clipped than of the teacher's")
    return reasons
