"""Seeds -> mean and interval, paired comparison, verdict.

Every interval is Student's t over independent seeds. Numbers are plain floats in the unit of the input. NaN and
infinity are refused: a run without a number has a status instead, and a mean over what is left would hide it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95

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
