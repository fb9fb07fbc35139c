"""The files of the studies of a run, read as strictly as its other results: what is damaged becomes a reason."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.cells import Table
from bench.report.load import LIKELIHOOD, Run, finite, read_csv
from bench.report.tables import NOT_ASKED

ONE_GRID = "not measured: one grid only"
# columns of a file that hold integers; all others are numbers, apart from the words
INTEGERS = frozenset({"image", "steps", "paths", "samples", "bins", "n"})
WORDS = frozenset({"sampler", "convention", "quantity", "units", "claim", "time", "status"})
Line = dict[str, Any]
Point = tuple[Any, ...]


@dataclass(frozen=True)
class Form:
    """How the file of a study is read and what its table looks like.

    ``keys`` name a line of the file, ``columns`` are its other columns; ``metrics`` and ``extra`` are those of the
    table; ``optional`` metrics may be blank throughout; ``same`` must agree between lines that stand side by side.
    """

    keys: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    extra: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    same: tuple[str, ...] = ("n",)
    across: bool = True
    by_variant: bool = False  # rows of a variant stand together, otherwise those of a key

    def table(self, name: str) -> Table:
        """The empty table."""
        first = ("variant",) if name == "gap_split" else ("variant", *self.keys)
        return Table(
            name, ("dataset", *(first if self.by_variant else (*self.keys, "variant"))), self.metrics, self.extra
        )


SE_PARTS = ("gap", "variational", "sde_to_ode")
FORMS = {
    "gap_split": Form(
        ("image", "steps"),
        ("paths", "nelbo", "sde", "sde_se", "ode", "ess"),
        (*SE_PARTS, "nelbo", "sde", "nll", "grid_change", "chain_excess", "ess"),
        (
            "units",
            "images",
            "steps",
            "grids",
            "paths",
            *(f"{part}_se" for part in SE_PARTS),
            "sde_se",
            "ess_min",
            "detail",
        ),
        by_variant=True,
    ),
    "discretisation": Form(
        ("sampler", "steps"),
        ("samples", "bins", "tv", "prior", "estimation", "discretisation", "bound", "floor", "se"),
        ("tv", "prior", "estimation", "discretisation", "bound", "floor", "slack"),
        ("samples", "bins", "se", "holds", "holds_in", "detail"),
        frozenset({"floor"}),
        ("samples", "bins"),
        by_variant=True,
    ),
    "conventions": Form(
        ("convention", "quantity"),
        ("units", "right", "official", "difference", "se", "closed_form", "closed_form_se", "n"),
        ("right", "official", "difference", "closed_form"),
        ("units", "n", "se", "closed_form_se", "agreement", "agreement_worst", "detail"),
        frozenset({"right", "official", "closed_form"}),
        ("units", "n"),
    ),
    "latents": Form(("time", "quantity"), ("value", "se", "n"), ("value",), ("n", "se", "detail")),
    "identities": Form(
        ("claim", "quantity"),
        ("value", "expected", "se", "n"),
        ("value", "expected", "difference"),
        ("n", "se", "agreement", "agreement_worst", "detail"),
        frozenset({"expected", "difference"}),
        across=False,  # n counts what a variant has, such as its gradients
    ),
}


# Reading -----------------------------------------------------------------------------------------------------------


def read_study(folder: Path, name: str) -> list[Line]:
    """Lines of one study's file in a run's folder: numbers as numbers, blanks as None, words as text.

    Raises FileNotFoundError where there is no file, and ValueError where it lacks a column or holds no line, NaN,
    infinity, a line without a status or two lines of one key. A line that could not be measured (its status is not
    "ok") may lack its keys, which are "" then.
    """
    form = FORMS[name]
    rows = read_csv(Path(folder) / f"{name}.csv")
    if not rows:
        raise ValueError("no rows")
    lacking = [column for column in (*form.keys, *form.columns, "status") if column not in rows[0]]
    if lacking:
        raise ValueError(f"lacks the column {lacking[0]}")
    lines, seen = [], set()
    for place, row in enumerate(rows, start=2):
        line = {column: _value(column, row[column], place) for column in (*form.keys, *form.columns, "status")}
        if not line["status"]:
            raise ValueError(f"line {place}: no status")
        for key in form.keys:
            if line[key] in (None, ""):
                if line["status"] == "ok":
                    raise ValueError(f"line {place}: no {key}")
                line[key] = ""
        point = tuple(line[key] for key in form.keys)
        if point in seen:
            raise ValueError(f"line {place}: a second row of {', '.join(map(str, point))}")
        seen.add(point)
        lines.append(line)
    return lines


def _value(column: str, text: str, place: int) -> Any:
    if column in WORDS:
        # 0, 0.0 and 0.00 are one time
        return f"{finite(text):g}" if column == "time" and finite(text) is not None else text
    if text == "":
        return None
    number = finite(text)
    if number is None or (column in INTEGERS and number != int(number)):
        raise ValueError(f"line {place}: {column} = {text}")
    return int(number) if column in INTEGERS else number


def asked(run: Run) -> dict[str, Any]:
    """The studies that a run's configuration asks for, with their settings."""
    return (run.config.get("evaluate") or {}).get("studies") or {}


