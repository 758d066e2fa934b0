"""The gap and the alarm."""

import numpy as np
import pytest

from dmdr_jax.evaluation.overoptimisation import GAP, Alarm, Observation, Thresholds, best_step, find_alarm, reward_gap

TEACHER = {"reward/a": np.array([0.0, 2.0]), "reward/b": np.array([0.0, 20.0]), "judge/c": np.array([-1.0, 1.0])}


def test_gap_in_standard_deviations_of_the_teacher():
    student = {"reward/a": np.array([3.0, 1.0]), "reward/b": np.array([10.0, 50.0]), "judge/c": np.array([0.0, -2.0])}
    # z of a: 2, 0; of b: 0, 4; of c: 0, -2.
    assert reward_gap(student, TEACHER)[GAP].tolist() == [1.0, 4.0]
    assert reward_gap(TEACHER, TEACHER)[GAP].mean() == 0


def test_scale_and_offset_of_a_reward_do_not_matter():
    rng = np.random.default_rng(0)
    teacher = {"reward/a": rng.random(9), "judge/b": rng.random(9)}
    student = {"reward/a": rng.random(9), "judge/b": rng.random(9)}
    moved = [{"reward/a": 26 * x["reward/a"] - 3, "judge/b": x["judge/b"]} for x in (student, teacher)]
    assert reward_gap(*moved)[GAP] == pytest.approx(reward_gap(student, teacher)[GAP])


def test_no_gap_without_both_kinds():
    assert reward_gap({"reward/a": np.ones(2)}, TEACHER) == {}
    constant = {"reward/a": np.ones(2), "judge/c": np.ones(2)}
    assert reward_gap(TEACHER, constant) == {}


def history(trained, held_out, diversity=None):
    shares = diversity or [None] * len(trained)
    return [Observation(100 * i, *values) for i, values in enumerate(zip(trained, held_out, shares))]


def test_alarm_where_the_judge_falls_behind():
    found = find_alarm(history([0, 0.5, 1.0, 1.6, 2.2, 2.5], [0, 0.4, 0.6, 0.4, 0.1, -0.2]))
    assert (found.step, found.best) == (500, 200)
    assert "fell by 0.80 standard deviations from their best at step 200" in found.reason
    assert "moved away from them by 2.30" in found.reason


def test_no_alarm_while_both_rise():
    assert find_alarm(history([0, 1, 2, 3, 4], [0, 0.3, 0.5, 0.7, 0.9])) is None


def test_a_gap_that_was_there_from_the_beginning_is_none():
    assert find_alarm(history([2, 2.1, 2.2, 2.2], [0, 0.3, 0.25, 0.2])) is None


def test_rewards_that_fall_together_are_none():
    falling = history([1, 2, 1.4, 0.9, 0.5], [0, 1, 0.5, 0, -0.5])
    assert find_alarm(falling) is None and best_step(falling) == 400


def test_a_slow_drift_keeps_the_best_not_the_last():
    """The shape of a run with rewards alone: trained ones creep up, held-out ones have long turned."""
    drift = history([0.0, 0.06, 0.1, 0.07, 0.12, 0.13], [-0.4, -0.28, -0.25, -0.51, -0.56, -0.64])
    found = find_alarm(drift)
    assert (found.step, found.best) == (500, 200)
    assert best_step(drift[:5]) == 300  # beyond a threshold once, which is no alarm yet and no state to keep


def test_one_bad_measurement_is_none():
    assert find_alarm(history([0, 2, 0.5, 0.6], [0, -1, 0.4, 0.5])) is None


def test_lost_diversity_is_an_alarm_of_its_own():
    found = find_alarm(history([0, 0.1, 0.2, 0.3], [0, 0.1, 0.2, 0.3], [1.0, 0.8, 0.5, 0.4]))
    assert found == Alarm(300, 100, "diversity is down to 0.40 of the teacher's.")


def test_lost_colours_are_an_alarm_of_their_own():
    run = [Observation(i, 0.1 * i, 0.1 * i, 1.0, share) for i, share in enumerate((0.8, 1.0, 0.6, 0.3))]
    assert find_alarm(run) == Alarm(3, 1, "the spread of colours is down to 0.30 of the teacher's.")


def test_thresholds_are_settings():
    run = history([0, 1, 2], [0, 0.2, -0.3])
    assert find_alarm(run, Thresholds(patience=1)).step == 200
    assert find_alarm(run, Thresholds(gap=3, patience=1)) is None
    assert find_alarm([]) is None
