"""Intervals drawn about zero, as small inline vector pictures that follow the page's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 240, 22


def forest(findings: Sequence[Mapping[str, Any]], side: str) -> list[Any]:
    """One picture a finding (markup, empty where nothing was measured), on one scale for findings of one unit.

    The half of the picture on the ``side`` that the claim expects is shaded. An interval that leaves the picture ends
    in an arrow, so that one wide interval does not hide the others.
    """
    from markupsafe import Markup

    scales: dict[tuple[str, str], float] = {}
    for key in {_key(finding) for finding in findings}:
        measured = [f for f in findings if _key(f) == key and f["mean"] is not None]
        reach = max((abs(f["mean"]) for f in measured), default=0.0)
        half = max((min(_half(f), 2 * reach) if reach else _half(f) for f in measured), default=0.0)
        scales[key] = 1.1 * (reach + half) or 1.0
    return [
        _draw(finding, scales[_key(finding)], side) if finding["mean"] is not None else Markup("")
        for finding in findings
    ]


def _key(finding: Mapping[str, Any]) -> tuple[str, str]:
    # distances of different data sets and samplers have scales of their own
    return (finding["units"], "" if finding["units"] else f"{finding['dataset']} {finding['sampler']}")


def _half(finding: Mapping[str, Any]) -> float:
    return 0.0 if finding["low"] is None else (finding["high"] - finding["low"]) / 2


def _draw(finding: Mapping[str, Any], scale: float, side: str) -> Any:
    from markupsafe import Markup

    middle, y = WIDTH / 2, HEIGHT / 2

    def x(value: float) -> float:
        return round(middle + value / scale * middle, 1)

    shade = 0 if side == "negative" else middle
    low, high = (finding["mean"], finding["mean"]) if finding["low"] is None else (finding["low"], finding["high"])
    left, right = max(x(low), 1.0), min(x(high), WIDTH - 1.0)
    marks = ""
    for end, cut, out in ((left, x(low) < 1, -1), (right, x(high) > WIDTH - 1, 1)):
        tip = f"M{end - 5 * out:.1f} {y - 4} L{end:.1f} {y} L{end - 5 * out:.1f} {y + 4}"
        marks += f'<path d="{tip if cut else f"M{end:.1f} {y - 4} V{y + 4}"}"/>'
    words = f"difference {finding['mean']:.3g}"
    if finding["low"] is not None:
        words += f", 95 % interval {finding['low']:.3g} to {finding['high']:.3g}"
    kind = finding["verdict"].replace(" ", "-")
    # only numbers and one of four known words enter the markup
    return Markup(
        f'<svg class="forest {kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f'<rect class="frame" width="{WIDTH}" height="{HEIGHT}" rx="3"/>'
        f'<rect class="side" x="{shade}" y="0" width="{middle}" height="{HEIGHT}"/>'
        f'<path class="zero" d="M{middle} 0 V{HEIGHT}"/>'
        f'<g class="bar"><path d="M{left} {y} H{right}"/>{marks}</g>'
        f'<circle cx="{min(max(x(finding["mean"]), 4), WIDTH - 4)}" cy="{y}" r="4"/></svg>'
    )
