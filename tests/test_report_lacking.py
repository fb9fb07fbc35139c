"""Reports of models that lack a quantity: every table has their row, with the number or the reason for none."""

import json
import shutil
from pathlib import Path

import pytest
from synthetic_runs import (
    CHAINS,
    NO_BOUND,
    NO_CHAIN,
    NO_LAW,
    NO_SAMPLER,
    VARIANTS,
    Page,
    cell,
    edit,
    expected,
    rows_of,
    tables,
    write_suite,
)

from bench.report import forms, report_index, report_suite
from bench.report.cells import Cell, Row, Table
from bench.report.display import cell_text, views
from bench.report.forms import TABLES
from bench.report.grid import without_unrun
from bench.report.load import load_runs
from bench.statistics import summarise

REFERENCE = Path(__file__).parents[1] / "reports" / "reference.csv"
CORE = ("ddpmpp-vp", "indm-vp-nll")
MORE = ("ddpm", "ncsn", "diffflow")
LATER = ("sdeflow-uniform", "indm-vp-glow")
ALL = (*CORE, *MORE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of images and of points, some by models without a NELBO, without a sampler, or with a chain."""
    root = tmp_path_factory.mktemp("lacking")
    write_suite(root, "digits", {"digits": False}, ALL)
    write_suite(root, "toy2d", {"checkerboard": True}, ALL, seeds=(0, 1))
    return root


@pytest.fixture(scope="module")
def reported(runs, tmp_path_factory):
    """Reports of both suites, in which two more variants were never run, and the page."""
    reports = tmp_path_factory.mktemp("reports")
    shutil.copy(REFERENCE, reports)
    for suite, dataset, seeds in (("digits", "digits", (0, 1, 2)), ("toy2d", "checkerboard", (0, 1))):
        core = expected(suite, [dataset], CORE, seeds)
        more = [entry | {"more": True} for entry in expected(suite, [dataset], (*MORE, *LATER), seeds)]
        report_suite(suite, runs, reports, core + more)
    report_index(reports)
    return reports


def test_every_table_has_a_row_of_every_variant(reported):
    for suite in ("digits", "toy2d"):
        for name in TABLES:
            rows = [row for row in rows_of(reported / suite / f"{name}.csv") if row.get("kind", "run") == "run"]
            empty = suite == "toy2d" and name == "discrete_bounds"
            assert {row["variant"] for row in rows} == (set() if empty else set(ALL)), name


def test_model_without_a_bound_keeps_its_likelihood(runs):
    table = tables(runs)["nll_nelbo_gap"]
    for metric in ("nelbo_corrected", "gap_uncorrected"):
        assert cell(table, metric, variant="ncsn") == Cell(None, NO_BOUND)
    assert cell(table, "nll_corrected", variant="ncsn").summary.mean == pytest.approx(2.80, abs=0.1)
    curve = tables(runs)["learning_curve"]
    assert cell(curve, "nelbo", variant="ncsn", images=64000) == Cell(None, NO_BOUND)
    assert cell(curve, "nll", variant="ncsn", images=64000).summary.n == 3


def test_gap_is_of_nelbo_and_nll_alone_and_bounds_stand_side_by_side(runs):
    found = tables(runs)
    for variant in ("ddpm", "diffflow", "ddpmpp-vp"):
        nelbo, nll, gap = (
            cell(found["nll_nelbo_gap"], f"{name}_corrected", variant=variant).summary.mean
            for name in ("nelbo", "nll", "gap")
        )
        assert gap == pytest.approx(nelbo - nll)
        bounds = found["bounds"]
        assert cell(bounds, "nelbo", variant=variant).summary.mean == nelbo
        assert cell(bounds, "nll", variant=variant).summary.mean == nll
    assert cell(bounds, "chain", variant="ddpmpp-vp") == Cell(None, NO_CHAIN)
    assert cell(bounds, "chain", variant="ddpm").summary.mean == pytest.approx(
        cell(bounds, "nelbo", variant="ddpm").summary.mean + 0.2
    )
    assert cell(bounds, "chain", variant="ncsn").summary.n == 3  # of its levels, though it has no NELBO
    said = {row.keys["variant"]: row.extra for row in bounds.rows}
    assert {name: said[name]["chain_steps"] for name in CHAINS} == CHAINS
    assert said["diffflow"]["bound"] == "chain of 15 steps" and said["ddpm"]["bound"] == "continuous"
    assert said["ncsn"]["bound"] is None  # nothing is bounded
    assert said["diffflow"]["family"] == "fully nonlinear, discrete"


def test_kind_of_bound_is_a_variants_own_but_its_seeds_must_agree(runs, tmp_path):
    shutil.copytree(runs / "digits", tmp_path / "digits")
    edit(tmp_path / "digits" / "diffflow" / "1", "likelihood.json", lambda r: r["protocol"].update(bound="continuous"))
    table = tables(tmp_path)["bounds"]
    assert cell(table, "nelbo", variant="diffflow").status.startswith("refused: seeds differ in protocol.bound")
    assert cell(table, "nelbo", variant="ddpmpp-vp").status == "ok"


def test_discrete_bounds_have_a_table_of_their_own(runs, reported):
    table = tables(runs)["discrete_bounds"]
    assert cell(table, "discrete", variant="ddpm").summary.mean == pytest.approx(1.9)
    assert {cell(table, "discrete", variant=name).status for name in (*CORE, "ncsn", "diffflow")} == {NO_LAW}
    text = (reported / "digits" / "discrete_bounds.md").read_text()
    assert "Not comparable with any other table" in text
    for name in TABLES:
        header = (reported / "digits" / f"{name}.csv").read_text().splitlines()[0]
        assert ("discrete_mean" in header) == (name == "discrete_bounds")
    assert tables(runs, "toy2d")["discrete_bounds"].rows == []
    assert "No data set of this suite consists of images" in (reported / "toy2d" / "discrete_bounds.md").read_text()


def test_parts_of_a_chain_are_listed_and_those_of_one_model_alone_sum_up(runs, tmp_path):
    shutil.copytree(runs / "digits", tmp_path / "digits")
    for seed in "012":
        folder = tmp_path / "digits" / "ddpm" / seed

        def split(record):
            parts = record["chain"]["parts"]
            parts["curl"], parts["twist"] = 0.25, 0.5
            parts["diffusion"] -= 0.75

        edit(folder, "likelihood.json", split)
    table = tables(tmp_path)["likelihood_parts"]
    (row,) = [row for row in table.rows if row.keys["variant"] == "ddpm" and row.keys["bound"] == "chain"]
    assert row.cells["other"].summary.mean == 0.75
    parts = [value.summary.mean for name, value in row.cells.items() if name != "total"]
    assert sum(parts) == pytest.approx(row.cells["total"].summary.mean)
    assert not [row for row in table.rows if row.keys["variant"] == "ddpmpp-vp" and row.keys["bound"] == "chain"]
    (row, _) = [row for row in table.rows if row.keys["variant"] == "ncsn" and row.keys["bound"] == "nelbo"]
    assert row.cells == {"total": Cell(None, NO_BOUND)}


def test_sampler_that_a_model_lacks_is_one_line(runs):
    table = tables(runs)["step_robustness"]
    rows = [row for row in table.rows if row.keys["variant"] == "ncsn" and row.keys["sampler"] == "euler_maruyama"]
    assert [row.keys["steps"] for row in rows] == [8, 16, 32, 64]
    assert {row.cells["fd"].status for row in rows} == {NO_SAMPLER}
    (view,) = views(table, {})
    lines = [line for line in view.rows if line[:2] == ["ncsn", "euler_maruyama"]]
    assert lines == [["ncsn", "euler_maruyama", "8 to 64", NO_SAMPLER, *["—"] * 5, "0"]]
    assert len([line for line in view.rows if line[0] == "ddpm" and line[1] == "euler_maruyama"]) == 4


def test_costs_are_those_of_the_files(runs):
    table = tables(runs)["costs"]
    assert cell(table, "flops_total", variant="ddpm").summary.mean == 1000 * 123456789
    assert cell(table, "peak_bytes", variant="ddpm").summary.mean == 2.5e6
    assert cell(table, "parameters_drift", variant="diffflow").summary.mean == 9000
    assert cell(table, "parameters_drift", variant="ddpm").summary.mean == 0
    curve = tables(runs)["learning_curve"]
    assert cell(curve, "flops", variant="ddpm", images=12800).summary.mean == 200 * 123456789
    assert cell(curve, "train_seconds", variant="ddpm", images=12800).summary.mean == pytest.approx(12)


def test_large_numbers_keep_their_interval():
    same, spread = Cell(summarise([1.5e12, 1.5e12])), Cell(summarise([1.5e9, 1.6e9, 1.7e9]))
    assert cell_text(same, "flops_total") == "1.50 T"
    assert cell_text(spread, "flops_total") == "1.60 ± 0.25 G"


def test_curves_are_drawn_against_images_arithmetic_and_time(reported):
    figures = json.loads((reported / "digits" / "summary.json").read_text())["figures"]
    assert {"learning_curve.png", "learning_curve_flops.png", "learning_curve_seconds.png"} <= set(figures)
    (row, *_) = rows_of(reported / "digits" / "plots" / "learning_curve.csv")
    assert float(row["flops"]) == float(row["images"]) / 64 * 123456789 and float(row["train_seconds"]) > 0


def test_variants_left_to_the_longer_reproduction_are_named_once(reported, runs):
    summary = json.loads((reported / "digits" / "summary.json").read_text())
    assert summary["not_run"] == list(LATER) and summary["missing"] == []
    for name in TABLES:
        assert not {row["variant"] for row in rows_of(reported / "digits" / f"{name}.csv")} & set(LATER)
    caption = "Not run: sdeflow (uniform), INDM (VP, Glow); `make repro-all` runs them."
    assert caption.replace("`", "\\`") in (reported / "digits" / "nll_nelbo_gap.md").read_text()
    text = " ".join(" ".join(Page((reported / "index.html").read_text()).text).split())
    assert "make repro-all runs them: sdeflow-uniform, indm-vp-glow" in text.replace(
        "make repro-all  ", "make repro-all "
    )
    # one run of such a variant is a run like any other, and what it lacks is missing
    grid = expected("digits", ["digits"], ("ddpm",), (0, 9))
    kept = without_unrun(load_runs("digits", runs, grid), ["ddpm"])
    assert kept.not_run == () and [run.status for run in kept.of("digits", "ddpm")][:2] == ["ok", "run missing"]


def test_claims_and_page_survive_what_is_not_defined(reported):
    rows = rows_of(reported / "digits" / "claims.csv")
    assert not [row for row in rows if "ncsn" in (row["variant"], row["baseline"]) and row["verdict"] == "supported"]
    page = Page((reported / "index.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert NO_BOUND in text and NO_LAW in text and "chain of 15 steps" in text
    assert "Learning curve against compute" in text and "No data set of this suite consists of images" in text


def test_claim_about_a_variant_without_its_number_is_not_measured(runs, tmp_path):
    from synthetic_runs import judged

    shutil.copytree(runs / "digits", tmp_path / "digits")
    for seed in "012":
        lost = {"nelbo": None, "gap": None, "reasons": {"nelbo": NO_BOUND, "gap": NO_BOUND}}
        edit(tmp_path / "digits" / "indm-vp-nll" / seed, "likelihood.json", lambda record: record.update(lost))
    found = [row for row in judged(tmp_path) if row.claim == "mle-training" and row.variant == "indm-vp-nll"]
    assert found[0].verdict == "not measured" and NO_BOUND in found[0].note
    (nll,) = [row for row in judged(tmp_path) if row.claim == "better-nll" and row.variant == "indm-vp-nll"]
    assert nll.verdict != "not measured"


def test_rows_of_one_reason_become_one_line_and_others_stay():
    def row(steps, cell):
        return Row({"dataset": "d", "variant": "a", "sampler": "s", "steps": steps}, {"fd": cell})

    lacking = Cell(None, "not defined: why")
    table = Table("step_robustness", ("dataset", "variant", "sampler", "steps"), ("fd",))
    table.rows = [row(4, lacking), row(8, lacking), row(16, Cell(summarise([1.0, 2.0])))]
    (view,) = views(table, {})
    assert [line[:4] for line in view.rows] == [
        ["a", "s", "4 and 8", "not defined: why"],
        ["a", "s", "16", "1.5 ± 6.4"],
    ]


def test_older_runs_are_read_and_say_that_they_are_older(tmp_path):
    write_suite(tmp_path, "digits", {"digits": False}, VARIANTS[:2], (0, 1))
    for path in tmp_path.rglob("likelihood.json"):
        old = lambda record: [record.pop(name) for name in ("chain", "discrete", "reasons", "family")]  # noqa: E731
        edit(path.parent, "likelihood.json", old)
    found = tables(tmp_path)
    assert cell(found["nll_nelbo_gap"], "gap_corrected", variant="ddpmpp-vp").summary.n == 2
    assert "evaluated by code that knew no bounds" in cell(found["bounds"], "chain", variant="ddpmpp-vp").status


def test_no_string_of_the_style_sheet_runs_over_a_line():
    """Such a string is an error of CSS that silently takes the rules after it away: the page loses its margins."""
    style = (Path(forms.__file__).parent / "page.css.j2").read_text()
    assert all(line.count('"') % 2 == 0 for line in style.splitlines())
    assert style.count("{") == style.count("}")
