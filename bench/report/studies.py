"""Tables of the studies: what was measured on a run beside its likelihoods and samples, with every standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.files import write_text_atomic
from bench.report.cells import Row, Table, aggregate
from bench.report.load import Reading, Run
from bench.report.protocol import Protocol, likelihood_protocol, refusals
from bench.report.study_figures import draw_studies
from bench.report.study_files import FORMS, SE_PARTS, Line, Point, asked, mean, pooled, read_study, split_of, study_of
from bench.report.study_text import known_conventions, study_captions
from bench.report.study_views import document
from bench.report.tables import Grid

__all__ = ["FORMS", "agreement", "build_studies", "read_study", "report_studies"]

# a difference and its closed form are equal within this, whatever their standard errors
EXACT = 1e-6


def _fill_split(table: Table, grid: Grid) -> None:
    for dataset in _concerned(grid, table.name):
        splits = {(run.variant, run.seed): split_of(run) for run in grid.of(dataset)}

        def protocol(run: Run) -> Protocol | None:
            split = splits[run.variant, run.seed]
            if isinstance(split, str):
                return None
            own = {f"gap_split.{name}": split[name] for name in ("images", "steps", "grids", "paths")}
            return (likelihood_protocol(run) or {}) | own | _options(run, table.name)

        refused = refusals(grid.of(dataset), protocol)
        for variant in dict.fromkeys(run.variant for run in grid.of(dataset)):
            runs = grid.of(dataset, variant)
            row = Row({"dataset": dataset, "variant": variant}, extra={"detail": refused.get(variant) or ""})
            for metric in table.metrics:
                readings: dict[int, Reading] = {}
                for run in runs:
                    split = splits[variant, run.seed]
                    readings[run.seed] = split if isinstance(split, str) else split[metric]
                row.cells[metric] = aggregate(readings, refused.get(variant))
            found = [split for run in runs if not isinstance(split := splits[variant, run.seed], str)]
            if found and variant not in refused:
                row.extra |= {name: found[0][name] for name in ("units", "images", "steps", "grids", "paths")}
                for name in (*(f"{part}_se" for part in SE_PARTS), "sde_se"):
                    errors = [split[name] for split in found if split[name] is not None]
                    row.extra[name] = mean(errors) if errors else None
                row.extra["ess_min"] = min(split["ess_min"] for split in found)
            table.rows.append(row)


# Studies of one line a cell ----------------------------------------------------------------------------------------


def _fill_lines(table: Table, grid: Grid) -> None:
    """One row a data set, a key of the study and a variant, over its seeds."""
    form = FORMS[table.name]
    for dataset in _concerned(grid, table.name):
        content: dict[tuple[str, int], dict[Point, Line] | str] = {}
        for run in grid.of(dataset):
            lines = study_of(run, table.name)
            content[run.variant, run.seed] = (
                lines if isinstance(lines, str) else {tuple(line[key] for key in form.keys): line for line in lines}
            )
        points = list(dict.fromkeys(point for lines in content.values() if isinstance(lines, dict) for point in lines))
        refused = {
            point: refusals(grid.of(dataset), partial(_line_protocol, table.name, content, point), across=form.across)
            for point in points
        }
        variants = list(dict.fromkeys(run.variant for run in grid.of(dataset)))
        pairs = []
        for variant in variants:
            own = [lines for (name, _), lines in content.items() if name == variant and isinstance(lines, dict)]
            pairs += [(variant, point) for point in points if any(point in lines for lines in own)] or [(variant, ())]
        if not form.by_variant:
            # what no line says anything about comes last
            pairs.sort(key=lambda pair: points.index(pair[1]) if pair[1] else len(points))
        for variant, point in pairs:
            keys = {"dataset": dataset, "variant": variant} | dict(zip(form.keys, point or [""] * len(form.keys)))
            seeds = {run.seed: content[variant, run.seed] for run in grid.of(dataset, variant)}
            table.rows.append(_line_row(table.name, keys, point, seeds, refused.get(point, {}).get(variant)))


def _line_protocol(name: str, content: Mapping[Any, Any], point: Point, run: Run) -> Protocol | None:
    lines = content[run.variant, run.seed]
    line = lines.get(point) if isinstance(lines, dict) else None
    if line is None:
        return None
    stated = {key: value for key, value in (likelihood_protocol(run) or {}).items() if key.startswith("protocol.")}
    data = ((run.likelihood or {}).get("data") or {}).get("hash")
    same = {column: None if line[column] == "" else line[column] for column in FORMS[name].same}
    return {"data.hash": data} | same | stated | _options(run, name)


def _line_row(name: str, keys: Line, point: Point, seeds: Mapping[int, Any], refused: str | None) -> Row:
    form = FORMS[name]
    row = Row(keys, extra={"detail": refused or ""})
    lines = {seed: lines[point] for seed, lines in seeds.items() if isinstance(lines, dict) and point in lines}
    measured = {seed: READINGS[name](line) for seed, line in lines.items()}
    for metric in form.metrics:
        blank = all(line["status"] == "ok" and measured[seed][metric] is None for seed, line in lines.items())
        if metric in form.optional and lines and blank:
            continue
        readings: dict[int, Reading] = {}
        for seed, found in seeds.items():
            if seed not in lines:
                readings[seed] = found if isinstance(found, str) else f"no such row in {name}.csv"
                continue
            value, status = measured[seed][metric], lines[seed]["status"]
            unsaid = f"{metric} is blank in {name}.csv" if status == "ok" else status
            readings[seed] = unsaid if value is None else value
        row.cells[metric] = aggregate(readings, refused)
    if lines and not refused:
        row.extra |= _said(name, row, lines)
    return row


def _said(name: str, row: Row, lines: Mapping[int, Line]) -> Line:
    """What a row says beside its measured quantities: sizes, pooled standard error, agreement."""
    form = FORMS[name]
    extra = {
        column: next((line[column] for line in lines.values() if line[column] not in (None, "")), None)
        for column in form.same
    }
    main = row.cells.get({"discretisation": "tv", "conventions": "difference"}.get(name, "value"))
    used = {seed: lines[seed] for seed in (main.values if main else ())}
    extra["se"] = pooled([line["se"] for line in used.values()])
    if name == "discretisation" and (slack := row.cells["slack"].values):
        # not the floor: what finite samples add is in the estimation and discretisation terms already
        held = sum(value + 2 * (lines[seed]["se"] or 0.0) >= 0 for seed, value in slack.items())
        extra |= {"holds": "yes" if held == len(slack) else "no", "holds_in": f"{held} of {len(slack)}"}
    if name == "conventions":
        closed = [line for line in used.values() if line["closed_form"] is not None]
        extra["closed_form_se"] = pooled([line["closed_form_se"] or 0.0 for line in closed])
        extra |= agreement(
            [
                (line["difference"] - line["closed_form"], line["se"] if (e := line["closed_form_se"]) is None else e)
                for line in closed
            ],
            EXACT,
        )
    if name == "identities":
        known = [line for line in used.values() if line["expected"] is not None]
        # no standard error: nothing was drawn at random, and equal means equal
        extra |= agreement([(line["value"] - line["expected"], line["se"] or 0.0) for line in known])
    return extra


def agreement(deviations: Sequence[tuple[float, float]], exact: float = 0.0) -> dict[str, float | str | None]:
    """How far seeds' deviations lie from zero, in standard errors: of their mean, and of the worst seed alone.

    ``deviations`` holds pairs (deviation, its standard error; 0 where it has none). They are "equal" where none is
    above ``exact``, and "different" where one without a standard error is.
    """
    if not deviations:
        return {"agreement": None, "agreement_worst": None}
    if all(abs(deviation) <= exact for deviation, _ in deviations):
        return dict.fromkeys(("agreement", "agreement_worst"), "equal")
    if any(error == 0 and abs(deviation) > exact for deviation, error in deviations):
        return dict.fromkeys(("agreement", "agreement_worst"), "different")
    whole = abs(math.fsum(deviation for deviation, _ in deviations))
    return {
        "agreement": whole / math.sqrt(math.fsum(error**2 for _, error in deviations)),
        "agreement_worst": max(abs(deviation) / error for deviation, error in deviations if error),
    }


def _terms(line: Line) -> dict[str, Reading | None]:
    found: dict[str, Any] = {name: line[name] for name in FORMS["discretisation"].metrics if name != "slack"}
    terms = [line[name] for name in ("prior", "estimation", "discretisation")]
    if line["bound"] is not None and None not in terms and abs(sum(terms) - line["bound"]) > 1e-6:
        found["bound"] = f"the terms sum to {sum(terms):.6g}, the bound is {line['bound']:.6g}"
    bound = found["bound"]
    absent = line["tv"] is None or not isinstance(bound, float)
    return found | {"slack": bound if isinstance(bound, str) else None if absent else bound - line["tv"]}


def _rulers(line: Line) -> dict[str, Reading | None]:
    found: dict[str, Any] = {name: line[name] for name in FORMS["conventions"].metrics}
    right, official, difference = (line[name] for name in ("right", "official", "difference"))
    if difference is not None and line["se"] is None:
        found["difference"] = "a difference without its standard error"
    elif None not in (right, official, difference):
        size = max(1.0, abs(right), abs(official))
        if abs(official - right - difference) > 1e-6 * size:
            found["difference"] = f"official − right is {official - right:.6g}, the difference {difference:.6g}"
    return found


def _equalities(line: Line) -> dict[str, Reading | None]:
    known = line["value"] is not None and line["expected"] is not None
    return {name: line[name] for name in ("value", "expected")} | {
        "difference": line["value"] - line["expected"] if known else None
    }


READINGS = {
    "discretisation": _terms,
    "conventions": _rulers,
    "latents": lambda line: {"value": line["value"]},
    "identities": _equalities,
}


# Whole reports -----------------------------------------------------------------------------------------------------


def build_studies(grid: Grid) -> dict[str, Table]:
    """The tables of all studies that at least one run has a file of."""
    tables = {}
    for name, form in FORMS.items():
        if any((run.folder / f"{name}.csv").is_file() for run in grid.runs):
            tables[name] = form.table(name)
            (_fill_split if name == "gap_split" else _fill_lines)(tables[name], grid)
    return tables


def report_studies(grid: Grid, folder: Path) -> dict[str, Any]:
    """Write tables and figures of the studies into a suite's report; returns what summary.json must hold for the page.

    Tables of studies that no run has any more are removed. Keys: "tables" and "figures" (names), "captions" (table ->
    data set -> caption), "conventions" (name -> title, meaning, source), "refused" (rows measured differently).
    """
    tables = build_studies(grid)
    said = study_captions(tables, grid)
    meanings = known_conventions(tables)
    for name in FORMS:
        for suffix in ("csv", "md") if name not in tables else ():
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    for name, table in tables.items():
        table.write_csv(folder / f"{name}.csv")
        write_text_atomic(folder / f"{name}.md", document(table, said[name], meanings))
    return {
        "tables": list(tables),
        "figures": draw_studies(tables, folder / "figures", grid.variants),
        "captions": said,
        "conventions": meanings,
        "refused": _refused(tables),
    }


def _refused(tables: Mapping[str, Table]) -> list[str]:
    rows = ((row, table.name) for table in tables.values() for row in table.rows if row.extra.get("detail"))
    return list(
        dict.fromkeys(
            f"{row.keys['dataset']}, {row.keys['variant']}, {name}: {row.extra['detail']}" for row, name in rows
        )
    )


def _concerned(grid: Grid, name: str) -> list[str]:
    """Data sets on which some run has the study or was asked for it."""

    def concerned(run: Run) -> bool:
        return name in asked(run) or (run.folder / f"{name}.csv").is_file()

    return [dataset for dataset in grid.datasets if any(map(concerned, grid.of(dataset)))]


def _options(run: Run, name: str) -> Protocol:
    """The settings of a study: its seeds must agree in them, a variant may have its own."""
    return {f"protocol.studies.{name}.{key}": value for key, value in (asked(run).get(name) or {}).items()}
