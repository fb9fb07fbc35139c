"""Seeds -> mean and interval, paired comparison, verdict, correction for many comparisons, and power.

An interval over independent seeds is Student's t. Over the images of one test set, whose values are many and skewed, it
is a bootstrap interval. Numbers are plain floats in the unit of the input. NaN and infinity are refused: a run without
a number has a status instead, and a mean over what is left would hide it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
# 1 - LEVEL, without its rounding
SIGNIFICANCE = 0.05
# above this many seeds a difference is as good as undecidable
MOST_SEEDS = 10_000

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
INCONCLUSIVE = "inconclusive"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Summary:
    """Mean of n values, their standard deviation (n - 1) and the t interval of the mean; None where n = 1."""

    mean: float
    sd: float | None
    n: int
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedDifference(Summary):
    """Summary of a_i - b_i, and p of the two-sided paired t test that its mean is zero (None where n = 1)."""

    p: float | None


def student_quantile(probability: float, df: int) -> float:
    """The value below which a Student t variable of ``df`` degrees of freedom falls with ``probability``."""
    from scipy.special import stdtrit  # here: reports must import fast

    return float(stdtrit(df, probability))


def _finite(values: Iterable[float], what: str) -> list[float]:
    numbers = [float(value) for value in values]
    for place, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{what}[{place}] = {number}: only finite numbers can be summarised")
    if not numbers:
        raise ValueError(f"{what} is empty: at least one number is needed")
    return numbers


def summarise(values: Iterable[float], level: float = LEVEL) -> Summary:
    """Mean, standard deviation and two-sided t interval of the mean at ``level``.

    One value gives a mean without spread or interval. Raises ValueError for no values, NaN or infinity.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must lie strictly between 0 and 1")
    numbers = _finite(values, "values")
    n = len(numbers)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Summary(mean, None, 1, None, None)
    # equal values have no spread; a rounded mean must not invent one
    spread = 0.0 if min(numbers) == max(numbers) else math.fsum((number - mean) ** 2 for number in numbers)
    mean = numbers[0] if spread == 0 else mean
    sd = math.sqrt(spread / (n - 1))
    half = student_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Summary(mean, sd, n, mean - half, mean + half)


def paired_difference(
    a: Mapping[object, float] | Sequence[float], b: Mapping[object, float] | Sequence[float], level: float = LEVEL
) -> PairedDifference:
    """Summary of a - b over pairs that share a seed.

    Mappings from seed to number are paired by key, and seeds that only one of them has are left out (``n`` tells how
    many pairs remain); sequences are paired by place and must have one length. Raises ValueError where no pair is left.
    """
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        raise ValueError("a and b must both map seeds to numbers, or both be sequences")
    if isinstance(a, Mapping):
        shared = [key for key in a if key in b]
        if not shared:
            raise ValueError("a and b share no seed")
        a, b = [a[key] for key in shared], [b[key] for key in shared]
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b has {len(b)}: pairs need one length")
    first, second = _finite(a, "a"), _finite(b, "b")
    summary = summarise([x - y for x, y in zip(first, second)], level)
    return PairedDifference(summary.mean, summary.sd, summary.n, summary.low, summary.high, _p_value(summary))


def _p_value(summary: Summary) -> float | None:
    from scipy.special import stdtr

    if summary.sd is None:
        return None
    if summary.sd == 0:
        return 1.0 if summary.mean == 0 else 0.0
    t = abs(summary.mean) / (summary.sd / math.sqrt(summary.n))
    return float(2 * stdtr(summary.n - 1, -t))


