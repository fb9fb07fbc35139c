"""From the loaded runs to one number a seed: the statistics of the claims, each a pure function of result files.

Every function takes a run, the runs that it is compared with (itself included) and where to look, and gives a finite
number or the reason why there is none. The other runs say what should be there: which images a learning curve has,
which step counts a sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from bench.claims.definition import Measure, Point
from bench.report.load import CURVE, LIKELIHOOD, Reading, Run, finite
from bench.report.study_files import study_of
from bench.report.tables import likelihood_reading, quality_reading, robustness_line

START = 0.1  # share of training that a learning curve's statistics leave out
ADAPTIVE = 0  # steps of a sampler that chooses its own
PUBLISHED_SAMPLES = 50_000
PUBLISHED_FEATURES = "inception"


# Likelihoods -------------------------------------------------------------------------------------------------------


def bound(name: str) -> Measure:
    """The test NELBO or NLL at the end of training, residual included, in the data set's unit."""
    return lambda run, peers, point: likelihood_reading(run, name, "corrected")


def gap_at_the_end(run: Run, peers: Sequence[Run], point: Point) -> Reading:
    """|NELBO - NLL| at the end of training, residual included, in the data set's unit."""
    gap = likelihood_reading(run, "gap", "corrected")
    return gap if isinstance(gap, str) else abs(gap)


def per_image(run: Run, name: str) -> Any:
    """Array (n,) of per_image.npz as nats, or bits/dim without the constant offset; or the reason for none."""
    import numpy as np

    record, path = run.likelihood or {}, run.folder / "per_image.npz"
    if run.diverged or LIKELIHOOD in run.problems:
        return run.diverged or run.problems[LIKELIHOOD]
    if path.name in run.problems:
        return run.problems[path.name]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = arrays[name].astype(np.float64)
    except (OSError, ValueError, KeyError):
        return f"{path.name} has no {name}"
    return values / (record["dims"] * math.log(2)) if record.get("units") == "bits/dim" else values


# The learning curve ------------------------------------------------------------------------------------------------


def curve_area(height: Callable[[dict[str, str]], float | None]) -> Measure:
    """Area under ``height`` of the learning curve over log(step), from 10 % of training on, over its width.

    The division makes it the mean height, in the unit of the height: a constant distance between two curves is the
    difference of their areas. Images seen are steps times the batch size, so their logarithm differs by a constant.
    """

    def measure(run: Run, peers: Sequence[Run], point: Point) -> Reading:
        if not run.curve:
            return run.problems.get(CURVE) or f"{CURVE} is empty"
        counts = sorted({images for peer in peers for line in peer.curve if (images := finite(line.get("images")))})
        if not counts:
            return f"{CURVE} has no number of images"
        kept = [images for images in counts if images >= START * counts[-1]]
        if len(kept) < 2:
            return "fewer than two points of the curve lie after the first 10 % of training"
        lines = {finite(line.get("images")): line for line in run.curve}
        lacking = next((images for images in kept if images not in lines), None)
        if lacking is not None:
            last = max((images for images in lines if images), default=0)
            return f"no row at {int(lacking)} images, the curve ends at {int(last)}"
        heights = [height(lines[images]) for images in kept]
        if None in heights:
            return f"a blank or a status in {CURVE} at {int(kept[heights.index(None)])} images"
        x = [math.log(images) for images in kept]
        area = sum((heights[i] + heights[i + 1]) / 2 * (x[i + 1] - x[i]) for i in range(len(x) - 1))
        return area / (x[-1] - x[0])

    return measure


def curve_nelbo(line: dict[str, str]) -> float | None:
    """The NELBO of one row of a learning curve, in its unit."""
    return _curve_number(line, "nelbo")


def curve_gap(line: dict[str, str]) -> float | None:
    """|NELBO - NLL| of one row of a learning curve, in its unit."""
    nelbo, nll = _curve_number(line, "nelbo"), _curve_number(line, "nll")
    return None if nelbo is None or nll is None else abs(nelbo - nll)


def _curve_number(line: dict[str, str], name: str) -> float | None:
    numbers = (finite(line.get(f"{name}_{unit}")) for unit in ("nats", "bpd"))
    return next((number for number in numbers if number is not None), None)


# Sampling ----------------------------------------------------------------------------------------------------------


def step_counts(runs: Sequence[Run], sampler: str) -> list[int]:
    """The step counts of a sampler in any of the runs, ascending; an adaptive one has the count 0."""
    counts = {
        int(steps)
        for run in runs
        for line in run.robustness
        if line.get("sampler") == sampler and (steps := finite(line.get("steps"))) is not None
    }
    return sorted(counts)


