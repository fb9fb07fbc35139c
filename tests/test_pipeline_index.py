"""The page's stage depends on what the page reads, also where other suites' reports come and go."""

import json
import shutil
from pathlib import Path

import pytest

from bench import pipeline
from bench.files import file_hash

ROOT = Path(__file__).parents[1]
FIRST = ["toy2d", "digits"]


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A project that holds nothing but reports: the folder of these."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "suite_files", dict)
    monkeypatch.setattr(pipeline, "pipeline", lambda names, folder: "stages\n")
    for name in (*FIRST, "estimators"):
        (tmp_path / "reports" / name).mkdir(parents=True)
        (tmp_path / "reports" / name / "summary.json").write_text("{}")
    return tmp_path / "reports"


def recorded():
    return json.loads(pipeline.OTHERS.read_text())


def test_a_report_of_another_pipeline_changes_what_the_page_depends_on(reports):
    pipeline.write_pipelines()
    assert recorded() == {} and pipeline.outdated() == [] and pipeline.refresh() and not pipeline.refresh()
    summary = reports / "cifar10-lite" / "summary.json"
    for text in ("one", "two"):
        summary.parent.mkdir(exist_ok=True)
        summary.write_text(text)
        assert pipeline.outdated() == [] and recorded() != {"cifar10-lite": file_hash(summary)}
        assert not pipeline.refresh() and recorded() == {"cifar10-lite": file_hash(summary)}
    shutil.rmtree(summary.parent)
    assert not pipeline.refresh() and recorded() == {}


def test_reports_of_the_same_pipeline_are_dependencies_themselves(reports):
    pipeline.write_pipelines()
    for name in (*FIRST, "estimators"):
        (reports / name / "summary.json").write_text("changed")
    assert pipeline.outdated() == []
    depends = pipeline.index_stage(FIRST)["deps"]
    assert {f"reports/{name}/summary.json" for name in (*FIRST, "estimators")} < set(depends)
    # files of a measurement on a GPU among them, once they are there
    assert {"reports/performance", "reports/reference.csv", "reports/others.json"} < set(depends)


def test_no_dependency_of_the_page_is_made_by_another_pipeline():
    """Else `dvc repro` would run the suites that are meant for GPUs."""
    for dependency in map(Path, pipeline.index_stage(FIRST)["deps"]):
        owner = dependency.parts[1] if dependency.parts[0] == "reports" else ""
        assert owner not in set(pipeline.suite_files()) - set(FIRST)
