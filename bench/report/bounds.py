"""Rows of the two tables of bounds: on the density of dequantised data, and on the probability of discrete images."""

from __future__ import annotations

from bench.report.cells import Row, Table, aggregate
from bench.report.grid import Grid, bound_stated, likelihood_reading, stated, total_reading
from bench.report.load import LIKELIHOOD, Reading, Run
from bench.report.protocol import likelihood_protocol, refusals

OLDER = "not measured: evaluated by code that knew no bounds of chains"


def fill_bounds(table: Table, grid: Grid) -> None:
    """A row a data set and variant: NELBO, the bound of its discrete chain, and the ODE's NLL, all of one density."""
    refused = {name: refusals(grid.of(name), likelihood_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        refusal = refused[dataset].get(variant)
        row = Row({"dataset": dataset, "variant": variant})
        for name in ("nelbo", "nll"):
            row.cells[name] = aggregate({run.seed: likelihood_reading(run, name, "corrected") for run in runs}, refusal)
        row.cells["chain"] = aggregate({run.seed: _reading(run, "chain") for run in runs}, refusal)
        row.extra = {
            "units": stated(grid.of(dataset), "units"),
            "family": stated(runs, "family"),
            "bound": bound_stated(runs),
            "chain_steps": stated(runs, "chain", "steps"),
            "detail": refusal or "",
        }
        table.rows.append(row)


def fill_discrete(table: Table, grid: Grid) -> None:
    """A row a variant of every data set of images; none of points."""
    refused = {name: refusals(grid.of(name), likelihood_protocol) for name in grid.datasets}
    for dataset, variant, runs in grid.cells():
        if stated(grid.of(dataset), "levels") is None:
            continue
        refusal = refused[dataset].get(variant)
        row = Row({"dataset": dataset, "variant": variant})
        row.cells["discrete"] = aggregate({run.seed: _reading(run, "discrete") for run in runs}, refusal)
        row.extra = {
            "units": "bits/dim of grey levels",
            "family": stated(runs, "family"),
            "chain_steps": stated(runs, "discrete", "steps"),
            "detail": refusal or "",
        }
        table.rows.append(row)


def _reading(run: Run, name: str) -> Reading:
    record = run.likelihood
    if record is not None and not run.diverged and name not in record and LIKELIHOOD not in run.problems:
        return OLDER
    return total_reading(run, name)