def _samplers(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(line["sampler"] for run in runs for line in run.robustness if line.get("sampler")))


def sweeps(runs: Sequence[Run], metric: str | None) -> list[Point]:
    """Each sampler with two step counts or more below its largest."""
    found = ((name, [count for count in step_counts(runs, name) if count]) for name in _samplers(runs))
    return [Point(name, metric, steps=counts[-1]) for name, counts in found if metric and len(counts) > 2]


def longest(runs: Sequence[Run], metric: str | None) -> list[Point]:
    """Each sampler of fixed steps at its largest step count."""
    found = ((name, [count for count in step_counts(runs, name) if count]) for name in _samplers(runs))
    return [Point(name, metric, steps=counts[-1]) for name, counts in found if metric and counts]


def longest_or_adaptive(runs: Sequence[Run], metric: str | None) -> list[Point]:
    """Each sampler at its largest step count, or with the steps it chooses itself."""
    found = ((name, step_counts(runs, name)) for name in _samplers(runs))
    return [Point(name, metric, steps=counts[-1]) for name, counts in found if metric and counts]


def distance(run: Run, peers: Sequence[Run], point: Point) -> Reading:
    """Distance of the samples to the data with the point's sampler and steps."""
    if run.robustness and point.sampler not in _samplers([run]):
        return "not sampled in this way"
    return quality_reading(run, robustness_line(run, point.sampler, point.steps), point.metric)


def step_slope(run: Run, peers: Sequence[Run], point: Point) -> Reading:
    """Least-squares slope of log(distance) against log(steps), over the step counts below the largest."""
    counts = [count for count in step_counts(peers, point.sampler) if 0 < count < point.steps]
    x, y = [], []
    for steps in counts:
        reading = distance(run, peers, Point(point.sampler, point.metric, steps=steps))
        if isinstance(reading, str):
            return reading
        if reading <= 0:
            return f"{point.metric} is not positive at {steps} steps, so it has no logarithm"
        x.append(math.log(steps))
        y.append(math.log(reading))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


def published_distance(published: Mapping[tuple[str, str], float]) -> Measure:
    """FID minus the published one, by (data set, variant); a reason where it was not measured as that one was."""

    def measure(run: Run, peers: Sequence[Run], point: Point) -> Reading:
        key = (run.dataset, run.variant)
        if key not in published:
            return f"no FID of {run.variant} on {run.dataset} is published"
        line = robustness_line(run, point.sampler, point.steps)
        features = (run.config.get("evaluate") or {}).get("features")
        if line and (features != PUBLISHED_FEATURES or finite(line.get("n")) != PUBLISHED_SAMPLES):
            return f"FID is of {PUBLISHED_SAMPLES:,} samples and {PUBLISHED_FEATURES} features, not of these"
        reading = quality_reading(run, line, "fd")
        return reading if isinstance(reading, str) else reading - published[key]

    return measure


# Studies -----------------------------------------------------------------------------------------------------------
# A study that failed as a whole is one row with a status and blank keys: its reason is that of every key.


def _measured(row: dict[str, Any], column: str, study: str) -> Reading:
    if row["status"] != "ok":
        return row["status"]
    return f"{column} is blank in {study}.csv" if row[column] is None else float(row[column])


