"""The files of `reports/performance`, read as they are: what is damaged is named and left out."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import read_json
from bench.report.load import read_csv

SCHEMA = 1
CHANGE_COLUMNS = ("change", "predicted", "measured", "where", "command", "date")
OFFICIAL_COLUMNS = (
    *("case", "seconds", "c", "multiple", "evaluations", "peak_mb", "peak_mb_alone"),
    *("source", "machine", "torch", "date"),
)


class Record:
    """What the folder holds; what is damaged is named in ``problems`` and left out."""

    def __init__(self, folder: Path):
        self.problems: list[str] = []
        self.notes: dict[str, str] = {}  # of a record, written by hand into its file: what its numbers do not say
        self.cpu, self.gpu = self._cases(folder / "cpu.json"), self._cases(folder / "gpu.json")
        self.changes = self._rows(folder / "changes.csv", CHANGE_COLUMNS)
        self.official = {row["case"]: row for row in self._rows(folder / "official.csv", OFFICIAL_COLUMNS)}

    def __bool__(self) -> bool:
        return bool(self.cpu or self.gpu or self.changes or self.problems)

    def _cases(self, path: Path) -> dict[str, dict[str, Any]]:
        if not path.is_file():
            return {}
        try:
            record = read_json(path)
            if record["schema"] != SCHEMA:
                raise ValueError
            self.notes[path.stem] = str(record.get("note") or "")
            return {str(name): dict(case) for name, case in record["cases"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.problems.append(f"{path.name} cannot be read")
            return {}

    def _rows(self, path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
        if not path.is_file():
            return []
        try:
            rows = read_csv(path)
        except (OSError, ValueError, csv.Error):
            self.problems.append(f"{path.name} cannot be read")
            return []
        lacking = [column for column in columns if rows and column not in rows[0]]
        if lacking:
            self.problems.append(f"{path.name} lacks the column {lacking[0]}")
            return []
        return rows

    def of(self, group: str) -> dict[str, dict[str, Any]]:
        """The cases of a group, by the rest of their names."""
        cases = self.gpu if group.startswith("gpu") else self.cpu
        return {name.removeprefix(f"{group}/"): case for name, case in cases.items() if name.startswith(f"{group}/")}

    def measured_on(self, cases: Mapping[str, Mapping[str, Any]]) -> str:
        """Machine, packages, code and dates of cases, in a sentence; blank without any."""
        found: dict[str, dict[str, None]] = {}
        for case in cases.values():
            record = case.get("provenance") or {}
            packages = record.get("packages") or {}
            commit = str(record.get("commit") or "unknown")[:10] + (" with changes" if record.get("dirty") else "")
            said = {
                "device": record.get("device"),
                "processor": record.get("cpu"),
                "threads": record.get("threads"),
                "PyTorch": packages.get("torch"),
                "commit": commit,
                "code": record.get("code"),
                "load average": record.get("load"),
                "date": str(record.get("started") or "")[:10],
            }
            for name, value in said.items():
                if value not in (None, ""):
                    found.setdefault(name, {})[str(value)] = None
        if len(loads := [float(load) for load in found.get("load average", ())]) > 1:
            found["load average"] = {f"{min(loads):g} to {max(loads):g}": None}
        return "; ".join(f"{name} {', '.join(values)}" for name, values in found.items())
