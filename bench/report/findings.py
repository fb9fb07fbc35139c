"""What the tables say, in words: INDM against its linear counterpart, paired by seed, with interval and verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.report.cells import Row, Table
from bench.report.display import SAMPLERS, interval, label, number
from bench.statistics import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_MEASURED,
    SUPPORTED,
    PairedDifference,
    paired_difference,
    verdict,
)

# the nonlinear diffusion and the linear one it grew from: same SDE, same score network
PAIRS = (("indm-vp-nll", "ddpmpp-vp"), ("indm-vp-fid", "ddpmpp-vp"), ("indm-ve", "ncsnpp-ve"))

NO_ROW = "no such row"
# seed -> number, or why there is none
Values = Mapping[int, float] | str


@dataclass(frozen=True)
class Claim:
    """One claim as this report decides it: the statistic is INDM minus its linear counterpart, paired by seed."""

    id: str
    title: str
    statement: str
    statistic: str
    side: str  # where the claim expects the difference


CLAIMS = (
    Claim(
        "better-nll",
        "Better likelihood",
        "INDM reaches a lower NLL at equal budget.",
        "test NLL at the end of training, corrected",
        "negative",
    ),
    Claim(
        "mle-training",
        "Nearly maximum likelihood",
        "INDM training is nearly maximum likelihood: NELBO and NLL almost coincide, unlike the linear diffusion's.",
        "|NELBO − NLL| at the end of training, corrected",
        "negative",
    ),
    Claim(
        "fast-training",
        "Faster training",
        "The learning curve of INDM lies under that of its linear counterpart.",
        "mean height of the test NELBO over log(images), the first 10 % of training left out",
        "negative",
    ),
    Claim(
        "robust-sampling",
        "Robust against few steps",
        "The sample quality of INDM is robust on the number of discretisation steps.",
        "slope of log(distance to the data) against log(steps), below the largest step count",
        "positive",
    ),
    Claim(
        "sample-quality",
        "Better samples",
        "INDM's samples are closer to the data at the largest step count (asked by this report; the paper claims it on "
        "its own data sets).",
        "distance of the samples to the data at the largest step count",
        "negative",
    ),
)
DISTANCES = {"fd": "FD", "energy": "energy distance", "sliced_wasserstein": "sliced Wasserstein distance"}


@dataclass(frozen=True)
class Question:
    """One comparison to make: a claim on one data set, with what is measured and how it is said."""

    claim: Claim
    noun: str
    units: str
    below: str  # sentence where INDM's value is the lower one; {ours}, {theirs}, {size}
    above: str
    values: Callable[[str], Values]
    sampler: str = ""


@dataclass(frozen=True)
class Finding:
    """One paired comparison on one data set; ``mean`` with its interval is INDM minus its linear counterpart."""

    dataset: str
    claim: str
    variant: str
    baseline: str
    sampler: str
    units: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    verdict: str
    sentence: str

    def record(self) -> dict[str, Any]:
        """Plain data for summary.json."""
        return asdict(self)


def find(tables: Mapping[str, Table], quality: Mapping[str, str]) -> list[Finding]:
    """Every claim for every pair and data set of the suite; ``quality`` maps a data set to its distance's column."""
    likelihood = [row for row in tables["nll_nelbo_gap"].rows if row.kind == "run"]
    findings = []
    for dataset in dict.fromkeys(row.keys["dataset"] for row in likelihood):
        own = [row for row in likelihood if row.keys["dataset"] == dataset]
        units = next((row.extra["units"] for row in own if row.extra.get("units")), "")
        present = {row.keys["variant"] for row in own}
        for question in _questions(tables, dataset, units, quality.get(dataset)):
            for variant, baseline in PAIRS:
                if {variant, baseline} <= present:
                    findings.append(_compare(dataset, question, variant, baseline, tables["step_robustness"]))
    return findings


