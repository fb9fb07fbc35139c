"""Study: the value that a convention of published code gives, beside the right one, on the same trained model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from bench.conventions import CONVENTIONS, Convention
from bench.conventions.case import Case
from bench.studies import Context
from models.base import NotDefined
from models.flows import FlowInverseError
from models.indm import INDM
from models.integrators import IntegrationError

Several = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=1)]

COLUMNS = (
    "convention",
    "quantity",
    "units",
    "right",
    "official",
    "difference",
    "se",
    "closed_form",
    "closed_form_se",
    "n",
    "status",
)


def measure(
    context: Context,
    *,
    images: Several = 100,
    times: Count = 16,
    draws: Count = 4,
    samples: Several = 400,
    steps: Several = 100,
    tolerance: Annotated[float, Field(gt=0)] = 1e-2,
    path_images: Several | None = None,
) -> list[dict[str, Any]]:
    """Rows of conventions.csv, one a convention and quantity; difference = official - right.

    ``images`` test images, ``times`` noise levels of a bound, ``draws`` pairs of noise draws at eps, ``samples``
    samples by the probability-flow ODE at ``tolerance`` (two treatments of the same samples are compared, so that it
    matters little), ``steps`` of the stochastic path for the first ``path_images`` (null: all). Likelihoods use the
    run's own tolerances and probes. ``se`` is over images or samples, paired; ``closed_form`` is the same difference by
    theory, without the convention's own arithmetic; ``closed_form_se`` is always the standard error of difference -
    closed form, paired by image or sample, and blank only where ``closed_form`` is.
    """
    case = Case(context, images, times, draws, samples, steps, tolerance, path_images)
    return [row for convention in CONVENTIONS.values() for row in conduct(convention, case)]


def conduct(convention: Convention, case: Case) -> Iterator[dict[str, Any]]:
    """Rows of one convention, each of its quantities once; the reason in ``status`` where one does not exist."""
    left, reason = list(convention.quantities), "not measured for these data"
    try:
        if not isinstance(case.model, INDM):
            raise NotDefined("the model is not a flow before a linear diffusion")
        for row in convention.measure(case):
            left.remove(row["quantity"])
            yield _finished(convention.name, row)
    except (NotDefined, FlowInverseError, IntegrationError) as error:
        reason = " ".join(str(error).split())
    for quantity in left:
        yield _not_defined(convention.name, quantity, reason)


def _finished(name: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = {
        key: float(value) for key, value in row.items() if key not in ("quantity", "units", "n") and value is not None
    }
    if not all(math.isfinite(number) for number in numbers.values()):
        return _not_defined(name, row["quantity"], "a value is not finite")
    return dict.fromkeys(COLUMNS) | row | numbers | {"convention": name, "status": "ok"}


def _not_defined(name: str, quantity: str, reason: str) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {
        "convention": name,
        "quantity": quantity,
        "status": f"not defined: {reason.removeprefix('not defined: ')}",
    }
