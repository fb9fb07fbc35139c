"""Every number of claims.csv, once more from the raw files of the runs, by formulas that share nothing with the report.

The checker reads JSON, CSV and npz itself. With INDM_BENCH_RUNS set to a folder of runs and their reports beside it (or
under INDM_BENCH_REPORTS), it also runs on those.
"""

import csv
import json
import math
import os
from collections import Counter
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic_claims import write_per_image, write_studies
from synthetic_runs import EFFECTS, OTHERS, judged, write_suite

from bench.claims import CLAIMS
from bench.report.claims_table import write_csv

COMMITTED = Path(__file__).parents[1] / "reports"
PLANE = ["checkerboard", "swissroll"]
PUBLISHED = {("cifar10", "indm-vp-fid"): 2.28, ("celeba64", "indm-vp-fid"): 1.75, ("celeba64", "indm-ve"): 2.54}
FOUR_ERRORS, RESOLUTION = 4.0, 0.05


def least_seeds(suite):
    return 5 if suite == "toy2d" else 3


def lines(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


# What a run's number is, by claim and statistic -------------------------------------------------------------------


def curve(folder, pick):
    """Mean of ``pick`` over log(images), by the trapezium rule, from a tenth of training on."""
    rows = lines(folder / "learning_curve.csv")
    unit = "nats" if "nelbo_nats" in rows[0] else "bpd"
    images, nelbo, nll = (
        np.array([float(row[name]) for row in rows]) for name in ("images", f"nelbo_{unit}", f"nll_{unit}")
    )
    late = images >= images.max() / 10
    x = np.log(images[late])
    return np.trapezoid(pick(nelbo, nll)[late], x) / np.ptp(x)


def likelihood(folder, name):
    return json.loads((folder / "likelihood.json").read_text())[name]["corrected"]["total"]


def metric(folder):
    return "fd" if json.loads((folder / "likelihood.json").read_text())["units"] == "bits/dim" else "sliced_wasserstein"


def samples(folder, sampler):
    """(steps, distances) of a sampler, ascending in steps."""
    rows = [row for row in lines(folder / "robustness.csv") if row["sampler"] == sampler]
    found = sorted((int(float(row["steps"])), float(row[metric(folder)])) for row in rows)
    return np.array([steps for steps, _ in found]), np.array([value for _, value in found])


def slope(folder, sampler):
    steps, distances = samples(folder, sampler)
    return np.polyfit(np.log(steps[:-1]), np.log(distances[:-1]), 1)[0]


def study(folder, name, **keys):
    rows = [row for row in lines(folder / f"{name}.csv") if row["status"] == "ok"]
    return [row for row in rows if all(row[key] == value for key, value in keys.items())]


def column(rows, name):
    return np.array([float(row[name] or 0) for row in rows])


def identity(folder, claim, quantity):
    (row,) = study(folder, "identities", claim=claim, quantity=quantity)
    return float(row["value"]) - float(row["expected"] or 0), float(row["se"] or 0)


def slack(folder, sampler):
    rows = study(folder, "discretisation", sampler=sampler)
    return (column(rows, "bound") - column(rows, "tv") + 2 * column(rows, "se")).min()


def special(folder):
    rows = study(folder, "identities", claim="special-case")
    return np.abs(column(rows, "value") - column(rows, "expected")).max()


def number(folder, row):
    """The number of one run that a row of claims.csv is about."""
    claim, sampler, statistic = row["claim"], row["sampler"], row["statistic"]
    if claim == "fast-training":
        return curve(folder, lambda nelbo, nll: nelbo)
    if claim == "mle-training":
        along = "learning curve" in statistic
        return curve(folder, lambda nelbo, nll: np.abs(nelbo - nll)) if along else abs(likelihood(folder, "gap"))
    if claim == "better-nll":
        return likelihood(folder, "nll")
    if claim in ("resnet-over-glow", "linear-pretraining") or (claim, row["baseline"]) == (
        "debiased-time",
        "sdeflow-uniform",
    ):
        return likelihood(folder, "nelbo")
    if claim == "robust-sampling":
        return slope(folder, sampler)
    if claim == "sample-quality":
        return samples(folder, sampler)[1][-1]
    if claim == "state-of-the-art":
        return samples(folder, sampler)[1][-1] - PUBLISHED[row["dataset"], row["variant"]]
    if claim == "discretisation-error" and row["baseline"]:
        return column(study(folder, "discretisation", sampler=sampler), "discretisation").mean()
    if claim == "discretisation-error":
        return slack(folder, sampler)
    if claim == "flow-role":
        return float(study(folder, "latents", quantity="kl_gaussian_change", time="0")[0]["value"])
    if claim == "special-case":
        return special(folder)
    return identity(folder, claim, quantity(row))[0]


def quantity(row):
    """The quantity that a statistic of identities.csv begins with."""
    return row["statistic"].split(",")[0].split(":")[0]


# What a row must then say -----------------------------------------------------------------------------------------


SIDES = {"robust-sampling": 1, ("debiased-time", ""): 1}


def by_interval(row, low, high):
    side = SIDES.get(row["claim"], SIDES.get((row["claim"], row["baseline"]), -1))
    if low <= 0 <= high:
        return "inconclusive"
    return "supported" if np.sign(low) == side else "contradicted"


def close(text, value):
    return text != "" and math.isclose(float(text), value, rel_tol=1e-6, abs_tol=1e-9)


def check_numbers(runs, suite, row):
    """Estimate, spread, interval, n, p and the verdict of one measured row."""

    def folder(variant, seed):
        deep = runs / suite / variant / str(seed) / row["dataset"]
        return deep if deep.is_dir() else deep.parent

    def of(variant):
        found = {}
        for seed in sorted(int(path.name) for path in (runs / suite / variant).iterdir() if path.name.isdecimal()):
            try:
                found[seed] = number(folder(variant, seed), row)
            except FileNotFoundError:
                assert "left out" in row["note"], row  # a run without the file is named
        return found

    ours = of(row["variant"])
    theirs = of(row["baseline"]) if row["baseline"] else dict.fromkeys(ours, 0.0)
    shared = [seed for seed in ours if seed in theirs]
    values = np.array([ours[seed] - theirs[seed] for seed in shared])
    if row["decided_by"] == "runs":
        check_identity(row, values, [folder(row["variant"], seed) for seed in shared])
    elif row["decided_by"] == "images":
        (seed,) = shared
        check_images(row, values, folder(row["variant"], seed), folder(row["baseline"], seed))
    else:
        check_seeds(row, values, suite)


def check_seeds(row, values, suite):
    n = len(values)
    assert close(row["estimate"], values.mean()) and row["n"] == str(n), row
    if n == 1:
        assert row["sd"] == row["low"] == row["high"] == row["p"] == row["seeds_needed"] == ""
        assert row["verdict_alone"] == "inconclusive"
        return
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert close(row["sd"], values.std(ddof=1)) and close(row["low"], low) and close(row["high"], high), row
    assert close(row["p"], stats.ttest_1samp(values, 0).pvalue), row
    assert row["verdict_alone"] == (by_interval(row, low, high) if n >= least_seeds(suite) else "inconclusive"), row


def check_images(row, values, ours, theirs):
    """One pair of models: an interval over test images, and no verdict."""
    name = "nll" if row["claim"] == "better-nll" else "nelbo"
    record = json.loads((ours / "likelihood.json").read_text())
    unit = record["dims"] * math.log(2) if record["units"] == "bits/dim" else 1.0
    images = (np.load(ours / "per_image.npz")[name] - np.load(theirs / "per_image.npz")[name]) / unit
    assert close(row["estimate"], values[0]) and math.isclose(images.mean(), values[0], abs_tol=1e-6)
    assert row["n"] == str(len(images)) and close(row["sd"], images.std(ddof=1))
    found = stats.bootstrap((images,), np.mean, method="BCa", n_resamples=4000, rng=5).confidence_interval
    # two bootstraps of 4000 differ by their own noise
    width = found.high - found.low
    assert abs(float(row["low"]) - found.low) < 0.08 * width and abs(float(row["high"]) - found.high) < 0.08 * width
    assert row["p"] == row["seeds_needed"] == "" and row["verdict"] == row["verdict_alone"] == "inconclusive"


def check_identity(row, values, folders):
    """Identities and inequalities have no p; each has a rule of its own."""
    assert row["n"] == str(len(values)) and row["p"] == row["p_holm"] == row["low"] == row["seeds_needed"] == ""
    if row["claim"] == "discretisation-error":
        estimate, verdict = values.min(), "supported" if (values >= 0).all() else "contradicted"
    elif row["claim"] == "special-case":
        estimate, verdict = values.mean(), "supported" if (values == 0).all() else "contradicted"
    else:
        errors = np.array([identity(folder, row["claim"], quantity(row))[1] for folder in folders])
        estimate, allowed = values.mean(), FOUR_ERRORS * np.sqrt((errors**2).sum()) / len(errors)
        beyond = abs(estimate) > max(allowed, 1e-6)
        verdict = "contradicted" if beyond else "supported" if allowed <= RESOLUTION else "inconclusive"
    if "left out" in row["note"] and verdict == "supported":
        verdict = "inconclusive"  # it must hold in every run
    assert close(row["estimate"], estimate) and row["verdict"] == row["verdict_alone"] == verdict, row


def check_family(suite, rows):
    """Holm's corrections, the verdicts after them, and the seeds needed, from the columns of the table alone."""
    pair = itemgetter("dataset", "variant", "baseline")
    for key in sorted({pair(row) for row in rows}):
        check_pair(suite, [row for row in rows if pair(row) == key])

    tested = enough_seeds(suite, rows)
    assert {id(row) for row in tested} == {id(row) for row in rows if row["p_holm_suite"]}
    for row in tested:
        assert close(row["p_holm_suite"], holm(row, tested)), row


def enough_seeds(suite, rows):
    return [row for row in rows if row["p"] and int(row["n"]) >= least_seeds(suite) and row["decided_by"] == "seeds"]


def holm(row, family):
    """The definition: the largest, over p not above this row's, of p times the number of p not below it."""
    p = [float(other["p"]) for other in family]
    return max(min(1.0, q * sum(other >= q for other in p)) for q in p if q <= float(row["p"]))


def check_pair(suite, rows):
    family = enough_seeds(suite, rows)
    assert {id(row) for row in family} == {id(row) for row in rows if row["p_holm"]}
    for row in family:
        assert close(row["p_holm"], holm(row, family)), row
        kept = float(row["p_holm"]) < 0.05
        assert row["verdict"] == (row["verdict_alone"] if kept else "inconclusive"), row
        assert int(row["family"]) == len(family)
    level = 0.05 / max(1, len(family))
    for row in rows:
        if row["seeds_needed"]:
            n, effect = int(row["seeds_needed"]), abs(float(row["estimate"])) / float(row["sd"])
            assert power(effect, n, level) >= 0.8 - 1e-6, row
            assert n == least_seeds(suite) or power(effect, n - 1, level) < 0.8 + 1e-6, row
        elif row["p"]:
            beyond = "more than 10,000 seeds" in row["note"]
            assert beyond or float(row["estimate"]) == 0, row


def power(effect, n, level):
    """Power of the two-sided t test, by integrating the normal over the chi distribution of the sample spread."""
    if n < 2:
        return 0.0
    critical = stats.t.ppf(1 - level / 2, n - 1)
    spread = stats.chi(n - 1)
    x, weights = np.polynomial.legendre.leggauss(400)
    low, high = spread.ppf(1e-12), spread.isf(1e-12)
    s = low + (x + 1) / 2 * (high - low)
    density = spread.pdf(s) * weights / 2 * (high - low)
    scaled = critical * s / math.sqrt(n - 1)
    shift = effect * math.sqrt(n)
    return float((density * (stats.norm.sf(scaled - shift) + stats.norm.cdf(-scaled - shift))).sum())


def check_consistency(suite, rows):
    """A table against itself: interval, p and verdicts from estimate, spread and n, and the corrections from p."""
    assert {row["claim"] for row in rows} == {claim.id for claim in CLAIMS}
    for row in rows:
        if row["decided_by"] != "seeds" or int(row["n"]) < 2:
            continue
        mean, sd, n = float(row["estimate"]), float(row["sd"]), int(row["n"])
        half = stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n)
        assert close(row["low"], mean - half) and close(row["high"], mean + half), row
        assert close(row["p"], 2 * stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1)), row
        decided = by_interval(row, mean - half, mean + half) if n >= least_seeds(suite) else "inconclusive"
        assert row["verdict_alone"] == decided, row
    check_family(suite, rows)


