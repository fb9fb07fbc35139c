"""The measured rows of every table: runs of a suite -> aggregated rows, refused where protocols differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from bench.report.bounds import fill_bounds, fill_discrete
from bench.report.cells import Cell, Row, Table, aggregate
from bench.report.forms import CORRECTIONS, PARTS, TABLES
from bench.report.grid import (
    Grid,
    bound_stated,
    common,
    curve_units,
    likelihood_reading,
    mean_of,
    stated,
    total_reading,
)
from bench.report.load import CURVE, LIKELIHOOD, PROVENANCE, ROBUSTNESS, Reading, Run, finite
from bench.report.protocol import (
    curve_protocol,
    likelihood_protocol,
    refusals,
    robustness_protocol,
    timing_protocol,
)

__all__ = [
    "IMAGES",
    "NOT_ASKED",
    "PLANE",
    "TABLES",
    "Grid",
    "build",
    "cost_reading",
    "likelihood_reading",
    "point_protocol",
    "quality_reading",
    "robustness_line",
]

PLANE = "not defined for 2-D data"
IMAGES = "not defined for images"
NOT_ASKED = "not asked for in this suite"
CURVE_COLUMNS = {
    "nelbo": ("nelbo_bpd", "nelbo_nats"),
    "nll": ("nll_bpd", "nll_nats"),
    "fd": ("fd",),
    "energy": ("energy",),
}


def build(grid: Grid) -> dict[str, Table]:
    """All tables of a suite with their measured rows."""
    fillers = {
        "learning_curve": _fill_curve,
        "nll_nelbo_gap": _fill_likelihood,
        "bounds": fill_bounds,
        "discrete_bounds": fill_discrete,
        "likelihood_parts": _fill_parts,
        "step_robustness": _fill_robustness,
        "costs": _fill_costs,
    }
    tables = {}
    for name, make in TABLES.items():
        tables[name] = make()
        fillers[name](tables[name], grid)
    return tables


def _fill_likelihood(table: Table, grid: Grid) -> None:
    refused = {name: refusals(grid.of(name), likelihood_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        refusal = refused[dataset].get(variant)
        row = Row({"dataset": dataset, "kind": "run", "variant": variant})
        for correction in CORRECTIONS:
            for bound in ("nelbo", "nll", "gap"):
                readings = {run.seed: likelihood_reading(run, bound, correction) for run in runs}
                row.cells[f"{bound}_{correction}"] = aggregate(readings, refusal)
        row.extra = {
            "units": stated(runs, "units") or curve_units(grid.of(dataset)),
            "family": stated(runs, "family"),
            "bound": bound_stated(runs),
            "images": common((run.likelihood or {}).get("n") for run in runs if not run.diverged),
            "detail": refusal or "",
        }
        if not refusal:
            row.extra |= {
                "nelbo_se_images": mean_of(runs, "nelbo", "corrected", "se_images"),
                "nelbo_se_repeats": mean_of(runs, "nelbo", "corrected", "se_repeats"),
                "nll_se_images": mean_of(runs, "nll", "corrected", "se_images"),
                "gap_se": mean_of(runs, "gap", "corrected", "se"),
                "nfe": mean_of(runs, "nll", "nfe_mean"),
                "nll_tolerance_change": mean_of(runs, "nll", "tolerance_check", "change"),
            }
        table.rows.append(row)


def _fill_parts(table: Table, grid: Grid) -> None:
    refused = {name: refusals(grid.of(name), likelihood_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        refusal = refused[dataset].get(variant)
        places = [(bound, correction, (bound, correction)) for bound in ("nelbo", "nll") for correction in CORRECTIONS]
        if any(not isinstance(run.at(LIKELIHOOD, "chain", "total"), str) for run in runs):
            places.append(("chain", "corrected", ("chain",)))  # a chain has no truncation to leave out
        for bound, correction, path in places:
            row = Row({"dataset": dataset, "variant": variant, "bound": bound, "correction": correction})
            row.extra["units"] = stated(runs, "units")
            for part in PARTS:
                readings = {run.seed: _part_reading(run, path, part) for run in runs}
                # a part that no run of this row names does not belong to its bound
                if any(not isinstance(reading, str) for reading in readings.values()):
                    row.cells[part] = aggregate(readings, refusal)
            row.cells["total"] = aggregate({run.seed: total_reading(run, *path) for run in runs}, refusal)
            table.rows.append(row)


def _part_reading(run: Run, path: tuple[str, ...], part: str) -> Reading:
    """One named part; "other" is the sum of those that only this model names."""
    if part != "other":
        return run.at(LIKELIHOOD, *path, "parts", part)
    record: Any = run.likelihood
    for key in (*path, "parts"):
        record = record.get(key) if isinstance(record, Mapping) else None
    named = [name for name in record or {} if name not in PARTS]
    readings = [run.at(LIKELIHOOD, *path, "parts", name) for name in named] or ["no other part"]
    return next((reading for reading in readings if isinstance(reading, str)), None) or sum(readings)


def _fill_curve(table: Table, grid: Grid) -> None:
    refused = {name: refusals(grid.of(name), curve_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        units = curve_units(runs) or curve_units(grid.of(dataset))
        asked = {column for run in grid.of(dataset) for line in run.curve for column in line if line[column] != ""}
        points = sorted({int(images) for run in runs for line in run.curve if (images := finite(line.get("images")))})
        for images in points or [None]:
            row = Row({"dataset": dataset, "variant": variant, "images": images}, extra={"units": units})
            for metric, names in CURVE_COLUMNS.items():
                name = next((name for name in names if name in asked), None)
                if name is None and any(run.curve for run in grid.of(dataset)):
                    absent = {"fd": PLANE, "energy": IMAGES} if (units == "nats") == (metric == "fd") else {}
                    row.cells[metric] = Cell(None, absent.get(metric, NOT_ASKED))
                    continue
                readings = {run.seed: _curve_reading(run, name, images) for run in runs}
                row.cells[metric] = aggregate(readings, refused[dataset].get(variant))
            row.cells["flops"] = aggregate({run.seed: _curve_flops(run, images) for run in runs})
            seconds = {run.seed: _curve_reading(run, "seconds", images) for run in runs}
            row.cells["train_seconds"] = aggregate(seconds, refusals(runs, timing_protocol, across=False).get(variant))
            table.rows.append(row)


def _curve_flops(run: Run, images: int | None) -> Reading:
    """Arithmetic of training up to a row of the curve: its steps times what one step takes."""
    step, flops = _curve_reading(run, "step", images), run.at(PROVENANCE, "flops_per_step")
    return next((reading for reading in (step, flops) if isinstance(reading, str)), None) or step * flops


def _curve_reading(run: Run, column: str | None, images: int | None) -> Reading:
    if not run.curve:
        return run.problems.get(CURVE) or f"{CURVE} is empty"
    line = next((line for line in run.curve if finite(line.get("images")) == images), None)
    if line is None:
        last = max((finite(line.get("images")) or 0 for line in run.curve), default=0)
        return f"no row at {images} images, the curve ends at {int(last)}"
    number = finite(line.get(column or ""))
    if number is not None:
        return number
    # the evaluation says why a model has no such likelihood at all
    reason = run.reason((column or "").rpartition("_")[0]) or ""
    blank = f"{column} = {line.get(column or '') or 'blank'} in {CURVE}"
    return reason if reason.startswith("not defined") else blank


def _fill_robustness(table: Table, grid: Grid) -> None:
    defined = {
        name: {column for run in grid.of(name) for line in run.robustness for column in line if line[column] != ""}
        for name in grid.datasets
    }
    for dataset, variant, runs in grid.cells():
        flat = curve_units(grid.of(dataset)) == "nats"
        points = {_point(line): None for run in runs for line in run.robustness} or {("", None): None}
        for sampler, steps in points:
            refused = refusals(grid.of(dataset), partial(point_protocol, sampler=sampler, steps=steps)).get(variant)
            keys = {"dataset": dataset, "kind": "run", "variant": variant, "sampler": sampler, "steps": steps}
            row = Row(keys)
            lines = {run.seed: robustness_line(run, sampler, steps) for run in runs}
            for metric in table.metrics:
                if metric not in defined[dataset] and defined[dataset]:
                    row.cells[metric] = Cell(None, _undefined(metric, flat))
                    continue
                readings = {run.seed: quality_reading(run, lines[run.seed], metric) for run in runs}
                row.cells[metric] = aggregate(readings, refused if metric != "seconds" else None)
            row.extra["samples"] = common(line.get("n") for line in lines.values() if line)
            row.extra["detail"] = refused or ""
            table.rows.append(row)


def _point(line: Mapping[str, str]) -> tuple[str, int | None]:
    steps = finite(line.get("steps"))
    return line.get("sampler", ""), None if steps is None else int(steps)


def robustness_line(run: Run, sampler: str, steps: int | None) -> dict[str, str] | None:
    """The run's row of robustness.csv for a sampler and step count; None where it has none."""
    return next((line for line in run.robustness if _point(line) == (sampler, steps)), None)


