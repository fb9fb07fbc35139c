"""Tables for people: cells as text with sensible digits, one view a data set, rendered as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.report.cells import OK, Cell, Row, Table
from bench.report.load import finite
from bench.statistics import Summary

ABSENT = "not available"
BLANK = "—"
LABELS = {
    "ddpmpp-vp": "DDPM++ (VP)",
    "ddpmpp-subvp": "DDPM++ (sub-VP)",
    "ncsnpp-ve": "NCSN++ (VE)",
    "indm-vp-nll": "INDM (VP, NLL)",
    "indm-vp-fid": "INDM (VP, FID)",
    "indm-ve": "INDM (VE)",
    "indm-vp-glow": "INDM (VP, Glow)",
    "indm-vp-pretrained": "INDM (VP, pre-trained)",
    "indm-vp-st": "INDM (VP, ST)",
    "diffflow": "DiffFlow",
    "sbp-fbsde": "SB-FBSDE",
    "sbp-dsb": "DSB",
    "ddpm": "DDPM",
    "ncsn": "NCSN",
    "scoreflow-vp": "ScoreFlow (VP)",
    "sdeflow-uniform": "sdeflow (uniform)",
    "sdeflow-debiased": "sdeflow (debiased)",
}
SAMPLERS = {
    "euler_maruyama": "Euler–Maruyama",
    "predictor_corrector": "predictor-corrector",
    "ode": "the adaptive ODE",
    "published_ode": "the published ODE sampler",
    "published_pc": "the published predictor-corrector",
    "heun": "Heun",
    "ddim": "DDIM",
    "ancestral": "ancestral sampling",
    "annealed_langevin": "annealed Langevin dynamics",
    "plugin_sde": "plug-in SDE",
}
TITLES = {
    "learning_curve": "Learning curve",
    "nll_nelbo_gap": "Likelihood: NELBO, NLL and their gap",
    "bounds": "Bounds: continuous and of discrete chains",
    "discrete_bounds": "Bounds on discrete images",
    "likelihood_parts": "Likelihood in parts",
    "step_robustness": "Sample quality against steps",
    "costs": "Costs",
}
# of a table without a row
EMPTY = {
    "discrete_bounds": (
        "No data set of this suite consists of images with discrete grey levels, so that no model has a probability "
        "of such an image to bound."
    )
}
HEADINGS = {
    "nelbo": "NELBO",
    "nll": "NLL",
    "gap": "gap",
    "fd": "FD",
    "kid": "KID",
    "nfe": "NFE",
    "chain": "bound of the chain",
    "discrete": "bound on −log P(image)",
    "chain_steps": "steps of the chain",
    "bound": "kind of bound",
    "energy": "energy distance",
    "sliced_wasserstein": "sliced Wasserstein",
    "images_seen": "images seen",
    "parameters_score": "parameters, score",
    "parameters_flow": "parameters, flow",
    "parameters_drift": "parameters, drift",
    "parameters_total": "parameters",
    "train_seconds": "training, s",
    "evaluate_seconds": "evaluation, s",
    "ms_per_step": "ms a step",
    "flops": "training, FLOPs",
    "flops_per_step": "FLOPs a step",
    "flops_total": "FLOPs of training",
    "peak_bytes": "peak of a step, bytes",
    "peak_memory_mb": "peak of the process, MB",
    "seconds": "sampling, s",
}
COUNTS = ("parameters_score", "parameters_flow", "parameters_drift", "parameters_total", "images_seen", "steps")
# shown with a prefix: 1.23 G
LARGE = ("flops", "flops_per_step", "flops_total", "peak_bytes")
# words that stand behind a table's numbers, where any row has them
SAID = {
    "nll_nelbo_gap": ("bound", "family"),
    "bounds": ("bound", "chain_steps", "family"),
    "discrete_bounds": ("chain_steps", "family"),
    "costs": ("family", "device"),
}


@dataclass
class View:
    """One table as text, of one data set."""

    name: str
    dataset: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: frozenset[str] = frozenset()  # the columns that hold words, not numbers


def label(variant: str) -> str:
    """A variant's name as the field writes it, with the name that the files use kept elsewhere."""
    return LABELS.get(variant, variant)