def check(runs, suite, path):
    """All of claims.csv; returns how many measured rows each claim had."""
    rows = lines(path)
    measured = Counter()
    for row in rows:
        assert not {"nan", "inf", "-inf"} & {value.lower() for value in row.values()}
        if row["verdict"] == "not measured":
            assert row["note"] and row["verdict_alone"] == "not measured"
            assert not any(
                row[name] for name in ("estimate", "sd", "low", "high", "p", "p_holm", "p_holm_suite", "seeds_needed")
            )
            continue
        check_numbers(Path(runs), suite, row)
        measured[row["claim"]] += 1
    check_consistency(suite, rows)
    return measured


# On runs made up for it, on runs named by the environment, on the committed table ---------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Points (5 seeds), images (3 seeds) and a GPU suite of one seed, with every file that a claim reads."""
    root = tmp_path_factory.mktemp("claims")
    runs, reports = root / "runs", root / "reports"
    write_suite(runs, "toy2d", dict.fromkeys(PLANE, True), (*EFFECTS, *OTHERS), range(5))
    write_suite(runs, "digits", {"digits": False}, tuple(EFFECTS), range(3))
    write_suite(runs, "cifar10", {"cifar10": False}, tuple(EFFECTS), (0,))
    for suite in ("toy2d", "digits"):
        write_studies(runs, suite)
    for path in (runs / "cifar10").rglob("likelihood.json"):
        write_per_image(path.parent)
        for name, old, new in (("robustness.csv", ",256,", ",50000,"), ("config.yaml", "digits-cnn", "inception")):
            file = path.parent / name
            file.write_text(file.read_text().replace(old, new))
    for suite in ("toy2d", "digits", "cifar10"):
        write_csv(reports / suite / "claims.csv", judged(runs, suite))
    return runs, reports