def verdict(difference: Summary | None, side: str) -> str:
    """Where the interval of ``difference`` lies against the side that the claim predicts.

    ``side`` is "negative" or "positive". Wholly on that side: supported; wholly on the other: contradicted; zero inside
    (or on its edge), or one pair only: inconclusive; no difference at all: not measured.
    """
    if side not in ("negative", "positive"):
        raise ValueError(f"side = {side!r}: must be 'negative' or 'positive'")
    if difference is None:
        return NOT_MEASURED
    if difference.low is None or difference.low <= 0 <= difference.high:
        return INCONCLUSIVE
    return SUPPORTED if (difference.low > 0) == (side == "positive") else CONTRADICTED


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p of each hypothesis of one family, in the order given.

    Rejecting where the adjusted p is below a level keeps the chance of any false rejection in the family below that
    level, however the tests depend on each other (Holm, Scandinavian Journal of Statistics 6, 1979). Raises ValueError
    for a p outside [0, 1].
    """
    for place, p in enumerate(p_values):
        if not 0 <= p <= 1:
            raise ValueError(f"p_values[{place}] = {p}: must lie between 0 and 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        # an adjusted p is never below that of a smaller p
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def corrected_verdict(alone: str, p_adjusted: float | None, level: float = SIGNIFICANCE) -> str:
    """``alone`` where the adjusted p is below ``level`` too; what only its own interval decides is inconclusive."""
    if alone in (SUPPORTED, CONTRADICTED) and (p_adjusted is None or p_adjusted >= level):
        return INCONCLUSIVE
    return alone


def verdict_of_equality(difference: float, se: float, tolerance: float, resolution: float, errors: float = 4.0) -> str:
    """Whether ``difference``, known to its standard error ``se`` (0: exactly), is zero as far as it can be.

    Supported: |difference| is at most the ``tolerance``, or within ``errors`` standard errors where these are no wider
    than the ``resolution``. Contradicted: it is beyond both. Inconclusive: it is within errors so wide that they would
    hide a difference worth finding. Raises ValueError for a negative or non-finite argument (but the difference).
    """
    for name, value in (("se", se), ("tolerance", tolerance), ("resolution", resolution), ("errors", errors)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value}: must be a finite number, not negative")
    (size,) = _finite([abs(difference)], "difference")
    if size > max(tolerance, errors * se):
        return CONTRADICTED
    return SUPPORTED if errors * se <= max(tolerance, resolution) else INCONCLUSIVE


def bootstrap_interval(
    values: Sequence[float], level: float = LEVEL, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Two-sided bootstrap interval of the mean of ``values`` (n,), bias-corrected and accelerated (BCa).

    For values over the images of one test set: many, independent, of no particular shape. The resampling is drawn from
    ``seed`` alone, so that equal values give equal ends. One value, or equal ones, give an interval of no width.
    Source: Efron, Journal of the American Statistical Association 82, 1987. Raises ValueError for no values, NaN or
    infinity.
    """
    import numpy as np  # here: reports must import fast
    from scipy.special import ndtr, ndtri

    if not 0 < level < 1:
        raise ValueError(f"level = {level}: must lie strictly between 0 and 1")
    x = np.asarray(_finite(values, "values"))
    n = len(x)
    if x.min() == x.max():
        return float(x[0]), float(x[0])
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // n)  # resamples at a time: the memory stays bounded for large test sets
    blocks = [
        x[rng.integers(0, n, (min(rows, resamples - start), n))].mean(axis=1) for start in range(0, resamples, rows)
    ]
    means = np.sort(np.concatenate(blocks))
    mean = x.mean()
    below = (np.count_nonzero(means < mean) + 0.5 * np.count_nonzero(means == mean)) / resamples
    bias = ndtri(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    centred = x - mean
    # jackknife means of a mean differ from it by -centred / (n - 1), which leaves this ratio
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    z = ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    places = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
    low, high = np.quantile(means, places)
    return float(low), float(high)


def seeds_needed(mean: float, sd: float, power: float = 0.8, level: float = SIGNIFICANCE) -> int | None:
    """Smallest number of paired seeds whose two-sided t test at ``level`` finds a true ``mean`` with chance ``power``.

    ``mean`` and ``sd`` are those of the paired differences; the power is exact for normal differences (noncentral t).
    None where the mean is zero, because nothing is there to find, or where more than ``MOST_SEEDS`` would be needed.
    Raises ValueError for a negative ``sd``, or a power or level outside (0, 1).
    """
    _finite([mean, sd], "mean, sd")
    if sd < 0 or not 0 < power < 1 or not 0 < level < 1:
        raise ValueError(
            f"sd = {sd}, power = {power}, level = {level}: sd >= 0 and the others inside (0, 1) are accepted"
        )
    if mean == 0:
        return None
    if sd == 0:
        return 2
    effect = abs(mean) / sd
    few, enough = 1, 2
    while _power(effect, enough, level) < power:
        if enough >= MOST_SEEDS:
            return None
        few, enough = enough, min(2 * enough, MOST_SEEDS)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if _power(effect, middle, level) >= power else (middle, enough)
    return enough


def _power(effect: float, n: int, level: float) -> float:
    """Chance that a two-sided t test of n values at ``level`` rejects, for a mean of ``effect`` standard deviations."""
    from scipy.special import nctdtr

    shift, critical = effect * math.sqrt(n), student_quantile(1 - level / 2, n - 1)
    below, above = float(nctdtr(n - 1, shift, -critical)), float(nctdtr(n - 1, shift, critical))
    # where the shift is far beyond the critical value both tails are too small for the routine, which gives NaN
    return 1 - (0.0 if math.isnan(above) else above) + (0.0 if math.isnan(below) else below)