def heading(metric: str) -> str:
    """What a column is called."""
    base, _, correction = metric.rpartition("_")
    if correction == "uncorrected":
        return f"{heading(base)}, uncorrected"
    if correction == "corrected":
        return heading(base)
    return HEADINGS.get(metric, metric.replace("_", " "))


def number(value: float | None, digits: int = 4) -> str:
    """A lone number to ``digits`` significant digits, without an exponent where that is readable."""
    if value is None:
        return BLANK
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -5 <= size < 9:
        decimals = max(0, digits - 1 - size)
        text = f"{value:,.{decimals}f}"
        return minus(text if decimals == 0 or value != int(value) else f"{value:,.0f}")
    return minus(f"{value:.{digits - 1}e}")


def minus(text: str) -> str:
    """The text with a true minus sign, and none before a zero."""
    if not text.startswith("-"):
        return text
    digits = text[1:].split(" ")[0]
    return "−" + text[1:] if any(digit in "123456789" for digit in digits) else text[1:]


def plain(value: Any) -> str:
    """A setting as it is written by hand: 1e-05 -> "1e-5", 2.970 -> "2.97"."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return minus(f"{value:.10g}".replace("e-0", "e-").replace("e+0", "e"))


def interval(summary: Summary, digits: int = 2) -> str:
    """Value ± half-interval: ``digits`` significant digits of the half-interval fix those of the value."""
    half = summary.half
    if not half:
        return number(summary.mean)  # one seed, or seeds that agree
    decimals = min(8, max(0, digits - 1 - math.floor(math.log10(half))))
    # 0.0996 rounds to 0.10, which has a digit more than was asked for
    if round(half, decimals) >= 10 ** (digits - decimals):
        decimals = max(0, decimals - 1)
    return minus(f"{summary.mean:,.{decimals}f} ± {half:,.{decimals}f}")


def cell_text(cell: Cell | None, metric: str = "", seeds: bool = True) -> str:
    """What stands in a cell: the number with its interval (and which share of the ``seeds``), or why there is none."""
    if cell is None:
        return BLANK
    summary = cell.summary
    if summary is None:
        return cell.status
    if metric in COUNTS and not summary.sd:
        return f"{summary.mean:,.0f}"
    text = engineering(summary) if metric in LARGE else interval(summary)
    return f"{text} ({_seeds(cell)} seeds)" if seeds and cell.status != OK else text


def _seeds(cell: Cell) -> str:
    """Either "3", or "2 of 3" where a seed was left out."""
    partial = cell.status.split(" seeds")[0] if cell.summary and cell.status.startswith(f"{cell.summary.n} of ") else ""
    return partial or str(cell.summary.n if cell.summary else 0)


def engineering(summary: Summary) -> str:
    """A large number with its interval: 1.23e9 -> "1.23 G", with a spread "1.23 ± 0.10 G"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(summary.mean) >= size:
            break
    else:
        prefix, size = "", 1.0
    if not summary.half:
        return f"{number(summary.mean / size, 3)} {prefix}".rstrip()
    low, high = (None if end is None else end / size for end in (summary.low, summary.high))
    scaled = replace(summary, mean=summary.mean / size, low=low, high=high)
    return f"{interval(scaled)} {prefix}".rstrip()


def views(table: Table, captions: Mapping[str, str], variants: Sequence[str] = ()) -> list[View]:
    """One view a data set with measured rows, then one of the published rows, if there are any."""
    made = []
    measured = [row for row in table.rows if row.kind != "published"]
    for dataset in dict.fromkeys(row.keys["dataset"] for row in measured):
        rows = [row for row in measured if row.keys["dataset"] == dataset]
        made.append(_measured_view(table, dataset, rows, captions.get(dataset, "")))
    published = [row for row in table.rows if row.kind == "published"]
    if published:
        make = _published_likelihoods if table.name == "nll_nelbo_gap" else _published_steps
        made.append(make(table.name, published, captions.get("published", "")))
    return made


