"""The report of one suite: tables, figures, metrics and the summary from which the page is made."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import seals
from bench.errors import InputError
from bench.files import write_bytes_atomic, write_hashed_json, write_json, write_text_atomic
from bench.locks import exclusive_results
from bench.report import references
from bench.report.captions import captions
from bench.report.cells import OK, Row, Table
from bench.report.display import EMPTY, TITLES, markdown, views
from bench.report.figures import draw_all
from bench.report.grid import Grid, without_unrun
from bench.report.load import Run, finite, load_runs
from bench.report.studies import report_studies
from bench.report.tables import build

SUMMARY = "summary.json"
SCHEMA = 3  # of the summary
PICTURES = ("samples", "trajectory")
# what stands for sample quality on a data set, first choice first
QUALITY = ("fd", "sliced_wasserstein", "energy")
# what a point of the learning curve cost, beside the images it saw
COMPUTE = ("flops", "train_seconds")


def report_suite(
    suite_name: str,
    runs_root: Path | str | None = None,
    reports_root: Path | str | None = None,
    expected: Iterable[Mapping[str, Any]] | None = None,
    title: str | None = None,
    description: str | None = None,
) -> None:
    """Write ``reports_root``/``suite_name`` from the result files under ``runs_root``; no model and no GPU is needed.

    ``expected`` is the grid that the suite asks for, mappings with suite, dataset, variant and seed: what of it has no
    result is marked in every table. A variant whose entries have a true "more", which only the longer reproduction
    runs, is named once instead while nothing of it was run. Runs found on disk beside it are reported too. Left out,
    the roots, the grid and the words are those of :mod:`bench.config` and the suite's file. Raises InputError where
    there is neither a run nor an expectation, or a reference file cannot be read.
    """
    if runs_root is None or reports_root is None:
        from bench import config

        runs_root, reports_root = runs_root or config.runs_root(), reports_root or config.reports_root()
    if expected is None:
        expected, title, description = _suite_file(suite_name, title, description)
    folder = Path(reports_root) / suite_name
    expected = list(expected)
    runs = load_runs(suite_name, Path(runs_root), expected)
    if not runs:
        raise InputError(f"suite {suite_name!r}: no runs under {Path(runs_root) / suite_name} and none expected")
    more = {str(entry["variant"]) for entry in expected if entry.get("more")}
    with exclusive_results(folder):
        _write(suite_name, runs, more, folder, title or suite_name, description or "")


def _write(suite_name: str, runs: Sequence[Run], more: set[str], folder: Path, title: str, description: str) -> None:
    """Every file of the report, the summary with their hashes last."""
    grid = without_unrun(runs, more)
    runs = list(grid.runs)
    tables = build(grid)
    units = {row.keys["dataset"]: row.extra.get("units") for row in tables["nll_nelbo_gap"].rows}
    _add_references(tables, grid, units, folder / "references.json", folder.parent / "reference.csv")
    said = captions(suite_name, grid)
    for name, table in tables.items():
        table.write_csv(folder / f"{name}.csv")
        write_text_atomic(folder / f"{name}.md", markdown(TITLES[name], views(table, said[name]), EMPTY.get(name, "")))
    quality = {name: metric for name in grid.datasets if (metric := _quality(tables["step_robustness"], name))}
    _write_plots(tables, quality, folder / "plots")
    write_json(folder / "metrics.json", metrics(tables, quality))
    figures = draw_all(tables, quality, folder / "figures")
    pictures = _copy_pictures(grid, folder / "figures")
    studied = report_studies(grid, folder)
    _sweep(folder / "figures", {*figures, *studied["figures"], *(picture["file"] for picture in pictures)})
    write_hashed_json(
        folder / SUMMARY,
        {
            "schema": SCHEMA,
            "suite": suite_name,
            "title": title,
            "description": description,
            "datasets": grid.datasets,
            "variants": grid.variants,
            "seeds": grid.seeds,
            "units": units,
            "captions": said,
            **_report_claims(suite_name, grid, quality, units, folder),
            "figures": figures,
            "pictures": pictures,
            "runs": {"wanted": len(runs), "complete": sum(run.status == OK for run in runs)},
            "missing": missing(runs),
            "not_run": list(grid.not_run),
            "refused": refused(tables) + studied["refused"],
            "studies": studied,
            "provenance": provenance(runs),
            seals.HASHES: seals.report_hashes(folder),
        },
    )


def _report_claims(
    suite: str, grid: Grid, quality: Mapping[str, str], units: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Write claims.csv and claims.md; what the page says of them."""
    # here, because the claims read result files with the loaders of this package
    from bench.claims import CLAIMS, UNJUDGED
    from bench.report import claims_table, claims_text

    rows = claims_table.judge(suite, grid, quality, units, CLAIMS)
    claims_table.write_csv(folder / "claims.csv", rows)
    write_text_atomic(folder / "claims.md", claims_text.document(CLAIMS, rows, claims_text.caption(suite, grid, rows)))
    sizes = claims_table.families(suite, rows)
    return {
        "judged": suite not in UNJUDGED,
        "tested": sum(sizes.values()),
        "families": len(sizes),
        "claims": [claims_text.claim_record(claim) for claim in CLAIMS],
        "findings": [claims_text.record(row) for row in rows],
    }


