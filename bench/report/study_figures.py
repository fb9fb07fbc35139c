"""Figures of the studies, from their tables' rows, in the colours and with the intervals of the other figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.cells import Row, Table
from bench.report.display import SAMPLERS, label
from bench.report.figures import colour, draw_series, line_style, make_panels, save_figure
from bench.statistics import Summary

SOFT = "0.45"
# what is drawn on one panel at most: beyond it, the table is easier to read
ROWS = 40


def draw_studies(tables: Mapping[str, Table], folder: Path, variants: Sequence[str]) -> list[str]:
    """Write the figures that have data into ``folder``; returns the names written. ``variants`` fix the colours."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn

    seaborn.set_theme(style="whitegrid", context="notebook", rc={"axes.edgecolor": "0.6", "grid.color": "0.9"})
    made = {}
    if "gap_split" in tables:
        made["gap_split.png"] = _split(tables["gap_split"].rows, variants)
    if "discretisation" in tables:
        rows = [row for row in tables["discretisation"].rows if _summary(row, "tv") and row.keys["steps"]]
        samplers = list(dict.fromkeys(row.keys["sampler"] for row in rows))
        for sampler in samplers:
            name = "discretisation.png" if len(samplers) == 1 else f"discretisation_{sampler}.png"
            own = [row for row in rows if row.keys["sampler"] == sampler]
            made[name] = _terms(own, variants, SAMPLERS.get(sampler, sampler))
    if "conventions" in tables:
        made["conventions.png"] = _rulers(tables["conventions"].rows, variants)
    written = []
    for name, figure in made.items():
        if figure is not None:
            save_figure(figure, folder / name)
            written.append(name)
    return written


def _summary(row: Row, name: str) -> Summary | None:
    cell = row.cells.get(name)
    return cell.summary if cell else None


def _whisker(axis: Any, summary: Summary, y: float, hue: str, **style: Any) -> None:
    axis.errorbar(summary.mean, y, xerr=summary.half or 0.0, color=hue, capsize=2.5, elinewidth=1.4, **style)


def _split(rows: Sequence[Row], variants: Sequence[str]) -> Any:
    """The gap as a bar, its two parts as points with intervals, one panel a data set."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in rows if _summary(row, "gap")]
    if not rows:
        return None
    datasets = list(dict.fromkeys(row.keys["dataset"] for row in rows))
    present = [variant for variant in variants if any(row.keys["variant"] == variant for row in rows)]
    figure, panels = make_panels(datasets, height=0.55 * len(present) + 1.5, share_x=False)
    for place, (dataset, axis) in enumerate(panels.items()):
        own = {row.keys["variant"]: row for row in rows if row.keys["dataset"] == dataset}
        axis.axvline(0, color="0.35", linewidth=1)
        for y, variant in enumerate(reversed(present)):
            if variant not in own:
                continue
            hue, row = colour(variant, variants), own[variant]
            gap, bound, ode = (_summary(row, name) for name in ("gap", "variational", "sde_to_ode"))
            axis.barh(y, gap.mean, height=0.62, color=hue, alpha=0.22, linewidth=0)
            _whisker(axis, gap, y, hue, fmt="none", alpha=0.45)
            _whisker(axis, bound, y + 0.2, hue, fmt="o", markersize=6)
            _whisker(axis, ode, y - 0.2, hue, fmt="s", markersize=5.5, markerfacecolor="white")
        axis.set(title=dataset, xlabel="nats", ylim=(-0.6, len(present) - 0.4))
        names = [label(variant) for variant in reversed(present)]
        axis.set_yticks(range(len(present)), names if place % 3 == 0 else [])
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="y", visible=False)
    handles = [
        Line2D([], [], color=SOFT, marker="o", label="variational: NELBO − NLL of the SDE"),
        Line2D([], [], color=SOFT, marker="s", markerfacecolor="white", label="SDE to ODE: NLL of SDE − NLL of ODE"),
        Patch(color=SOFT, alpha=0.3, label="gap: their sum"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(datasets) > 1 else 1, frameon=False)
    return figure


def _terms(rows: Sequence[Row], variants: Sequence[str], sampler: str) -> Any:
    """Above TV, bound and floor, below the three terms, against the number of steps; one column a data set."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    if len({row.keys["steps"] for row in rows}) < 2:
        return None  # one point: the table says it all
    datasets = list(dict.fromkeys(row.keys["dataset"] for row in rows))
    present = [variant for variant in variants if any(row.keys["variant"] == variant for row in rows)]
    size = (4.4 * len(datasets) if len(datasets) > 1 else 6.4, 6.6)
    figure, axes = plt.subplots(2, len(datasets), figsize=size, squeeze=False, layout="constrained", sharex=True)
    lines = (({"tv": "-", "bound": "--"}), {"discretisation": "-", "estimation": ":", "prior": "-."})
    for place, dataset in enumerate(datasets):
        own = [row for row in rows if row.keys["dataset"] == dataset]
        for variant in present:
            mine = sorted((r for r in own if r.keys["variant"] == variant), key=lambda row: int(row.keys["steps"]))
            marker = line_style(variant, variants)["marker"]
            for axis, styles in zip(axes[:, place], lines):
                for name, dash in styles.items():
                    points = [(int(row.keys["steps"]), found) for row in mine if (found := _summary(row, name))]
                    if points:
                        style = {"color": colour(variant, variants), "linestyle": dash, "marker": marker}
                        draw_series(axis, points, style, None)
        floors: dict[int, list[float]] = {}
        for row in own:
            if found := _summary(row, "floor"):
                floors.setdefault(int(row.keys["steps"]), []).append(found.mean)
        if floors:
            counts = sorted(floors)
            axes[0, place].plot(counts, [sum(floors[c]) / len(floors[c]) for c in counts], color="0.6", linewidth=3)
        axes[0, place].set(title=dataset, ylabel="TV" if place == 0 else "", xscale="log")
        axes[1, place].set(xlabel=f"steps of {sampler}", ylabel="term" if place == 0 else "", xscale="log")
        ticks = sorted({int(row.keys["steps"]) for row in own})
        for axis in axes[:, place]:
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    handles = [
        Line2D([], [], color=colour(name, variants), marker=line_style(name, variants)["marker"], label=label(name))
        for name in present
    ]
    dashes = (("-", "TV; discretisation"), ("--", "bound"), (":", "estimation"), ("-.", "prior"))
    handles += [Line2D([], [], color=SOFT, linestyle=dash, label=name) for dash, name in dashes]
    handles += [Line2D([], [], color="0.6", linewidth=3, label="TV of equal laws")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, 2 * len(datasets)), frameon=False)
    return figure


