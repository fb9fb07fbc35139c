"""How many evaluations the probability-flow ODE takes for an image, from what was measured of trained networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

# of the solvers: evaluations grow as the tolerance to the power -1 / ORDER
ORDER = 5
# Adams' method has about the error of Dormand and Prince's at a sixtieth of its tolerance (reports/performance)
STRICTER = 60


@dataclass(frozen=True)
class Measured:
    """Mean ``evaluations`` of an ODE for one image or point of ``dims`` dimensions, and the record that they are from.

    ``solver``: of the likelihood's ODE; "sampler" for that of samples, which has no divergence to resolve.
    ``preconditioning``: of the score network; None for models without that option.
    """

    solver: str
    preconditioning: str | None
    tolerance: float
    dims: int
    evaluations: float
    record: str


TOY2D, DIGITS = "reports/toy2d/nll_nelbo_gap.csv", "reports/digits/nll_nelbo_gap.csv"
SPEED = "reports/performance/cpu.json"
MEASURED = (
    Measured("dopri5", "gaussian", 1e-4, 2, 80, TOY2D),
    Measured("dopri5", "gaussian", 1e-4, 64, 76, DIGITS),
    Measured("dopri5", None, 1e-4, 2, 41, TOY2D),
    Measured("dopri5", None, 1e-4, 64, 78, DIGITS),
    # small networks of few dimensions, then colour images
    Measured("dopri5", "none", 1e-4, 2, 95, TOY2D),
    Measured("dopri5", "none", 1e-4, 64, 89, DIGITS),
    Measured("dopri5", "none", 1e-5, 768, 730, SPEED),
    Measured("adams", "none", 4e-4, 768, 433, SPEED),
    Measured("adams", "none", 1e-3, 768, 235, SPEED),
    Measured("sampler", "gaussian", 1e-3, 2, 37, "reports/smoke/step_robustness.csv"),
    Measured("sampler", "none", 1e-5, 768, 245, "the networks nll/S16/*/300 of the above: 314 (VP) and 176 (VE)"),
)


def usual_evaluations(solver: str, preconditioning: str | None, tolerance: float, dims: int) -> float:
    """Evaluations of the ODE for one image or point of ``dims`` dimensions by a trained network at a tolerance.

    By the records of the nearest number of dimensions: between two tolerances by the power law through them, beyond
    them by ORDER. Where ``solver`` was not measured on a preconditioning: Dormand and Prince's at the same error, times
    what Adams' method saves where both were.
    """
    found = [row for row in MEASURED if (row.solver, row.preconditioning) == (solver, preconditioning)]
    if not found and solver == "adams":
        stricter, colour = tolerance / STRICTER, 768
        saved = usual_evaluations("adams", "none", tolerance, colour)
        saved /= usual_evaluations("dopri5", "none", stricter, colour)
        return saved * usual_evaluations("dopri5", preconditioning, stricter, dims)
    if not found:  # a preconditioning or a solver of one's own
        found = [row for row in MEASURED if (row.solver, row.preconditioning) == ("dopri5", None)]
    nearest = min((row.dims for row in found), key=lambda measured: abs(math.log(measured / dims)))
    found = sorted((row for row in found if row.dims == nearest), key=lambda row: row.tolerance)
    for one, next_one in pairwise(found):
        if one.tolerance < tolerance < next_one.tolerance:
            share = math.log(tolerance / one.tolerance) / math.log(next_one.tolerance / one.tolerance)
            return one.evaluations ** (1 - share) * next_one.evaluations**share
    best = min(found, key=lambda row: abs(math.log(row.tolerance / tolerance)))
    return best.evaluations * (best.tolerance / tolerance) ** (1 / ORDER)