@pytest.mark.parametrize("suite", ["toy2d", "digits", "cifar10"])
def test_every_number_follows_from_the_raw_files(reported, suite):
    runs, reports = reported
    measured = check(runs, suite, reports / suite / "claims.csv")
    everywhere = {"better-nll", "mle-training", "fast-training", "robust-sampling", "sample-quality"}
    studied = {"special-case", "flow-role", "dsm-is-elbo", "equivalent-sdes", "debiased-time"}
    rare = {"discretisation-error", "resnet-over-glow", "linear-pretraining"}
    wanted = {"toy2d": studied | rare, "digits": studied, "cifar10": {"state-of-the-art"}}[suite]
    assert set(measured) == everywhere | wanted


def test_made_up_runs_reach_every_verdict(reported):
    _, reports = reported
    rows = [row for suite in ("toy2d", "digits") for row in lines(reports / suite / "claims.csv")]
    assert {row["verdict"] for row in rows} == {"supported", "contradicted", "inconclusive", "not measured"}
    assert any(row["verdict_alone"] != row["verdict"] for row in rows)  # what Holm's correction takes back
    assert {row["decided_by"] for row in rows} == {"seeds", "runs", ""}
    assert {row["decided_by"] for row in lines(reports / "cifar10" / "claims.csv")} == {"seeds", "images", ""}