def _suite_file(name: str, title: str | None, description: str | None) -> tuple[list[dict[str, Any]], Any, Any]:
    """The grid and the words of the suite's file; no grid where there is no such file."""
    from bench.config import load_suite, suite_files

    if name not in suite_files():
        return [], title, description
    suite = load_suite(name)
    grid = [
        {"suite": name, "dataset": dataset, "variant": variant, "seed": seed, "more": variant in suite.more}
        for variant, seed, dataset in suite.cells()
    ]
    return grid, title or suite.title, description or suite.description


def _add_references(
    tables: Mapping[str, Table], grid: Grid, units: Mapping[str, Any], closed: Path, cited: Path
) -> None:
    tables["nll_nelbo_gap"].rows += references.reference_rows(closed, grid, units)
    if "bits/dim" not in units.values():
        return  # no published number speaks of 2-D densities
    published = references.load_published(cited)
    tables["nll_nelbo_gap"].rows += references.likelihood_rows(published, grid.variants)
    tables["step_robustness"].rows += references.step_rows(published, grid.variants)


def _quality(table: Table, dataset: str) -> str | None:
    rows = [row for row in table.rows if row.keys["dataset"] == dataset and row.kind == "run"]
    return next((name for name in QUALITY if any((cell := row.cells.get(name)) and cell.summary for row in rows)), None)


def metrics(tables: Mapping[str, Table], quality: Mapping[str, str]) -> dict[str, Any]:
    """Data set -> variant -> scalars for ``dvc metrics show``: means over seeds, half-intervals, null if unmeasured."""
    nested: dict[str, Any] = {}
    for row in tables["nll_nelbo_gap"].rows:
        if row.kind != "run":
            continue
        scalars: dict[str, Any] = {}
        for name, cell in row.cells.items():
            scalars[name] = cell.summary.mean if cell.summary else None
            if name in ("nelbo_corrected", "nll_corrected", "gap_corrected"):
                scalars[f"{name}_half_interval"] = cell.summary.half if cell.summary else None
        scalars["seeds"] = max((cell.summary.n for cell in row.cells.values() if cell.summary), default=0)
        statuses = {cell.status for cell in row.cells.values()}
        scalars["status"] = "; ".join(sorted(statuses - {OK})) or OK
        nested.setdefault(row.keys["dataset"], {})[row.keys["variant"]] = scalars
    for row in tables["step_robustness"].rows:
        metric = quality.get(row.keys["dataset"])
        if row.kind == "run" and metric and row.keys["sampler"] and (cell := row.cells.get(metric)):
            steps = row.keys["steps"] or "adaptive"
            place = nested[row.keys["dataset"]][row.keys["variant"]]
            place[f"{metric}_{row.keys['sampler']}_{steps}"] = cell.summary.mean if cell.summary else None
    for row in tables["costs"].rows:
        for name in ("parameters_total", "flops_total", "ms_per_step", "train_seconds"):
            summary = row.cells[name].summary
            nested[row.keys["dataset"]][row.keys["variant"]][name] = summary.mean if summary else None
    return nested


