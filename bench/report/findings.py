"""Findings counted: how often each verdict was reached, and a headline a claim, from the records of summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bench.statistics import CONTRADICTED, INCONCLUSIVE, NOT_MEASURED, SUPPORTED

VERDICTS = (SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_MEASURED)


def score(findings: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many findings had each verdict; verdicts of none are left out."""
    counts = Counter(finding["verdict"] for finding in findings)
    return {name: counts[name] for name in VERDICTS if counts[name]}


def headline(findings: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on a claim over all suites: how its comparisons came out, or why there are none."""
    counts = score(findings)
    measured = sum(counts.values()) - counts.get(NOT_MEASURED, 0)
    if not measured:
        reasons = Counter(finding["note"] for finding in findings if finding["note"])
        return f"Not measured: {reasons.most_common(1)[0][0]}." if reasons else "Not measured."
    supported, contradicted, open_ = (counts.get(name, 0) for name in VERDICTS[:3])
    of = f"Of {measured} comparison{'' if measured == 1 else 's'}"
    said = f"{of} {supported} support{'s' if supported == 1 else ''} it, {contradicted} contradict"
    said += f"{'s' if contradicted == 1 else ''} it and {open_} stay{'s' if open_ == 1 else ''} open"
    alone = Counter(finding["verdict_alone"] for finding in findings if finding["verdict"] == INCONCLUSIVE)
    sides = [f"{alone[name]} {word}" for name, word in ((SUPPORTED, "for"), (CONTRADICTED, "against")) if alone[name]]
    return f"{said} ({' and '.join(sides)} it by the interval alone)." if sides else f"{said}."
