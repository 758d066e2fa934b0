"""Statistics against closed forms."""

import math

import numpy as np
import pytest

from dmdr_jax.evaluation.table import (
    Estimate,
    decide,
    estimate,
    format_estimate,
    format_interval,
    jackknife,
    markdown_table,
    paired,
)


def test_mean_and_sample_standard_error():
    x = np.array([1.0, 2.0, 4.0, 9.0])
    got = estimate(x)
    assert got.mean == 4.0
    assert got.n == 4
    assert got.se == pytest.approx(x.std(ddof=1) / 2)


def test_standard_error_of_a_proportion_is_binomial():
    verdicts = np.arange(200) < 60
    assert estimate(verdicts).se == pytest.approx(math.sqrt(0.3 * 0.7 / 199))


@pytest.mark.parametrize("value", [True, False])
def test_verdicts_that_are_all_alike_still_have_a_standard_error(value):
    got = estimate(np.full(40, value))
    assert got.mean == float(value)
    assert got.se == pytest.approx(math.sqrt(41 / 42 * (1 / 42) / 42))


def test_prompts_are_the_unit_where_images_share_one():
    # Images of a prompt are all alike: ten images of four prompts know no more than four images.
    by_prompt = np.array([0.0, 1.0, 0.0, 1.0])
    x, prompts = np.repeat(by_prompt, 10), np.repeat(["a", "b", "c", "d"], 10)
    assert estimate(x, prompts).se == pytest.approx(by_prompt.std(ddof=1) / 2)
    assert estimate(x).se == pytest.approx(0.5 / math.sqrt(39))


def test_prompts_of_unequal_weight():
    # Residuals from the mean 2.5 sum to -3 and +3 in the two prompts: se^2 = 2/1 * 18 / 4^2.
    assert estimate(np.array([1.0, 1.0, 1.0, 7.0]), ["a", "a", "b", "b"]).se == pytest.approx(
        max(math.sqrt(2 * 18 / 16), np.std([1, 1, 1, 7], ddof=1) / 2)
    )


def test_few_prompts_never_make_the_error_smaller():
    x = np.array([0.0, 1.0, 1.0, 0.0])  # prompts agree exactly, images do not
    assert estimate(x, ["a", "a", "b", "b"]).se == estimate(x).se > 0


def test_one_prompt_and_one_image():
    assert estimate(np.array([0.0, 1.0]), ["a", "a"]).se == pytest.approx(0.5)
    assert math.isnan(estimate(np.array([1.0])).se)
    assert math.isnan(estimate(np.array([])).mean)


def test_pairing_removes_what_prompts_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=500) * 10
    a, b = difficulty + 0.5 + rng.normal(size=500) * 0.1, difficulty + rng.normal(size=500) * 0.1
    got = paired(a, b)
    assert got.mean == pytest.approx((a - b).mean())
    assert got.se == pytest.approx((a - b).std(ddof=1) / math.sqrt(500))
    assert got.se < 0.01 < math.hypot(estimate(a).se, estimate(b).se)


def test_equal_verdicts_are_undecided_with_an_error():
    got = paired(np.zeros(30, bool), np.zeros(30, bool))
    assert (got.mean, got.se) == (0.0, pytest.approx(math.sqrt(2 / 32 / 32)))
    won = paired(np.ones(30, bool), np.zeros(30, bool))
    assert won.mean == 1.0
    assert 0 < won.se < 0.1


def test_paired_verdicts_are_subtracted_as_numbers():
    assert paired(np.array([True, False]), np.array([False, False])).mean == 0.5


def test_jackknife_of_a_mean_is_the_sample_standard_error():
    x = np.random.default_rng(1).normal(size=30)
    got = jackknife(lambda index: float(x[index].mean()), 30, blocks=30)
    assert got.mean == pytest.approx(x.mean())
    assert got.se == pytest.approx(x.std(ddof=1) / math.sqrt(30))


def test_jackknife_in_blocks_of_a_mean():
    x = np.random.default_rng(2).normal(size=40)
    means = x.reshape(10, 4).mean(0)  # block b holds images b, b + 4, ...
    got = jackknife(lambda index: float(x[index].mean()), 40, blocks=4)
    assert got.se == pytest.approx(means.std(ddof=1) / 2)


def test_jackknife_keeps_the_images_of_a_prompt_together():
    x = np.repeat(np.random.default_rng(3).normal(size=12), 5)  # five equal images of each of twelve prompts
    alone, together = (jackknife(lambda index: float(x[index].mean()), 60, together=k) for k in (1, 5))
    assert together.se == pytest.approx(x[::5].std(ddof=1) / math.sqrt(12))
    assert together.freedom == 11
    assert alone.mean == together.mean


def test_intervals_are_students():
    got = estimate(np.array([1.0, 2.0, 4.0, 9.0]))
    assert got.freedom == 3
    assert got.interval() == pytest.approx((4 - 3.182446 * got.se, 4 + 3.182446 * got.se), rel=1e-6)
    assert Estimate(1.0, 0.5, 9).interval() == pytest.approx((1 - 1.959964 * 0.5, 1 + 1.959964 * 0.5), rel=1e-6)
    assert estimate(np.arange(6.0), ["a", "a", "b", "b", "c", "c"]).freedom == 2
    assert all(map(math.isnan, Estimate(1.0, math.nan, 1).interval()))
    assert format_interval(Estimate(0.2, 0.1, 9), 2, times=10) == "[+0.04, +3.96]"
    assert format_interval(None) == "–"


@pytest.mark.parametrize(
    ("mean", "se", "better", "expected"),
    [
        (0.21, 0.1, 1, "better"),
        (0.19, 0.1, 1, "undecided"),
        (-0.21, 0.1, 1, "worse"),
        (-0.21, 0.1, -1, "better"),
        (0.21, 0.1, -1, "worse"),
        (0.21, 0.1, 0, "higher"),
        (-0.21, 0.1, 0, "lower"),
        (0.0, 0.0, 1, "undecided"),
        (1.0, math.nan, 1, "undecided"),
    ],
)
def test_decide(mean, se, better, expected):
    assert decide(Estimate(mean, se, 9), better) == expected


def test_formatting():
    assert format_estimate(Estimate(0.6174, 0.0312, 9)) == "0.617 ± 0.031"
    assert format_estimate(Estimate(0.6174, 0.0312, 9), 2, signed=True) == "+0.62 ± 0.03"
    assert format_estimate(Estimate(0.5, math.nan, 1)) == "0.500"
    assert format_estimate(Estimate(math.nan, math.nan, 0)) == format_estimate(None) == "–"


def test_markdown_table_lines_up():
    lines = markdown_table(["model", "x"], [["a", "1.5"], ["longer", "10"]]).splitlines()
    assert lines[0] == "| model  |   x |"
    assert lines[1] == "| ------ | --: |"
    assert len({len(line) for line in lines}) == 1
