"""Figures from the tables' rows: what a table refuses, no figure shows. One hue a family, safe for the colour-blind."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import write_bytes_atomic
from bench.report.cells import Row, Table
from bench.report.display import heading, label
from bench.report.references import family

# Okabe and Ito's palette: distinct in the common forms of colour blindness
COLOURS = {
    "indm": "#D55E00",
    "ddpmpp": "#0072B2",
    "ncsnpp": "#009E73",
    "diffflow": "#CC79A7",
    "ddpm": "#56B4E9",
    "ncsn": "#E69F00",
    "sbp": "#8C6D1F",
    "scoreflow": "#5A4FCF",
    "sdeflow": "#000000",
}
OTHER = "#555555"
DASHES = ("-", "--", ":", "-.")
# towards black (0) or white (1), by this share
SHADES = ((0, 0.0), (1, 0.4), (0, 0.45))
MEMBERS = {"ddpmpp-vp": 0, "ncsnpp-ve": 0, "indm-vp-nll": 0, "indm-vp-fid": 1, "indm-ve": 2}
AXES = {"images": "images seen", "flops": "training, FLOPs", "train_seconds": "training, seconds"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 130


def _member(variant: str, variants: Sequence[str]) -> int:
    """Place of a variant in its family: fixed for the known ones, after them in the order of the suite."""
    if variant in MEMBERS:
        return MEMBERS[variant]
    others = [name for name in variants if family(name) == family(variant) and name not in MEMBERS]
    known = sum(family(name) == family(variant) for name in MEMBERS)
    return known + others.index(variant)


def colour(variant: str, variants: Sequence[str]) -> str:
    """The hue of a variant's family, in the variant's own shade."""
    from matplotlib.colors import to_hex, to_rgb

    base = to_rgb(COLOURS.get(family(variant) or "", OTHER))
    target, share = SHADES[_member(variant, variants) % len(SHADES)]
    return to_hex([share * target + (1 - share) * part for part in base])


def line_style(variant: str, variants: Sequence[str]) -> dict[str, Any]:
    """Colour by family; shade, dash and marker tell the members of a family apart."""
    place = _member(variant, variants)
    return {
        "color": colour(variant, variants),
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def draw_all(tables: Mapping[str, Table], quality: Mapping[str, str], folder: Path) -> list[str]:
    """Write every figure that has data into ``folder``; returns the names written."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn

    seaborn.set_theme(style="whitegrid", context="notebook", rc={"axes.edgecolor": "0.6", "grid.color": "0.9"})
    runs = {name: [row for row in table.rows if row.kind == "run"] for name, table in tables.items()}
    variants = list(dict.fromkeys(row.keys["variant"] for row in runs["costs"]))
    made = {
        "learning_curve.png": _learning_curve(runs["learning_curve"], variants, "images"),
        "learning_curve_flops.png": _learning_curve(runs["learning_curve"], variants, "flops"),
        "learning_curve_seconds.png": _learning_curve(runs["learning_curve"], variants, "train_seconds"),
        "gap.png": _gap(tables["nll_nelbo_gap"].rows, variants),
    }
    for sampler in dict.fromkeys(row.keys["sampler"] for row in runs["step_robustness"] if row.keys["sampler"]):
        rows = [row for row in runs["step_robustness"] if row.keys["sampler"] == sampler]
        made[f"robustness_{sampler}.png"] = _robustness(rows, variants, quality)
    made["costs.png"] = _costs(runs["costs"], runs["nll_nelbo_gap"], variants)
    written = []
    for name, figure in made.items():
        if figure is not None:
            save_figure(figure, folder / name)
            written.append(name)
    return written


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    stream = io.BytesIO()
    # no version or date in the file: the same tables give the same bytes
    figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)
    write_bytes_atomic(path, stream.getvalue())


def make_panels(names: Sequence[str], width: float = 5.2, height: float = 3.9, share_x: bool = True):
    from matplotlib import pyplot as plt

    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (width * columns if len(names) > 1 else 7.0, height * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=share_x)
    panels = dict(zip(names, axes.flat))
    for unused in axes.flat[len(names) :]:
        unused.set_visible(False)
    return figure, panels


