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
      fall: in z-units, of the held-out rewards below their best so far.
      gap: in z-units, by which the gap is wider than it was at that best.
      diversity: share of the teacher's below which diversity, of content or of colour, counts as lost.
      chroma: times the teacher's, above which images count as gaudy; 0: not watched.
      clipped: share of clipped pixels above the teacher's that counts as too much; 0: not watched.
      patience: measurements in a row that must be beyond a threshold.
    """

    fall: float = 0.3
    gap: float = 0.3
    diversity: float = 0.7
    chroma: float = 0.0
    clipped: float = 0.0
    patience: int = 2


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is known of a student at one step, on a fixed set of prompts and noise; None: not measured.

    Attributes:
      trained, held_out: mean z of the two kinds of rewards.
      diversity, palette, chroma: as a share of the teacher's.
      clipped: share of clipped pixels, the teacher's taken off.
    """

    step: int
    trained: float | None = None
    held_out: float | None = None
    diversity: float | None = None
    palette: float | None = None
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
      best: the observed step to keep: of the best held-out rewards, where they fell; else the last one before
        something was lost. None where no step was without fault.
      reason: in a sentence.
    """

    step: int
    best: int | None
    reason: str


def find_alarm(history: Sequence[Observation], thresholds: Thresholds = Thresholds()) -> Alarm | None:
    """The first alarm of a run, or None.

    It is raised where, in `Thresholds.patience` observations in a row, either the held-out rewards have fallen from
    their best while the gap opened, or diversity is lost, or images have become gaudy or clipped. A wide gap alone is
    none, for trained rewards may well gain more while both rise; nor are rewards that fall together.

    Args:
      history: observations in the order of their steps.
    """
    since: int | None = None
    for i, seen in enumerate(history):
        reasons = _faults(history[: i + 1], thresholds)
        if not reasons:
            since = None
            continue
        since = i if since is None else since
        if i - since + 1 >= thresholds.patience:
            return Alarm(seen.step, _before(history, since, thresholds), f"{' and '.join(reasons)}.")
    return None


def best_step(history: Sequence[Observation], thresholds: Thresholds = Thresholds()) -> int | None:
    """The step to keep: what the alarm says, where there is one; else the last step without fault."""
    alarm = find_alarm(history, thresholds)
    if alarm is not None:
        return alarm.best
    faultless = [seen.step for i, seen in enumerate(history) if not _faults(history[: i + 1], thresholds)]
    return faultless[-1] if faultless else None


def _faults(history: Sequence[Observation], thresholds: Thresholds) -> list[str]:
    """What is wrong at the last observation."""
    seen = history[-1]
    return [*_fallen_behind(seen, _best_judged(history), thresholds), *_lost(seen, thresholds)]


def _before(history: Sequence[Observation], since: int, thresholds: Thresholds) -> int | None:
    """The step before things went wrong at index ``since``: of the best held-out rewards, if it is they that fell."""
    whole = [seen for seen in history[:since] if not _lost(seen, thresholds)]
    best = _best_judged(whole)
    if best is not None and _fallen_behind(history[since], best, thresholds):
        return best.step
    return whole[-1].step if whole else None


def _best_judged(history: Sequence[Observation]) -> Observation | None:
    """The first observation with the highest held-out rewards."""
    judged = [seen for seen in history if seen.held_out is not None]
    return max(judged, key=lambda seen: seen.held_out, default=None)


def _fallen_behind(seen: Observation, best: Observation | None, thresholds: Thresholds) -> list[str]:
    """What is wrong with the rewards, compared with when the held-out ones were best."""
    if best is None or seen.held_out is None or seen.gap is None or best.gap is None:
        return []
    fallen, opened = best.held_out - seen.held_out, seen.gap - best.gap
    if not (fallen > thresholds.fall and opened > thresholds.gap):
        return []
    return [
        f"held-out rewards fell by {fallen:.2f} standard deviations from their best at step {best.step}, and trained"
        f" ones moved away from them by {opened:.2f}"
    ]


def _lost(seen: Observation, thresholds: Thresholds) -> list[str]:
    """What is wrong with the images, whatever their rewards."""
    reasons = []
    if seen.diversity is not None and seen.diversity < thresholds.diversity:
        reasons.append(f"diversity is down to {seen.diversity:.2f} of the teacher's")
    if seen.palette is not None and seen.palette < thresholds.diversity:
        reasons.append(f"the spread of colours is down to {seen.palette:.2f} of the teacher's")
    if thresholds.chroma and seen.chroma is not None and seen.chroma > thresholds.chroma:
        reasons.append(f"chroma is {seen.chroma:.2f} times the teacher's")
    if thresholds.clipped and seen.clipped is not None and seen.clipped > thresholds.clipped:
        reasons.append(f"{seen.clipped:.1%} more of the pixels are clipped than of the teacher's")
    return reasons
