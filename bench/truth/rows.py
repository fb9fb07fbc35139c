"""One line of the battery: an estimate beside its truth, and the bound that the difference must keep."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.files import write_text_atomic

FLOOR = 1e-3  # nats/dim: below it no likelihood in a table would change
LOOSE = 1e-2  # nats/dim: a larger bound would hide what changes tables
NATS = "nats/dim"
BOUND, ODE = "bound (NELBO)", "likelihood (NLL)"  # the groups of the two likelihoods


@dataclass(frozen=True)
class Row:
    """``error`` = |estimate - truth| in ``unit``, ``se`` the estimate's standard error (0 where nothing is random).

    ``ok``: error <= bound, where the bound is the larger of a floor and three standard errors. A likelihood whose bound
    exceeds LOOSE is never ok.
    """

    group: str
    problem: str
    sde: str
    setting: str
    estimator: str
    truth: float
    estimate: float
    se: float
    error: float
    bound: float
    unit: str
    ok: bool

    @property
    def name(self) -> str:
        """Estimator, process and setting, for messages."""
        return ", ".join(part for part in (self.estimator, self.sde, self.setting) if part and part != "-")


@dataclass(frozen=True)
class Case:
    """What a block of rows has in common."""

    group: str
    problem: str
    sde: str = "-"
    setting: str = "-"

    def row(
        self,
        estimator: str,
        estimate: float,
        truth: float = 0.0,
        se: float = 0.0,
        floor: float = FLOOR,
        unit: str = NATS,
    ) -> Row:
        """The row of one estimate; a number that is not finite is never within bounds."""
        estimate, truth = float(estimate), float(truth)
        error, bound = abs(estimate - truth), max(floor, 3 * se) if math.isfinite(se) else math.nan
        tight = self.group not in (BOUND, ODE) or unit != NATS or bound <= LOOSE
        ok = math.isfinite(error) and math.isfinite(bound) and error <= bound and tight
        return Row(**vars(self), estimator=estimator, truth=truth, estimate=estimate, se=se, error=error, bound=bound,
                   unit=unit, ok=ok)  # fmt: skip


def largest(rows: Iterable[Row], unit: str = NATS) -> Row | None:
    """The row of ``unit`` with the largest error, None if there is none; a number that is not finite counts as such."""
    rows = [row for row in rows if row.unit == unit]
    return max(rows, key=lambda row: _finite(row.error), default=None)


def summary_line(rows: Sequence[Row]) -> str:
    """How many rows are within bounds, the largest error of a likelihood, and the row closest to its bound."""
    parts = [f"{sum(row.ok for row in rows)} of {len(rows)} within bounds"]
    worst = largest(row for row in rows if row.group in (BOUND, ODE))
    if worst is not None:
        parts.append(f"largest error of a likelihood {worst.error:.1e} {worst.unit} ({worst.name})")
    closest = max((row for row in rows if row.bound > 0), key=lambda row: _finite(row.error / row.bound), default=None)
    if closest is not None:
        parts.append(f"closest to its bound: {closest.name}, at {closest.error / closest.bound:.0%}")
    return "; ".join(parts)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


_COLUMNS = ("problem", "sde", "setting", "estimator", "truth", "estimate", "se", "error", "bound", "unit", "ok")


def _cells(row: Row) -> list[str]:
    return [
        row.problem,
        row.sde,
        row.setting,
        row.estimator,
        f"{row.truth:.5f}",
        f"{row.estimate:.5f}",
        f"{row.se:.1e}" if row.se else "-",
        f"{row.error:.1e}",
        f"{row.bound:.1e}",
        row.unit,
        "yes" if row.ok else "NO",
    ]


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def print_battery(rows: Sequence[Row], stream=None) -> None:
    """An aligned table on ``stream`` (default: stdout), a heading for each group, and the summary line."""
    stream = stream or sys.stdout
    table = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
    numeric = range(4, 9)

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    for group, members in _groups(rows).items():
        print(f"\n{group}", line(_COLUMNS), *(line(_cells(row)) for row in members), sep="\n", file=stream)
    print(f"\n{summary_line(rows)}", file=stream)


def write_battery(rows: Sequence[Row], folder: Path | str) -> None:
    """``validate.csv`` and ``validate.md`` in ``folder``, each written atomically; numbers to six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        record = asdict(row)
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()})
    write_text_atomic(Path(folder) / "validate.csv", text.getvalue())

    lines = ["# Ground truth", "", summary_line(rows) + ".", ""]
    for group, members in _groups(rows).items():
        lines += [f"## {group}", "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        # a bar would end the cell
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in _cells(row))} |" for row in members]
        lines.append("")
    write_text_atomic(Path(folder) / "validate.md", "\n".join(lines))
