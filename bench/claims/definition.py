"""What a claim is made of: statement, tests, and for each test its statistic, pairing, side and rule of decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.statistics import CONTRADICTED, SIGNIFICANCE, SUPPORTED, verdict_of_equality

if TYPE_CHECKING:
    from bench.report.load import Reading, Run

# kinds of test
PAIRED = "paired"  # INDM minus its counterpart, seed by seed, against zero
OWN = "own"  # a variant's own number, seed by seed, against zero
CHECK = "check"  # an identity or an inequality that must hold in every run; no p, so outside the family

# the nonlinear diffusion and the linear one it grew from: same SDE, same score network
PAIRS = (("indm-vp-nll", "ddpmpp-vp"), ("indm-vp-fid", "ddpmpp-vp"), ("indm-ve", "ncsnpp-ve"))

# a verdict asks for this many seeds, paired where the test is
MINIMUM_SEEDS = 3
MINIMUM_SEEDS_OF = {"toy2d": 5}
# suites that decide nothing, and why
UNJUDGED = {"smoke": "this suite trains for a few steps to guard the code and decides no claim"}
# a family's chance of one false verdict, and of each interval to miss
FAMILY_LEVEL = SIGNIFICANCE

PAPER, HARNESS = "paper", "harness"
SEEDS, IMAGES, RUNS = "seeds", "images", "runs"

BY_SEED = "INDM with its linear counterpart of the same seed: data order, noise and test images are shared"
INTERVAL_RULE = (
    "supported where the 95 % t interval of the mean over seeds lies wholly on the claim's side of zero and Holm's "
    "corrected p is below 0.05, contradicted where it lies wholly on the other side with the same, else inconclusive; "
    f"inconclusive below {MINIMUM_SEEDS} seeds "
    f"({', '.join(f'{n} in {suite}' for suite, n in MINIMUM_SEEDS_OF.items())})"
)


@dataclass(frozen=True)
class Point:
    """Where a statistic is taken on a data set: with which sampler and distance, or of which quantity of a study."""

    sampler: str = ""
    metric: str = ""
    quantity: str = ""
    steps: int | None = None


# (run, all runs that it is compared with, itself included; where) -> the run's number, or the reason for none
Measure = Callable[["Run", Sequence["Run"], Point], "Reading"]
# runs of a comparison, what stands for sample quality -> the points at which to compare them
Points = Callable[[Sequence["Run"], "str | None"], list[Point]]
# seed -> number, seed -> standard error within the run (0: none) -> (estimate, verdict, standard error)
Decision = Callable[[Mapping[int, float], Mapping[int, float]], tuple[float, str, float]]


def once(runs: Sequence[Run], metric: str | None) -> list[Point]:
    """One point a data set."""
    return [Point()]


@dataclass(frozen=True)
class Test:
    """One statistic of a claim, with the rule that decides on it. Texts may hold {sampler}, {distance}, {steps},
    {quantity}; sentences also {ours}, {theirs} and {size}.

    ``units`` "data" stands for the unit of the data set's likelihoods. ``side`` is where the claim expects the number:
    "negative", "positive", or "equal" for a check. ``needs`` are the result files. ``study`` names the study whose file
    is among them. ``protocols`` say in what the compared runs must agree.
    """

    kind: str
    noun: str
    statistic: str
    side: str
    needs: tuple[str, ...]
    value: Measure | None = None
    points: Points = once
    rule: str = INTERVAL_RULE
    pairing: str = BY_SEED
    pairs: tuple[tuple[str, str], ...] = PAIRS
    protocols: tuple[str, ...] = ()
    units: str = ""
    unit: str = SEEDS
    below: str = ""
    above: str = ""
    study: str = ""
    error: Measure | None = None
    decide: Decision | None = None
    variants: tuple[str, ...] = ()  # of an OWN or CHECK test
    caveat: str = ""  # said with every number of the test
    per_image: str = ""  # array of per_image.npz whose mean over images the statistic is
    only_units: str = ""  # the test exists only where likelihoods have this unit ...
    only_suites: tuple[str, ...] = ()  # ... or in these suites ...
    otherwise: str = ""  # ... and this is why not elsewhere, or nowhere if there is no ``value``


@dataclass(frozen=True)
class Claim:
    """One row of the list of claims, in the words of its source. ``scope``: "paper", or "harness" for a question of
    this harness's own."""

    id: str
    title: str
    statement: str
    source: str
    tests: tuple[Test, ...] = field(repr=False)
    scope: str = PAPER


def minimum_seeds(suite: str) -> int:
    """How many seeds a verdict asks for in this suite."""
    return MINIMUM_SEEDS_OF.get(suite, MINIMUM_SEEDS)


def equal(tolerance: float, resolution: float) -> Decision:
    """The mean over runs is zero to within ``tolerance``, or to within its error where that is below ``resolution``."""

    def decide(values: Mapping[int, float], errors: Mapping[int, float]) -> tuple[float, str, float]:
        mean = sum(values.values()) / len(values)
        se = sum(errors[seed] ** 2 for seed in values) ** 0.5 / len(values)
        return mean, verdict_of_equality(mean, se, tolerance, resolution), se

    return decide


def never_negative(values: Mapping[int, float], errors: Mapping[int, float]) -> tuple[float, str, float]:
    """The smallest value over runs is not below zero; what errors allow is part of the values."""
    least = min(values.values())
    return least, SUPPORTED if least >= 0 else CONTRADICTED, 0.0
