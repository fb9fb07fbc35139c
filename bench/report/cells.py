"""Cells, rows and tables: seeds' readings aggregated once, written to CSV and read back."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.files import write_text_atomic
from bench.report.load import Reading, finite, read_csv
from bench.statistics import Summary, summarise

OK = "ok"
STATISTICS = ("mean", "sd", "low", "high", "n", "status")


@dataclass(frozen=True)
class Cell:
    """One quantity of one row over its seeds: a summary, or the reason why there is none.

    ``status`` is "ok", or tells which seeds were left out and why; ``values`` maps seed -> number.
    """

    summary: Summary | None
    status: str = OK
    values: Mapping[int, float] = field(default_factory=dict)


@dataclass
class Row:
    """One line of a table: ``keys`` name it, ``cells`` hold measured quantities, ``extra`` all else that is said."""

    keys: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.keys.get("kind") or "run")


def aggregate(readings: Mapping[int, Reading], refused: str | None = None) -> Cell:
    """Seeds' readings -> one cell. A refusal leaves no number; seeds without a number are named in the status."""
    if refused:
        return Cell(None, refused)
    values = {seed: reading for seed, reading in readings.items() if not isinstance(reading, str)}
    reasons: dict[str, list[int]] = {}
    for seed, reading in readings.items():
        if isinstance(reading, str):
            reasons.setdefault(reading, []).append(seed)
    if not values:
        if len(reasons) == 1 and next(iter(reasons)).startswith("not "):
            return Cell(None, next(iter(reasons)))
        return Cell(None, f"not measured: {_reasons(reasons) or 'no runs'}")
    status = f"{len(values)} of {len(readings)} seeds; left out: {_reasons(reasons)}" if reasons else OK
    return Cell(summarise(values.values()), status, values)


def _reasons(reasons: Mapping[str, list[int]]) -> str:
    return "; ".join(
        f"{reason} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))})"
        for reason, seeds in reasons.items()
    )


def number_text(value: Any) -> str:
    """A value for a CSV cell: nine significant digits, so that rounding of the machine does not touch the file."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return format(value, ".9g") if isinstance(value, float) else str(value)


@dataclass
class Table:
    """Rows of one kind and the names of their columns, in order."""

    name: str
    keys: tuple[str, ...]
    metrics: tuple[str, ...]
    extra: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)

    def header(self) -> list[str]:
        """Names of the CSV columns: keys, six a metric, the rest."""
        return [*self.keys, *(f"{metric}_{part}" for metric in self.metrics for part in STATISTICS), *self.extra]

    def flatten(self, row: Row) -> dict[str, str]:
        """One row as CSV text by column."""
        flat = {key: number_text(row.keys.get(key)) for key in self.keys}
        for metric in self.metrics:
            cell = row.cells.get(metric)
            if cell is None:
                continue
            summary = cell.summary
            for part in STATISTICS[:-1]:
                flat[f"{metric}_{part}"] = number_text(getattr(summary, part)) if summary else ""
            flat[f"{metric}_status"] = cell.status
        return flat | {name: number_text(row.extra.get(name)) for name in self.extra}

    def write_csv(self, path: Path) -> None:
        """Write the table; a quantity has columns <name>_mean, _sd, _low, _high (95 %), _n (seeds) and _status."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self.header(), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.flatten(row) for row in self.rows)
        write_text_atomic(path, stream.getvalue())

    def read_rows(self, path: Path) -> list[Row]:
        """The rows of a CSV file that ``write_csv`` made; ValueError where a column is lacking."""
        rows = []
        for line in read_csv(path):
            lacking = [name for name in self.header() if name not in line]
            if lacking:
                raise ValueError(f"{path.name}: lacks the column {lacking[0]}")
            rows.append(
                Row(
                    {key: line[key] for key in self.keys},
                    {metric: cell for metric in self.metrics if (cell := _cell(line, metric))},
                    {name: line[name] for name in self.extra},
                )
            )
        return rows


def _cell(line: Mapping[str, str], metric: str) -> Cell | None:
    mean, sd, low, high, n = (finite(line[f"{metric}_{part}"]) for part in STATISTICS[:-1])
    status = line[f"{metric}_status"]
    if not status:
        return None
    return Cell(None if mean is None else Summary(mean, sd, int(n or 0), low, high), status)
