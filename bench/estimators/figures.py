"""Standard error against work, one figure a table."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.files import write_bytes_atomic
from bench.report.figures import COLOURS

Rows = Sequence[Mapping[str, Any]]
DPI = 70
HUES = list(COLOURS.values())
# the closed form that is shown beside the trained networks
SHOWN = "gaussian-16 vp"
DASHES = {"stratified": "-", "independent": "--"}


def draw_all(tables: Mapping[str, Rows], folder: Path) -> list[str]:
    """Write time_sampling.png, trace.png and series.png from the tables' rows; returns the names written."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn

    seaborn.set_theme(style="whitegrid", context="notebook", rc={"axes.edgecolor": "0.6", "grid.color": "0.9"})
    makers: dict[str, Callable[[Any, Rows], None]] = {
        "time_sampling": _time_sampling,
        "trace": _trace,
        "series": _series,
    }
    labels = {
        "time_sampling": ("network evaluations an image", "standard error (nats/dim)"),
        "trace": ("network evaluations and products an image", "standard deviation (nats/dim)"),
        "series": ("products a block", "standard deviation (nats/dim)"),
    }
    for name, rows in tables.items():
        _figure(makers[name], rows, labels[name], folder / f"{name}.png")
    return [f"{name}.png" for name in tables]


def _figure(draw: Callable[[Any, Rows], None], rows: Rows, labels: tuple[str, str], path: Path) -> None:
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["status"] == "ok"]
    names = [n for n in dict.fromkeys(row["problem"] for row in rows) if not n.startswith("gaussian") or n == SHOWN]
    size = (4.6 * len(names) + 0.4, 5.0)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for name, axis in zip(names, axes.flat, strict=True):
        draw(axis, [row for row in rows if row["problem"] == name])
        axis.set(xscale="log", yscale="log", title=name, xlabel=labels[0])
        _ticks(axis.xaxis)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axes.flat[0].set_ylabel(labels[1])
    columns = min(5, len(handles))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI, format="png", metadata={"Software": None})
    plt.close(figure)
    write_bytes_atomic(path, stream.getvalue())


def _line(axis: Any, rows: Rows, x: str, y: str, **style: Any) -> None:
    # zero has no place on a logarithmic axis
    points = sorted((row[x], row[y]) for row in rows if row[x] > 0 and row[y] > 0)
    if points:
        axis.plot(*zip(*points, strict=True), linewidth=1.7, markersize=5, **style)


def _ticks(axis: Any) -> None:
    """Written-out ticks at 1, 2 and 5 on an axis of few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _key(axis: Any, name: str, **style: Any) -> None:
    """An entry of the legend for one trait of several lines."""
    axis.plot([], [], label=name, **style)


def _groups(rows: Rows, *names: str) -> dict[tuple, list[Mapping[str, Any]]]:
    found: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _time_sampling(axis: Any, rows: Rows) -> None:
    hues = dict(zip(dict.fromkeys(row["proposal"] for row in rows), HUES))
    for (proposal, draws, control), own in _groups(rows, "proposal", "draws", "control_variate").items():
        style = {"color": hues[proposal], "linestyle": DASHES[draws]}
        style |= {"marker": "o" if control else "x", "alpha": 1.0 if control else 0.5}
        _line(axis, own, "evaluations", "se_integral", **style)
    for proposal, colour in hues.items():
        _key(axis, proposal, color=colour)
    for draws, dash in DASHES.items():
        _key(axis, draws, color="0.3", linestyle=dash)
    _key(axis, "control variate", color="0.3", marker="o", linestyle="")
    _key(axis, "no control variate", color="0.3", marker="x", linestyle="", alpha=0.5)
    floor = rows[0]["se_residual"]
    # far below all that is drawn it would only stretch the axis
    if floor > 0.3 * min(row["se_integral"] for row in rows):
        axis.axhline(floor, color="0.3", linestyle=":", label="the residual at eps, any option")


def _trace(axis: Any, rows: Rows) -> None:
    for ((kind,), own), colour, marker in zip(_groups(rows, "probe_kind").items(), HUES, "os^D"):
        if kind == "exact":
            axis.axvline(own[0]["evaluations"], color="0.3", linestyle=":", label="exact trace: no spread")
        else:
            _line(axis, own, "evaluations", "sd", color=colour, marker=marker, label=kind)


def _series(axis: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["roulette"] != "exact"]
    hues = dict(zip(dict.fromkeys(row["roulette"] for row in rows if row["roulette"] != "none"), HUES))
    for (roulette, probes), own in _groups(rows, "roulette", "probes").items():
        if roulette != "none":
            dash = "-" if probes == "rademacher" else "--"
            _line(axis, own, "products", "sd", marker="o", color=hues[roulette], linestyle=dash)
        elif probes == "rademacher":  # the bias belongs to the terms left out, not to the probe
            sure = [row | {"size": abs(row["bias"])} for row in own if abs(row["bias"]) > 3 * row["bias_se"]]
            _line(axis, sure, "products", "size", color="0.3", linestyle=":")
    for roulette, colour in hues.items():
        _key(axis, roulette, color=colour)
    _key(axis, "rademacher", color="0.3")
    _key(axis, "gaussian", color="0.3", linestyle="--")
    _key(axis, "abs(bias) of plain truncation", color="0.3", linestyle=":")
