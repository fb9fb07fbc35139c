"""The studies as a person reads them: each table as text, what it found, its Markdown file, its part of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.cells import Cell, Row, Table
from bench.report.data_uri import data_uri
from bench.report.display import BLANK, View, escape_cell, interval, label, markdown, number, views
from bench.report.load import finite
from bench.report.study_files import FORMS
from bench.report.study_text import CLOSE, FIGURES, HEADINGS, INTROS, TITLES
from bench.statistics import Summary

# Tables as text ----------------------------------------------------------------------------------------------------


def table_views(table: Table, captions: Mapping[str, str]) -> list[View]:
    """One view a data set of a study's table, with its standard errors and checks in columns of their own."""
    words = Table(table.name, table.keys, tuple(HEADINGS.get(name, name) for name in table.metrics))
    for row in table.rows:
        cells = {HEADINGS.get(name, name): cell for name, cell in row.cells.items()}
        words.rows.append(Row(_worded(row), cells, row.extra))
    made = views(words, captions)
    for view in made:
        rows = [row for row in table.rows if row.keys["dataset"] == view.dataset]
        for place, (name, texts) in enumerate(_beside(table.name, rows).items(), start=len(view.columns) - 1):
            view.columns.insert(place, name)
            for line, text in zip(view.rows, texts, strict=True):
                line.insert(place, text)
        if table.name != "gap_split":
            _say_once(view, rows, [_worded(row) for row in rows], FORMS[table.name].keys)
    return made


