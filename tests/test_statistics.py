"""Summaries, comparisons, corrections and power against scipy, tables, by hand, and by what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutated_checks import check_holm
from scipy import stats

from bench.statistics import (
    bootstrap_interval,
    corrected_verdict,
    holm,
    paired_difference,
    seeds_needed,
    student_quantile,
    summarise,
    verdict,
    verdict_of_equality,
)

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


# Many comparisons --------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    check_holm()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
@settings(max_examples=60, deadline=None)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    adjusted = holm(p_values)
    rejected, order = set(), sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        if p_values[place] * (len(p_values) - rank) >= level:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(adjusted) if p < level} == rejected
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted))


def test_holm_keeps_the_chance_of_any_false_rejection():
    rng = np.random.default_rng(3)
    # 20 tests that share half of their noise, none with a difference
    values = rng.normal(size=(1500, 20, 5)) + rng.normal(size=(1500, 1, 5))
    p_values = stats.ttest_1samp(values, 0, axis=2).pvalue
    false = np.mean([min(holm(list(row))) < 0.05 for row in p_values])
    assert false < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500) < np.mean(p_values.min(axis=1) < 0.05)


def test_corrected_verdict_takes_back_only():
    assert corrected_verdict("supported", 0.049) == "supported"
    assert corrected_verdict("contradicted", 0.05) == "inconclusive"
    assert corrected_verdict("supported", None) == "inconclusive"
    assert corrected_verdict("inconclusive", 0.001) == "inconclusive"
    assert corrected_verdict("not measured", None) == "not measured"


# Equality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "se", "tolerance", "resolution", "expected"),
    [
        (0.0, 0.0, 0.0, 0.0, "supported"),
        (1e-300, 0.0, 0.0, 0.0, "contradicted"),  # exactly means exactly
        (-0.5e-6, 0.0, 1e-6, 0.05, "supported"),
        (-0.03, 0.01, 0.0, 0.05, "supported"),
        (-0.05, 0.01, 0.0, 0.05, "contradicted"),  # five standard errors
        (0.03, 0.02, 0.0, 0.05, "inconclusive"),  # errors that would hide 0.08
        (0.9, 0.2, 0.0, 0.05, "contradicted"),
    ],
)
def test_equality_needs_errors_that_could_tell(difference, se, tolerance, resolution, expected):
    assert verdict_of_equality(difference, se, tolerance, resolution) == expected


def test_equality_refuses_what_is_no_number():
    with pytest.raises(ValueError, match="se = -1"):
        verdict_of_equality(0.0, -1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="difference"):
        verdict_of_equality(math.nan, 1.0, 0.0, 0.0)


# The bootstrap -----------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(1).gamma(0.5, 2.0, 300)
    low, high = bootstrap_interval(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=2).confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.03 * width and abs(high - theirs.high) < 0.03 * width
    # skewed to the right: the upper end is further away
    assert high - values.mean() > 1.05 * (values.mean() - low)


def test_bootstrap_is_a_function_of_values_and_seed():
    values = list(np.random.default_rng(1).normal(size=40))
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0) and bootstrap_interval([3.0]) == (3.0, 3.0)
    shifted = bootstrap_interval([5 + 2 * value for value in values])
    assert shifted == pytest.approx([5 + 2 * end for end in bootstrap_interval(values)])
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"values\[1\]"):
        bootstrap_interval([1.0, math.nan])


def test_bootstrap_covers_the_mean_of_a_skewed_law():
    rng = np.random.default_rng(5)
    covered = [
        low <= 1.0 <= high
        for low, high in (bootstrap_interval(rng.exponential(size=60), resamples=600) for _ in range(400))
    ]
    # binomial standard deviation 0.011; a bootstrap of 60 skewed values falls a little short of 0.95
    assert 0.90 < np.mean(covered) < 0.98


# Power -------------------------------------------------------------------------------------------------------------


def test_seeds_needed_are_those_of_the_tables():
    # paired t test, two-sided 5 %, power 80 %: d = 0.2, 0.5, 0.8 and 1 (G*Power; Cohen 1988)
    assert [seeds_needed(d, 1.0) for d in (0.2, 0.5, 0.8, 1.0)] == [199, 34, 15, 10]
    # power 90 %
    assert [seeds_needed(d, 1.0, power=0.9) for d in (0.5, 0.8)] == [44, 19]


def test_seeds_needed_depend_on_the_ratio_alone():
    assert seeds_needed(-3.0, 6.0) == seeds_needed(0.5, 1.0) == 34
    assert seeds_needed(1.0, 0.0) == 2 == seeds_needed(1e6, 1.0)
    assert seeds_needed(0.0, 1.0) is None and seeds_needed(0.0, 0.0) is None
    assert seeds_needed(0.02, 1.0) is None  # 19,600 by the normal approximation
    assert 8700 < seeds_needed(0.03, 1.0) < 8750  # (1.960 + 0.842)^2 / 0.03^2 = 8721
    assert seeds_needed(0.5, 1.0, level=0.01) > 34
    with pytest.raises(ValueError, match="sd"):
        seeds_needed(1.0, -1.0)


@pytest.mark.parametrize("effect", [1.3, 2.0, 5.0])
def test_seeds_needed_find_the_difference_as_often_as_asked(effect):
    n, level = seeds_needed(effect, 1.0, level=0.01), 0.01
    rng = np.random.default_rng(8)
    found = [np.mean(stats.ttest_1samp(rng.normal(effect, 1, (6000, m)), 0, axis=1).pvalue < level) for m in (n, n - 1)]
    # binomial standard deviation 0.005
    assert found[0] > 0.8 - 0.02 and found[1] < 0.8 + 0.02
