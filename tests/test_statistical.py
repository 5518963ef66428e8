"""Checks of what comes by chance: a kept promise passes, a broken one does not, few trials are refused."""

from __future__ import annotations

import numpy as np
import pytest
import statistical
from scipy import stats


def test_a_kept_promise_passes_in_all_of_10000_simulated_runs_and_half_the_width_in_none():
    """The expected numbers are 1 false alarm and fewer than 1 miss; the draw is fixed."""
    bound = statistical.least(240, 0.95)
    kept, broken = (
        np.random.default_rng(0).binomial(240, rate, 10_000)
        for rate in (0.95, statistical.half_as_wide(0.95))
    )
    assert (kept < bound).sum() <= 3
    assert (broken >= bound).sum() == 0
    statistical.assert_at_least(int(np.sort(kept)[5]), 240, 0.95)
    with pytest.raises(AssertionError, match=r"of 240 trials, 0\.\d+, where 0\.95 is promised"):
        statistical.assert_at_least(int(broken.max()), 240, 0.95)


@pytest.mark.parametrize(("trials", "rate"), [(24, 0.95), (100, 0.95), (160, 0.985), (1500, 0.9), (60, 0.5)])
def test_the_bound_is_the_exact_binomial_one(trials, rate):
    bound = statistical.least(trials, rate)
    below = [
        stats.binomtest(successes, trials, rate, alternative="less").pvalue
        for successes in (bound - 1, bound)
    ]
    assert below[0] < statistical.ALPHA <= below[1]


def test_half_the_width_holds_two_times_in_three():
    assert statistical.half_as_wide(0.95) == pytest.approx(0.6729, abs=1e-4)  # 2 Phi(0.97998) - 1


def test_trials_too_few_to_catch_the_fault_are_refused():
    """24 trials, of which 22 held: what another processor saw where the bound was 93%."""
    with pytest.raises(
        AssertionError, match=r"24 trials are too few: they tell a rate of 0\.6729 from 0\.95"
    ):
        statistical.assert_at_least(22, 24, 0.95)
    statistical.assert_at_least(22, 24, 0.95, fault=0.2)


def test_rates_that_are_too_high_are_found_out():
    statistical.assert_at_most(30, 400, 0.05, fault=0.2)
    with pytest.raises(AssertionError, match="of the opposite"):
        statistical.assert_at_most(80, 400, 0.05, fault=0.2)
    statistical.assert_rate(2010, 4000, 0.5, fault=0.1)
    for off in (1800, 2200):
        with pytest.raises(AssertionError):
            statistical.assert_rate(off, 4000, 0.5, fault=0.1)


def test_one_of_two_is_shown_to_hold_more_often_by_what_differs():
    """20 of 20 trials that differ are chance once in 1,048,576 draws, 10 of 10 once in 1,024."""
    always, mostly = np.ones(300, bool), np.arange(300) >= 20
    statistical.assert_more_often(always, mostly)
    with pytest.raises(AssertionError, match=r"10 trials against 0: comes by chance once in 1,024"):
        statistical.assert_more_often(always[10:], mostly[10:])
    with pytest.raises(AssertionError, match="0 trials against 20"):
        statistical.assert_more_often(mostly, always)


def test_intervals_are_judged_by_how_far_the_truth_reaches():
    assert statistical.reach(1.0, 1.0, 1.0, 1.0) == 0
    assert statistical.reach(2.0, 1.0, 1.0, 1.0) == np.inf
    assert [statistical.reach(truth, 1.0, 0.5, 3.0) for truth in (2.0, 0.75)] == [0.5, 0.5]
    reaches = np.abs(np.random.default_rng(1).normal(size=400)) / stats.norm.ppf(0.975)
    statistical.assert_covers(reaches, 0.95)
    with pytest.raises(AssertionError, match=r"intervals hold, 0\.\d+, where 0\.95 is promised"):
        statistical.assert_covers(2 * reaches, 0.95)
    with pytest.raises(AssertionError, match="400 trials do not find out intervals 0.99 times as wide"):
        statistical.assert_covers(reaches, 0.95, narrow=0.99)


def test_means_are_judged_by_their_own_error():
    """200 values, whose mean is -1 with an error of 0.1."""
    values = np.random.default_rng(2).normal(-1, 1.4, 200)
    statistical.assert_mean_below(values)
    statistical.assert_mean_not_above(values)
    statistical.assert_mean_not_above(values, float(values.mean()) - 0.2)
    for check, bound in ((statistical.assert_mean_below, -0.9), (statistical.assert_mean_not_above, -2.0)):
        with pytest.raises(AssertionError, match="errors above"):
            check(values, bound)
