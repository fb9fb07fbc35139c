"""Quality against the committed tables of a suite: a two-sided gate with uncertainty, where "absent" never passes.

A committed cell holds the mean of n seeds. A fresh mean over m seeds of the same distribution lies within

    t(0.975, df) * s * sqrt(1/n + 1/m)  +  FLOOR * scale

of it in 95 cases of 100 (Student's prediction interval). s and df are the committed spread of the seeds, pooled over
the variants of the same data set and the same point of the table: two seeds alone would give t = 12.7 and a gate that
sees nothing. In truth far fewer cases fail, because fresh runs repeat the committed seeds and differ by rounding alone;
the second term is for that rounding where seeds do not spread (another processor adds up in another order, and training
amplifies it). Its scale is the larger of the two numbers; for a gap or a part, the numbers that it is a difference of;
for precision and recall, which count, one sample is added. Leaving the interval on either side is a failure: an
unexpected improvement also means that something changed.

Seconds and megabytes belong to the machine, so they are compared only in being there. One more safeguard: with nothing
to compare, the gate fails.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.report.load import finite, read_csv
from bench.seals import read_summary
from bench.statistics import student_quantile

FLOOR = 0.002
TABLES = {
    "learning_curve": ("dataset", "variant", "images"),
    "nll_nelbo_gap": ("dataset", "kind", "variant"),
    "bounds": ("dataset", "variant"),
    "discrete_bounds": ("dataset", "variant"),
    "likelihood_parts": ("dataset", "variant", "bound", "correction"),
    "step_robustness": ("dataset", "kind", "variant", "sampler", "steps"),
    "costs": ("dataset", "variant"),
}
COUNTED = ("precision", "recall")
MACHINE = ("seconds", "train_seconds", "evaluate_seconds", "ms_per_step", "peak_bytes", "peak_memory_mb")
# the floor of a small difference, or of a part that others cancel, is a share of the numbers it comes from
SCALES = {
    "gap_corrected": ("nelbo_corrected", "nll_corrected"),
    "gap_uncorrected": ("nelbo_uncorrected", "nll_uncorrected"),
    **dict.fromkeys(
        ("prior", "diffusion", "ode", "reconstruction", "flow", "other", "total"),
        ("prior", "diffusion", "ode", "reconstruction", "flow", "other", "total"),
    ),
}
MISSING_TABLE, MISSING_ROW, ABSENT, CHANGED, NEW = "missing table", "missing row", "absent", "changed", "new"


@dataclass(frozen=True)
class Difference:
    """One thing in which fresh tables differ from the committed ones; a new row or number is only a notice."""

    table: str
    row: str
    metric: str
    kind: str
    committed: float | None = None
    fresh: float | None = None
    tolerance: float | None = None
    detail: str = ""

    @property
    def fails(self) -> bool:
        """Whether the gate must fail for it."""
        return self.kind != NEW


def compare(committed: Path, fresh: Path, suite: str) -> list[Difference]:
    """Differences between two report folders of ``suite`` (its tables' CSV files): failures and notices.

    Every committed row and number must be there again, within its tolerance. Numbers that are not finite count as
    absent, on both sides. InputError where both are one folder, because that gate could only pass.
    """
    if Path(committed).resolve() == Path(fresh).resolve():
        raise InputError(
            f"--against {committed}: is the folder of the fresh report itself; accepted: another folder, for example "
            "the committed one with the fresh report elsewhere (INDM_BENCH_REPORTS)"
        )
    found: list[Difference] = []
    compared = 0
    for table, keys in TABLES.items():
        before = _read(Path(committed) / f"{table}.csv", keys)
        after = _read(Path(fresh) / f"{table}.csv", keys)
        if isinstance(before, str):
            found.append(Difference(table, "", "", MISSING_TABLE, detail=f"committed tables of {suite}: {before}"))
            continue
        if isinstance(after, str):
            found.append(Difference(table, "", "", MISSING_TABLE, detail=f"fresh tables of {suite}: {after}"))
            continue
        spreads = _spreads(before, keys)
        for key, row in before.items():
            name = ", ".join(part for part in key if part)
            if key not in after:
                found.append(Difference(table, name, "", MISSING_ROW, detail="committed, but not in the fresh tables"))
                continue
            count, differences = _compare_row(table, name, row, after[key], spreads.get(_point(row, keys), {}))
            compared += count
            found += differences
        for key in after:
            if key not in before:
                found.append(Difference(table, ", ".join(part for part in key if part), "", NEW, detail="new row"))
    if not compared:
        found.append(Difference("", "", "", MISSING_TABLE, detail=f"no number of {suite} could be compared"))
    return found


def _read(path: Path, keys: Sequence[str]) -> dict[tuple[str, ...], dict[str, str]] | str:
    """Rows by key, or why there are none."""
    if not path.is_file():
        return f"{path} does not exist"
    try:
        lines = read_csv(path)
    except (ValueError, OSError, csv.Error) as error:
        return " ".join(str(error).split())
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        lacking = [key for key in keys if key not in line]
        if lacking:
            return f"{path} lacks the column {lacking[0]}"
        key = tuple(line[name] for name in keys)
        if key in rows:
            # published rows may repeat a model; what tells them apart is their place
            key = (*key, str(sum(other[: len(keys)] == key for other in rows)))
        rows[key] = line
    return rows


def _point(row: dict[str, str], keys: Sequence[str]) -> tuple[str, ...]:
    """What a row shares with those of other variants."""
    return tuple(row[key] for key in keys if key != "variant")


def _spreads(
    rows: dict[tuple[str, ...], dict[str, str]], keys: Sequence[str]
) -> dict[Any, dict[str, tuple[float, int]]]:
    """Point -> metric -> (pooled standard deviation over seeds, its degrees of freedom)."""
    sums: dict[Any, dict[str, tuple[float, int]]] = {}
    for row in rows.values():
        for column in row:
            metric = column.removesuffix("_sd")
            sd, n = finite(row[column]), finite(row.get(f"{metric}_n"))
            if metric != column and sd is not None and n is not None and n > 1:
                point = sums.setdefault(_point(row, keys), {})
                squares, df = point.get(metric, (0.0, 0))
                point[metric] = (squares + sd**2 * (n - 1), df + int(n) - 1)
    return {
        point: {metric: (math.sqrt(squares / df), df) for metric, (squares, df) in metrics.items()}
        for point, metrics in sums.items()
    }


def _compare_row(
    table: str, name: str, before: dict[str, str], after: dict[str, str], spreads: dict[str, tuple[float, int]]
) -> tuple[int, list[Difference]]:
    """How many numbers were compared, and the differences."""
    compared, found = 0, []
    for column in before | after:
        if not column.endswith("_mean"):
            continue
        metric = column.removesuffix("_mean")
        old, new = finite(before.get(column)), finite(after.get(column))
        if old is None:
            if new is not None:
                found.append(Difference(table, name, metric, NEW, None, new, detail="was not measured before"))
            continue
        compared += 1
        if new is None:
            status = after.get(f"{metric}_status") or after.get(column) or "blank"
            found.append(Difference(table, name, metric, ABSENT, old, None, detail=status))
            continue
        n, m = (int(finite(row.get(f"{metric}_n")) or 0) for row in (before, after))
        if m < n:
            detail = after.get(f"{metric}_status") or f"{m} of {n} seeds"
            found.append(Difference(table, name, metric, ABSENT, old, new, detail=detail))
            continue
        if metric in MACHINE:
            continue
        sd, df = spreads.get(metric, (0.0, 0))
        allowed = tolerance(sd, df, n, m) + FLOOR * _scale(metric, before, after)
        if metric in COUNTED:
            allowed += 1 / max(1.0, finite(before.get("samples")) or 1.0)
        if abs(new - old) > allowed:
            detail = f"{'above' if new > old else 'below'} by {abs(new - old):.3g}"
            found.append(Difference(table, name, metric, CHANGED, old, new, allowed, detail))
    return compared, found


def tolerance(sd: float, df: int, n: int, m: int) -> float:
    """Half-width of the 95 % prediction interval for the difference of two means, over n and over m seeds.

    ``sd`` is the seeds' standard deviation, known with ``df`` degrees of freedom; without any the width is zero.
    """
    if df < 1 or n < 1 or m < 1:
        return 0.0
    return student_quantile(0.975, df) * sd * math.sqrt(1 / n + 1 / m)


def _scale(metric: str, before: dict[str, str], after: dict[str, str]) -> float:
    values = [finite(row.get(f"{name}_mean")) for row in (before, after) for name in (metric, *SCALES.get(metric, ()))]
    return max((abs(value) for value in values if value is not None), default=0.0)


def report(differences: Sequence[Difference], suite: str, write: Callable[[str], object] | None = None) -> int:
    """Print the differences as a table; returns the exit status, 1 where any of them fails the gate, else 0."""
    write = write or sys.stdout.write
    failures = [difference for difference in differences if difference.fails]
    lines = [("", "table", "row", "metric", "committed", "fresh", "allowed", "what")]
    groups: dict[Any, list[Difference]] = {}
    for place, difference in enumerate(sorted(differences, key=lambda difference: not difference.fails)):
        # one lost run takes many numbers with it: they are told together
        alike = (difference.table, difference.row, difference.kind, difference.detail)
        groups.setdefault(alike if difference.kind in (ABSENT, NEW) else place, []).append(difference)
    for group in groups.values():
        first = group[0]
        numbers = (first.committed, first.fresh, first.tolerance) if len(group) == 1 else (None,) * 3
        texts = ("-" if number is None else f"{number:.5g}" for number in numbers)
        what = f"{first.kind}: {first.detail}" if first.detail else first.kind
        metrics = first.metric if len(group) == 1 else f"{len(group)} numbers"
        lines.append(("FAIL" if first.fails else "note", first.table, first.row, metrics, *texts, what))
    if len(lines) > 1:
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            write("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() + "\n")
    notices = len(differences) - len(failures)
    write(f"{suite}: {len(failures)} failure{'s' * (len(failures) != 1)}, {notices} notice{'s' * (notices != 1)}\n")
    return 1 if failures else 0


def regression(committed: Path, fresh: Path, suite: str, write: Callable[[str], object] | None = None) -> int:
    """Compare and print; the exit status of ``indm-bench regression SUITE --against COMMITTED``.

    InputError where a table is not the one that its report wrote, or a report holds no hashes of its tables.
    """
    for folder in (Path(committed), Path(fresh)):
        if folder.is_dir():  # an absent one is told of as missing tables
            read_summary(folder, suite)
    return report(compare(committed, fresh, suite), suite, write)
