"""`indm-bench validate`: every estimator against problems whose answers are known, as one table.

Groups of rows can be run alone; each is deterministic, in float64 unless it says otherwise, with noise that is a
function of the image's index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.progress import Bar
from bench.truth.averages import AVERAGES, average_rows
from bench.truth.component_rows import (
    DENSITIES,
    FLOWS,
    ORDERS,
    PROCESSES,
    SAMPLERS,
    UNITS,
    density_rows,
    flow_rows,
    order_rows,
    orders,
    process_rows,
    sampler_rows,
    unit_rows,
)
from bench.truth.convergence import write_orders
from bench.truth.likelihood_rows import (
    TRAINING,
    bound_identities,
    bound_rows,
    eps_rows,
    ode_rows,
    proposal_rows,
    training_rows,
)
from bench.truth.noise_rows import NOISE, noise_rows
from bench.truth.process import SDES
from bench.truth.rows import BOUND, ODE, Row, print_battery, summary_line, write_battery

__all__ = ["GROUPS", "Row", "print_battery", "run_battery", "run_group", "summary_line", "validate", "write_battery"]

# group -> functions of one SDE's name; those of COMMON need none
PER_SDE: dict[str, tuple[Callable[[str], list[Row]], ...]] = {
    PROCESSES: (process_rows,),
    BOUND: (bound_rows, bound_identities, proposal_rows),
    ODE: (ode_rows, eps_rows),
    TRAINING: (training_rows,),
    DENSITIES: (density_rows,),
    SAMPLERS: (sampler_rows,),
    ORDERS: (order_rows,),
}
COMMON: dict[str, tuple[Callable[[], list[Row]], ...]] = {
    FLOWS: (flow_rows,),
    UNITS: (unit_rows,),
    AVERAGES: (average_rows,),
    NOISE: (noise_rows,),
}
GROUPS = (*PER_SDE, *COMMON)


def _tasks(groups: Iterable[str], sdes: Sequence[str]) -> list[Callable[[], list[Row]]]:
    tasks: list[Callable[[], list[Row]]] = []
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"group = {group!r}: accepted are {', '.join(GROUPS)}")
        tasks += [lambda f=f, sde=sde: f(sde) for sde in sdes for f in PER_SDE.get(group, ())]
        tasks += COMMON.get(group, ())
    return tasks


def run_group(group: str, sdes: Sequence[str] = tuple(SDES)) -> list[Row]:
    """The rows of one group; the likelihood's come with those of the bound that it is compared with."""
    return [row for task in _tasks([group], sdes) for row in task()]


def run_battery(groups: Sequence[str] = GROUPS, sdes: Sequence[str] = tuple(SDES), progress: bool = False) -> list[Row]:
    """All rows, in the order of ``groups``. Raises ValueError for a group that does not exist."""
    rows: list[Row] = []
    tasks = _tasks(groups, sdes)
    with Bar(total=len(tasks), desc="validate", unit="part", disable=not progress, leave=False) as bar:
        for task in tasks:
            rows += task()
            bar.update()
    return sorted(rows, key=lambda row: GROUPS.index(row.group))


def validate(out: Path | str | None = None) -> int:
    """Run the battery, print it and, with ``out``, write validate.csv, validate.md and convergence.csv there.

    Returns 0 if every row is within its bound, else 1.
    """
    rows = run_battery(progress=True)
    print_battery(rows)
    if out is not None:
        write_battery(rows, out)
        write_orders([row for sde in SDES for row in orders(sde)], Path(out) / "convergence.csv")
    return 0 if all(row.ok for row in rows) else 1
