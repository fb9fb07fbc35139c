"""Reports on synthetic runs, from the rows to verdicts, text, figures and a page that holds together."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import EFFECTS, VARIANTS, Page, edit, expected, rows_of, tables, write_run, write_suite

from bench.errors import InputError
from bench.report import report_index, report_suite
from bench.report.cells import Cell, Row, Table, aggregate
from bench.report.display import cell_text, interval, markdown, number, plain, views
from bench.report.load import load_runs
from bench.report.references import TRUST, family, load_published, of_families, reference_rows
from bench.report.tables import Grid
from bench.statistics import Summary, summarise

REFERENCE = Path(__file__).parents[1] / "reports" / "reference.csv"
PLANE = ["checkerboard", "swissroll"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two suites: digits (images) and toy2d (two data sets of points)."""
    root = tmp_path_factory.mktemp("runs")
    write_suite(root, "digits", {"digits": False})
    write_suite(root, "toy2d", dict.fromkeys(PLANE, True), seeds=(0, 1))
    return root


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of the digits runs to damage."""
    shutil.copytree(runs / "digits", tmp_path / "runs" / "digits")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def reported(runs, tmp_path_factory):
    """Reports of both suites, with gaps in digits, and the page."""
    damaged = tmp_path_factory.mktemp("damaged")
    shutil.copytree(runs, damaged / "runs")
    digits = damaged / "runs" / "digits"
    shutil.rmtree(digits / "indm-ve" / "2")
    edit(digits / "ncsnpp-ve" / "1", "likelihood.json", lambda r: r.update(status="diverged <at> step 7", nll=None))
    edit(digits / "indm-vp-fid" / "1", "likelihood.json", lambda r: r.update(n=100))
    reports = damaged / "reports"
    (reports / "digits").mkdir(parents=True)
    shutil.copy(REFERENCE, reports)
    gaussian = {"gaussian_full_covariance": {"nll": 2.974, "units": "bits/dim"}}
    (reports / "digits" / "references.json").write_text(json.dumps(gaussian))
    report_suite(
        "digits", damaged / "runs", reports, expected("digits", ["digits"]), "Digits <b>8 x 8</b>", "All & sundry"
    )
    report_suite("toy2d", damaged / "runs", reports, expected("toy2d", PLANE, seeds=(0, 1)))
    report_index(reports)
    return reports


# Findings ----------------------------------------------------------------------------------------------------------


def test_findings_recover_the_effects_put_in(reported):
    summary = json.loads((reported / "digits" / "summary.json").read_text())
    found = {}
    for finding in summary["findings"]:
        found.setdefault((finding["claim"], finding["variant"]), finding)
    nll = found["better-nll", "indm-vp-nll"]
    assert nll["low"] < EFFECTS["indm-vp-nll"][0] - EFFECTS["ddpmpp-vp"][0] < nll["high"]
    assert (nll["verdict"], nll["n"]) == ("supported", 3)
    assert re.fullmatch(
        r"INDM \(VP, NLL\)'s test NLL is 0\.\d+ ± 0\.\d+ bits/dim lower than DDPM\+\+ \(VP\)'s \(3 paired seeds\)\.",
        nll["sentence"],
    )
    assert found["mle-training", "indm-vp-nll"]["estimate"] == pytest.approx(-0.05, abs=0.001)
    assert found["robust-sampling", "indm-vp-nll"]["estimate"] == pytest.approx(0.5, abs=0.01)
    assert found["robust-sampling", "indm-vp-nll"]["verdict"] == "supported"
    # refused numbers decide nothing, and one pair of seeds gives no interval
    assert found["better-nll", "indm-vp-fid"]["verdict"] == "not measured"
    assert "seeds differ in n" in found["better-nll", "indm-vp-fid"]["sentence"]
    assert found["better-nll", "indm-ve"]["n"] == 1
    assert found["better-nll", "indm-ve"]["verdict"] == "inconclusive"
    assert "One paired seed" in found["better-nll", "indm-ve"]["sentence"]


# References --------------------------------------------------------------------------------------------------------


def test_published_numbers_have_a_known_trust():
    published = load_published(REFERENCE)
    assert len(published) > 50
    assert {number.trust for number in published} <= set(TRUST)
    assert family("indm-vp-nll") == "indm" and family("ddpmpp-vp") == "ddpmpp" and family("gan") is None
    names = {number.model for number in of_families(published, ["indm-vp-nll"])}
    assert "INDM (NLL)" in names and "DDPM++ cont. (VP)" in names and "NCSN++ cont. (VE)" in names
    assert not {"DDPM", "VDM", "Glow"} & names


@pytest.mark.parametrize(("old", "new", "named"), [("3.16", "NaN", "value"), ("leaderboard", "hearsay", "trust")])
def test_published_number_that_cannot_be_used_is_refused(tmp_path, old, new, named):
    path = tmp_path / "reference.csv"
    path.write_text(REFERENCE.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=f"line .*{named} = '{new}'"):
        load_published(path)


def test_published_rows_stand_beside_image_suites_only(reported):
    digits = [row for row in rows_of(reported / "digits" / "nll_nelbo_gap.csv") if row["kind"] == "published"]
    assert {row["trust"] for row in digits} <= set(TRUST)
    (row,) = [row for row in digits if row["variant"] == "DDPM++ cont. (VP)"]
    assert (row["published_nll"], row["published_nelbo"], row["dataset"]) == ("3.16", "", "CIFAR-10")
    assert not [row for row in rows_of(reported / "toy2d" / "nll_nelbo_gap.csv") if row["kind"] == "published"]
    steps = [row for row in rows_of(reported / "digits" / "step_robustness.csv") if row["kind"] == "published"]
    assert {row["variant"]: row["published_fid"] for row in steps if row["steps"] == "5"} == {
        "DDPM": "370.23",
        "DiffFlow": "28.51",
    }
    assert "not available" in next(row["detail"] for row in steps if row["variant"] == "INDM")
    text = (reported / "digits" / "nll_nelbo_gap.md").read_text()
    assert "not available" in text and "are not the paper's" in text


def test_reference_rows_of_both_forms(runs, reported, tmp_path):
    row = next(row for row in rows_of(reported / "digits" / "nll_nelbo_gap.csv") if row["kind"] == "reference")
    assert (row["variant"], row["nll_corrected_mean"]) == ("Gaussian, full covariance", "2.974")
    truths = [row for row in rows_of(reported / "toy2d" / "nll_nelbo_gap.csv") if row["kind"] == "reference"]
    assert {(row["dataset"], row["nll_corrected_mean"]) for row in truths} == {(name, "2.079") for name in PLANE}
    path = tmp_path / "references.json"
    path.write_text(json.dumps({"checkerboard": {"truth": 2.08, "uniform_box": {"nll": 2.77, "note": "too wide"}}}))
    found = reference_rows(path, Grid(tuple(load_runs("toy2d", runs))), dict.fromkeys(PLANE, "nats"))
    assert [(row.keys["variant"], row.keys["dataset"], row.extra["note"]) for row in found] == [
        ("exact density", "checkerboard", "mean over the runs' test points"),  # closer than the file's entropy
        ("exact density", "swissroll", "mean over the runs' test points"),
        ("uniform box", "checkerboard", "too wide"),
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"gaussian": {"nll": None}},
        {"gaussian": 2.0},
        {"gaussian": {"nll": 2, "units": "nats"}},
        {"g": {"nll": 2, "dataset": "x"}},
    ],
)
def test_reference_that_cannot_be_used_is_refused(copy, record):
    path = copy / "references.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="references.json"):
        reference_rows(path, Grid(tuple(load_runs("digits", copy))), {"digits": "bits/dim"})


# Text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (2.97412, 0.0123, "2.974 ± 0.012"),
        (2.97412, 0.0996, "2.97 ± 0.10"),
        (23863.2, 1234.0, "23,863 ± 1,234"),
        (-0.031, 0.0147, "−0.031 ± 0.015"),
        (-0.0001, 0.13, "0.00 ± 0.13"),
        (0.5, 0.0, "0.5000"),
    ],
)
def test_interval_fixes_the_digits(mean, half, text):
    assert interval(Summary(mean, 1.0, 3, mean - half, mean + half)) == text


def test_numbers_read_well():
    assert [number(value) for value in (0.0, 3.0, 1234.5678, -0.00012345)] == ["0", "3", "1,235", "−0.0001234"]
    assert [plain(value) for value in (1e-05, 2.970, 370.23, 62758787, "exact")] == [
        "1e-5", "2.97", "370.23", "62,758,787", "exact"
    ]  # fmt: skip
    assert cell_text(Cell(summarise([1.0, 2.0]), "2 of 3 seeds; left out: x")) == "1.5 ± 6.4 (2 of 3 seeds)"
    assert cell_text(Cell(None, "refused: seeds differ in n")) == "refused: seeds differ in n"


def test_markdown_cannot_be_broken_by_what_it_shows():
    table = Table("costs", ("dataset", "variant"), ("steps",), ("device",))
    table.rows.append(Row({"dataset": "d", "variant": "a|b<script>\n*c*"}, {"steps": aggregate({0: 1.0, 1: 2.0})}))
    text = markdown("Costs", views(table, {"d": "cap|tion"}))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<script>" not in text and "\\*c\\*" in text


def test_csv_round_trip(runs, tmp_path):
    for name, table in tables(runs).items():
        table.write_csv(tmp_path / f"{name}.csv")
        again = table.read_rows(tmp_path / f"{name}.csv")
        table.rows, before = again, table.rows
        table.write_csv(tmp_path / "again.csv")
        assert (tmp_path / "again.csv").read_bytes() == (tmp_path / f"{name}.csv").read_bytes()
        for one, other in zip(before, again, strict=True):
            for metric, value in one.cells.items():
                assert (value.summary is None) == (other.cells[metric].summary is None)
                if value.summary:
                    assert other.cells[metric].summary.mean == pytest.approx(value.summary.mean, rel=1e-8)
    with pytest.raises(ValueError, match="lacks the column"):
        tables(runs)["costs"].read_rows(tmp_path / "learning_curve.csv")


# Whole reports -----------------------------------------------------------------------------------------------------


def test_report_is_complete_on_partial_results(reported):
    for suite in ("digits", "toy2d"):
        folder = reported / suite
        for name in ("learning_curve", "nll_nelbo_gap", "likelihood_parts", "step_robustness", "costs", "claims"):
            assert (folder / f"{name}.csv").is_file() and (folder / f"{name}.md").read_text().startswith("# ")
        for name in ("learning_curve.png", "gap.png", "costs.png", "robustness_euler_maruyama.png"):
            assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert "variant" in rows_of(folder / "costs.csv")[0]
    assert (reported / "digits" / "figures" / "samples_indm-ve.png").is_file()
    assert (reported / "toy2d" / "figures" / "trajectory_swissroll_indm-ve.png").is_file()
    summary = json.loads((reported / "digits" / "summary.json").read_text())
    assert {(run["variant"], run["seed"], run["why"]) for run in summary["missing"]} == {
        ("indm-ve", 2, "run missing"),
        ("ncsnpp-ve", 1, "diverged <at> step 7"),
    }
    assert any("seeds differ in n" in text for text in summary["refused"])
    rows = rows_of(reported / "digits" / "nll_nelbo_gap.csv")
    (refused,) = [row for row in rows if row["variant"] == "indm-vp-fid"]
    assert refused["nll_corrected_mean"] == "" and refused["nll_corrected_status"].startswith("refused")


def test_nothing_but_expectations_still_makes_a_report(tmp_path):
    report_suite("digits", tmp_path, tmp_path / "reports", expected("digits", ["digits"]))
    rows = rows_of(tmp_path / "reports" / "digits" / "learning_curve.csv")
    assert len(rows) == len(VARIANTS)
    assert {row["nelbo_status"] for row in rows} == {"not measured: run missing (seeds 0, 1, 2)"}
    report_index(tmp_path / "reports")
    assert "run missing" in (tmp_path / "reports" / "index.html").read_text()


def test_quantities_that_do_not_exist_on_a_data_set_say_so(reported):
    row = rows_of(reported / "toy2d" / "step_robustness.csv")[0]
    assert row["fd_status"] == "not defined for 2-D data" and float(row["energy_mean"]) > 0
    row = rows_of(reported / "digits" / "step_robustness.csv")[0]
    assert row["energy_status"] == "not defined for images" and float(row["fd_mean"]) > 0


def test_metrics_are_strict_json_of_scalars(reported):
    def refuse(name):
        raise AssertionError(name)

    content = json.loads((reported / "digits" / "metrics.json").read_text(), parse_constant=refuse)
    good, refused = content["digits"]["ddpmpp-vp"], content["digits"]["indm-vp-fid"]
    assert good["nll_corrected"] == pytest.approx(2.6, abs=0.1) and good["status"] == "ok" and good["seeds"] == 3
    assert good["fd_euler_maruyama_64"] == pytest.approx(10, rel=0.1)
    assert refused["nll_corrected"] is None and "refused" in refused["status"]
    assert all(not isinstance(value, dict | list) for value in good.values())


def test_plots_are_long_tables(reported):
    rows = rows_of(reported / "toy2d" / "plots" / "learning_curve.csv")
    assert {"images", "nelbo", "variant"} <= set(rows[0])
    assert {row["series"] for row in rows} == {f"{dataset}/{variant}" for dataset in PLANE for variant in VARIANTS}
    assert float(rows[0]["nelbo_low"]) < float(rows[0]["nelbo"]) < float(rows[0]["nelbo_high"])


def test_same_files_give_the_same_bytes_and_stale_figures_go(tmp_path):
    write_suite(tmp_path / "runs", "small", {"digits": False}, VARIANTS[:2], (0, 1))
    written = []
    for _ in range(2):
        (tmp_path / "small" / "figures").mkdir(parents=True, exist_ok=True)
        (tmp_path / "small" / "figures" / "robustness_gone.png").write_bytes(b"old")
        report_suite("small", tmp_path / "runs", tmp_path, ())
        files = sorted(path for path in (tmp_path / "small").rglob("*") if path.is_file())
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0] == written[1]
    assert "robustness_gone.png" not in written[0]
    assert "robustness_ode.png" not in written[0]  # one point is no curve


# The page ----------------------------------------------------------------------------------------------------------


def test_page_is_one_file_that_asks_for_nothing(reported):
    text = (reported / "index.html").read_text()
    assert len(text.encode()) < 6_000_000
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "base")]
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes[name][:60])
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in attributes.get("style", "")
    assert "url(" not in text.split("<style>")[1].split("</style>")[0]


def test_page_can_be_read_without_seeing_it(reported):
    page = Page((reported / "index.html").read_text())
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) > 20 and all(len(attributes["alt"]) > 15 for attributes in images)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= targets
    assert next(attributes for tag, attributes in page.tags if tag == "html")["lang"] == "en"


def test_page_escapes_what_files_say(reported):
    text = (reported / "index.html").read_text()
    assert "Digits &lt;b&gt;8 x 8&lt;/b&gt;" in text and "<b>8 x 8" not in text
    assert "All &amp; sundry" in text and "diverged &lt;at&gt; step 7" in text


def test_page_says_what_was_run_found_and_missed(reported):
    text = " ".join(" ".join(Page((reported / "index.html").read_text()).text).split())
    assert "28 of 30" not in text and "33 of 35" in text  # runs complete, over both suites
    assert "Synthetic CPU" in text and "0123456789" in text and "2026-11-20 to 2026-11-22" in text
    assert "supported" in text and "contradicted" in text and "against the claim" in text
    assert "not in this suite: indm-vp-glow" in text and "seeds would decide it at the spread observed" in text
    assert "indm-ve, seed 2" in text and "seeds differ in n" in text
    assert "not available" in text and "text-copy" in text
    assert "indm-bench run digits" in text
    assert "Nothing: all 20 runs are complete" in text


def test_page_shrinks_its_pictures_to_stay_small(reported, monkeypatch):
    from bench.report import page

    size = len((reported / "index.html").read_bytes())
    monkeypatch.setattr(page, "LIMIT", size - 1)
    target = reported / "index.html"
    before = target.read_bytes()
    report_index(reported)
    assert len(target.read_bytes()) < size
    target.write_bytes(before)


def test_page_without_reports_is_refused(tmp_path):
    with pytest.raises(InputError, match="no suite has a report"):
        report_index(tmp_path)


def test_reports_import_no_model():
    heavy = {"torch", "pandas", "seaborn", "scipy", "models"}
    code = f"import sys, bench.report, bench.regression; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_run_alone_and_smoke_judge_nothing(tmp_path):
    write_run(tmp_path / "runs" / "one" / "ddpmpp-vp" / "0", "one", "digits", "ddpmpp-vp", 0, False)
    write_suite(tmp_path / "runs", "smoke", {"digits": False}, VARIANTS[:2], (0, 1))
    report_suite("one", tmp_path / "runs", tmp_path / "reports", ())
    report_suite("smoke", tmp_path / "runs", tmp_path / "reports", ())
    report_index(tmp_path / "reports")
    text = (tmp_path / "reports" / "index.html").read_text()
    assert "No claim could be measured" in text and "not in this suite: indm-vp-nll" in text
    assert "no claim is judged on it" in text
    assert not re.search('class="chip (supported|contradicted|inconclusive)"', text)
    rows = rows_of(tmp_path / "reports" / "smoke" / "claims.csv")
    assert {(row["verdict"], row["note"][:10]) for row in rows} == {("not measured", "this suite")}


def test_board_has_every_claim_before_anything_else(reported):
    text = (reported / "index.html").read_text()
    board = text[text.index('<table class="board claims">') : text.index('<section class="block" id="short">')]
    claims = json.loads((reported / "digits" / "summary.json").read_text())["claims"]
    assert len(claims) == 15 and all(f"<code>{claim['id']}</code>" in board for claim in claims)
    assert board.count("not the paper’s") == 1  # what the harness asks on its own
    assert text.index("<main>") < text.index(board) < text.index('class="suite"')
    # chips count the findings of each suite
    for suite in ("digits", "toy2d"):
        found = json.loads((reported / suite / "summary.json").read_text())["findings"]
        for verdict in ("supported", "contradicted", "inconclusive", "not measured"):
            own = sum(finding["verdict"] == verdict for finding in found if finding["claim"] == "better-nll")
            row = board[board.index("better-nll") :].split("</tr>")[0]
            assert own == 0 or f'title="{own} {verdict}"' in row
    assert len(re.findall(r"Of \d+ comparisons? \d+ supports? it, \d+ contradicts? it and \d+ stays? open", board)) == 5


def test_page_refuses_a_summary_of_another_form(reported, tmp_path):
    shutil.copytree(reported / "digits", tmp_path / "digits")
    shutil.copy(reported / "reference.csv", tmp_path)
    edit(tmp_path / "digits", "summary.json", lambda record: record.update(schema=1))
    with pytest.raises(InputError, match="run `indm-bench report digits` again"):
        report_index(tmp_path)


def test_page_leaves_out_a_suite_of_another_form_and_says_so(reported, tmp_path):
    for suite in ("digits", "toy2d"):
        shutil.copytree(reported / suite, tmp_path / suite)
    shutil.copy(reported / "reference.csv", tmp_path)
    edit(tmp_path / "digits", "summary.json", lambda record: record.update(schema=1))
    report_index(tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert 'id="suite-toy2d"' in text and 'id="suite-digits"' not in text
    assert "because other code wrote their reports: <code>digits</code>" in text