def _rulers(rows: Sequence[Row], variants: Sequence[str]) -> Any:
    """A forest of differences: one row of panels a unit, one column a data set, one line a convention and quantity."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    rows = [row for row in rows if _summary(row, "difference")]
    if not rows:
        return None
    datasets = list(dict.fromkeys(row.keys["dataset"] for row in rows))
    present = [variant for variant in variants if any(row.keys["variant"] == variant for row in rows)]
    lines = {
        units: list(dict.fromkeys(_line(row) for row in rows if row.extra["units"] == units))[:ROWS]
        for units in dict.fromkeys(row.extra["units"] for row in rows)
    }
    heights = [len(names) * (0.075 * len(present) + 0.12) + 0.9 for names in lines.values()]
    figure, axes = plt.subplots(
        len(lines),
        len(datasets),
        figsize=(3.6 * len(datasets) + 2.6, sum(heights) + 0.7),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for depth, (panels, (units, names)) in enumerate(zip(axes, lines.items())):
        places = {name: len(names) - 1 - y for y, name in enumerate(names)}
        for place, (axis, dataset) in enumerate(zip(panels, datasets)):
            own = [row for row in rows if row.extra["units"] == units and row.keys["dataset"] == dataset]
            axis.axvline(0, color="0.35", linewidth=1)
            for row in own:
                if _line(row) not in places:
                    continue
                shift = 0.36 - 0.72 * (present.index(row.keys["variant"]) + 0.5) / len(present)
                y, hue = places[_line(row)] + shift, colour(row.keys["variant"], variants)
                _whisker(axis, _summary(row, "difference"), y, hue, fmt="o", markersize=4)
                if closed := _summary(row, "closed_form"):
                    axis.plot(closed.mean, y, "x", color="0.15", markersize=4.5, markeredgewidth=1, zorder=3)
            axis.set_xscale("symlog", linthresh=_threshold([_summary(row, "difference").mean for row in own]))
            axis.set(xlabel=f"difference ({units})", ylim=(-0.6, len(names) - 0.4))
            axis.set_yticks(range(len(names)), reversed(names) if place == 0 else [])
            axis.tick_params(axis="both", labelsize=9)
            axis.grid(axis="y", visible=False)
            _few_ticks(axis)
            if depth == 0:
                axis.set_title(dataset)
            for boundary in range(1, len(names)):
                axis.axhline(boundary - 0.5, color="0.92", linewidth=0.8, zorder=0)
    handles = [Line2D([], [], color=colour(name, variants), marker="o", label=label(name)) for name in present]
    handles += [Line2D([], [], color="0.15", marker="x", linestyle="none", label="closed form")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _line(row: Row) -> str:
    return f"{row.keys['convention']}: {row.keys['quantity']}"


def _threshold(values: Sequence[float]) -> float:
    """Half-width of the linear part of a symlog axis: the decade of the smallest value, or three below the largest."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 1.0
    return 10.0 ** max(math.floor(math.log10(min(sizes))), math.floor(math.log10(max(sizes))) - 3)


def _few_ticks(axis: Any) -> None:
    """Decades of a symlog axis, few enough to be read."""
    from matplotlib.ticker import FuncFormatter

    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    while len(ticks) > 5:
        ticks = (
            [tick for place, tick in enumerate(ticks) if (place - ticks.index(0.0)) % 2 == 0]
            if 0.0 in ticks
            else ticks[::2]
        )
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−").replace("e−0", "e−")))
