"""The studies' part of a report on synthetic files: tables and figures written, read back, and shown on the page."""

import csv
import json
import shutil

import pytest
from jinja2 import DictLoader
from synthetic_runs import Page, rows_of, write_suite
from synthetic_studies import (
    IMAGES,
    PLANE,
    SEEDS,
    STUDIES,
    VARIANTS,
    change,
    folder_of,
    grid_of,
    write_estimators,
    write_studies,
)

from bench.report import studies
from bench.report.display import markdown
from bench.report.estimators_page import estimators_section
from bench.report.page import _environment
from bench.report.studies import build_studies, report_studies
from bench.report.study_files import FORMS
from bench.report.study_views import study_views


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_suite(root, "toy2d", dict.fromkeys(PLANE, True), VARIANTS, SEEDS)
    write_studies(root, "toy2d")
    return root


@pytest.fixture
def copy(runs, tmp_path, monkeypatch):
    """A copy of the runs to damage, reported without figures."""
    monkeypatch.setattr(studies, "draw_studies", lambda *_: [])
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def reported(runs, tmp_path_factory):
    """The studies' part of a report, as the page reads it back: (folder, summary)."""
    folder = tmp_path_factory.mktemp("reports") / "toy2d"
    summary = {"datasets": list(PLANE), "studies": report_studies(grid_of(runs), folder)}
    return folder, json.loads(json.dumps(summary, allow_nan=False))


def test_report_writes_tables_figures_and_what_the_page_needs(reported):
    folder, summary = reported
    assert summary["studies"]["tables"] == list(STUDIES)
    assert set(summary["studies"]["figures"]) == {
        "gap_split.png",
        "discretisation_ddim.png",
        "discretisation_euler_maruyama.png",
        "conventions.png",
    }
    for name in summary["studies"]["figures"]:
        content = (folder / "figures" / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 200_000
    for name in STUDIES:
        assert rows_of(folder / f"{name}.csv")[0]["dataset"] == "checkerboard"
        text = (folder / f"{name}.md").read_text()
        assert text.startswith("# ") and "## swissroll" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) > 6
    assert "<are>" not in (folder / "conventions.md").read_text()
    assert summary["studies"]["conventions"]["two-draw-residual"]["title"]


def test_tables_survive_their_csv_files(runs, reported, tmp_path):
    folder, _ = reported
    for name, table in build_studies(grid_of(runs)).items():
        again = FORMS[name].table(name)
        again.rows = again.read_rows(folder / f"{name}.csv")
        again.write_csv(tmp_path / f"{name}.csv")
        assert (tmp_path / f"{name}.csv").read_bytes() == (folder / f"{name}.csv").read_bytes()
        assert len(again.rows) == len(table.rows)


def test_views_read_back_say_the_same_as_the_markdown(reported):
    folder, summary = reported
    shown = {study["name"]: study for study in study_views(folder, summary, 300)}
    assert list(shown) == list(STUDIES)
    for name, study in shown.items():
        assert markdown("x", study["views"]).partition("\n\n")[2].strip() in (folder / f"{name}.md").read_text()
        assert study["intro"] and all(view.caption for view in study["views"])
    split, terms = shown["gap_split"], shown["discretisation"]
    assert "variational" in split["headline"] and "Of 4 rows" in split["headline"]
    assert f"same {IMAGES} test points" in split["views"][0].caption
    assert terms["headline"] == "The bound holds in every seed in 24 of 24 rows."
    assert len(terms["figures"]) == 2 and terms["figures"][0]["uri"].startswith("data:image/png")
    assert "4 of 4 differences agree with their closed form" in shown["conventions"]["headline"]
    first = shown["conventions"]["views"][0]
    assert len(first.rows) == 4  # what no variant has is said once, below the table
    assert "uint8-truncation" not in {row[0] for row in first.rows}
    assert any(
        note.endswith("mean level of data: not defined: the data <are> not grey levels.") for note in first.notes
    )
    column = shown["latents"]["views"][0].columns.index("time")
    assert {row[column] for row in shown["latents"]["views"][0].rows} == {"z_0", "z_T"}


def test_stale_tables_go_and_an_absent_study_leaves_nothing(copy, tmp_path):
    folder = tmp_path / "reports"
    report_studies(grid_of(copy), folder)
    for path in (copy / "toy2d").glob("*/*/*/latents.csv"):
        path.unlink()
    made = report_studies(grid_of(copy), folder)
    assert "latents" not in made["tables"] and not list(folder.glob("latents.*"))
    for path in (copy / "toy2d").glob("*/*/*/*.csv"):
        if path.stem in FORMS:
            path.unlink()
    made = report_studies(grid_of(copy), folder)
    assert (made["tables"], made["figures"]) == ([], [])
    assert study_views(folder, {"datasets": [], "studies": made}) == [] and study_views(folder, {}) == []