def _measured_view(table: Table, dataset: str, rows: list[Row], caption: str) -> View:
    names = [key for key in table.keys if key not in ("dataset", "kind")]
    shown = [metric for metric in table.metrics if _worth_showing(metric, rows)]
    within = table.name == "nll_nelbo_gap"
    columns = [{"images": "images seen"}.get(name, name) for name in names] + [heading(metric) for metric in shown]
    columns += ["SE over images: NELBO, NLL, gap", "NFE of the NLL"] if within else []
    said = [name for name in SAID.get(table.name, ()) if any(row.extra.get(name) for row in rows)]
    columns += [heading(name) for name in said]
    words = frozenset((*names, *map(heading, said))) - {"steps"}
    view = View(table.name, dataset, caption, [*columns, "seeds"], [], words=words)
    # the tables of the studies keep a line a row
    together = _together(rows, names, shown) if table.name in TITLES else [(row, "") for row in rows]
    for row, covered in together:
        line = [_key_text(name, row) for name in names]
        line[-1] = covered or line[-1]
        cells = {metric: cell for metric in shown if (cell := row.cells.get(metric))}
        counts = list(dict.fromkeys(_seeds(cell) for cell in cells.values() if cell.summary))
        texts = [cell_text(row.cells.get(metric), metric, seeds=len(counts) > 1) for metric in shown]
        reasons = {cell.status if cell.summary is None else None for cell in cells.values()}
        if len(cells) == len(shown) > 1 and len(reasons) == 1 and None not in reasons:
            texts = [texts[0], *[BLANK] * (len(texts) - 1)]  # one reason for the whole row is said once
        line += texts
        if within:
            errors = [finite(row.extra.get(name)) for name in ("nelbo_se_images", "nll_se_images", "gap_se")]
            line += [", ".join(number(error, 2) for error in errors) if any(errors) else BLANK]
            line += [number(finite(row.extra.get("nfe")), 3)]
        line += [str(row.extra.get(name) or BLANK) for name in said]
        view.rows.append([*line, BLANK if row.kind == "reference" else ", ".join(counts) or "0"])
    view.notes = _notes(rows, names, shown)
    return view


def _together(rows: Sequence[Row], names: Sequence[str], metrics: Sequence[str]) -> list[tuple[Row, str]]:
    """Rows that differ in their last key alone and have no number, all for one reason, become one: (row, last keys)."""
    groups: dict[Any, list[Row]] = {}
    for place, row in enumerate(rows):
        reasons = {cell.status if cell.summary is None else None for name in metrics if (cell := row.cells.get(name))}
        alone = len(names) < 2 or len(reasons) != 1 or None in reasons
        keys = tuple(str(row.keys.get(name)) for name in names[:-1])
        groups.setdefault(place if alone else (row.kind, keys, *reasons), []).append(row)
    said = []
    for group in groups.values():
        texts = [_key_text(names[-1], row) for row in group]
        said.append((group[0], f"{texts[0]} to {texts[-1]}" if len(group) > 2 else " and ".join(texts)))
    return said


def _worth_showing(metric: str, rows: list[Row]) -> bool:
    """A quantity that is not defined or not asked for on the whole data set needs no column."""
    cells = [cell for row in rows if (cell := row.cells.get(metric))]
    if metric == "parameters_drift" and not any(cell.summary and cell.summary.mean for cell in cells):
        return False  # no model here has such a network
    return any(cell.summary or not cell.status.startswith(("not defined", "not asked")) for cell in cells)


def _key_text(name: str, row: Row) -> str:
    value = row.keys.get(name)
    if name == "variant":
        return str(value) if row.kind == "run" else f"{value} (reference)"
    if name == "images":
        return BLANK if value in (None, "") else f"{int(value):,}"
    if name == "steps":
        return {"0": "adaptive", "": BLANK, "None": BLANK}.get(str(value), str(value))
    return str(value if value not in (None, "") else BLANK)


