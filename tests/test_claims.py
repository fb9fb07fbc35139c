"""The claims as data: what each says of itself, and its readings against curves and power laws that are known."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.claims import CHECK, CLAIMS, HARNESS, OWN, PAIRED, Point, minimum_seeds
from bench.claims import readings as r
from bench.claims.indm import PUBLISHED_FID
from bench.report.claims_text import claim_record, p_text
from bench.report.findings import headline, score
from bench.report.load import Run

REFERENCE = Path(__file__).parents[1] / "reports" / "reference.csv"
LISTED = [
    "fast-training",
    "mle-training",
    "better-nll",
    "robust-sampling",
    "discretisation-error",
    "image-translation",
    "special-case",
    "resnet-over-glow",
    "linear-pretraining",
    "flow-role",
    "dsm-is-elbo",
    "equivalent-sdes",
    "debiased-time",
    "state-of-the-art",
]


# The claims as data ------------------------------------------------------------------------------------------------


def test_every_listed_claim_is_there_and_one_question_of_the_harness():
    assert [one.id for one in CLAIMS if one.scope != HARNESS] == LISTED
    assert [one.id for one in CLAIMS if one.scope == HARNESS] == ["sample-quality"]


@pytest.mark.parametrize("one", CLAIMS, ids=lambda one: one.id)
def test_claim_says_how_it_is_decided(one):
    assert one.title and one.statement.endswith(".") and one.source
    assert "arXiv" in one.source or one.scope == HARNESS
    for test in one.tests:
        assert test.noun and test.statistic and test.rule and test.pairing and test.needs and test.unit
        assert test.side in ("negative", "positive") if test.kind in (PAIRED, OWN) else test.side == "equal"
        assert (test.decide is not None) == (test.kind == CHECK)
        assert test.value is not None or test.otherwise
        # a study's test names its file and in what the compared runs must agree
        assert (f"{test.study}.csv" in test.needs and "study" in test.protocols) or not test.study
        if test.kind != CHECK and test.value:
            assert "{size}" in test.below and "{size}" in test.above
    json.dumps(claim_record(one))


def test_verdicts_ask_for_three_seeds_and_for_five_in_the_plane():
    assert (minimum_seeds("toy2d"), minimum_seeds("digits"), minimum_seeds("cifar10")) == (5, 3, 3)


# Readings ----------------------------------------------------------------------------------------------------------


def curve_run(tmp_path, points, unit="nats", seed=0):
    """A run with a learning curve: images -> (NELBO, NLL)."""
    lines = [
        {"images": str(images), f"nelbo_{unit}": str(nelbo), f"nll_{unit}": str(nll)}
        for images, (nelbo, nll) in points.items()
    ]
    return Run("suite", "data", "a", seed, tmp_path, curve=lines)


def test_curve_area_ignores_the_start_and_weighs_by_the_logarithm(tmp_path):
    height, gap = r.curve_area(r.curve_nelbo), r.curve_area(r.curve_gap)
    run = curve_run(tmp_path, {10: (99.0, 0.0), 1000: (4.0, 4.5), 10000: (2.0, 1.5)})
    assert height(run, [run], Point()) == pytest.approx(3.0)  # a straight line in log(images)
    assert gap(run, [run], Point()) == pytest.approx(0.5)  # of absolute values: -0.5 and 0.5 do not cancel
    higher = curve_run(tmp_path, {10: (0.0, 0.0), 1000: (4.25, 0.0), 10000: (2.25, 0.0)}, "bpd")
    assert height(higher, [higher], Point()) - 3.0 == pytest.approx(0.25)
    # three points, unevenly spaced: trapezia of log-widths ln 2 and ln 5
    run = curve_run(tmp_path, {100: (5.0, 0.0), 200: (3.0, 0.0), 1000: (1.0, 0.0)})
    assert height(run, [run], Point()) == pytest.approx((4 * math.log(2) + 2 * math.log(5)) / math.log(10))


def test_curve_that_cannot_be_summed_says_why(tmp_path):
    height = r.curve_area(r.curve_nelbo)
    whole = curve_run(tmp_path, {500: (2.0, 2.0), 1000: (1.0, 1.0)})
    short = curve_run(tmp_path, {500: (2.0, 2.0)}, seed=1)
    assert height(short, [short, whole], Point()) == "no row at 1000 images, the curve ends at 500"
    assert height(whole, [short, whole], Point()) == pytest.approx(1.5)
    assert "fewer than two points" in height(short, [short], Point())
    blank = curve_run(tmp_path, {500: (2.0, 2.0), 1000: ("", 1.0)})
    assert "blank" in height(blank, [blank], Point())
    absent = Run("suite", "data", "a", 0, tmp_path, problems={"learning_curve.csv": "run missing"})
    assert height(absent, [absent, whole], Point()) == "run missing"


def sampled(tmp_path, distances, seed=0):
    """A run with a sweep over steps."""
    lines = [
        {"sampler": "ddim", "steps": str(steps), "fd": str(value), "status": "ok"} for steps, value in distances.items()
    ]
    return Run("suite", "data", "a", seed, tmp_path, robustness=lines)


def test_step_slope_is_the_exponent_of_a_power_law(tmp_path):
    run = sampled(tmp_path, {4: 3 * 4**-0.7, 8: 3 * 8**-0.7, 16: 3 * 16**-0.7, 32: 1e9})  # the reference is left out
    (point,) = r.sweeps([run], "fd")
    assert point == Point("ddim", "fd", steps=32)
    assert r.step_slope(run, [run], point) == pytest.approx(-0.7)
    rng = np.random.default_rng(0)
    values = {steps: math.exp(rng.normal()) for steps in (4, 8, 16, 64)}
    run = sampled(tmp_path, values)
    fitted = np.polyfit(np.log([4, 8, 16]), [math.log(values[steps]) for steps in (4, 8, 16)], 1)[0]
    assert r.step_slope(run, [run], Point("ddim", "fd", steps=64)) == pytest.approx(fitted)


def test_step_slope_needs_every_step_count_and_positive_distances(tmp_path):
    whole, lacking = sampled(tmp_path, {4: 3.0, 8: 2.0, 16: 1.0}), sampled(tmp_path, {4: 3.0, 16: 1.0}, 1)
    (point,) = r.sweeps([whole, lacking], "fd")
    assert "no row" in r.step_slope(lacking, [whole, lacking], point)
    negative = sampled(tmp_path, {4: 3.0, 8: -1.0, 16: 1.0})
    assert "not positive at 8 steps" in r.step_slope(negative, [negative], point)
    assert r.sweeps([sampled(tmp_path, {4: 3.0, 8: 2.0})], "fd") == []  # one count below the largest is no slope
    assert r.sweeps([sampled(tmp_path, {0: 3.0})], "fd") == [] and r.longest([sampled(tmp_path, {0: 3.0})], "fd") == []


def test_published_number_is_compared_with_its_own_kind_only(tmp_path):
    measure, point = r.published_distance({("data", "a"): 2.0}), Point("ddim", "fd", steps=8)
    run = sampled(tmp_path, {8: 2.5})
    run.robustness[0]["n"], run.config = "50000", {"evaluate": {"features": "inception"}}
    assert measure(run, [run], point) == pytest.approx(0.5)
    run.robustness[0]["n"] = "1000"
    assert "FID is of 50,000 samples" in measure(run, [run], point)
    run.variant = "b"  # another model of the same data set has no number to stand beside
    assert measure(run, [run], point) == "no FID of b on data is published"
    run.dataset, run.variant = "other", "a"
    assert measure(run, [run], point) == "no FID of a on other is published"


def test_published_numbers_are_those_of_the_file():
    models = {
        ("celeba64", "indm-vp-fid"): ("INDM", "CelebA"),
        ("celeba64", "indm-ve"): ("INDM (VE, FID)", "CelebA 64x64"),
        ("cifar10", "indm-vp-fid"): ("INDM (FID)", "CIFAR-10"),
    }
    with open(REFERENCE, newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["metric"] == "fid"]
    found = {
        key: [float(row["value"]) for row in rows if (row["model"], row["dataset"]) == model]
        for key, model in models.items()
    }
    assert {key: [value] for key, value in PUBLISHED_FID.items()} == found


def test_rows_without_numbers_are_no_crash(tmp_path):
    blank = sampled(tmp_path, {"": 3.0})
    assert r.longest_or_adaptive([blank], "fd") == r.longest([blank], "fd") == r.sweeps([blank], "fd") == []
    assert r.longest_or_adaptive([blank, sampled(tmp_path, {0: 3.0})], "fd") == [Point("ddim", "fd", steps=0)]
    unnumbered = curve_run(tmp_path, {"": (1.0, 1.0)})
    said = r.curve_area(r.curve_nelbo)(unnumbered, [unnumbered], Point())
    assert said == "learning_curve.csv has no number of images"


# Words ---------------------------------------------------------------------------------------------------------------


def test_headline_counts_verdicts():
    def finding(verdict, alone="", note="why"):
        return {"verdict": verdict, "verdict_alone": alone or verdict, "note": note}

    found = [finding("supported")] * 3 + [finding("contradicted")] + [finding("inconclusive", "contradicted")] * 2
    assert headline(found) == (
        "Of 6 comparisons 3 support it, 1 contradicts it and 2 stay open (2 against it by the interval alone)."
    )
    assert headline([finding("not measured", note="run missing")]) == "Not measured: run missing."
    assert score(found) == {"supported": 3, "contradicted": 1, "inconclusive": 2}
    assert [p_text(p) for p in (None, 1e-9, 0.0123, 1.0)] == ["—", "< 0.0001", "0.012", "1"]