def test_refused_rows_are_listed(copy, tmp_path):
    change(folder_of(copy, seed=1), "latents", lambda rows: [row.update(n="7") for row in rows])
    made = report_studies(grid_of(copy), tmp_path / "reports")
    assert made["refused"] == [
        "checkerboard, ddpmpp-vp, latents: refused: seeds differ in n (seed 1: 7; before it: 200)"
    ]


def test_same_files_give_the_same_bytes(runs, reported, tmp_path):
    folder, summary = reported
    assert report_studies(grid_of(runs), tmp_path) == summary["studies"]
    for path in folder.rglob("*.*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def render(**context):
    """The partial templates inside the smallest page that gives them what page.html.j2 does."""
    environment = _environment()
    source, _, _ = environment.loader.get_source(environment, "page.html.j2")
    macros = source.split("<!DOCTYPE html>")[0]
    body = (
        "<!DOCTYPE html><html><body>{% for suite in suites %}{% include 'studies.html.j2' %}{% endfor %}"
        "{% include 'estimators.html.j2' %}</body></html>"
    )
    partials = {
        name: environment.loader.get_source(environment, name)[0] for name in ("studies.html.j2", "estimators.html.j2")
    }
    environment.loader = DictLoader({"small": macros + body, **partials})
    return environment.get_template("small").render(**context)


def test_page_shows_studies_and_estimators_and_escapes(reported, tmp_path):
    folder, summary = reported
    write_estimators(tmp_path)
    suite = {"datasets": summary["datasets"], "studies": study_views(folder, summary, 200)}
    text = render(suites=[suite], estimators=estimators_section(tmp_path, 200))
    page = Page(text)
    said = " ".join(" ".join(page.text).split())
    assert "&lt;are&gt;" in text and "<are>" not in text and "&lt;5&gt;" in text and "<5>" not in text
    assert "3 of 4 estimates on problems with a known answer lie within their bounds" in said
    assert "Largest error in nats: 0.50 (bound 0.010; gaussian, ve, D = 2, NLL)" in said
    assert "Largest error: 0.010 (bound 0.10; gaussian, D = 2, order)" in said
    assert "Outside its bound: gaussian, ve, D = 2, NLL" in said
    assert "How the divergence is estimated: exact" in said and "summed: 5 terms <b>" in said
    assert "Estimators &amp; choices" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5 and all(len(image["alt"]) > 15 for image in images)
    assert Page(render(suites=[{"datasets": [], "studies": []}], estimators=None)).tags[-1][0] == "body"


def test_estimators_section_tells_damage_and_absence(tmp_path):
    assert estimators_section(tmp_path) is None
    folder = write_estimators(tmp_path)
    section = estimators_section(tmp_path, 100)
    assert (section["validation"]["within"], section["validation"]["count"]) == (3, 4)
    view = section["tables"][0]["view"]
    assert view.rows[0] == ["uniform", number_of(view.rows[0][1]), "no"]
    (folder / "validate.csv").write_text((folder / "validate.csv").read_text().replace("True", "perhaps"))
    (folder / "time_sampling.csv").write_text("a,b\n1\n")
    (folder / "summary.json").write_text("{")
    section = estimators_section(tmp_path, 100)
    assert section["validation"] is None and section["tables"] == [] and len(section["problems"]) == 3
    assert not any(str(tmp_path) in text for text in section["problems"])
    (folder / "validate.csv").write_text("problem,ok\na,True\n")
    assert "validate.csv lacks the column sde" in estimators_section(tmp_path, 100)["problems"]


def number_of(text):
    assert float(text.replace(",", "")) == pytest.approx(1234.5, rel=1e-3)
    return text


def test_csv_is_what_the_machine_reads(reported):
    folder, _ = reported
    with open(folder / "conventions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    row = next(row for row in rows if row["convention"] == "two-draw-residual")
    assert float(row["difference_low"]) < float(row["difference_mean"]) < float(row["difference_high"])
    assert row["difference_n"] == "3" and row["units"] == "nats" and float(row["se"]) > 0
    absent = next(row for row in rows if row["convention"] == "uint8-truncation")
    assert absent["difference_mean"] == "" and absent["difference_status"].startswith("not defined: ")
