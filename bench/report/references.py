"""Numbers that this project did not train: closed forms on the same data, and published values with their trust."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.files import read_json
from bench.report.cells import Cell, Row
from bench.report.load import LIKELIHOOD, Run, finite, read_csv
from bench.report.tables import Grid
from bench.statistics import Summary

# best first, as paper/README.md defines them
TRUST = ("primary", "official-readme", "text-copy", "leaderboard", "secondary")
# families of variants (beginning of the name) -> the beginnings of the published models' names
FAMILIES = {
    "indm": ("INDM",),
    "ddpmpp": ("DDPM++",),
    "ncsnpp": ("NCSN++",),
    "diffflow": ("DiffFlow",),
    "ddpm": ("DDPM", "DDPM cont."),
    "ncsn": ("NCSN", "NCSNv2"),
    "sbp": ("SB-FBSDE",),
    "scoreflow": ("ScoreFlow",),
    "sdeflow": (),
}
CORE = ("indm", "ddpmpp", "ncsnpp")
PUBLISHED_DATA = "CIFAR-10"
LIKELIHOOD_METRICS = {
    "nelbo_bpd": "published_nelbo",
    "nll_bpd": "published_nll",
    "gap_bpd": "published_gap",
    "bpd": "published_bpd",
}
NAMES = {"gaussian_full_covariance": "Gaussian, full covariance", "truth": "exact density"}


@dataclass(frozen=True)
class Published:
    """One published number and where it was read."""

    model: str
    dataset: str
    metric: str
    value: float
    detail: str
    source: str
    trust: str
    note: str

    def said(self) -> dict[str, str]:
        """What a table says beside the number."""
        return {"detail": self.detail, "source": self.source, "trust": self.trust, "note": self.note}


def load_published(path: Path) -> list[Published]:
    """Rows of reference.csv; InputError for a value that is no number or a trust that is not one of ``TRUST``."""
    if not path.is_file():
        path = Path(__file__).parents[2] / "reports" / "reference.csv"
    if not path.is_file():
        return []
    published = []
    try:
        rows = read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise InputError(f"{path}: cannot be read ({reason}); accepted: a CSV table in UTF-8") from error
    for place, row in enumerate(rows, start=2):
        value = finite(row.get("value"))
        if value is None:
            raise InputError(f"{path}: line {place}: value = {row.get('value')!r}: must be a finite number")
        if row.get("trust") not in TRUST:
            raise InputError(f"{path}: line {place}: trust = {row.get('trust')!r}: must be one of {', '.join(TRUST)}")
        row = {name: text.strip() for name, text in row.items()}
        try:
            published.append(Published(**(row | {"value": value})))
        except TypeError as error:
            names = ", ".join(Published.__dataclass_fields__)
            raise InputError(f"{path}: columns must be {names}") from error
    return published


def family(variant: str) -> str | None:
    """The family of a variant of ours: the longest known beginning of its name."""
    matches = [name for name in FAMILIES if variant == name or variant.startswith(f"{name}-")]
    return max(matches, key=len, default=None)


def of_families(published: list[Published], variants: list[str], dataset: str = PUBLISHED_DATA) -> list[Published]:
    """Published numbers on ``dataset`` of INDM, DDPM++, NCSN++ and of the families of ``variants``."""
    wanted = dict.fromkeys([*CORE, *filter(None, map(family, variants))])
    names = [name for group in wanted for name in FAMILIES[group]]
    rows = [row for row in published if row.dataset == dataset]
    return [row for name in names for row in rows if _is_model(row.model, name)]


def _is_model(model: str, name: str) -> bool:
    if name in ("DDPM", "NCSN"):
        return model == name
    return model == name or model.startswith(f"{name} ")


def likelihood_rows(published: list[Published], variants: list[str]) -> list[Row]:
    """One row a published model and source with its likelihoods; what its source does not give stays blank."""
    grouped: dict[tuple[str, str, str], Row] = {}
    for number in of_families(published, variants):
        column = LIKELIHOOD_METRICS.get(number.metric)
        if column is None:
            continue
        key = (number.model, number.source, number.trust)
        row = grouped.get(key)
        if row is None:
            keys = {"dataset": number.dataset, "kind": "published", "variant": number.model}
            row = grouped[key] = Row(keys, extra={"units": "bits/dim", **number.said()})
        elif number.detail not in row.extra["detail"]:
            row.extra["detail"] += f"; {number.detail}"
        row.extra[column] = number.value
    return list(grouped.values())


def step_rows(published: list[Published], variants: list[str]) -> list[Row]:
    """Published FID at a stated number of steps, and a row that says so for INDM while nobody has its curve."""
    # the step sweeps are of these two models, whatever the suite's own variants are
    sweeps = of_families(published, [*variants, "diffflow", "ddpm"])
    rows = []
    for number in sweeps:
        steps = re.fullmatch(r"(\d+) steps", number.detail)
        if number.metric == "fid" and steps:
            keys = {"dataset": number.dataset, "kind": "published", "variant": number.model, "sampler": ""}
            extra = {"published_fid": number.value, **number.said()}
            rows.append(Row(keys | {"steps": int(steps[1])}, extra=extra))
    if not any(row.keys["variant"].startswith("INDM") for row in rows):
        keys = {"dataset": PUBLISHED_DATA, "kind": "published", "variant": "INDM", "sampler": "", "steps": None}
        rows.insert(0, Row(keys, extra={"detail": "not available: the paper's FID against steps could not be read"}))
    return sorted(rows, key=lambda row: (row.keys["variant"] != "INDM", row.keys["variant"], row.keys["steps"] or 0))


def reference_rows(path: Path, grid: Grid, units: Mapping[str, str | None]) -> list[Row]:
    """Closed-form rows: those of references.json, and the exact density where the runs evaluated it.

    references.json maps a name to {"nll": number, ...}, or a data set to {name: number or {"nll": number, ...}};
    optional keys of a reference: dataset, units, note. InputError names a reference that cannot be read.
    """
    rows = []
    for dataset in grid.datasets:
        row = _truth(grid.of(dataset), dataset, units.get(dataset))
        rows += [row] if row else []
    exact = {row.keys["dataset"] for row in rows}
    for dataset, name, record in _entries(path, grid.datasets):
        if name == "truth" and dataset in exact:
            continue  # measured on the very test points of the runs, which is the closer comparison
        value = finite(record.get("nll"))
        if value is None:
            raise InputError(f"{path}: {name}: nll = {record.get('nll')!r}: must be a finite number")
        stated = record.get("units") or units.get(dataset)
        if units.get(dataset) and stated != units[dataset]:
            raise InputError(f"{path}: {name}: units = {stated!r}: the runs on {dataset} are in {units[dataset]!r}")
        note = str(record.get("note") or ("entropy of the density" if name == "truth" else ""))
        rows.append(_reference(dataset, NAMES.get(name, name.replace("_", " ")), value, stated, note))
    return rows


def _entries(path: Path, datasets: list[str]) -> list[tuple[str, str, Mapping[str, Any]]]:
    try:
        content = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if not isinstance(content, dict) or not all(isinstance(record, dict) for record in content.values()):
        raise InputError(f"{path}: must map names to objects")
    entries = []
    for name, record in content.items():
        if name in datasets and "nll" not in record:
            for inner, value in record.items():
                entries.append((name, inner, value if isinstance(value, dict) else {"nll": value}))
            continue
        dataset = record.get("dataset") or (datasets[0] if len(datasets) == 1 else None)
        if dataset not in datasets:
            raise InputError(f"{path}: {name}: dataset = {dataset!r}: must be one of {', '.join(datasets)}")
        entries.append((dataset, name, record))
    return entries


def _truth(runs: list[Run], dataset: str, units: str | None) -> Row | None:
    """The exact negative log-density of the test points, mean over the runs that evaluated it on the same ones."""
    values = [value for run in runs if not isinstance(value := run.at(LIKELIHOOD, "truth", "nll"), str)]
    if not values:
        return None
    low, high = min(values), max(values)
    note = "mean over the runs' test points"
    if high - low > 1e-6 * max(1.0, abs(low)):
        note = f"differs between runs, from {low:.4g} to {high:.4g}: they used different test points"
    return _reference(dataset, NAMES["truth"], sum(values) / len(values), units, note)


def _reference(dataset: str, name: str, value: float, units: str | None, note: str) -> Row:
    keys = {"dataset": dataset, "kind": "reference", "variant": name}
    cells = {"nll_corrected": Cell(Summary(value, None, 0, None, None), "closed form")}
    return Row(keys, cells, {"units": units, "source": "closed form", "note": note})