def study_of(run: Run, name: str) -> list[Line] | str:
    """The lines of a run's study, or why there are none."""
    if LIKELIHOOD in run.problems:
        # a study belongs to an evaluated run: what is left beside a broken one may be of other weights
        return run.problems[LIKELIHOOD]
    if run.diverged:
        return run.diverged
    path = run.folder / f"{name}.csv"
    if path.is_file() and path.name in run.problems:
        return run.problems[path.name]
    if not path.is_file():
        return f"{path.name} missing" if name in asked(run) or not run.config else NOT_ASKED
    try:
        return read_study(run.folder, name)
    except (OSError, ValueError, csv.Error) as error:
        return f"{path.name} cannot be read ({_short(error, path)})"


def _short(error: Exception, path: Path) -> str:
    """An error's words without a machine's path."""
    text = " ".join(str(error).split()).replace(f"{path}: ", "").replace(str(path), path.name)
    return text if len(text) <= 120 else text[:117] + "..."


# The gap in parts --------------------------------------------------------------------------------------------------


def split_of(run: Run) -> Line | str:
    """The parts of one run's gap NELBO − NLL, nats, means over the images of its path estimate; or why there are none.

    With p_SDE the density of the generative SDE: gap = variational + sde_to_ode, where variational = NELBO −
    (−log p_SDE) and sde_to_ode = (−log p_SDE) − NLL, all of the same images. NELBO and −log p_SDE are limits of a fine
    grid, 2 v(N) − v(N/2) for each image; with one grid, the values on it.
    NLL is that of the ODE in the study's own file: the one of per_image.npz has a single draw of its residual.
    ``*_se`` are standard errors over images, ``sde_se`` that of the paths on the finest grid. ``grid_change`` is the
    limit of −log p_SDE minus its value on the finest grid; ``chain_excess`` the bound of the finest grid's chain minus
    its limit; ``grids`` how many grids the values are of.
    """
    lines = study_of(run, "gap_split")
    if isinstance(lines, str):
        return lines
    bad = [line for line in lines if line["status"] != "ok"]
    if bad:
        # leaving images out would choose the easy ones
        return bad[0]["status"] if len(bad) == len(lines) else f"{len(bad)} of {len(lines)} rows: {bad[0]['status']}"
    if (run.likelihood or {}).get("units") != "nats":
        return "not defined: the likelihoods are not in nats"
    blank = next((name for line in lines for name in FORMS["gap_split"].columns if line[name] is None), None)
    if blank:
        return f"{blank} is blank in gap_split.csv"
    grids = {line["steps"]: {} for line in lines}
    for line in lines:
        grids[line["steps"]][line["image"]] = line
    steps = max(grids)
    fine, half = grids[steps], grids.get(steps / 2)
    if half is None and len(grids) > 1:
        return f"gap_split.csv has {steps} steps and other grids, but not half as many"
    coarse = fine if half is None else half  # a value and itself: the limit is the value
    images = sorted(fine)
    if images != sorted(coarse):
        return "the grids of gap_split.csv hold different images"
    paths = {line["paths"] for grid in (fine, coarse) for line in grid.values()}
    if len(paths) > 1:
        return "the rows of gap_split.csv differ in their number of paths"
    if any(fine[image]["ode"] != coarse[image]["ode"] for image in images):
        return "the grids of gap_split.csv differ in the NLL of the ODE, which has no grid"
    nelbo, sde = ([2 * fine[image][name] - coarse[image][name] for image in images] for name in ("nelbo", "sde"))
    nll = [fine[image]["ode"] for image in images]
    parts = {
        "gap": [a - b for a, b in zip(nelbo, nll)],
        "variational": [a - b for a, b in zip(nelbo, sde)],
        "sde_to_ode": [a - b for a, b in zip(sde, nll)],
    }
    effective = sorted(line["ess"] for line in fine.values())
    middle = len(effective) // 2
    return {
        **{name: mean(values) for name, values in (parts | {"nelbo": nelbo, "sde": sde, "nll": nll}).items()},
        **{f"{name}_se": standard_error(values) for name, values in parts.items()},
        "sde_se": pooled([line["sde_se"] for line in fine.values()]),
        "grid_change": mean(sde) - mean(line["sde"] for line in fine.values()) if half else ONE_GRID,
        "chain_excess": mean(line["nelbo"] for line in fine.values()) - mean(nelbo) if half else ONE_GRID,
        "ess": (effective[middle] + effective[~middle]) / 2,
        "ess_min": effective[0],
        "units": "nats",
        "images": len(images),
        "steps": steps,
        "grids": 2 if half else 1,
        "paths": paths.pop(),
    }


def mean(values: Iterable[float]) -> float:
    """Mean of at least one number."""
    found = list(values)
    return math.fsum(found) / len(found)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent numbers; None for one."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def pooled(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent numbers, from theirs; None where one lacks it."""
    if not errors or None in errors:
        return None
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
