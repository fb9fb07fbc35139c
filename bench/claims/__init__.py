"""The claims under test as data: what the papers say, which statistic decides on it, and by which rule.

Everything here is fixed before any result is read: no threshold, side or choice of a statistic is computed from
results. :mod:`bench.report.claims_table` applies it to the runs of a suite.
"""

from bench.claims.definition import (
    CHECK,
    FAMILY_LEVEL,
    HARNESS,
    IMAGES,
    OWN,
    PAIRED,
    PAIRS,
    PAPER,
    RUNS,
    SEEDS,
    UNJUDGED,
    Claim,
    Point,
    Test,
    minimum_seeds,
)
from bench.claims.indm import CLAIMS as INDM_CLAIMS
from bench.claims.indm import OWN_QUESTIONS, THE_TABLES
from bench.claims.variational import CLAIMS as VARIATIONAL_CLAIMS

CLAIMS = (*INDM_CLAIMS, *VARIATIONAL_CLAIMS, *THE_TABLES, *OWN_QUESTIONS)

__all__ = [
    "CHECK",
    "CLAIMS",
    "FAMILY_LEVEL",
    "HARNESS",
    "IMAGES",
    "OWN",
    "PAIRED",
    "PAIRS",
    "PAPER",
    "RUNS",
    "SEEDS",
    "UNJUDGED",
    "Claim",
    "Point",
    "Test",
    "minimum_seeds",
]
