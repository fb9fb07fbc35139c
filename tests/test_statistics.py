"""Summaries and paired comparisons against scipy, by hand, and by the coverage they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.statistics import paired_difference, student_quantile, summarise, verdict

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))


@given(st.lists(numbers, min_size=2, max_size=12))
@settings(max_examples=60, deadline=None)
def test_summary_agrees_with_scipy(values):
    summary = summarise(values)
    assert summary.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert summary.sd == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-9)
    if np.ptp(values) > 0:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (summary.low, summary.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_level_sets_the_width(level):
    values = [1.0, 2.5, 2.0, 4.0]
    low, high = stats.t.interval(level, 3, loc=np.mean(values), scale=stats.sem(values))
    summary = summarise(values, level)
    assert (summary.low, summary.high) == pytest.approx((low, high))
    assert summary.half == pytest.approx((high - low) / 2)


def test_one_value_has_no_spread():
    summary = summarise([3.0])
    assert (summary.mean, summary.n) == (3.0, 1)
    assert summary.sd is summary.low is summary.high is summary.half is None


def test_equal_values_have_an_interval_of_no_width():
    # 0.1 + 0.1 + 0.1 is not 0.3 in floating point
    summary = summarise([0.1, 0.1, 0.1])
    assert (summary.mean, summary.sd, summary.low, summary.high) == (0.1, 0.0, 0.1, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_a_number_is_refused(bad):
    with pytest.raises(ValueError, match=r"values\[1\]"):
        summarise([1.0, bad])
    with pytest.raises(ValueError, match=r"b\[0\]"):
        paired_difference([1.0, 2.0], [bad, 2.0])


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        summarise([])
    with pytest.raises(ValueError, match="level"):
        summarise([1.0], level=95)


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=10))
@settings(max_examples=60, deadline=None)
def test_paired_difference_agrees_with_scipy(pairs):
    a, b = zip(*pairs)
    ours = paired_difference(a, b)
    differences = np.subtract(a, b)
    if np.ptp(differences) < 1e-6:
        return
    theirs = stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert ours.mean == pytest.approx(differences.mean(), rel=1e-6, abs=1e-6)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-5)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)


def test_pairs_are_matched_by_seed_not_by_place():
    difference = paired_difference({0: 1.0, 1: 20.0, 7: 5.0}, {1: 19.0, 0: 0.5, 3: 9.0})
    assert difference.n == 2
    assert difference.mean == pytest.approx(0.75)


def test_pairs_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="share no seed"):
        paired_difference({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="both"):
        paired_difference({0: 1.0}, [1.0])


def test_p_value_of_constant_differences():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p == 0.0
    assert paired_difference([2.0], [1.0]).p is None


def test_pairing_removes_what_seeds_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=6) * 10
    a, b = shared + 1 + rng.normal(size=6) * 0.01, shared
    assert paired_difference(a, b).half < 0.1 < summarise(a).half


def test_interval_covers_the_mean_as_often_as_promised():
    rng = np.random.default_rng(20220)
    values = rng.normal(2.0, 3.0, size=(4000, 3))
    covered = sum(summary.low <= 2.0 <= summary.high for summary in map(summarise, values))
    # binomial standard deviation 0.0034
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_paired_interval_covers_zero_as_often_as_promised():
    rng = np.random.default_rng(7)
    pairs = rng.normal(size=(3000, 2, 5)) + rng.normal(size=(3000, 1, 5)) * 20
    verdicts = [verdict(paired_difference(a, b), "negative") for a, b in pairs]
    assert verdicts.count("inconclusive") / 3000 == pytest.approx(0.95, abs=0.015)
    assert verdicts.count("supported") / 3000 == pytest.approx(0.025, abs=0.01)


def test_verdict_by_side():
    below = paired_difference([1.0, 1.1, 0.9], [2.0, 2.0, 2.0])
    assert verdict(below, "negative") == "supported"
    assert verdict(below, "positive") == "contradicted"
    assert verdict(paired_difference([1.0, 3.0], [2.0, 2.0]), "negative") == "inconclusive"
    assert verdict(paired_difference([1.0], [2.0]), "negative") == "inconclusive"
    assert verdict(paired_difference([2.0, 3.0], [2.0, 3.0]), "positive") == "inconclusive"
    assert verdict(None, "negative") == "not measured"
    with pytest.raises(ValueError, match="side"):
        verdict(below, "lower")


def test_quantile_agrees_with_scipy():
    for df in (1, 2, 5, 100):
        assert student_quantile(0.975, df) == pytest.approx(stats.t.ppf(0.975, df))
