"""The claims applied to runs with known effects: pairs, refusals, studies, verdicts, correction, power."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
from synthetic_claims import change_rows, claim, only, write_per_image, write_studies
from synthetic_runs import EFFECTS, OTHERS, VARIANTS, edit, expected, judged, write_suite

from bench.claims import CHECK, CLAIMS
from bench.report.claims_table import COLUMNS, correct, families, write_csv
from bench.report.claims_text import caption, document, sentence
from bench.report.load import load_runs
from bench.report.tables import Grid


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Images with 3 seeds, and one set of points with 5 and with every study and variant."""
    root = tmp_path_factory.mktemp("runs")
    write_suite(root, "digits", {"digits": False})
    write_suite(root, "toy2d", {"checkerboard": True}, (*EFFECTS, *OTHERS), range(5))
    write_studies(root, "toy2d")
    for picture in root.rglob("*.png"):
        picture.unlink()
    return root


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of the images' suite to damage."""
    shutil.copytree(runs / "digits", tmp_path / "runs" / "digits")
    return tmp_path / "runs"


@pytest.fixture
def points(runs, tmp_path):
    """A copy of the points' suite to damage."""
    shutil.copytree(runs / "toy2d", tmp_path / "runs" / "toy2d")
    return tmp_path / "runs"


# Comparisons -------------------------------------------------------------------------------------------------------


def test_effects_put_in_are_found_on_their_side(runs):
    rows = judged(runs)
    nll = only(rows, "better-nll", "indm-vp-nll")
    assert nll.low < EFFECTS["indm-vp-nll"][0] - EFFECTS["ddpmpp-vp"][0] < nll.high
    assert (nll.verdict_alone, nll.verdict, nll.n, nll.decided_by, nll.units) == (
        "supported", "supported", 3, "seeds", "bits/dim"
    )  # fmt: skip
    assert only(rows, "better-nll", "indm-vp-fid").verdict == "contradicted"
    slope = only(rows, "robust-sampling", "indm-vp-nll", "euler_maruyama")
    assert slope.estimate == pytest.approx(0.5, abs=0.01) and slope.verdict == "supported"
    # equal up to noise
    assert only(rows, "robust-sampling", "indm-ve", "euler_maruyama").verdict == "inconclusive"


def test_gap_on_the_other_side_of_zero_is_no_smaller_gap(copy):
    for seed in "012":
        folder = copy / "digits" / "indm-vp-nll" / seed
        edit(folder, "likelihood.json", lambda record: record["gap"]["corrected"].update(total=-0.3))
    row = only(judged(copy), "mle-training", "indm-vp-nll", statistic="at the end")
    assert row.verdict == "contradicted"
    assert row.estimate == pytest.approx(0.24, abs=0.001)


def test_comparison_without_samples_says_why(copy):
    for seed in "012":
        (copy / "digits" / "indm-vp-nll" / seed / "robustness.csv").unlink()
        path = copy / "digits" / "indm-ve" / seed / "robustness.csv"
        path.write_text(path.read_text().replace("euler_maruyama", "heun"))
    rows = judged(copy, claims=claim("sample-quality"))
    lost = only(rows, "sample-quality", "indm-vp-nll", "euler_maruyama")
    assert lost.verdict == "not measured" and lost.estimate is None
    assert lost.note == "INDM (VP, NLL): trained but not evaluated (seeds 0, 1, 2)"
    other = only(rows, "sample-quality", "indm-ve", "euler_maruyama")
    assert other.verdict == "not measured" and "INDM (VE): not sampled in this way" in other.note
    assert only(rows, "sample-quality", "indm-vp-fid", "euler_maruyama").n == 3


def test_pairs_use_common_seeds_only_and_few_decide_nothing(copy):
    shutil.rmtree(copy / "digits" / "indm-vp-nll" / "0")
    shutil.rmtree(copy / "digits" / "indm-vp-fid" / "1")
    shutil.rmtree(copy / "digits" / "ddpmpp-vp" / "2")
    rows = judged(copy, claims=claim("better-nll"))
    row = only(rows, "better-nll", "indm-vp-nll")
    totals = [
        json.loads((copy / "digits" / name / "1" / "likelihood.json").read_text())["nll"]["corrected"]["total"]
        for name in ("indm-vp-nll", "ddpmpp-vp")
    ]
    assert (row.n, row.estimate) == (1, pytest.approx(totals[0] - totals[1]))
    assert row.p is None and row.low is None and row.verdict == "inconclusive"
    assert "1 of the 3 paired seeds" in row.note and "One paired seed" in sentence(row)
    # two seeds have an interval and a p, which do not enter the family
    shutil.rmtree(copy / "digits" / "indm-ve" / "2")
    row = only(judged(copy, claims=claim("better-nll")), "better-nll", "indm-ve")
    assert row.n == 2 and row.p is not None and row.p_holm is None
    assert row.verdict == row.verdict_alone == "inconclusive" and "2 of the 3 paired seeds" in row.note