def point_protocol(run: Run, sampler: str, steps: int | None) -> dict[str, Any] | None:
    """How the samples of one sampler and step count were measured; None where the run has none."""
    line = robustness_line(run, sampler, steps)
    return None if line is None else robustness_protocol(run, line)


def _undefined(metric: str, flat: bool) -> str:
    if flat and metric in ("fd", "kid", "precision", "recall"):
        return PLANE
    if not flat and metric in ("sliced_wasserstein", "energy"):
        return IMAGES
    return NOT_ASKED


def quality_reading(run: Run, line: Mapping[str, str] | None, metric: str) -> Reading:
    """One metric of a row of :func:`robustness_line`, or the reason why it has no number."""
    if line is None:
        return run.problems.get(ROBUSTNESS) or "no row for this sampler and step count"
    number = finite(line.get(metric))
    if number is not None:
        return number
    status = line.get("status") or "ok"
    if status == "ok":
        return f"{metric} = {line.get(metric) or 'blank'} in {ROBUSTNESS}"
    # a status of several clauses says for each metric without a number why it has none
    clauses = [clause for clause in status.split("; ") if re.match(rf"(\w+_)?{metric}(_\w+)? ", clause)]
    return clauses[0] if clauses else status


def _fill_costs(table: Table, grid: Grid) -> None:
    for dataset, variant, runs in grid.cells():
        refused = refusals(runs, timing_protocol, across=False).get(variant)
        row = Row({"dataset": dataset, "variant": variant})
        timings = {"train_seconds", "evaluate_seconds", "ms_per_step", "peak_memory_mb"}  # of the machine
        for metric in table.metrics:
            readings = {run.seed: cost_reading(run, metric) for run in runs}
            row.cells[metric] = aggregate(readings, refused if metric in timings else None)
        row.extra["family"] = stated(runs, "family")
        for name in ("device", "cpu", "threads"):
            values = {str(run.provenance[name]) for run in runs if run.provenance and run.provenance.get(name)}
            row.extra[name] = "; ".join(sorted(values))
        table.rows.append(row)