def _questions(tables: Mapping[str, Table], dataset: str, units: str, metric: str | None) -> list[Question]:
    nll, gap, curve, slope, samples = CLAIMS
    mine = {
        name: [row for row in table.rows if row.keys["dataset"] == dataset and row.kind == "run"]
        for name, table in tables.items()
    }
    likelihood, steps = mine["nll_nelbo_gap"], mine["step_robustness"]
    said = "{ours}'s %s is {size} %s than {theirs}'s"
    asked = [
        Question(
            nll,
            "test NLL",
            units,
            said % ("test NLL", "lower"),
            said % ("test NLL", "higher"),
            lambda variant: _cell(likelihood, variant, "nll_corrected"),
        ),
        Question(
            gap,
            "the gap |NELBO − NLL|",
            units,
            said % ("gap |NELBO − NLL|", "smaller"),
            said % ("gap |NELBO − NLL|", "larger"),
            lambda variant: _absolute(_cell(likelihood, variant, "gap_corrected")),
        ),
        Question(
            curve,
            "the height of the learning curve",
            units,
            "{ours}'s learning curve lies {size} below {theirs}'s",
            "{ours}'s learning curve lies {size} above {theirs}'s",
            lambda variant: curve_height(mine["learning_curve"], variant),
        ),
    ]
    if metric is None:
        return asked
    distance = DISTANCES[metric]
    for sampler in dict.fromkeys(row.keys["sampler"] for row in steps):
        called = SAMPLERS.get(sampler, sampler)
        own = [row for row in steps if row.keys["sampler"] == sampler and row.keys["steps"]]
        if not own:
            continue  # adaptive, or no row at all
        most = max(row.keys["steps"] for row in own)
        last = [row for row in own if row.keys["steps"] == most]
        if len({row.keys["steps"] for row in own}) > 2:
            grows = (
                "With fewer steps of %s the %s of {ours}'s samples grows %s than that of {theirs}: "
                "the slopes of its logarithm against log(steps) differ by {size}"
            )
            asked.append(
                Question(
                    slope,
                    f"the slope of log({distance}) against log(steps) of {called}",
                    "",
                    grows % (called, distance, "faster"),
                    grows % (called, distance, "more slowly"),
                    lambda variant, own=own: step_slope(own, variant, metric),
                    sampler,
                )
            )
        at = "At %d steps of %s the %s of {ours}'s samples is {size} %s than that of {theirs}"
        asked.append(
            Question(
                samples,
                f"{distance} at {most} steps of {called}",
                "",
                at % (most, called, distance, "lower"),
                at % (most, called, distance, "higher"),
                lambda variant, last=last: _cell(last, variant, metric),
                sampler,
            )
        )
    return asked


def _compare(dataset: str, question: Question, variant: str, baseline: str, steps: Table) -> Finding:
    ours, theirs = (_explained(question.values(name), dataset, name, steps) for name in (variant, baseline))
    difference, reason = None, ""
    for name, values in ((variant, ours), (baseline, theirs)):
        if isinstance(values, str):
            reason = reason or f"{label(name)}: {values.removeprefix('not measured: ')}"
    if not reason and not set(ours) & set(theirs):
        reason = "The two share no seed"
    if not reason:
        difference = paired_difference(ours, theirs)
    decided = verdict(difference, question.claim.side)
    sentence = _sentence(question, variant, baseline, difference, decided, reason)
    numbers = (None,) * 3 if difference is None else (difference.mean, difference.low, difference.high)
    n, p = (0, None) if difference is None else (difference.n, difference.p)
    identity = (dataset, question.claim.id, variant, baseline, question.sampler, question.units)
    return Finding(*identity, *numbers, n, p, decided, sentence)


def _explained(values: Values, dataset: str, variant: str, steps: Table) -> Values:
    """A variant without any sampling has one row that tells why; one with other samplers has none at this point."""
    if values != NO_ROW:
        return values
    rows = [row for row in steps.rows if (row.keys["dataset"], row.keys["variant"]) == (dataset, variant)]
    reasons = [cell.status for row in rows if not row.keys["sampler"] for cell in row.cells.values()]
    return reasons[0] if reasons else "not sampled in this way"