def _write_plots(tables: Mapping[str, Table], quality: Mapping[str, str], folder: Path) -> None:
    """Long CSV files for ``dvc plots``, one line a point; ``series``: the variant, with its data set if several."""
    several = len({row.keys["dataset"] for row in tables["costs"].rows}) > 1

    def series(row: Row) -> str:
        return f"{row.keys['dataset']}/{row.keys['variant']}" if several else row.keys["variant"]

    curve, gaps, steps = [], [], []
    for row in tables["learning_curve"].rows:
        if (summary := row.cells["nelbo"].summary) and row.keys["images"]:
            nll = row.cells["nll"].summary
            keys = [row.keys["dataset"], row.keys["variant"], series(row), row.keys["images"], row.extra.get("units")]
            spent = [found.summary.mean if (found := row.cells[name]).summary else None for name in COMPUTE]
            curve.append([*keys, *spent, summary.mean, summary.low, summary.high, nll.mean if nll else None])
    for row in tables["nll_nelbo_gap"].rows:
        if row.kind == "run" and (summary := row.cells["gap_corrected"].summary):
            keys = [row.keys["dataset"], row.keys["variant"], series(row), row.extra.get("units")]
            gaps.append([*keys, summary.mean, summary.low, summary.high])
    for row in tables["step_robustness"].rows:
        metric = quality.get(row.keys["dataset"])
        if row.kind == "run" and metric and row.keys["steps"] and (summary := row.cells[metric].summary):
            keys = [row.keys["dataset"], row.keys["variant"], series(row), row.keys["sampler"], row.keys["steps"]]
            steps.append([*keys, metric, summary.mean, summary.low, summary.high])
    head = ["dataset", "variant", "series"]
    curve_head = [*head, "images", "units", *COMPUTE, "nelbo", "nelbo_low", "nelbo_high", "nll"]
    _write_lines(folder / "learning_curve.csv", curve_head, curve)
    _write_lines(folder / "gap.csv", [*head, "units", "gap", "gap_low", "gap_high"], gaps)
    _write_lines(
        folder / "step_robustness.csv", [*head, "sampler", "steps", "metric", "distance", "low", "high"], steps
    )


def _write_lines(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(
        [format(v, ".9g") if isinstance(v, float) else "" if v is None else v for v in line] for line in lines
    )
    write_text_atomic(path, stream.getvalue())


def _copy_pictures(grid: Grid, folder: Path) -> list[dict[str, Any]]:
    """Copy samples.png and trajectory.png of the first seed that has them."""
    several = len(grid.datasets) > 1
    copied = []
    for dataset, variant, runs in grid.cells():
        for kind in PICTURES:
            file = f"{kind}.png"
            run = next((run for run in runs if file not in run.problems and (run.folder / file).is_file()), None)
            if run is None:
                continue
            name = f"{kind}_{dataset}_{variant}.png" if several else f"{kind}_{variant}.png"
            write_bytes_atomic(folder / name, (run.folder / file).read_bytes())
            copied.append({"file": name, "kind": kind, "dataset": dataset, "variant": variant, "seed": run.seed})
    return copied


def _sweep(folder: Path, kept: set[str]) -> None:
    """Remove figures of earlier reports that nothing refers to any more."""
    for path in folder.glob("*.png"):
        if path.name not in kept:
            path.unlink()


def missing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs that lack a result, and why."""
    return [
        {"dataset": run.dataset, "variant": run.variant, "seed": run.seed, "why": run.status}
        for run in runs
        if run.status != OK
    ]


def refused(tables: Mapping[str, Table]) -> list[str]:
    """Rows whose numbers were refused because they were measured differently."""
    found = {}
    for table in tables.values():
        for row in table.rows:
            for cell in row.cells.values():
                if cell.status.startswith("refused"):
                    found[f"{row.keys['dataset']}, {row.keys['variant']}, {table.name}: {cell.status}"] = None
    return list(found)


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """Code, hardware and time of all runs together; each list holds the distinct values."""
    records = [run.provenance for run in runs if run.provenance]

    def distinct(name: str) -> list[Any]:
        return sorted({record[name] for record in records if record.get(name) is not None}, key=str)

    evaluated = [finite((run.likelihood or {}).get("evaluate_seconds")) for run in runs]
    evaluated += [finite(record.get("evaluate_seconds")) for record in records]
    started = [str(value) for value in distinct("started")]
    packages: dict[str, set[str]] = {}
    for record in records:
        for name, version in (record.get("packages") or {}).items():
            packages.setdefault(str(name), set()).add(str(version))
    return {
        "commits": distinct("commit"),
        "dirty": any(record.get("dirty") for record in records),
        "devices": distinct("device"),
        "cpus": distinct("cpu"),
        "cores": distinct("cores"),
        "threads": distinct("threads"),
        "python": distinct("python"),
        "packages": {name: ", ".join(sorted(versions)) for name, versions in sorted(packages.items())},
        "first_started": started[0] if started else None,
        "last_started": started[-1] if started else None,
        "train_seconds": sum(finite(record.get("train_seconds")) or 0.0 for record in records),
        "evaluate_seconds": sum(value for value in evaluated if value),
    }
