"""Efficiencies against the code's defaults, the choice they lead to, and the tables as CSV and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.estimators.common import Measured, Subject
from bench.files import write_text_atomic

# a setting replaces the default only where its efficiency is below 1 by so many standard errors
SIGNIFICANT = 2.0
BIASED = 3.0
WORSE = 1.2  # a variance near the Lipschitz bound is known too poorly for a test of its own
RULE = (
    "lowest variance x cost on the trained networks, by more than two standard errors, among unbiased settings of "
    "finite variance that cost nowhere more than 1.2 times the default's"
)


def relate(subject: Subject, rows: Sequence[Measured]) -> None:
    """Fill in ``efficiency`` (variance x cost over that of the code's default, which is 1) and its standard error."""
    defaults = {_place(subject, row): row for row in rows if row.options == subject.defaults}
    for row in rows:
        default = defaults.get(_place(subject, row))
        ratio, error = None, None
        if default is not None and row.variance is not None and float(default.variance.sum()) > 0:
            if row is default:
                ratio, error = 1.0, 0.0
            else:
                ratio, error = ratio_of_work(row, default)
        row.values |= {"efficiency": ratio, "efficiency_se": error}


def _place(subject: Subject, row: Measured) -> tuple:
    return tuple(row.values.get(name) for name in ("problem", *subject.same))


def ratio_of_work(row: Measured, default: Measured) -> tuple[float, float]:
    """Mean variance x cost over the default's, and its jackknife standard error over the images, which are paired."""
    scale = row.cost / default.cost
    ours, theirs = row.variance, default.variance
    n = len(ours)
    whole = float(ours.sum() / theirs.sum()) * scale
    if n < 2:
        return whole, math.inf
    left = (ours.sum() - ours) / (theirs.sum() - theirs) * scale
    return whole, float(((left - left.mean()).square().sum() * (n - 1) / n).sqrt())


def choose_options(subject: Subject, rows: Sequence[Measured]) -> dict[str, Any]:
    """The options that the rule takes, the code's own, and the sentence that says so.

    Judged on the trained networks where there are any and on the closed forms otherwise, by the geometric mean of the
    efficiencies over them. ValueError where the code's default was not measured.
    """
    usable = [row for row in rows if row.candidate and row.values.get("efficiency") is not None]
    usable = [row for row in usable if all(row.values[name] == value for name, value in subject.reference.items())]
    trained = [row for row in usable if row.trained]
    checked = [row for row in rows if row.candidate and row.values.get("bias_se")]
    beyond = sum(abs(row.values["bias"]) > BIASED * row.values["bias_se"] for row in checked)
    settings: dict[tuple, list[Measured]] = {}
    for row in trained or usable:
        settings.setdefault(tuple(row.options.items()), []).append(row)
    scored = {key: _mean_efficiency(own) for key, own in settings.items()}
    default = tuple(subject.defaults.items())
    if default not in scored:
        raise ValueError(f"{subject.name}: the default, {_text(default)}, is not among the measured settings")
    # a default must serve everywhere: what is clearly worse on any problem measured cannot be one
    worse = {tuple(row.options.items()) for row in usable if _is_worse(row)} - {default}
    best = min((key for key in scored if key not in worse), key=lambda key: scored[key][0])
    value, error = scored[best]
    if value + SIGNIFICANT * error >= 1:
        chosen, reason = default, f"no setting is better than the default beyond chance (best: {_text(best)}, "
        reason += f"efficiency {value:.3g} +- {error:.1g})"
    else:
        chosen, reason = best, f"its variance x cost is {value:.3g} +- {error:.1g} of the default's"
    problems = sorted({row.values["problem"] for row in trained or usable})
    at = "".join(f", at {value} {name}" for name, value in subject.reference.items())
    verdict = "is the same" if chosen == default else f"differs: {_text(default)}"
    where = "trained networks" if trained else "closed forms, for want of trained networks"
    elsewhere = {
        row.values["problem"]: row.values["efficiency"]
        for row in usable
        if row.values["problem"] not in problems and tuple(row.options.items()) == chosen
    }
    sentence = f"chosen: {_text(chosen)}, because {reason} on the {where} ({', '.join(problems)}){at}; "
    if chosen != default and elsewhere:
        sentence += f"elsewhere it is {', '.join(f'{v:.3g} ({name})' for name, v in elsewhere.items())}; "
    return {
        "rule": RULE,
        "options": dict(chosen),
        "default": dict(default),
        "same": chosen == default,
        "best": {"options": dict(best), "efficiency": value, "efficiency_se": error},
        "problems": problems,
        "elsewhere": elsewhere,
        "bias": {"rows": len(checked), f"beyond {BIASED:g} standard errors": beyond},
        "reference": subject.reference,
        "sentence": f"{sentence}the code's default {verdict}.",
    }


def _is_worse(row: Measured) -> bool:
    return row.values["efficiency"] > WORSE


def _mean_efficiency(rows: Sequence[Measured]) -> tuple[float, float]:
    """Geometric mean of the rows' efficiencies and its standard error."""
    values = [max(row.values["efficiency"], 1e-12) for row in rows]
    mean = math.exp(sum(map(math.log, values)) / len(values))
    relative = sum((row.values["efficiency_se"] / value) ** 2 for row, value in zip(rows, values, strict=True))
    return mean, mean * math.sqrt(relative) / len(values)


def _text(options: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in options)


def write_table(out: Path, subject: Subject, rows: Sequence[Mapping[str, Any]], sentence: str) -> None:
    """`<name>.csv` with every row and `<name>.md` with the efficiencies side by side, into the folder ``out``."""
    lines = [",".join(subject.columns)]
    lines += [",".join(_csv(row.get(name)) for name in subject.columns) for row in rows]
    write_text_atomic(out / f"{subject.name}.csv", "\n".join(lines) + "\n")
    write_text_atomic(out / f"{subject.name}.md", _markdown(subject, rows, sentence))


def _csv(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a number for a table")
        return format(value, ".6g")
    text = _cell(value)
    return f'"{text}"' if "," in text else text


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return format(value, ".3g") if isinstance(value, float) else str(value)


def _markdown(subject: Subject, rows: Sequence[Mapping[str, Any]], sentence: str) -> str:
    shown = {name: name.removesuffix("_eval") for name in (*subject.defaults, *subject.same)}
    problems = list(dict.fromkeys(row["problem"] for row in rows if row["status"] == "ok"))
    spread = "se_integral" if "se_integral" in subject.columns else "sd"
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = tuple(_cell(row[name]) if row.get(name) is not None else "" for name in shown.values())
            text = f"{row[spread]:.3g}"
            if row.get("efficiency") is not None:
                text += f" ({row['efficiency']:.3g})"
            cells.setdefault(key, {})[row["problem"]] = text
    lines = [f"# {subject.title}", "", sentence[0].upper() + sentence[1:], "", subject.note, ""]
    lines += [f"Cells: {spread} in nats/dim (efficiency; below 1 is better than the default).", ""]
    header = [*(name.replace("_", " ") for name in shown.values()), *problems]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join([*key, *(own.get(name, '') for name in problems)])} |" for key, own in cells.items()]
    lines += ["", *(f"- {row['problem']}: {row['status']}" for row in rows if row["status"] != "ok")]
    return "\n".join(lines).rstrip() + "\n"
