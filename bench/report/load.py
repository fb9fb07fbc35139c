"""The result files of a suite's runs, read as they are: what is absent, damaged or diverged becomes a reason."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import seals
from bench.errors import InputError
from bench.files import read_json
from bench.report import shapes
from bench.studies.names import STUDIES

SCHEMA = 1
LIKELIHOOD, CURVE, ROBUSTNESS, PROVENANCE = (
    "likelihood.json",
    "learning_curve.csv",
    "robustness.csv",
    "provenance.json",
)
CONFIG = "config.yaml"
FAILURE = "failure.json"
FILES = (LIKELIHOOD, CURVE, ROBUSTNESS, PROVENANCE, CONFIG)

# a measurement of one run: a finite number, or the reason why there is none
Reading = float | str

RUN_MISSING = "run missing"
NOT_EVALUATED = "trained but not evaluated"
UNKNOWN = "unknown"


@dataclass
class Run:
    """One (suite, dataset, variant, seed) and what its folder holds; ``problems``: file -> why it has no content."""

    suite: str
    dataset: str
    variant: str
    seed: int
    folder: Path
    likelihood: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, str]] = field(default_factory=list)
    robustness: list[dict[str, str]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Either "ok" or the first thing that keeps this run out of the tables."""
        problems = (self.problems[name] for name in FILES[:-1] if name in self.problems)
        return self.diverged or next(problems, "ok")

    @property
    def diverged(self) -> str | None:
        """The status that the evaluation recorded instead of numbers, if it did."""
        status = (self.likelihood or {}).get("status", "ok")
        return None if status == "ok" else str(status)

    def reason(self, quantity: str) -> str | None:
        """Why the evaluation has no such quantity ("nelbo", "nll", "gap", "chain", "discrete"), where it says so."""
        reasons = (self.likelihood or {}).get("reasons")
        text = reasons.get(quantity) if isinstance(reasons, Mapping) else None
        return None if text is None else str(text)

    def at(self, file: str, *path: str) -> Reading:
        """The finite number at ``path`` in likelihood.json or provenance.json, or why there is none."""
        content = self.likelihood if file == LIKELIHOOD else self.provenance
        if content is None:
            return self.problems[file]
        value: Any = content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        number = finite(value)
        if number is not None and not (file == LIKELIHOOD and self.diverged):
            return number
        if file == LIKELIHOOD and self.diverged:
            return self.diverged
        if file == LIKELIHOOD and value is None and (reason := self.reason(path[0])):
            return reason
        return f"{'.'.join(path)} is not in {file}" if value is None else f"{'.'.join(path)} = {value} in {file}"