def _row(rows: Sequence[dict[str, Any]], **keys: str) -> dict[str, Any] | None:
    """The row with these keys, else the one whose keys are all blank."""
    fits = [keys, dict.fromkeys(keys, "")]
    return next((row for wanted in fits for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def latent(quantity: str) -> Measure:
    """A quantity of z_0 = h(x) in latents.csv."""

    def measure(run: Run, peers: Sequence[Run], point: Point) -> Reading:
        rows = study_of(run, "latents")
        if isinstance(rows, str):
            return rows
        row = _row(rows, quantity=quantity, time="0")
        return _measured(row, "value", "latents") if row else f"latents.csv has no {quantity} at time 0"

    return measure


def discretised(runs: Sequence[Run], metric: str | None) -> list[Point]:
    """Each sampler of discretisation.csv."""
    found = (rows for run in runs if not isinstance(rows := study_of(run, "discretisation"), str))
    samplers = dict.fromkeys(row["sampler"] for rows in found for row in rows if row["sampler"])
    return [Point(sampler) for sampler in samplers]


def _sampler_rows(run: Run, sampler: str) -> list[dict[str, Any]] | str:
    rows = study_of(run, "discretisation")
    if isinstance(rows, str):
        return rows
    own = [row for row in rows if row["sampler"] in (sampler, "")]
    reason = next((row["status"] for row in own if row["status"] != "ok"), None)
    return reason or own or f"discretisation.csv has no sampler {sampler}"


def discretisation_term(run: Run, peers: Sequence[Run], point: Point) -> Reading:
    """Mean over step counts of the discretisation term of the bound on the total variation."""
    rows = _sampler_rows(run, point.sampler)
    if isinstance(rows, str):
        return rows
    of_peers = (found for peer in peers if not isinstance(found := _sampler_rows(peer, point.sampler), str))
    counts = {row["steps"] for found in of_peers for row in found}
    own = {row["steps"]: _measured(row, "discretisation", "discretisation") for row in rows}
    if counts - set(own):
        return f"discretisation.csv has no row at {min(counts - set(own))} steps"
    reason = next((reading for reading in own.values() if isinstance(reading, str)), None)
    return reason or sum(own.values()) / len(own)


def bound_slack(run: Run, peers: Sequence[Run], point: Point) -> Reading:
    """Smallest bound - TV over step counts, with two standard errors of the TV added.

    The distance that two samples of one law show, the floor, is not added: the estimation and discretisation terms
    were measured from samples and hold it already, so that an allowance of it could hide a term that is missing.
    Measured shares obey the inequality up to the draws that the two fine reverse processes share
    (:mod:`bench.studies.discretisation`): below zero, the measurement is at fault.
    """
    rows = _sampler_rows(run, point.sampler)
    if isinstance(rows, str):
        return rows
    slack = []
    for row in rows:
        numbers = [_measured(row, column, "discretisation") for column in ("bound", "tv")]
        if any(isinstance(number, str) for number in numbers):
            return next(number for number in numbers if isinstance(number, str))
        slack.append(numbers[0] - numbers[1] + 2 * (row["se"] or 0.0))
    return min(slack)


def _identity_rows(run: Run, claim: str) -> list[dict[str, Any]] | str:
    rows = study_of(run, "identities")
    if isinstance(rows, str):
        return rows
    own = [row for row in rows if row["claim"] in (claim, "")]
    return own or f"identities.csv has no row of {claim}"


def identities(claim: str, *patterns: str) -> Callable[[Sequence[Run], str | None], list[Point]]:
    """Each quantity that identities.csv holds of a claim, or those whose names fit a pattern such as "energy_*"."""

    def points(runs: Sequence[Run], metric: str | None) -> list[Point]:
        found = (rows for run in runs if not isinstance(rows := _identity_rows(run, claim), str))
        names = dict.fromkeys(row["quantity"] for rows in found for row in rows if row["quantity"])
        return [Point(quantity=name) for name in names if any(fnmatchcase(name, one) for one in patterns or ("*",))]

    return points


def identity_difference(claim: str) -> Measure:
    """Measured minus expected value of a quantity of identities.csv; a blank expectation is zero."""

    def measure(run: Run, peers: Sequence[Run], point: Point) -> Reading:
        rows = _identity_rows(run, claim)
        if isinstance(rows, str):
            return rows
        row = _row(rows, quantity=point.quantity)
        if row is None:
            return f"identities.csv has no {point.quantity} of {claim}"
        value = _measured(row, "value", "identities")
        return value if isinstance(value, str) else value - (row["expected"] or 0.0)

    return measure


def identity_error(claim: str) -> Measure:
    """Standard error of the same quantity; 0 where the row states none."""

    def measure(run: Run, peers: Sequence[Run], point: Point) -> Reading:
        rows = _identity_rows(run, claim)
        rows = [] if isinstance(rows, str) else rows
        return next((row["se"] or 0.0 for row in rows if row["quantity"] == point.quantity), 0.0)

    return measure


def largest_difference(claim: str) -> Measure:
    """Largest |measured - expected| over all quantities that identities.csv holds of a claim."""

    def measure(run: Run, peers: Sequence[Run], point: Point) -> Reading:
        rows = _identity_rows(run, claim)
        if not isinstance(rows, str) and (failed := _row(rows, quantity="")):
            return failed["status"]
        points = identities(claim)([run], None)
        differences = [identity_difference(claim)(run, peers, where) for where in points]
        if not points:
            return identity_difference(claim)(run, peers, point)
        reason = next((found for found in differences if isinstance(found, str)), None)
        return reason or max(abs(found) for found in differences)

    return measure
