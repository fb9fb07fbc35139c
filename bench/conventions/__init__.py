"""Conventions of published code that move a number, each measured beside the right value on the same trained model.

A convention is a function of a :class:`bench.conventions.case.Case` that yields rows: the right value, the value by the
convention, their difference with its standard error and, where theory gives the difference, its closed form. The
registry itself needs no torch, so that reports may read the texts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

INDM = "official INDM code"


@dataclass(frozen=True)
class Convention:
    """One convention: ``meaning`` is a sentence for a caption, ``quantities`` are those that it moves, in table order.

    ``function`` is ``module.name`` below this package; it takes a Case, yields rows, and raises NotDefined with the
    reason for which the remaining quantities do not exist.
    """

    name: str
    title: str
    meaning: str
    source: str
    quantities: tuple[str, ...]
    function: str

    @property
    def measure(self) -> Callable[[Any], Iterable[dict[str, Any]]]:
        """The function itself; importing it imports torch."""
        module, name = self.function.rsplit(".", 1)
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)


_ALL = (
    Convention(
        "two-draw-residual",
        "Residual from two noise draws",
        "The residual at eps evaluates the score at one noise draw and denoises another, so that a term of "
        "-0.5 sigma^2 E|score|^2 nats becomes +0.5 sigma^2 E|score|^2.",
        INDM,
        ("NELBO", "NLL"),
        "residual.two_draws",
    ),
    Convention(
        "no-correction",
        "No correction at eps",
        "The bound stops at eps without the residual, and the ODE starts from the clean image at time eps, so neither "
        "is about the density of the data.",
        "score_sde; official INDM code, its values before correction",
        ("NELBO", "NLL"),
        "residual.no_correction",
    ),
    Convention(
        "training-surrogate",
        "Training surrogate for the log-determinant",
        "The Neumann series that training differentiates, an estimate of tr J(I+J)^-1 for each block, is logged as if "
        "it were log|det(I+J)|. Its mean is taken, by a long series, for its own roulette has no finite variance.",
        f"{INDM}, logged loss",
        ("NELBO", "NLL"),
        "flow.training_surrogate",
    ),
    Convention(
        "raw-flow",
        "Raw flow beside an averaged score",
        "The flow keeps the weights of the last step while the score has the averaged ones, so that the two come from "
        "different moments of training.",
        INDM,
        ("NELBO",),
        "flow.raw_weights",
    ),
    Convention(
        "float32-near-eps",
        "Cancellation in float32 near eps",
        "sigma = sqrt(1 - exp(-B)) and Z, both computed as written in float32, miss the last 0.0061 of log sigma at "
        "eps = 1e-5: the score loss falls, the bound does not.",
        INDM,
        ("score loss", "NELBO"),
        "precision.near_eps",
    ),
    Convention(
        "un-dequantised",
        "Grey levels without noise",
        "The density is evaluated at the grey levels themselves, where a model of discrete data may be as peaked as it "
        "likes, and still turned into bits/dim by the offset of uniform dequantisation.",
        "DiffFlow's and SB-FBSDE's code",
        ("NELBO", "NLL"),
        "pixels.un_dequantised",
    ),
    Convention(
        "sb-stochastic-path",
        "NLL along a stochastic path",
        "The divergence of the probability-flow velocity is summed along a path of the noisy forward SDE, by Euler's "
        "method on a grid of 100 times, instead of along the ODE: right only in expectation and only for the exact "
        "score. Steps are the grid's spacing; the official step, T / interval, is not reproduced.",
        "SB-FBSDE's code",
        ("NLL",),
        "path.stochastic_path",
    ),
    Convention(
        "inverse-tolerance",
        "Inverse of the flow by squared tolerance",
        "The fixed point of a block's inverse stops when the squared change is below 1e-5 (1 + |y|), a tolerance of "
        "0.003 or more on the sample itself.",
        INDM,
        ("sample error, mean", "sample error, largest", "sample distance"),
        "samples.inverse_tolerance",
    ),
    Convention(
        "ve-denoising",
        "VE samples left undenoised",
        "The last step of a VE sample moves by g(eps)^2 eps score instead of by sigma_min^2 score, so that practically "
        "all noise of sigma_min stays.",
        INDM,
        ("denoising step, rms", "sample distance"),
        "samples.ve_denoising",
    ),
    Convention(
        "uint8-truncation",
        "Pixels by truncation",
        "Samples become pixels as the integer part of (levels - 1) (x + 1) / 2, though level k was spread over "
        "[k, k + 1) / levels: level k falls to k - 1 with probability k / (levels - 1).",
        INDM,
        ("mean level of data", "mean level of samples", "sample distance"),
        "pixels.truncation",
    ),
)

CONVENTIONS: dict[str, Convention] = {convention.name: convention for convention in _ALL}