def _sentence(
    question: Question, variant: str, baseline: str, difference: PairedDifference | None, decided: str, reason: str
) -> str:
    ours, theirs, noun = label(variant), label(baseline), question.noun
    if difference is None:
        return f"{ours} against {theirs}, {noun}: not measured. {reason}."
    unit = f" {question.units}" if question.units else ""
    if difference.low is None:
        shown = f"{number(difference.mean, 2)}{unit}"
        return f"One paired seed gives no interval. {noun[0].upper()}{noun[1:]}: {ours} − {theirs} = {shown}."
    seeds = f"{difference.n} paired seeds"
    if decided == INCONCLUSIVE:
        shown = f"{interval(difference)}{unit}"
        return f"No difference seen in {noun}: {ours} − {theirs} = {shown} ({seeds}; the interval covers zero)."
    size = PairedDifference(abs(difference.mean), None, difference.n, 0, 2 * difference.half, None)
    text = question.below if difference.mean < 0 else question.above
    return f"{text.format(ours=ours, theirs=theirs, size=interval(size) + unit)} ({seeds})."


def _cell(rows: list[Row], variant: str, metric: str) -> Values:
    """The seeds' values of one cell, or its status."""
    cell = next((row.cells.get(metric) for row in rows if row.keys["variant"] == variant), None)
    if cell is None:
        return NO_ROW
    return dict(cell.values) if cell.values else cell.status


def _absolute(values: Values) -> Values:
    return values if isinstance(values, str) else {seed: abs(value) for seed, value in values.items()}


def curve_height(rows: list[Row], variant: str) -> Values:
    """Seed -> area under the NELBO curve over log(images) from 10 % of training on, divided by its width.

    In the unit of the NELBO: a constant offset between two curves is the difference of their heights.
    """
    own = [row for row in rows if row.keys["variant"] == variant and row.keys["images"]]
    if not own:
        return next((row.cells["nelbo"].status for row in rows if row.keys["variant"] == variant), NO_ROW)
    last = max(row.keys["images"] for row in own)
    kept = sorted((row for row in own if row.keys["images"] >= 0.1 * last), key=lambda row: row.keys["images"])
    if len(kept) < 2:
        return "fewer than two points of the curve lie after the first 10 % of training"
    seeds = set.intersection(*(set(row.cells["nelbo"].values) for row in kept))
    if not seeds:
        return next(
            (row.cells["nelbo"].status for row in kept if row.cells["nelbo"].summary is None), "no complete curve"
        )
    x = [math.log(row.keys["images"]) for row in kept]
    heights = {}
    for seed in sorted(seeds):
        y = [row.cells["nelbo"].values[seed] for row in kept]
        area = sum((y[i] + y[i + 1]) / 2 * (x[i + 1] - x[i]) for i in range(len(x) - 1))
        heights[seed] = area / (x[-1] - x[0])
    return heights


def step_slope(rows: list[Row], variant: str, metric: str) -> Values:
    """Seed -> least-squares slope of log(metric) against log(steps), over step counts below the largest."""
    own = [row for row in rows if row.keys["variant"] == variant and row.keys["steps"]]
    if not own:
        return NO_ROW
    most = max(row.keys["steps"] for row in own)
    kept = [row for row in own if row.keys["steps"] < most]
    if len(kept) < 2:
        return "fewer than two step counts lie below the largest"
    seeds = set.intersection(*(set(row.cells[metric].values) for row in kept))
    if not seeds:
        return next(
            (row.cells[metric].status for row in kept if row.cells[metric].summary is None), "no complete sweep"
        )
    slopes = {}
    for seed in sorted(seeds):
        points = [(math.log(row.keys["steps"]), row.cells[metric].values[seed]) for row in kept]
        if min(y for _, y in points) <= 0:
            return f"{metric} is not positive at every step count, so it has no logarithm"
        x_mean = sum(x for x, _ in points) / len(points)
        spread = sum((x - x_mean) ** 2 for x, _ in points)
        slopes[seed] = sum((x - x_mean) * math.log(y) for x, y in points) / spread
    return slopes


def score(findings: list[Mapping[str, Any]]) -> dict[str, int]:
    """How many findings had each verdict."""
    counts = dict.fromkeys((SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_MEASURED), 0)
    for finding in findings:
        counts[finding["verdict"]] += 1
    return {name: count for name, count in counts.items() if count}
