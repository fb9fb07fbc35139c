"""The studies by name, in the order of the report.

All likelihood values are nats a dimension. Draws are functions of (SEED, purpose, image), so the tables repeat.
"""

from __future__ import annotations

from bench.estimators import series, time_sampling, trace
from bench.estimators.common import Budget, Subject

__all__ = ["SUBJECTS", "Budget"]

SUBJECTS: dict[str, Subject] = {part.SUBJECT.name: part.SUBJECT for part in (time_sampling, trace, series)}
