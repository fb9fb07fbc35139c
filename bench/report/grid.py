"""The runs of a suite as a grid, and what is read from several of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.load import LIKELIHOOD, RUN_MISSING, Reading, Run, finite

# CSV columns carry the unit of a curve in their names
UNITS = {"bpd": "bits/dim", "nats": "nats"}


@dataclass(frozen=True)
class Grid:
    """The runs of a suite by data set, variant and seed, each axis in the order of first appearance.

    ``not_run``: variants that the suite leaves to a longer reproduction, of which no run is there.
    """

    runs: tuple[Run, ...]
    not_run: tuple[str, ...] = ()

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


def without_unrun(runs: Sequence[Run], optional: Iterable[str]) -> Grid:
    """The grid without those of the ``optional`` variants of which nothing at all was run: they are named once."""
    idle = {name for name in optional if all(_absent(run) for run in runs if run.variant == name)}
    names = dict.fromkeys(run.variant for run in runs if run.variant in idle)
    return Grid(tuple(run for run in runs if run.variant not in idle), tuple(names))


def _absent(run: Run) -> bool:
    return set(run.problems.values()) == {RUN_MISSING}


def likelihood_reading(run: Run, bound: str, correction: str) -> Reading:
    """Total of one bound; a reason where its parts do not sum to it, because then one of them is wrong."""
    return total_reading(run, bound, correction)


def total_reading(run: Run, *path: str) -> Reading:
    """The total at a place of likelihood.json, checked against the sum of its parts."""
    total = run.at(LIKELIHOOD, *path, "total")
    if isinstance(total, str):
        return total
    record: Any = run.likelihood or {}
    for key in path:
        record = record[key]
    parts = record.get("parts")
    if isinstance(parts, Mapping) and parts:
        values = [finite(value) for value in parts.values()]
        if None in values:
            return f"{' '.join(path)}: a part is not a finite number"
        if abs(sum(values) - total) > 1e-4 * max(1.0, abs(total)):
            return f"{' '.join(path)}: parts sum to {sum(values):.6g}, total is {total:.6g}"
    return total


def curve_units(runs: Sequence[Run]) -> str | None:
    """The unit of likelihoods of runs on one data set, as their evaluations or their learning curves state it."""
    for run in runs:
        if run.likelihood and run.likelihood.get("units"):
            return str(run.likelihood["units"])
        for column in run.curve[0] if run.curve else ():
            if column.startswith("nelbo_"):
                return UNITS.get(column.removeprefix("nelbo_"))
    return None


def stated(runs: Sequence[Run], *path: str) -> Any:
    """What likelihood.json states at ``path``, the same over the runs or joined; None where none states it."""
    values = []
    for run in runs:
        value: Any = run.likelihood
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        values.append(value)
    return common(values)


def bound_stated(runs: Sequence[Run]) -> Any:
    """What kind of bound the runs' NELBO is; None where they have none."""
    return stated([run for run in runs if (run.likelihood or {}).get("nelbo")], "protocol", "bound")


def mean_of(runs: Sequence[Run], *path: str) -> float | None:
    """Mean over the runs of a number of likelihood.json."""
    values = [value for run in runs if not isinstance(value := run.at(LIKELIHOOD, *path), str)]
    return sum(values) / len(values) if values else None


def common(values: Iterable[Any]) -> Any:
    """The one distinct value, or all of them joined as text; None where there is none."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return distinct[0] if len(distinct) == 1 else "; ".join(map(str, distinct)) or None