def _say_once(view: View, rows: Sequence[Row], worded: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Move what is not defined for any variant, for one reason, from the lines of a view to its notes."""
    reasons: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        said = {cell.status if cell.summary is None else "" for cell in row.cells.values()}
        reasons.setdefault(tuple(row.keys[key] for key in keys), set()).update(said)
    whole = {key: said.pop() for key, said in reasons.items() if len(said) == 1 and all(key)}
    notes: dict[tuple[str, str], list[str]] = {}
    kept = []
    for row, line, words in zip(rows, view.rows, worded, strict=True):
        reason = whole.get(tuple(row.keys[key] for key in keys), "")
        if not reason.startswith("not defined"):
            kept.append(line)
        elif words[keys[-1]] not in (found := notes.setdefault((words[keys[0]], reason), [])):
            found.append(words[keys[-1]])
    view.rows = kept
    view.notes += [f"{first}, {', '.join(map(str, found))}: {reason}." for (first, reason), found in notes.items()]


def _worded(row: Row) -> dict[str, Any]:
    """The keys of a row as a person reads them."""
    worded = dict(row.keys)
    if "quantity" in worded:
        worded["quantity"] = worded["quantity"].replace("_", " ")
        worded["quantity"] += f" ({row.extra['units']})" if row.extra.get("units") else ""
    if "time" in worded:
        worded["time"] = {"0": "z_0", "1": "z_T", "": ""}.get(worded["time"], f"z at t = {worded['time']}")
    return worded


def _beside(name: str, rows: Sequence[Row]) -> dict[str, list[str]]:
    """Columns of what stands beside the measured quantities: standard errors, agreement, sizes."""

    def said(column: str, digits: int = 2) -> list[str]:
        return [number(finite(row.extra.get(column)), digits) for row in rows]

    if name == "gap_split":
        parts = zip(*(said(f"{part}_se") for part in ("gap", "variational", "sde_to_ode")))
        texts = [BLANK if set(errors) == {BLANK} else ", ".join(errors) for errors in parts]
        return {"SE over images: gap, parts": texts, "SE of the paths": said("sde_se")}
    if name == "discretisation":
        return {"SE of the TV": said("se"), "holds in": [row.extra.get("holds_in") or BLANK for row in rows]}
    columns = {"SE": said("se")}
    if name != "latents":
        columns["agreement"] = [_agreement(row) for row in rows]
    sizes = [finite(row.extra.get("n")) for row in rows]
    return columns | {"n": [BLANK if size is None else f"{size:,.0f}" for size in sizes]}


def _agreement(row: Row) -> str:
    whole, worst = row.extra.get("agreement"), row.extra.get("agreement_worst")
    if finite(whole) is None:
        return str(whole or BLANK)
    return f"{finite(whole):.1f} (worst seed {finite(worst):.1f})"


def document(table: Table, captions: Mapping[str, str], conventions: Mapping[str, Mapping[str, str]]) -> str:
    """The Markdown file of a study."""
    title, _, rest = markdown(TITLES[table.name], table_views(table, captions)).partition("\n\n")
    terms = conventions.items() if table.name == "conventions" else ()
    meaning = View("terms", "What the conventions are", "", ["convention", "title", "meaning", "source"], [])
    meaning.words = frozenset(meaning.columns)
    meaning.rows = [[name, term["title"], term["meaning"] or BLANK, term["source"] or BLANK] for name, term in terms]
    tail = "\n" + markdown("", [meaning]).partition("\n\n")[2] if meaning.rows else ""
    return (
        "\n\n".join(
            text for text in (title, INTROS[table.name], escape_cell(headline(table, conventions)), rest) if text
        )
        + tail
    )


# What was found ----------------------------------------------------------------------------------------------------


def headline(table: Table, conventions: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The table in one or two sentences; empty where it has no number or none that sums it up."""
    said = {"gap_split": _split_found, "discretisation": _terms_found, "identities": _equalities_found}
    if table.name == "conventions":
        return _rulers_found(table.rows, conventions or {})
    return said[table.name](table.rows) if table.name in said else ""


def _summary(row: Row, name: str) -> Summary | None:
    cell: Cell | None = row.cells.get(name)
    return cell.summary if cell else None


def _sign(summary: Summary) -> int:
    """1 or -1 where the interval lies on that side of zero, 0 where it covers it or there is none."""
    return 0 if summary.low is None else (summary.low > 0) - (summary.high < 0)


def _split_found(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if _summary(row, "gap")]
    if not rows:
        return ""
    largest = max(rows, key=lambda row: abs(_summary(row, "gap").mean))
    gap, bound, ode = (interval(_summary(largest, name)) for name in ("gap", "variational", "sde_to_ode"))
    signs = {name: [_sign(_summary(row, name)) for row in rows] for name in ("variational", "sde_to_ode")}
    return (
        f"The largest gap is that of {label(largest.keys['variant'])} on {largest.keys['dataset']}: {gap} nats, of "
        f"which {bound} is variational and {ode} lies between SDE and ODE. Of {len(rows)} rows the variational part "
        f"is above zero in {signs['variational'].count(1)} and below it in {signs['variational'].count(-1)}, the "
        f"SDE-to-ODE part above in {signs['sde_to_ode'].count(1)} and below in {signs['sde_to_ode'].count(-1)} (95 % "
        "intervals)."
    )


def _terms_found(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.extra.get("holds")]
    if not rows:
        return ""
    broken = [row for row in rows if row.extra["holds"] != "yes"]
    text = f"The bound holds in every seed in {len(rows) - len(broken)} of {len(rows)} rows."
    if broken:
        worst = min(broken, key=lambda row: _summary(row, "slack").mean)
        variant, dataset, sampler, steps = (worst.keys[key] for key in ("variant", "dataset", "sampler", "steps"))
        where = f"{label(variant)} on {dataset}, {sampler}, {steps} steps"
        text += f" The least room is left to {where}: bound − TV = {interval(_summary(worst, 'slack'))}."
    return text


def _rulers_found(rows: Sequence[Row], conventions: Mapping[str, Mapping[str, str]]) -> str:
    rows = [row for row in rows if _summary(row, "difference")]
    if not rows:
        return ""
    shifted = [row for row in rows if _sign(_summary(row, "difference"))]
    text = f"{len(shifted)} of {len(rows)} differences exclude zero (95 % over seeds)."
    for units in dict.fromkeys(row.extra["units"] for row in shifted):
        own = [row for row in shifted if row.extra["units"] == units]
        row = max(own, key=lambda row: abs(_summary(row, "difference").mean))
        title = conventions.get(row.keys["convention"], {}).get("title") or row.keys["convention"]
        text += (
            f" Largest in {units}: {title}, {row.keys['quantity']}, {interval(_summary(row, 'difference'))} "
            f"({label(row.keys['variant'])} on {row.keys['dataset']})."
        )
    return text + _agreed(rows, "differences", "their closed form")


def _equalities_found(rows: Sequence[Row]) -> str:
    return _agreed(rows, "values", "what is expected").strip()


def _agreed(rows: Sequence[Row], what: str, target: str) -> str:
    """How many rows agree with a known number."""
    said = [row.extra.get("agreement") for row in rows if row.extra.get("agreement") not in (None, "")]
    close = sum(text == "equal" or (finite(text) is not None and finite(text) <= CLOSE) for text in said)
    return f" {close} of {len(said)} {what} agree with {target} within {CLOSE:.0f} standard errors." if said else ""


# The page ----------------------------------------------------------------------------------------------------------


def study_views(folder: Path, summary: Mapping[str, Any], width: int = 1240) -> list[dict[str, Any]]:
    """What the page shows of a suite's studies, from its report alone; empty where the report has none.

    ``folder``: reports/<suite>; ``summary``: its summary.json, where "studies" holds what ``report_studies`` returned;
    ``width``: of figures, in pixels. Each study has name, title, intro, headline, rows (their number), views, terms and
    figures.
    """

    studies = summary.get("studies") or {}
    made = []
    for name in studies.get("tables", ()):
        table = FORMS[name].table(name)
        table.rows = table.read_rows(folder / f"{name}.csv")
        figures = []
        for file in studies["figures"]:
            if not file.startswith(name):
                continue
            title, caption = FIGURES[name]
            sampler = file.removesuffix(".png").removeprefix(name).strip("_")
            title += f", {sampler}" if sampler else ""
            alt = f"{title}, {', '.join(summary['datasets'])}: {caption} The numbers are in the table below."
            uri = data_uri(folder / "figures" / file, width)
            figures.append({"title": title, "caption": caption, "alt": alt, "uri": uri})
        terms = [{"name": key, **term} for key, term in studies["conventions"].items()] if name == "conventions" else []
        made.append(
            {
                "name": name,
                "title": TITLES[name],
                "intro": INTROS[name],
                "headline": headline(table, studies["conventions"]),
                "rows": len(table.rows),
                "views": table_views(table, studies["captions"].get(name, {})),
                "terms": terms,
                "figures": figures,
            }
        )
    return made
