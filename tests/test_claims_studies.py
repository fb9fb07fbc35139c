"""Claims on studies that went wrong: a bound that does not hold, rows without numbers, files of one reason."""

import shutil

import pytest
from synthetic_claims import change_rows, claim, only, read_study, write_studies, write_study
from synthetic_runs import EFFECTS, OTHERS, judged, write_suite


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Points with 5 seeds, every study and every variant."""
    root = tmp_path_factory.mktemp("runs")
    write_suite(root, "toy2d", {"checkerboard": True}, (*EFFECTS, *OTHERS), range(5))
    write_studies(root, "toy2d")
    for picture in root.rglob("*.png"):
        picture.unlink()
    return root


@pytest.fixture
def points(runs, tmp_path):
    """A copy to damage."""
    shutil.copytree(runs / "toy2d", tmp_path / "runs" / "toy2d")
    return tmp_path / "runs"


def test_bound_on_the_total_variation_is_checked_at_every_step(points):
    rows = judged(points, "toy2d", claims=claim("discretisation-error"))
    row = only(rows, "discretisation-error", "ddpmpp-vp", "ddim", "smallest")
    assert row.verdict == "supported"
    # within two standard errors of 0.01, then beyond them: the floor of 0.05 is no excuse
    for excess, verdict in ((0.015, "supported"), (0.025, "contradicted")):
        found = read_study(points / "toy2d" / "ddpmpp-vp" / "2", "discretisation")
        bound = next(float(r["bound"]) for r in found if (r["sampler"], r["steps"]) == ("ddim", "16"))
        change_rows(points, "discretisation", "ddpmpp-vp", 2, {"tv": bound + excess}, sampler="ddim", steps="16")
        rows = judged(points, "toy2d", claims=claim("discretisation-error"))
        assert only(rows, "discretisation-error", "ddpmpp-vp", "ddim", "smallest").verdict == verdict
        assert only(rows, "discretisation-error", "ddpmpp-vp", "euler_maruyama", "smallest").verdict == "supported"


def test_bound_without_its_estimation_term_is_found_not_to_hold(points):
    for estimation, verdict in ((0.09, "supported"), (0.0, "contradicted")):
        terms = {"prior": 0.001, "estimation": estimation, "discretisation": 0.055}
        found = {"tv": 0.12, "bound": sum(terms.values())} | terms
        change_rows(points, "discretisation", "ddpmpp-vp", 2, found, sampler="ddim", steps="8")
        row = only(
            judged(points, "toy2d", claims=claim("discretisation-error")),
            "discretisation-error",
            "ddpmpp-vp",
            "ddim",
            "smallest",
        )
        assert row.verdict == verdict and "no evidence by itself" in row.note


WHOLE = {
    "discretisation": ("discretisation-error", "euler_maruyama", "mean over step counts"),
    "latents": ("flow-role", None, ""),
    "identities": ("special-case", None, ""),
}


@pytest.mark.parametrize("study", WHOLE)
@pytest.mark.parametrize("everywhere", [True, False], ids=["every run", "one variant"])
def test_study_that_failed_as_a_whole_keeps_its_reason(points, study, everywhere):
    """Such a file is one row with a status and blank keys."""
    name, sampler, statistic = WHOLE[study]
    why = "not measured: the inverse of the flow did not converge"
    for folder in (points / "toy2d").glob("*/*"):
        if everywhere or folder.parent.name == "ddpmpp-vp":
            write_study(folder, study, [{"status": why}])
    rows = [row for row in judged(points, "toy2d", claims=claim(name)) if statistic in row.statistic]
    hit = [row for row in rows if "ddpmpp-vp" in (row.variant, row.baseline)]
    assert hit and all(row.verdict == "not measured" for row in hit)
    assert all("the inverse of the flow did not converge" in row.note for row in hit)
    # no row of a sampler or quantity without a name beside those of the other runs
    if sampler:
        assert {row.sampler for row in hit} == ({""} if everywhere else {"ddim", "euler_maruyama"})
    if not everywhere:
        assert any(row.verdict != "not measured" for row in rows if row not in hit)


def test_identities_that_failed_as_a_whole_keep_their_reason(points):
    for folder in (points / "toy2d").glob("*/*"):
        reason = "not measured: a" if folder.parent.name == "ddpmpp-vp" else "not measured: b"
        write_study(folder, "identities", [{"status": reason}])
    rows = judged(points, "toy2d", claims=claim("dsm-is-elbo", "debiased-time"))
    notes = {(row.variant, row.note) for row in rows if not row.baseline}
    assert notes == {("ddpmpp-vp", "a"), ("ncsnpp-ve", "b"), ("sdeflow-uniform", "b")}


def test_reasons_of_two_variants_stand_apart(points):
    """Both have the seeds 0 to 4: a reason of one must not replace that of the other."""
    for folder in (points / "toy2d").glob("*/*"):
        reason = "not measured: a" if folder.parent.name == "ddpmpp-vp" else "not measured: b"
        write_study(folder, "discretisation", [{"status": reason}])
    rows = judged(points, "toy2d", claims=claim("discretisation-error"))
    (row,) = [row for row in rows if row.variant == "indm-vp-nll" and row.baseline]
    assert row.note.startswith("DDPM++ (VP): ") and "; INDM (VP, NLL): " in row.note


def test_what_a_study_could_not_measure_is_told(points):
    for seed in range(5):
        change = {"value": "", "se": "", "status": "not defined: 3 images do not determine a covariance"}
        change_rows(points, "latents", "indm-ve", seed, change, quantity="kl_gaussian_change")
    row = only(judged(points, "toy2d", claims=claim("flow-role")), "flow-role", "indm-ve")
    assert row.verdict == "not measured" and "do not determine a covariance" in row.note
