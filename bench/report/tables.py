"""The measured rows of every table: runs of a suite -> aggregated rows, refused where protocols differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.report.cells import Cell, Row, Table, aggregate
from bench.report.load import CURVE, LIKELIHOOD, PROVENANCE, ROBUSTNESS, Reading, Run, finite
from bench.report.protocol import (
    curve_protocol,
    likelihood_protocol,
    refusals,
    robustness_protocol,
    timing_protocol,
)

PLANE = "not defined for 2-D data"
IMAGES = "not defined for images"
NOT_ASKED = "not asked for in this suite"
# CSV columns carry the unit of a curve in their names
UNITS = {"bpd": "bits/dim", "nats": "nats"}
CORRECTIONS = ("corrected", "uncorrected")
PARTS = ("prior", "diffusion", "ode", "reconstruction", "flow", "dequantisation")
SOURCE = ("detail", "source", "trust", "note")


def learning_curve_table() -> Table:
    """NELBO, NLL and sample quality against images seen in training."""
    return Table("learning_curve", ("dataset", "variant", "images"), ("nelbo", "nll", "fd", "energy"), ("units",))


def likelihood_table() -> Table:
    """NELBO, NLL and their gap after and before the residual correction, with reference and published rows."""
    metrics = tuple(f"{name}_{correction}" for correction in CORRECTIONS for name in ("nelbo", "nll", "gap"))
    within = ("nelbo_se_images", "nelbo_se_repeats", "nll_se_images", "gap_se", "nfe", "nll_tolerance_change")
    published = ("published_nelbo", "published_nll", "published_gap", "published_bpd")
    return Table(
        "nll_nelbo_gap",
        ("dataset", "kind", "variant"),
        metrics,
        ("units", "images", *within, *published, *SOURCE),
    )


def parts_table() -> Table:
    """The named parts that NELBO and NLL are sums of."""
    return Table("likelihood_parts", ("dataset", "variant", "bound", "correction"), (*PARTS, "total"), ("units",))


def robustness_table() -> Table:
    """Sample quality against the number of steps of every sampler, with published rows."""
    metrics = ("nfe", "fd", "kid", "precision", "recall", "sliced_wasserstein", "energy", "seconds")
    return Table(
        "step_robustness",
        ("dataset", "kind", "variant", "sampler", "steps"),
        metrics,
        ("samples", "published_fid", *SOURCE),
    )


def costs_table() -> Table:
    """Size, images seen, time, arithmetic and memory of training and evaluation."""
    metrics = (
        "parameters_score",
        "parameters_flow",
        "parameters_total",
        "images_seen",
        "steps",
        "train_seconds",
        "evaluate_seconds",
        "ms_per_step",
        "flops_per_step",
        "peak_memory_mb",
    )
    return Table("costs", ("dataset", "variant"), metrics, ("device", "cpu", "threads"))


TABLES: dict[str, Callable[[], Table]] = {
    "learning_curve": learning_curve_table,
    "nll_nelbo_gap": likelihood_table,
    "likelihood_parts": parts_table,
    "step_robustness": robustness_table,
    "costs": costs_table,
}


@dataclass(frozen=True)
class Grid:
    """The runs of a suite by data set, variant and seed, each axis in the order of first appearance."""

    runs: tuple[Run, ...]

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(run.dataset for run in self.runs))

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run.variant for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def of(self, dataset: str, variant: str | None = None) -> list[Run]:
        """Runs of a data set, and of one variant if named."""
        return [run for run in self.runs if run.dataset == dataset and variant in (None, run.variant)]

    def cells(self) -> list[tuple[str, str, list[Run]]]:
        """(data set, variant, its runs over seeds) for every pair that has or should have runs."""
        pairs = ((dataset, variant) for dataset in self.datasets for variant in self.variants)
        return [(*pair, runs) for pair in pairs if (runs := self.of(*pair))]


def build(grid: Grid) -> dict[str, Table]:
    """All tables of a suite with their measured rows."""
    fillers = (_fill_curve, _fill_likelihood, _fill_parts, _fill_robustness, _fill_costs)
    tables = {}
    for (name, make), fill in zip(TABLES.items(), fillers):
        tables[name] = make()
        fill(tables[name], grid)
    return tables


def likelihood_reading(run: Run, bound: str, correction: str) -> Reading:
    """Total of one bound; a reason where its parts do not sum to it, because then one of them is wrong."""
    total = run.at(LIKELIHOOD, bound, correction, "total")
    if isinstance(total, str):
        return total
    record = (run.likelihood or {})[bound][correction]
    parts = record.get("parts")
    if isinstance(parts, Mapping) and parts:
        values = [finite(value) for value in parts.values()]
        if None in values:
            return f"{bound} {correction}: a part is not a finite number"
        if abs(sum(values) - total) > 1e-4 * max(1.0, abs(total)):
            return f"{bound} {correction}: parts sum to {sum(values):.6g}, total is {total:.6g}"
    return total


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
            "units": _common((run.likelihood or {}).get("units") for run in runs) or _curve_units(grid.of(dataset)),
            "images": _common((run.likelihood or {}).get("n") for run in runs if not run.diverged),
            "detail": refusal or "",
        }
        if not refusal:
            row.extra |= {
                "nelbo_se_images": _mean(runs, "nelbo", "corrected", "se_images"),
                "nelbo_se_repeats": _mean(runs, "nelbo", "corrected", "se_repeats"),
                "nll_se_images": _mean(runs, "nll", "corrected", "se_images"),
                "gap_se": _mean(runs, "gap", "corrected", "se"),
                "nfe": _mean(runs, "nll", "nfe_mean"),
                "nll_tolerance_change": _mean(runs, "nll", "tolerance_check", "change"),
            }
        table.rows.append(row)


def _fill_parts(table: Table, grid: Grid) -> None:
    refused = {name: refusals(grid.of(name), likelihood_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        for bound in ("nelbo", "nll"):
            for correction in CORRECTIONS:
                row = Row({"dataset": dataset, "variant": variant, "bound": bound, "correction": correction})
                row.extra["units"] = _common((run.likelihood or {}).get("units") for run in runs)
                for part in PARTS:
                    # a part that no run of this row names does not belong to its bound
                    path = (bound, correction, "parts", part)
                    if any(not isinstance(run.at(LIKELIHOOD, *path), str) for run in runs):
                        readings = {run.seed: run.at(LIKELIHOOD, *path) for run in runs}
                        row.cells[part] = aggregate(readings, refused[dataset].get(variant))
                totals = {run.seed: likelihood_reading(run, bound, correction) for run in runs}
                row.cells["total"] = aggregate(totals, refused[dataset].get(variant))
                table.rows.append(row)


def _fill_curve(table: Table, grid: Grid) -> None:
    refused = {name: refusals(grid.of(name), curve_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        units = _curve_units(runs) or _curve_units(grid.of(dataset))
        columns = {
            "nelbo": ("nelbo_bpd", "nelbo_nats"),
            "nll": ("nll_bpd", "nll_nats"),
            "fd": ("fd",),
            "energy": ("energy",),
        }
        asked = {column for run in grid.of(dataset) for line in run.curve for column in line if line[column] != ""}
        points = sorted({int(images) for run in runs for line in run.curve if (images := finite(line.get("images")))})
        for images in points or [None]:
            row = Row({"dataset": dataset, "variant": variant, "images": images}, extra={"units": units})
            for metric, names in columns.items():
                name = next((name for name in names if name in asked), None)
                if name is None and any(run.curve for run in grid.of(dataset)):
                    absent = {"fd": PLANE, "energy": IMAGES} if (units == "nats") == (metric == "fd") else {}
                    row.cells[metric] = Cell(None, absent.get(metric, NOT_ASKED))
                    continue
                readings = {run.seed: _curve_reading(run, name, images) for run in runs}
                row.cells[metric] = aggregate(readings, refused[dataset].get(variant))
            table.rows.append(row)


def _curve_reading(run: Run, column: str | None, images: int | None) -> Reading:
    if not run.curve:
        return run.problems.get(CURVE) or f"{CURVE} is empty"
    line = next((line for line in run.curve if finite(line.get("images")) == images), None)
    if line is None:
        last = max((finite(line.get("images")) or 0 for line in run.curve), default=0)
        return f"no row at {images} images, the curve ends at {int(last)}"
    number = finite(line.get(column or ""))
    return number if number is not None else f"{column} = {line.get(column or '') or 'blank'} in {CURVE}"


def _curve_units(runs: list[Run]) -> str | None:
    for run in runs:
        if run.likelihood and run.likelihood.get("units"):
            return str(run.likelihood["units"])
        for column in run.curve[0] if run.curve else ():
            if column.startswith("nelbo_"):
                return UNITS.get(column.removeprefix("nelbo_"))
    return None


def _fill_robustness(table: Table, grid: Grid) -> None:
    defined = {
        name: {column for run in grid.of(name) for line in run.robustness for column in line if line[column] != ""}
        for name in grid.datasets
    }
    for dataset, variant, runs in grid.cells():
        flat = _curve_units(grid.of(dataset)) == "nats"
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
            row.extra["samples"] = _common(line.get("n") for line in lines.values() if line)
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
        timings = {"train_seconds", "evaluate_seconds", "ms_per_step", "peak_memory_mb"}
        for metric in table.metrics:
            readings = {run.seed: cost_reading(run, metric) for run in runs}
            row.cells[metric] = aggregate(readings, refused if metric in timings else None)
        for name in table.extra:
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
    return run.at(PROVENANCE, *metric.split("_", 1)) if metric.startswith("parameters_") else run.at(PROVENANCE, metric)


def _mean(runs: list[Run], *path: str) -> float | None:
    values = [value for run in runs if not isinstance(value := run.at(LIKELIHOOD, *path), str)]
    return sum(values) / len(values) if values else None


def _common(values: Any) -> Any:
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return distinct[0] if len(distinct) == 1 else "; ".join(map(str, distinct)) or None