@pytest.mark.parametrize(
    "column, change",
    [("estimate", 1.001), ("low", 1.01), ("p", 1.01), ("p_holm", 1.01), ("p_holm_suite", 0.99), ("sd", 1.001)],
)
def test_checker_finds_a_wrong_number(reported, tmp_path, column, change):
    runs, reports = reported
    rows = lines(reports / "digits" / "claims.csv")
    place = next(i for i, row in enumerate(rows) if row["claim"] == "better-nll" and row["p_holm"] not in ("", "1"))
    rows[place][column] = repr(float(rows[place][column]) * change)
    with open(tmp_path / "claims.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(AssertionError):
        check(runs, "digits", tmp_path / "claims.csv")


def real():
    """(runs, suite, claims.csv) of the folder that INDM_BENCH_RUNS names, for each suite with a report."""
    root = os.environ["INDM_BENCH_RUNS"]
    reports = Path(os.environ.get("INDM_BENCH_REPORTS") or Path(root).parent / "reports")
    suites = (path for path in sorted(Path(root).glob("*")) if path.name != "smoke")
    return [(root, path.name, table) for path in suites if (table := reports / path.name / "claims.csv").is_file()]


def test_reports_agree_with_themselves_and_with_their_runs():
    """Committed tables by themselves; where INDM_BENCH_RUNS names runs, their tables from the raw files as well."""
    committed = sorted(COMMITTED.glob("*/claims.csv"))
    assert COMMITTED / "toy2d" / "claims.csv" in committed
    for path in committed:
        check_consistency(path.parent.name, lines(path))
    if "INDM_BENCH_RUNS" in os.environ:
        checked = [check(runs, suite, path) for runs, suite, path in real()]
        assert checked and all(checked)
