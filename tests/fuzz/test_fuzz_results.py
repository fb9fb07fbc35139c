"""What the report reads: result files, reference numbers, summaries, with consistent hashes as a hostile writer has."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import harness
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from synthetic_runs import expected, write_run

from bench import seals
from bench.files import HASH_KEY, content_hash, file_hash, write_hashed_json
from bench.report import page, suite
from bench.report.references import load_published
from bench.yaml_files import dump_yaml, read_yaml

DATASETS = {"digits": False, "gaussians": True}
VARIANTS = ("ddpmpp-vp", "indm-vp-nll")
REFERENCE = Path(__file__).parents[2] / "reports" / "reference.csv"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for dataset, flat in DATASETS.items():
        for variant in VARIANTS:
            write_run(root / dataset / "runs" / dataset / variant / "0", dataset, dataset, variant, 0, flat)
    return root


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Without the figures, which take seconds and are made of the tables alone."""
    monkeypatch.setattr(suite, "draw_all", lambda *_: [])


def seal(folder: Path) -> None:
    for name, marker in seals.MARKERS.items():
        files = [path for path in folder.iterdir() if path.name not in seals.MARKERS]
        kept = [path for path in files if (path.name in (*seals.TRAINED_FILES, marker)) == (name == seals.TRAIN)]
        kept += [folder / marker] if (folder / marker).is_file() and folder / marker not in kept else []
        write_hashed_json(folder / name, {"schema": 1, "files": {path.name: file_hash(path) for path in kept}})


def report(root: Path, dataset: str) -> None:
    suite.report_suite(dataset, root / "runs", root / "reports", expected(dataset, [dataset], VARIANTS, (0,)))


def table(draw: st.DrawFn, text: str) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        column = draw(st.integers(0, max(0, len(rows[row]) - 1)))
        how = draw(st.sampled_from(["set", "set", "set", "drop row", "copy row", "drop cell", "add cell"]))
        if how == "drop row":
            rows = rows[:row] + rows[row + 1 :] or [["a"]]
        elif how == "copy row":
            rows.insert(row, list(rows[row]))
        elif how == "drop cell":
            rows[row] = rows[row][:column] + rows[row][column + 1 :]
        elif how == "add cell":
            rows[row] = [*rows[row], "x"]
        elif rows[row]:
            rows[row][column] = str(draw(harness.SCALARS))
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


@st.composite
def hostile_file(draw: st.DrawFn, path: Path) -> bytes:
    content = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return draw(harness.damaged(content))
    if path.suffix == ".csv":
        return table(draw, content.decode()).encode("utf-8", "replace")
    if path.suffix == ".json":
        return json.dumps(draw(harness.mutated(json.loads(content), 3))).encode()
    try:
        return dump_yaml(draw(harness.mutated(read_yaml(path), 3))).encode("utf-8", "replace")
    except Exception:  # noqa: BLE001 - what cannot be written as YAML cannot be read either
        return b"suite: [\n"


@harness.cases(0.4)
@given(data=st.data())
def test_result_files(runs, tmp_path_factory, data):
    dataset = data.draw(st.sampled_from(sorted(DATASETS)))
    name = data.draw(
        st.sampled_from(["likelihood.json"] * 4 + ["provenance.json"] * 2 + ["config.yaml", "failure.json"])
        | st.sampled_from(["learning_curve.csv", "robustness.csv", seals.TRAIN, seals.EVALUATE, "samples.png"])
    )
    work = tmp_path_factory.getbasetemp() / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(runs / dataset, work)
    folder = work / "runs" / dataset / VARIANTS[1] / "0"
    seal(work / "runs" / dataset / VARIANTS[0] / "0")
    if name == "failure.json":
        (folder / name).write_text('{"status": "loss not finite", "step": 7}')
    if name.startswith("hashes"):
        seal(folder)
    (folder / name).write_bytes(data.draw(hostile_file(folder / name)) if name != "samples.png" else b"no picture")
    if not name.startswith("hashes"):
        seal(folder)
    harness.attempt("result files", lambda: report(work, dataset))


@harness.cases(4.0)
@given(data=st.data())
@example(data=None)
def test_reference_numbers(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "reference.csv"
    text = REFERENCE.read_text()
    if data is None:
        for content in (
            b"\xff\xfe\x00",
            b"model\0,x\n",
            b'"' + b"x" * 200_000 + b'"\n',
            b"",
            b"a,a\n1,2\n",
            b"\xef\xbb\xbfa\n",
        ):
            path.write_bytes(content)
            harness.attempt("reference numbers", lambda: load_published(path))
        return
    few = "".join(text.splitlines(keepends=True)[: data.draw(st.integers(1, 8))])
    draw = data.draw
    content = (
        draw(harness.damaged(few.encode())) if draw(st.booleans()) else table(draw, few).encode("utf-8", "replace")
    )
    path.write_bytes(content)
    harness.attempt("reference numbers", lambda: load_published(path))


@harness.cases(0.15)
@given(data=st.data())
def test_references_of_a_suite(runs, tmp_path_factory, data):
    work = tmp_path_factory.getbasetemp() / "closed"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(runs / "digits", work)
    for variant in VARIANTS:
        seal(work / "runs" / "digits" / variant / "0")
    honest = {"digits": {"gaussian_full_covariance": {"nll": 2.5, "units": "bits/dim", "note": "n"}}}
    content = json.dumps(data.draw(harness.mutated(honest))).encode()
    (work / "reports" / "digits").mkdir(parents=True)
    target = work / "reports" / "digits" / "references.json"
    target.write_bytes(data.draw(harness.damaged(content)) if data.draw(st.booleans()) else content)
    harness.attempt("closed forms", lambda: report(work, "digits"))


@harness.cases(0.2)
@given(data=st.data())
def test_the_page_of_hostile_reports(runs, tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp() / "paged"
    if not base.exists():
        shutil.copytree(runs / "digits", base)
        for variant in VARIANTS:
            seal(base / "runs" / "digits" / variant / "0")
        report(base, "digits")
    work = base.with_name("page")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base / "reports", work)
    folder = work / "digits"
    name = data.draw(st.sampled_from(["summary.json"] * 4 + ["nll_nelbo_gap.csv", "step_robustness.csv", "costs.csv"]))
    content = data.draw(hostile_file(folder / name))
    (folder / name).write_bytes(content)
    try:  # a hostile writer hashes what it wrote
        summary = json.loads((folder / "summary.json").read_bytes())
        summary.pop(HASH_KEY, None)
        summary["hashes"] = seals.report_hashes(folder)
        (folder / "summary.json").write_text(json.dumps(summary | {HASH_KEY: content_hash(summary)}))
    except (ValueError, TypeError, AttributeError):
        pass
    harness.attempt("summaries", lambda: page.report_index(work))
