"""The files of the studies of a run, read as strictly as its other results: what is damaged becomes a reason."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.cells import Table
from bench.report.load import LIKELIHOOD, Run, finite, read_csv
from bench.report.tables import NOT_ASKED

PER_IMAGE = "per_image.npz"
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
        ("paths", "nelbo", "sde", "sde_se", "ess"),
        (*SE_PARTS, "nelbo", "sde", "nll", "grid_change", "chain_excess", "ess"),
        ("units", "images", "steps", "paths", *(f"{part}_se" for part in SE_PARTS), "sde_se", "ess_min", "detail"),
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


def _per_image(run: Run) -> dict[int, tuple[float, float]] | str:
    """Image -> (NELBO, NLL) in nats, both corrected; the reason where they are absent or belong to another record."""
    import numpy as np

    path = run.folder / PER_IMAGE
    if not path.is_file():
        return f"{PER_IMAGE} missing"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index, nelbo, nll = (arrays[name] for name in ("index", "nelbo", "nll"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return f"{PER_IMAGE} cannot be read ({_short(error, path)})"
    if not len(index) == len(nelbo) == len(nll) > 0 or not (np.isfinite(nelbo).all() and np.isfinite(nll).all()):
        return f"{PER_IMAGE} holds no finite NELBO and NLL for each image"
    for name, values in (("nelbo", nelbo), ("nll", nll)):
        total = run.at(LIKELIHOOD, name, "corrected", "total")
        if isinstance(total, str):
            return total
        if abs(values.mean() - total) > 1e-4 * max(1.0, abs(total)):
            return f"{PER_IMAGE} has mean {name} {values.mean():.6g}, {LIKELIHOOD} {total:.6g}"
    return {int(image): (float(a), float(b)) for image, a, b in zip(index, nelbo, nll)}


# The gap in parts --------------------------------------------------------------------------------------------------


def split_of(run: Run) -> Line | str:
    """The parts of one run's gap NELBO − NLL, nats, means over the images of its path estimate; or why there are none.

    With p_SDE the density of the generative SDE, estimated on the finest grid: gap = variational + sde_to_ode, where
    variational = NELBO − (−log p_SDE) and sde_to_ode = (−log p_SDE) − NLL. The parts are of the same images and sum to
    the gap by construction. ``*_se`` are standard errors over images, ``sde_se`` that of the paths. ``grid_change`` is
    the mean of −log p_SDE on the finest grid minus that on the next coarser one; ``chain_excess`` the bound of the
    chain of the finest grid minus the NELBO, which is of continuous time.
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
    grids = sorted({line["steps"] for line in lines})
    fine, coarse = (
        {line["image"]: line for line in lines if line["steps"] == grid} for grid in (grids[-1], grids[-2:][0])
    )
    if set(fine) != set(coarse):
        return "the grids of gap_split.csv hold different images"
    paths = {line["paths"] for line in fine.values()}
    if len(paths) > 1:
        return "the images of gap_split.csv differ in their number of paths"
    bounds = _per_image(run)
    if isinstance(bounds, str):
        return bounds
    if not set(fine) <= set(bounds):
        return f"gap_split.csv holds images that {PER_IMAGE} lacks"
    images = sorted(fine)
    nelbo, nll = ([bounds[image][place] for image in images] for place in (0, 1))
    sde = [fine[image]["sde"] for image in images]
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
        "grid_change": mean(sde) - mean(line["sde"] for line in coarse.values()) if len(grids) > 1 else ONE_GRID,
        "chain_excess": mean(line["nelbo"] for line in fine.values()) - mean(nelbo),
        "ess": (effective[middle] + effective[~middle]) / 2,
        "ess_min": effective[0],
        "units": "nats",
        "images": len(images),
        "steps": grids[-1],
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
