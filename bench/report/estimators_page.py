"""The page's section on the estimators themselves: how they do where the answer is known, and which was chosen."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import read_json
from bench.report.data_uri import data_uri
from bench.report.display import BLANK, View, heading, number
from bench.report.load import finite, read_csv

ESTIMATORS = "estimators"
VALIDATION = "validate.csv"
TITLES = {
    "time_sampling": "How the times of the bound are drawn",
    "trace": "How the divergence is estimated",
    "series": "How the flow’s log-determinant is summed",
}
WHERE = ("problem", "sde", "setting", "estimator")
NEEDED = (*WHERE, "truth", "estimate", "se", "error", "bound", "unit", "ok")
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def estimators_section(reports_root: Path | str, width: int = 1240) -> dict[str, Any] | None:
    """What the page says of ``reports_root``/estimators; None where neither a table nor a validation is there.

    A file that is damaged is named in "problems" and left out. Keys: title, description, chosen (pairs of a question
    and its answer), validation (count, within, outside, largest, view) or None, tables, figures, problems.
    """
    folder = Path(reports_root) / ESTIMATORS
    problems: list[str] = []
    summary = _summary(folder, problems)
    tables = []
    for name, title in TITLES.items():
        if rows := _rows(folder / f"{name}.csv", problems):
            tables.append({"name": name, "title": title, "view": plain_view(name, rows)})
    validation = _validation(folder / VALIDATION, problems)
    if not tables and validation is None and not problems:
        return None
    return {
        "title": str(summary.get("title") or "The estimators"),
        "description": str(summary.get("description") or ""),
        "chosen": _chosen(summary.get("chosen")),
        "validation": validation,
        "tables": tables,
        "figures": _figures(folder / "figures", width),
        "problems": problems,
    }


def _summary(folder: Path, problems: list[str]) -> Mapping[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        record = read_json(path)
    except (OSError, ValueError):
        record = None
    if isinstance(record, Mapping):
        return record
    problems.append(f"{path.name} cannot be read")
    return {}


def _rows(path: Path, problems: list[str]) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    try:
        rows = read_csv(path)
    except (OSError, ValueError, csv.Error):
        rows = []
    if not rows:
        problems.append(f"{path.name} holds no rows that can be read")
    return rows


def _chosen(chosen: Any) -> list[tuple[str, str]]:
    """A choice for each question; a plain text is a choice without a question."""
    if isinstance(chosen, Mapping):
        return [(TITLES.get(name, heading(str(name))), _text(value)) for name, value in chosen.items()]
    if isinstance(chosen, str):
        return [("", chosen)]
    return [("", _text(value)) for value in chosen or ()]


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and value.get("sentence"):
        return str(value["sentence"]).removeprefix("chosen: ")
    if isinstance(value, Mapping):
        return ", ".join(f"{heading(str(key))}: {_text(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return number(value) if isinstance(value, float) else str(value)


def _validation(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """How many estimates lie within their bounds, the largest error of each unit, and those outside."""
    rows = _rows(path, problems)
    if not rows:
        return None
    lacking = [name for name in NEEDED if name not in rows[0]]
    if lacking:
        problems.append(f"{path.name} lacks the column {lacking[0]}")
        return None
    passed = [row["ok"].lower() in TRUE for row in rows]
    bad = next((row["ok"] for row in rows if row["ok"].lower() not in TRUE + FALSE), None)
    if bad is not None:
        problems.append(f"{path.name}: ok = {bad or 'blank'}")
        return None
    largest = []
    for unit in dict.fromkeys(row["unit"] for row in rows):
        # an estimate without an error says why in the table; it has no size
        own = [(abs(error), row) for row in rows if row["unit"] == unit and (error := finite(row["error"])) is not None]
        if own:
            error, row = max(own, key=lambda pair: pair[0])
            bound = finite(row["bound"])
            largest.append({"unit": unit, "error": number(error, 2), "bound": number(bound, 2), "where": _where(row)})
    return {
        "count": len(rows),
        "within": sum(passed),
        "outside": [_where(row) for row, ok in zip(rows, passed) if not ok],
        "largest": largest,
        "view": plain_view("validate", rows),
    }


def _where(row: Mapping[str, str]) -> str:
    return ", ".join(row[name] for name in WHERE if row[name] not in ("", "-"))


def plain_view(name: str, rows: Sequence[Mapping[str, str]]) -> View:
    """Any CSV table as text: numbers to four digits, truth values as words, blanks as dashes."""
    columns = list(rows[0])
    words = [column for column in columns if any(row[column] != "" and finite(row[column]) is None for row in rows)]
    view = View(name, "", "", [heading(column) for column in columns], [])
    view.words = frozenset(heading(column) for column in words)
    for row in rows:
        view.rows.append([_cell(row[column], column in words) for column in columns])
    return view


def _cell(text: str, word: bool) -> str:
    value = finite(text)
    if text == "":
        return BLANK
    if word or value is None:
        return {"true": "yes", "false": "no"}.get(text.lower(), text)
    return number(value)


def _figures(folder: Path, width: int) -> list[dict[str, str]]:

    made = []
    for path in sorted(folder.glob("*.png")):
        title = TITLES.get(path.stem, heading(path.stem))
        alt = f"Figure of the estimators: {title}. The numbers are in the tables below."
        made.append({"title": title, "alt": alt, "uri": data_uri(path, width)})
    return made