def finite(value: Any) -> float | None:
    """``value`` as a finite float; None for a blank, text, a truth value, NaN or infinity."""
    if value is None or isinstance(value, bool) or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as text; ValueError where a row does not fit the header."""
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    for place, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: line {place + 2} does not fit the header")
    return rows


def load_runs(suite: str, runs_root: Path, expected: Iterable[Mapping[str, Any]] = ()) -> list[Run]:
    """The runs of ``suite``: first the expected ones in their order, then others found under ``runs_root``/``suite``.

    ``expected`` holds mappings with keys suite, dataset, variant, seed; entries of other suites are left out. An
    expected run without a folder is kept, with "run missing" as the reason for every file.
    """
    wanted = []
    for entry in expected:
        missing = {"suite", "dataset", "variant", "seed"} - set(entry)
        if missing:
            raise InputError(f"expected run {dict(entry)}: lacks {', '.join(sorted(missing))}")
        if entry["suite"] == suite:
            wanted.append((str(entry["dataset"]), str(entry["variant"]), int(entry["seed"])))
    folders = _folders(Path(runs_root) / suite, wanted)
    runs = {}
    for key in wanted:
        runs[key] = folders.pop(key, Path(runs_root) / suite / key[1] / str(key[2]))
    runs.update(folders)
    return [_read(suite, *key, folder) for key, folder in runs.items()]


def _folders(root: Path, wanted: list[tuple[str, str, int]]) -> dict[tuple[str, str, int], Path]:
    """Run folders on disk: <variant>/<seed>, or <variant>/<seed>/<dataset> where a suite has several data sets."""
    found: dict[tuple[str, str, int], Path] = {}
    for variant in sorted(path for path in root.glob("*") if path.is_dir()):
        seeds = [path for path in variant.iterdir() if path.is_dir() and path.name.isdecimal()]
        for seed in sorted(seeds, key=lambda path: int(path.name)):
            if _holds_run(seed):
                datasets = list(dict.fromkeys(dataset for dataset, name, _ in wanted if name == variant.name))
                name = datasets[0] if len(datasets) == 1 else _dataset(seed)
                found[name, variant.name, int(seed.name)] = seed
                continue
            for folder in sorted(path for path in seed.iterdir() if path.is_dir()):
                if _holds_run(folder):
                    found[folder.name, variant.name, int(seed.name)] = folder
    named = {dataset for dataset, _, _ in found} - {UNKNOWN}
    if len(named) == 1:
        # a run that broke off does not say what it was trained on, but the others do
        (name,) = named
        return {(name if key[0] == UNKNOWN else key[0], *key[1:]): folder for key, folder in found.items()}
    return found


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*FILES, FAILURE))


def _dataset(folder: Path) -> str:
    """The data set that a run names in its own files."""
    run = _read("", "", "", 0, folder)
    return str((run.likelihood or {}).get("dataset") or run.config.get("dataset") or UNKNOWN)


def _read(suite: str, dataset: str, variant: str, seed: int, folder: Path) -> Run:
    run = Run(suite, dataset, variant, seed, folder)
    if (folder / FAILURE).is_file():
        # training broke off: what an earlier configuration may have left beside it is not this run's
        run.problems = dict.fromkeys(FILES, _failure(folder / FAILURE))
        return run
    present = _holds_run(folder)
    # the report reads no weights
    run.problems = seals.damage(folder, seals.TRAIN, skip="weights/")
    run.problems |= seals.damage(folder, seals.EVALUATE, also=[f"{study}.csv" for study in STUDIES])
    # what stands beside an absent record of its stage is unfinished
    for record, names in ((PROVENANCE, (CONFIG, CURVE)), (LIKELIHOOD, (ROBUSTNESS,))):
        if not (folder / record).is_file():
            run.problems |= dict.fromkeys(names, NOT_EVALUATED if record == LIKELIHOOD else f"{record} missing")
    for name, attribute, reader in (
        (LIKELIHOOD, "likelihood", _read_record),
        (PROVENANCE, "provenance", _read_record),
        (CONFIG, "config", _read_config),
        (CURVE, "curve", read_csv),
        (ROBUSTNESS, "robustness", read_csv),
    ):
        path = folder / name
        if name in run.problems and path.is_file():
            continue  # not what was written
        if not path.is_file():
            evaluated = name in (LIKELIHOOD, ROBUSTNESS)
            run.problems[name] = (NOT_EVALUATED if evaluated else f"{name} missing") if present else RUN_MISSING
            continue
        try:
            setattr(run, attribute, reader(path))
        except (OSError, ValueError, csv.Error) as error:
            # the reason must not hold a machine's path
            run.problems[name] = f"{name} cannot be read ({_short(error, path)})"
    return run


def _failure(path: Path) -> str:
    try:
        return str(read_json(path)["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "training failed"


def _short(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split()).replace(f"{path}: ", "").replace(str(path), path.name)
    return text if len(text) <= 120 else text[:117] + "..."


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"schema {record.get('schema')}: this report reads schema {SCHEMA}")
    shapes.check(record, shapes.LIKELIHOOD if path.name == LIKELIHOOD else shapes.PROVENANCE)
    return record


def _read_config(path: Path) -> dict[str, Any]:
    from bench.yaml_files import read_yaml

    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError("not a mapping")
    shapes.check(config, shapes.CONFIG)
    return config
