"""The evaluations that a plan reckons with, against the committed records of what trained networks took."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from bench.config import load_suite
from bench.plan_evaluations import MEASURED, usual_evaluations

ROOT = Path(__file__).parents[1]
FACTOR = 1.5


def reports():
    """Mean evaluations by (record, dims, preconditioning), and every variant's beside it."""
    found = defaultdict(list)
    for suite in ("toy2d", "digits"):
        path = f"reports/{suite}/nll_nelbo_gap.csv"
        kinds = {run.variant: run.model.get("preconditioning") for run in load_suite(suite).runs(seed=0)}
        with open(ROOT / path) as stream:
            for row in csv.DictReader(stream):
                if row["variant"] in kinds and row["nfe"]:
                    found[path, 64 if suite == "digits" else 2, kinds[row["variant"]]].append(float(row["nfe"]))
    return found


def test_small_networks():
    found = reports()
    assert len(found) == 6
    for (path, dims, kind), evaluations in found.items():
        row = next(row for row in MEASURED if (row.record, row.preconditioning) == (path, kind))
        assert (row.dims, row.solver, row.tolerance) == (dims, "dopri5", 1e-4)
        assert row.evaluations == pytest.approx(fmean(evaluations), rel=0.02)


def test_colour_images():
    """Networks that have seen hundreds of batches: after ten, a network is still nearly a constant."""
    cases = json.loads((ROOT / "reports/performance/cpu.json").read_text())["cases"]
    trained = [case for case in cases.values() if case.get("training_steps", 0) >= 100]
    assert {case["solver"] for case in trained} == {"adams", "dopri5"}
    for case in trained:
        reckoned = usual_evaluations(case["solver"], "none", case["tolerance"], 3 * 16 * 16)
        assert case["evaluations"] / FACTOR < reckoned < case["evaluations"] * FACTOR
        # both solvers at the tolerances of the comparison, on the same network
        for solver, tolerance, way in (
            ("dopri5", 1e-5, "lambda, a norm an image"),
            ("adams", 4e-4, "tau, a norm an image, Adams at 40 times the tolerance"),
            ("adams", 1e-3, "tau, a norm an image, Adams at 100 times the tolerance"),
        ):
            found = case["ways"][way]["evaluations"]
            assert found / FACTOR < usual_evaluations(solver, "none", tolerance, 768) < found * FACTOR


def test_the_smoke_suite_at_another_tolerance():
    """Networks of 100 steps on points, at 1e-3."""
    with open(ROOT / "reports/smoke/nll_nelbo_gap.csv") as stream:
        found = {row["variant"]: row["nfe"] for row in csv.DictReader(stream) if row["dataset"] == "checkerboard"}
    for variant in ("ddpmpp-vp", "indm-vp-nll", "indm-vp-fid"):
        reckoned = usual_evaluations("dopri5", "gaussian", 1e-3, 2)
        assert float(found[variant]) / FACTOR < reckoned < float(found[variant]) * FACTOR


def test_samples_by_the_ode():
    with open(ROOT / "reports/smoke/step_robustness.csv") as stream:
        found = [float(row["nfe_mean"]) for row in csv.DictReader(stream) if row["sampler"] == "ode"]
    assert usual_evaluations("sampler", "gaussian", 1e-3, 2) == pytest.approx(fmean(found), rel=0.03)
    for evaluations in found:
        assert evaluations / FACTOR < 37 < evaluations * FACTOR


def test_evaluations_grow_by_the_solvers_order_and_follow_the_nearest_record():
    one = usual_evaluations("dopri5", "gaussian", 1e-4, 3072)
    assert one == usual_evaluations("dopri5", "gaussian", 1e-4, 64) == 76
    assert usual_evaluations("dopri5", "gaussian", 1e-4 / 32, 64) == pytest.approx(2 * one)
    assert usual_evaluations("dopri5", "none", 1e-5, 3072) > 5 * usual_evaluations("dopri5", "none", 1e-4, 64)
    # never measured: a third of what Dormand and Prince's method takes at the same error
    saved = usual_evaluations("adams", "gaussian", 6e-3, 64) / usual_evaluations("dopri5", "gaussian", 1e-4, 64)
    assert saved == pytest.approx(235 / 730 * (10 / 6) ** 0.2)
    # between two records their power law
    middle = usual_evaluations("adams", "none", (4e-4 * 1e-3) ** 0.5, 768)
    assert middle == pytest.approx((433 * 235) ** 0.5)
    assert usual_evaluations("dopri5", "a kind of one's own", 1e-4, 64) == usual_evaluations("dopri5", None, 1e-4, 64)