def _notes(rows: Sequence[Row], names: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """What cells left out, said once for a variant where it holds in all its rows; the remarks on references."""
    left_out: dict[tuple[str, str], dict[str, list[str]]] = {}
    notes = []
    for row in rows:
        if row.kind == "reference":
            notes += [f"{row.keys['variant']}: {row.extra['note']}."] if row.extra.get("note") else []
            continue
        where = ", ".join(_key_text(name, row) for name in names if name != "variant")
        for metric in metrics:
            cell = row.cells.get(metric)
            if cell and cell.summary and cell.status != OK:
                left_out.setdefault((row.keys["variant"], cell.status), {}).setdefault(heading(metric), []).append(
                    where
                )
    for (variant, status), columns in left_out.items():
        of_variant = sum(row.keys["variant"] == variant for row in rows)
        everywhere = all(len(places) == of_variant for places in columns.values())
        places = list(dict.fromkeys(place for found in columns.values() for place in found))
        said = [] if everywhere else [" / ".join(places)]
        said += [] if len(columns) == len(metrics) else [", ".join(columns)]
        notes.append(f"{variant} ({'; '.join(said)}): {status}." if said else f"{variant}: {status}.")
    return notes


def _published_likelihoods(name: str, rows: list[Row], caption: str) -> View:
    values = {
        "published_nelbo": "NELBO",
        "published_nll": "NLL",
        "published_gap": "gap",
        "published_bpd": "bits/dim, bound not stated",
    }
    columns = ["model", "data set", *values.values(), "detail", "source", "trust"]
    view = View(
        name, "published", caption, columns, [], words=frozenset(("model", "data set", "detail", "source", "trust"))
    )
    for row in rows:
        texts = [plain(value) if (value := finite(row.extra.get(column))) is not None else None for column in values]
        texts = [text or (BLANK if column == "published_bpd" else ABSENT) for text, column in zip(texts, values)]
        view.rows.append([row.keys["variant"], row.keys["dataset"], *texts, *_said(row)])
    return view


def _published_steps(name: str, rows: list[Row], caption: str) -> View:
    columns = ["model", "data set", "steps", "FID", "detail", "source", "trust"]
    view = View(name, "published", caption, columns, [], words=frozenset(columns) - {"steps", "FID"})
    for row in rows:
        value = finite(row.extra.get("published_fid"))
        text = ABSENT if value is None else plain(value)
        view.rows.append([row.keys["variant"], row.keys["dataset"], _key_text("steps", row), text, *_said(row)])
    return view


def _said(row: Row) -> list[str]:
    detail = "; ".join(str(row.extra[name]) for name in ("detail", "note") if row.extra.get(name))
    return [detail or BLANK, *(str(row.extra.get(name) or BLANK) for name in ("source", "trust"))]


def markdown(title: str, made: Sequence[View], empty: str = "") -> str:
    """A document of one section a view; the words of ``empty`` where there is none."""
    blocks = [f"# {title}", *([empty] if empty and not made else [])]
    for view in made:
        blocks.append(f"## {'Published numbers' if view.dataset == 'published' else escape_cell(view.dataset)}")
        if view.caption:
            blocks.append(escape_cell(view.caption))
        align = ["---" if column in view.words else "---:" for column in view.columns]
        lines = [view.columns, align, *view.rows]
        blocks.append("\n".join("| " + " | ".join(map(escape_cell, line)) + " |" for line in lines))
        if view.notes:
            blocks.append("\n".join(f"- {escape_cell(note)}" for note in view.notes))
    return "\n\n".join(blocks) + "\n"


def escape_cell(text: Any) -> str:
    """Text that Markdown shows as it is: no cell ends early, no tag, link or emphasis begins."""
    text = " ".join(str(text).split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "|*`[]":
        text = text.replace(character, f"\\{character}")
    return text