def draw_series(axis: Any, points: Sequence[tuple[float, Any]], style: Mapping[str, Any], name: str | None) -> None:
    """One line with its band of 95 % t intervals; points of fewer than three seeds get none.

    Two seeds have t = 12.7: their bands would cover every other line. The tables keep the interval.
    """
    import seaborn

    x, summaries = zip(*points)
    means = [summary.mean for summary in summaries]
    seaborn.lineplot(
        x=list(x),
        y=means,
        ax=axis,
        label=name,
        legend=False,
        errorbar=None,
        markersize=5,
        linewidth=1.8,
        markeredgewidth=0,
        **style,
    )
    banded = [summary.low is not None and summary.n > 2 for summary in summaries]
    low = [summary.low if band else summary.mean for summary, band in zip(summaries, banded)]
    high = [summary.high if band else summary.mean for summary, band in zip(summaries, banded)]
    axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _log_ticks(axis: Any) -> None:
    """Ticks written out, enough of them on an axis that spans less than a decade; call once the limits are set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    wide = low > 0 and high / low > 4
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12) if wide else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    columns = min(5 if len(axes) > 1 else 3, len(handles))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def _learning_curve(rows: Sequence[Row], variants: Sequence[str], against: str) -> Any:
    """NELBO against images seen, or against the mean over seeds of the arithmetic or the time that they took."""

    def position(row: Row) -> float | None:
        if against == "images":
            return row.keys["images"]
        summary = row.cells[against].summary
        return summary.mean if summary and summary.mean > 0 else None

    rows = [row for row in rows if row.keys["images"] and row.cells["nelbo"].summary and position(row)]
    if not rows:
        return None
    datasets = list(dict.fromkeys(row.keys["dataset"] for row in rows))
    figure, panels = make_panels(datasets, share_x=against == "images")
    for dataset, axis in panels.items():
        own = [row for row in rows if row.keys["dataset"] == dataset]
        for variant in variants:
            points = [(position(row), row.cells["nelbo"].summary) for row in own if row.keys["variant"] == variant]
            if points:
                draw_series(axis, points, line_style(variant, variants), label(variant))
        unit = own[0].extra.get("units")
        axis.set(xscale="log", xlabel=AXES[against], ylabel=f"test NELBO ({unit})", title=dataset)
        _log_ticks(axis.xaxis)
        _crop(axis, own)
    _legend(figure, list(panels.values()))
    return figure


def _crop(axis: Any, rows: Sequence[Row]) -> None:
    """Leave out the fall from the untrained network, which would press all curves flat."""
    last: dict[str, float] = {}
    for row in rows:
        last[row.keys["variant"]] = max(row.keys["images"], last.get(row.keys["variant"], 0))
    # each variant against its own budget
    late = [row.cells["nelbo"].summary for row in rows if row.keys["images"] >= 0.08 * last[row.keys["variant"]]]
    low, high = min(s.mean for s in late), max(s.mean for s in late)
    reach = max(high - low, 1e-3 * max(1.0, abs(high)))
    top = max(row.cells["nelbo"].summary.mean for row in rows)
    if top > high + 2 * reach:
        axis.set_ylim(low - 0.25 * reach, high + 0.75 * reach)
        axis.text(
            0.985, 0.97, "axis cut above", transform=axis.transAxes, ha="right", va="top", fontsize=9, color="0.45"
        )


def _gap(rows: Sequence[Row], variants: Sequence[str]) -> Any:
    rows = [row for row in rows if row.kind == "run"]
    shown = ("gap_corrected", "gap_uncorrected")
    rows = [row for row in rows if any(row.cells[name].summary for name in shown)]
    if not rows:
        return None
    datasets = list(dict.fromkeys(row.keys["dataset"] for row in rows))
    present = [variant for variant in variants if any(row.keys["variant"] == variant for row in rows)]
    figure, panels = make_panels(datasets, height=0.42 * len(present) + 1.6, share_x=False)
    for place, (dataset, axis) in enumerate(panels.items()):
        own = {row.keys["variant"]: row for row in rows if row.keys["dataset"] == dataset}
        axis.axvline(0, color="0.35", linewidth=1)
        for y, variant in enumerate(present):
            for name, shift, filled in zip(shown, (0.14, -0.14), (True, False)):
                cell = own[variant].cells[name] if variant in own else None
                if cell is None or cell.summary is None:
                    continue
                half = cell.summary.half or 0.0
                axis.errorbar(
                    cell.summary.mean,
                    len(present) - 1 - y + shift,
                    xerr=half,
                    fmt="o",
                    color=colour(variant, variants),
                    capsize=3,
                    markersize=6,
                    markerfacecolor=None if filled else "white",
                    elinewidth=1.6 if filled else 1.0,
                    label="after correction" if filled else "before correction",
                )
                axis.plot(
                    list(cell.values.values()),
                    [len(present) - 1 - y + shift] * len(cell.values),
                    "|",
                    color=colour(variant, variants),
                    alpha=0.6,
                    markersize=9,
                )
        units = next(iter(own.values())).extra.get("units")
        axis.set(title=dataset, xlabel=f"NELBO − NLL ({units})", ylim=(-0.6, len(present) - 0.4))
        axis.set_yticks(
            range(len(present)), [label(variant) for variant in reversed(present)] if place % 3 == 0 else []
        )
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="y", visible=False)
    return figure


def _robustness(rows: Sequence[Row], variants: Sequence[str], quality: Mapping[str, str]) -> Any:
    rows = [row for row in rows if (metric := quality.get(row.keys["dataset"])) and row.cells[metric].summary]
    steps: dict[str, set[int]] = {}
    for row in rows:
        steps.setdefault(row.keys["dataset"], set()).add(row.keys["steps"] or 0)
    datasets = [name for name, counts in steps.items() if len(counts) > 1]
    if not datasets:
        return None  # one point, as an adaptive sampler has: the table says it all
    figure, panels = make_panels(datasets, share_x=False)
    for dataset, axis in panels.items():
        metric = quality[dataset]
        own = [row for row in rows if row.keys["dataset"] == dataset and row.keys["steps"]]
        for variant in variants:
            points = sorted(
                ((row.keys["steps"], row.cells[metric].summary) for row in own if row.keys["variant"] == variant),
                key=lambda point: point[0],
            )
            if points:
                draw_series(axis, points, line_style(variant, variants), label(variant))
        positive = all(row.cells[metric].summary.mean > 0 for row in own)
        axis.set(
            xscale="log", yscale="log" if positive else "linear", xlabel="steps", ylabel=heading(metric), title=dataset
        )
        ticks = sorted({row.keys["steps"] for row in own})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        if positive:
            _floor(axis, [row.cells[metric].summary.mean for row in own])
            _log_ticks(axis.yaxis)
    _legend(figure, list(panels.values()))
    return figure


def _floor(axis: Any, means: Sequence[float]) -> None:
    """Keep a band whose lower end is negative from stretching a logarithmic axis without end."""
    axis.set_ylim(max(axis.get_ylim()[0], min(means) / 3), min(axis.get_ylim()[1], max(means) * 3))


def _costs(rows: Sequence[Row], likelihood: Sequence[Row], variants: Sequence[str]) -> Any:
    """Test NLL against training time: what a variant's numbers cost."""
    nll = {(row.keys["dataset"], row.keys["variant"]): row.cells["nll_corrected"].summary for row in likelihood}
    units = {row.keys["dataset"]: row.extra.get("units") for row in likelihood}
    points = []
    for row in rows:
        key = (row.keys["dataset"], row.keys["variant"])
        if nll.get(key) and row.cells["train_seconds"].summary:
            points.append((*key, row.cells["train_seconds"].summary, nll[key]))
    if not points:
        return None
    datasets = list(dict.fromkeys(point[0] for point in points))
    figure, panels = make_panels(datasets, share_x=False)
    for dataset, axis in panels.items():
        for _, variant, seconds, value in (point for point in points if point[0] == dataset):
            style = line_style(variant, variants) | {"linestyle": "none"}
            axis.errorbar(
                seconds.mean,
                value.mean,
                xerr=seconds.half or 0.0,
                yerr=value.half or 0.0,
                capsize=3,
                markersize=7,
                label=label(variant),
                **style,
            )
        axis.set(xlabel="training, seconds", ylabel=f"test NLL ({units[dataset]})", title=dataset)
        axis.set_xlim(left=0)
    _legend(figure, list(panels.values()))
    return figure
