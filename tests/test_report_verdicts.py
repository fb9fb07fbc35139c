"""What the page says above a suite's claims: who did better, and of which comparisons that may be said."""

import shutil
from pathlib import Path

import pytest
from synthetic_runs import Page, edit, write_suite

from bench.report import report_index, report_suite

REFERENCE = Path(__file__).parents[1] / "reports" / "reference.csv"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A report of images with 3 seeds."""
    root = tmp_path_factory.mktemp("verdicts")
    write_suite(root / "runs", "digits", {"digits": False})
    report_suite("digits", root / "runs", root / "reports", ())
    shutil.copy(REFERENCE, root / "reports")
    return root / "reports"


@pytest.mark.parametrize(
    ("row", "said", "unsaid"),
    [
        (
            {"variant": "indm-ve", "baseline": "ncsnpp-ve", "side": "negative"},
            "1 comparison of INDM with its linear counterpart on this data and at this scale goes against the claim: "
            "there the linear diffusion did better.",
            "Of what else is compared",
        ),
        (
            {"variant": "sdeflow-debiased", "baseline": "sdeflow-uniform", "side": "negative"},
            "Of what else is compared, 1 row went against the claim.",
            "linear diffusion did better",
        ),
        (
            {"variant": "ddpmpp-vp", "baseline": "", "side": "equal"},
            "1 check of an identity or inequality failed.",
            "linear diffusion did better",
        ),
    ],
)
def test_only_a_linear_counterpart_is_said_to_do_better(reported, tmp_path, row, said, unsaid):
    shutil.copytree(reported / "digits", tmp_path / "digits")
    shutil.copy(reported / "reference.csv", tmp_path)

    def change(record):
        for finding in record["findings"]:
            finding["verdict"] = "inconclusive" if finding["estimate"] is not None else "not measured"
        next(f for f in record["findings"] if f["estimate"] is not None).update(row, verdict="contradicted")

    edit(tmp_path / "digits", "summary.json", change)
    report_index(tmp_path)
    text = " ".join(" ".join(Page((tmp_path / "index.html").read_text()).text).split())
    assert said in text and unsaid not in text and text.count("failed.") == (row["side"] == "equal")
    assert "all comparisons of the suite" not in text and "the claims about one pair on one data set" in text