def cost_reading(run: Run, metric: str) -> Reading:
    """One number of provenance.json; milliseconds a step are training seconds over steps."""
    if metric == "ms_per_step":
        seconds, steps = run.at(PROVENANCE, "train_seconds"), run.at(PROVENANCE, "steps")
        if isinstance(seconds, str) or isinstance(steps, str):
            return seconds if isinstance(seconds, str) else steps
        return 1000 * seconds / steps if steps > 0 else "no training step"
    if metric == "evaluate_seconds":
        # beside the evaluation's numbers, or added to the provenance
        found = [finite((record or {}).get(metric)) for record in (run.likelihood, run.provenance)]
        absent = run.problems.get(LIKELIHOOD) or f"{metric} is not in {LIKELIHOOD}"
        return next((seconds for seconds in found if seconds is not None), absent)
    if metric == "flops_total":
        flops, steps = run.at(PROVENANCE, "flops_per_step"), run.at(PROVENANCE, "steps")
        return next((reading for reading in (flops, steps) if isinstance(reading, str)), None) or flops * steps
    if metric.startswith("parameters_"):
        groups = (run.provenance or {}).get("parameters")
        group = metric.removeprefix("parameters_")
        if isinstance(groups, Mapping) and group != "total" and group not in groups:
            return 0.0  # a model without such a network
        return run.at(PROVENANCE, "parameters", group)
    return run.at(PROVENANCE, metric)