def test_seed_that_is_left_out_is_named(copy):
    rows = judged(copy, grid=expected("digits", ["digits"], seeds=range(4)), claims=claim("better-nll"))
    row = only(rows, "better-nll", "indm-vp-nll")
    assert row.n == 3 and "INDM (VP, NLL): 3 of 4 seeds; left out: run missing (seed 3)" in row.note
    assert "left out: run missing" in sentence(row)


def test_parts_that_do_not_sum_to_the_total_enter_no_claim(copy):
    edit(
        copy / "digits" / "ddpmpp-vp" / "0",
        "likelihood.json",
        lambda record: record["nll"]["corrected"]["parts"].update(prior=9.0),
    )
    row = only(judged(copy, claims=claim("better-nll")), "better-nll", "indm-vp-nll")
    assert row.n == 2 and "parts sum to" in row.note


# Refusals ----------------------------------------------------------------------------------------------------------

REFUSALS = {
    "better-nll": ("likelihood.json", lambda record: record["nll"].update(rtol=1e-3), "nll.rtol"),
    "mle-training": ("likelihood.json", lambda record: record["protocol"].update(weights="live"), "protocol.weights"),
    "robust-sampling": ("likelihood.json", lambda record: record["protocol"].update(reference="x"), "reference"),
    "fast-training": ("provenance.json", lambda record: record.update(images_seen=128000), "images_seen"),
    "flow-role": ("likelihood.json", lambda record: record["data"].update(hash="0" * 64), "data.hash"),
    "discretisation-error": ("likelihood.json", lambda record: record["protocol"].update(weights="live"), "weights"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_sides_measured_differently_are_refused_not_averaged(points, name):
    file, change, field = REFUSALS[name]
    for seed in "01234":
        folder = points / "toy2d" / "indm-vp-nll" / seed
        edit(folder, file, change)
        if name == "robust-sampling":
            edit(points / "toy2d" / "ddpmpp-vp" / seed, file, lambda record: record["protocol"].update(reference="y"))
    rows = judged(points, "toy2d", claims=claim(name))
    hit = [row for row in rows if row.variant == "indm-vp-nll" and row.baseline == "ddpmpp-vp"]
    refused = [row for row in hit if "refused" in row.note]
    assert refused and all(row.verdict == "not measured" and row.estimate is None for row in refused)
    assert all(field in row.note for row in refused)
    assert all("refused" not in row.note and row.estimate is not None for row in rows if row.variant == "indm-ve")


@pytest.mark.parametrize("name", ["better-nll", "discretisation-error"])
def test_seeds_measured_differently_are_refused(points, name):
    edit(points / "toy2d" / "ddpmpp-vp" / "1", "likelihood.json", lambda record: record["data"].update(hash="0" * 64))
    (row, *_) = [row for row in judged(points, "toy2d", claims=claim(name)) if row.variant == "indm-vp-nll"]
    assert row.verdict == "not measured" and "DDPM++ (VP): refused: seeds differ in data.hash" in row.note


def test_studies_with_other_settings_are_refused(points):
    for seed in "01234":
        path = points / "toy2d" / "indm-ve" / seed / "config.yaml"
        path.write_text(path.read_text().replace("latents: {groups: 20}", "latents: {groups: 10}"))
    rows = judged(points, "toy2d", claims=claim("flow-role"))
    assert "evaluate.studies.latents" in only(rows, "flow-role", "indm-ve").note
    assert only(rows, "flow-role", "indm-vp-nll").verdict == "supported"


def test_pre_training_on_top_of_the_budget_is_said(points):
    for seed in "01234":
        folder = points / "toy2d" / "indm-vp-pretrained" / seed
        edit(folder, "provenance.json", lambda record: record.update(images_seen=96000))
    row = only(judged(points, "toy2d", claims=claim("linear-pretraining")), "linear-pretraining")
    assert row.estimate is not None and "trained on 96,000 against 64,000 images" in row.note


# Studies -----------------------------------------------------------------------------------------------------------


def test_claims_about_studies(runs):
    rows = judged(runs, "toy2d")
    assert only(rows, "flow-role", "indm-vp-nll").verdict == "supported"
    term = only(rows, "discretisation-error", "indm-vp-nll", "ddim", "mean over step counts")
    assert term.verdict == "supported" and term.estimate == pytest.approx(-(2 / 4 + 2 / 8 + 2 / 16) / 6, abs=0.02)
    assert only(rows, "special-case", "ddpmpp-vp").verdict == "supported"
    assert {row.variant for row in rows if row.claim == "special-case"} == {"ddpmpp-vp", "ncsnpp-ve"}
    # both ways of drawing time are tested where they differ from the uniform one
    assert {row.variant for row in rows if row.claim == "debiased-time" and not row.baseline} == {
        "ddpmpp-vp",
        "sdeflow-uniform",
    }
    assert only(rows, "debiased-time", "ddpmpp-vp", statistic="over_debiased").verdict == "supported"
    assert only(rows, "debiased-time", "ddpmpp-vp", statistic="over_importance").verdict == "inconclusive"
    assert only(rows, "debiased-time", "sdeflow-debiased").verdict == "supported"
    # another estimator of the bound is not what the paper speaks of
    assert not [row for row in rows if "paired" in row.statistic or "elbo_sde" in row.statistic]


def test_special_case_must_be_exact_in_every_run(points):
    change_rows(points, "identities", "ddpmpp-vp", 3, {"value": "1e-12"}, claim="special-case", quantity="nll")
    rows = judged(points, "toy2d", claims=claim("special-case"))
    assert only(rows, "special-case", "ddpmpp-vp").verdict == "contradicted"
    assert only(rows, "special-case", "ncsnpp-ve").verdict == "supported"
    (points / "toy2d" / "ncsnpp-ve" / "2" / "identities.csv").unlink()
    row = only(judged(points, "toy2d", claims=claim("special-case")), "special-case", "ncsnpp-ve")
    assert (
        row.verdict == "inconclusive" and "identities.csv missing (seed 2)" in row.note
    )  # equal in those that are there


def test_checks_have_no_p_and_stand_outside_the_family(runs):
    rows = judged(runs, "toy2d")
    checks = [row for row in rows if row.test.kind == CHECK]
    assert checks and all(row.p is None and row.p_holm is None and row.seeds_needed is None for row in checks)
    assert {row.decided_by for row in checks} == {"runs"}
    assert sum(families("toy2d", rows).values()) == sum(row.p is not None for row in rows)


@pytest.mark.parametrize(
    ("value", "se", "verdict"),
    [("0.03", "0.01", "supported"), ("0.05", "0.005", "contradicted"), ("0.0", "0.1", "inconclusive")],
)
def test_gradients_are_equal_to_within_their_error(points, value, se, verdict):
    for seed in range(5):
        change = {"value": value, "se": se}
        change_rows(points, "identities", "ddpmpp-vp", seed, change, quantity="bound_difference")
    row = only(judged(points, "toy2d", claims=claim("dsm-is-elbo")), "dsm-is-elbo", "ddpmpp-vp", statistic="bound")
    # the mean of five has 1/sqrt(5) of a run's error
    expected = "contradicted" if float(value) > 4 * float(se) / math.sqrt(5) else verdict
    assert row.verdict == expected and row.units == "nats"
    assert f"standard error {float(se) / math.sqrt(5):.3g}" in row.note


def test_claims_that_do_not_apply_say_why(runs):
    rows = judged(runs)
    reasons = {row.claim: row.note for row in rows if row.verdict == "not measured"}
    assert "known density" in reasons["discretisation-error"]
    assert "nothing is translated" in reasons["image-translation"]
    assert "indm-vp-glow" in reasons["resnet-over-glow"] and "indm-vp-pretrained" in reasons["linear-pretraining"]
    assert "neither the data nor the scale" in reasons["state-of-the-art"]
    assert reasons["special-case"] == "the study 'identities' is not asked for in this suite"
    assert {row.claim for row in rows} == {one.id for one in CLAIMS}


def test_smoke_decides_nothing(runs, tmp_path):
    shutil.copytree(runs / "digits", tmp_path / "smoke")
    rows = judged(tmp_path, "smoke")
    assert [row.claim for row in rows] == [one.id for one in CLAIMS]
    assert {row.verdict for row in rows} == {"not measured"} and all("guard the code" in row.note for row in rows)


# One seed: images --------------------------------------------------------------------------------------------------


def test_one_pair_of_models_has_an_interval_over_images_and_no_verdict(tmp_path):
    write_suite(tmp_path, "cifar10", {"cifar10": False}, VARIANTS, (0,))
    for name in ("indm-vp-nll", "ddpmpp-vp"):
        write_per_image(tmp_path / "cifar10" / name / "0")
    rows = judged(tmp_path, "cifar10", claims=claim("better-nll"))
    row = only(rows, "better-nll", "indm-vp-nll")
    assert (row.decided_by, row.n, row.verdict, row.p) == ("images", 297, "inconclusive", None)
    assert row.low < row.estimate < row.high and "decides nothing about training" in row.note
    assert "297 test images" in sentence(row)
    # without the file there is no interval, and the row says how many seeds it lacks
    row = only(rows, "better-nll", "indm-ve")
    assert (row.decided_by, row.n, row.low) == ("seeds", 1, None) and "1 of the 3" in row.note


# Correction, power and words ---------------------------------------------------------------------------------------


def test_many_comparisons_take_back_what_one_alone_would_decide(runs):
    """Holm's correction acts within a data set and pair: p = 0.02 stands alone, and falls beside 0.3 and 0.6."""
    measured = only(judged(runs, claims=claim("better-nll")), "better-nll", "indm-vp-nll")
    family = [
        replace(measured, p=p, sd=abs(measured.estimate), verdict_alone=alone)
        for p, alone in ((0.02, "supported"), (0.3, "inconclusive"), (0.6, "inconclusive"))
    ]
    other = replace(family[0], variant="indm-ve", baseline="ncsnpp-ve")
    rows = correct("digits", [*family, other])
    assert [row.p_holm for row in rows] == pytest.approx([0.06, 0.6, 0.6, 0.02])
    assert [row.verdict for row in rows] == ["inconclusive"] * 3 + ["supported"]
    assert [row.p_holm_suite for row in rows] == pytest.approx([0.08, 0.6, 0.6, 0.08])  # four tests: 0.02 x 4, 0.3 x 2
    assert families("digits", rows) == {
        ("digits", "indm-vp-nll", "ddpmpp-vp"): 3,
        ("digits", "indm-ve", "ncsnpp-ve"): 1,
    }
    said = sentence(rows[0])
    assert rows[0].family == 3 and "no verdict among 3 comparisons" in said
    assert f"about {rows[0].seeds_needed} seeds would decide it" in said
    assert rows[0].seeds_needed > rows[3].seeds_needed > 3


def test_power_is_said_where_nothing_is_decided(copy):
    def same(record):
        record.clear()
        record.update(json.loads(source.read_text()))
        record["variant"] = "indm-vp-nll"

    for seed in "012":
        source = copy / "digits" / "ddpmpp-vp" / seed / "likelihood.json"
        edit(copy / "digits" / "indm-vp-nll" / seed, "likelihood.json", same)
    rows = judged(copy, claims=claim("better-nll"))
    row = only(rows, "better-nll", "indm-vp-nll")
    assert (row.estimate, row.p, row.verdict, row.seeds_needed) == (0.0, 1.0, "inconclusive", None)
    assert "no difference to decide" in sentence(row)
    row = only(rows, "better-nll", "indm-ve")
    assert row.verdict == "inconclusive" and re.search(r"about [\d,]+ seeds would decide it", sentence(row))


def test_table_has_its_columns_and_never_a_nan(runs, tmp_path):
    rows = judged(runs, "toy2d")
    write_csv(tmp_path / "claims.csv", rows)
    text = (tmp_path / "claims.csv").read_text()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert not re.search(r"\b(nan|inf|none)\b", text, re.IGNORECASE)
    assert len(text.splitlines()) == len(rows) + 1


def test_document_states_the_rules_and_every_claim(runs):
    rows, grid = judged(runs, "toy2d"), Grid(tuple(load_runs("toy2d", runs)))
    text = document(CLAIMS, rows, caption("toy2d", grid, rows))
    for said in (
        "seeds 0, 1, 2, 3, 4",
        "not the paper's data",
        f"of the {sum(families('toy2d', rows).values())} rows",
        "at least 5 seeds",
        "`p_holm_suite` in claims.csv",
    ):
        assert said in text
    for one in CLAIMS:
        assert f"## {one.title} ({one.id})" in text and one.statement.replace("<", "&lt;") in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {15}
