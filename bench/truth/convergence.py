"""Measured orders of convergence of every sampler and of the likelihood's integrator.

Samplers: the 2-Wasserstein distance between the exact law of the sampler as written (``laws``) and the law of the
continuous process that it discretises, both in closed form, over a doubling sequence of steps. The data are Gaussian
and the noise prediction is wrong on purpose (1.2 times the exact one, plus 0.2): with the exact score, leading errors
may cancel (Euler-Maruyama for VE then seems to be of order 2). The end time is 0.01, so that the asymptotic regime
starts at a hundred steps; the truncation and the last, noise-free step are on both sides of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.truth.laws import sampler_law
from bench.truth.problems import DOUBLE, Gaussian, Truth, wasserstein
from bench.truth.process import SDES
from models.indm import INDM
from models.integrators import dormand_prince, flow_field, state_scale
from models.score.adapter import noise_function

END = 1e-2
TOLERANCE = 0.15  # of a measured order
WRONG = {"scale": 1.2, "shift": 0.2}
LINE = Gaussian([0.3], [[0.25]])

STEPS = (64, 128, 256)
HEUN_STEPS = (33, 65, 129)  # the last step is the denoising: 32, 64, 128 steps of the ODE
SEGMENTS = (6, 12, 24)
TOLERANCES = (1e-4, 1e-6, 1e-8)

# Where Dormand-Prince starts: sigma / alpha of about 1/3, so that the field still varies there. From eps on it is flat
# at both ends, and the integral of the divergence converges faster than any power, like that of a periodic function.
STARTS = {"vp": 0.1, "subvp": 0.25, "ve": 0.4}


@dataclass(frozen=True)
class OrderRow:
    """One refinement: ``order`` is log2(previous error / error), None in the first row of a method.

    ``steps``: sampler steps, integrator segments or the tolerance's exponent; ``ok`` is decided by the finest pair.
    """

    method: str
    sde: str
    grid: str
    steps: int
    error: float
    order: float | None
    expected: float
    ok: bool


@dataclass(frozen=True)
class Method:
    """A sampler with its options, the order that theory gives and the process it tends to."""

    sampler: str
    options: tuple[tuple[str, float], ...]
    grids: tuple[str, ...]
    expected: int
    limit: str  # "sde", "sde denoised" or "ode"
    steps: Sequence[int] = STEPS
    label: str = ""


METHODS = (
    # Euler-Maruyama: weak order 1 (Kloeden and Platen 1992, theorem 14.1.5), and the law is all that a sample shows.
    Method("euler_maruyama", (), ("time", "log_ratio"), 1, "sde"),
    # The predictor takes the SDE's exact transition with the score held: a local error of second order in mean and
    # variance, order 1 in all.
    Method(
        "predictor_corrector",
        (("corrector_steps", 0),),
        ("time", "log_ratio"),
        1,
        "sde",
        label="predictor_corrector (0)",
    ),
    # A corrector whose step does not shrink relaxes to its own, biased stationary law: no order. With snr^2
    # proportional to the step it becomes Langevin dynamics beside the diffusion, under which the marginals of the exact
    # score are invariant; Euler's order 1.
    Method("predictor_corrector", (), ("time", "log_ratio"), 1, "sde", label="predictor_corrector (1, snr^2 ~ h)"),
    # DDIM is Euler's method in sigma / alpha: order 1. eta = 1 takes the exact transition with the prediction held.
    Method("ddim", (), ("time", "log_ratio"), 1, "ode"),
    Method("ddim", (("eta", 1.0),), ("log_ratio",), 1, "sde denoised", label="ddim (eta 1)"),
    # Explicit trapezoidal rule: order 2 (Hairer, Norsett, Wanner 1993, section II.1).
    Method("heun", (), ("log_ratio",), 2, "ode", HEUN_STEPS),
)


def sampler_orders(sde_name: str) -> list[OrderRow]:
    """Rows of all samplers for one SDE. VE's two grids are one and the same: sigma is exponential in t."""
    rows = []
    for method in METHODS:
        for grid in method.grids if sde_name != "ve" else method.grids[-1:]:
            rows += _sampler_order(sde_name, method, grid)
    return rows


def _sampler_order(sde_name: str, method: Method, grid: str) -> list[OrderRow]:
    sde, options = SDES[sde_name](), dict(method.options)
    corrected = method.sampler == "predictor_corrector" and not options
    error = {} if corrected else WRONG  # only the exact score's marginals are invariant under the corrector
    truth = Truth(LINE, sde, **error)
    model = INDM(sde, LINE.score(sde, **error), shape=(1,))
    limit = truth.ode_law(END) if method.limit == "ode" else truth.sde_law(END, method.limit == "sde denoised")
    if method.sampler != "heun":
        options["grid"] = grid
    errors = []
    for steps in method.steps:
        if corrected:
            options["snr"] = math.sqrt(4 / steps)
        errors.append(wasserstein(sampler_law(model, steps, method.sampler, end=END, **options), limit))
    return _rows(method.label or method.sampler, sde_name, grid, method.steps, errors, 2.0, method.expected, TOLERANCE)


def _rows(method, sde, grid, steps, errors, ratio, expected, tolerance) -> list[OrderRow]:
    orders = [math.log(a / b) / math.log(ratio) for a, b in zip(errors, errors[1:])]
    ok = abs(orders[-1] - expected) <= tolerance
    return [
        OrderRow(method, sde, grid, n, error, order, expected, ok)
        for n, error, order in zip(steps, errors, [None, *orders], strict=True)
    ]


def integrator_orders(sde_name: str) -> list[OrderRow]:
    """Dormand-Prince on the probability-flow ODE: order of the step in state and log-determinant, and of tolerance.

    With a boundless tolerance the controller's steps are fixed shares of the interval it is given (it starts with a
    fiftieth and grows fivefold), so N equal segments are a fixed-step method whose steps shrink as 1 / N: order 5
    (Dormand and Prince 1980). Under control, the local error estimate is of fifth order in the step and so is the
    global error: it is proportional to the tolerance, order 1.
    """
    sde = SDES[sde_name](eps=STARTS[sde_name])
    truth, noise = Truth(LINE, sde, **WRONG), noise_function(LINE.score(sde, **WRONG), sde)
    z = LINE.draw(4, purpose="integrator")
    z_end, log_det = truth.ode_end(z)
    ends = torch.tensor([sde.eps, 1.0], dtype=DOUBLE)
    (first, last), _ = state_scale(sde, ends)
    low, high = sde.log_ratio_range(ends)
    field = flow_field(noise, sde, "exact")

    def errors(segments: int, tolerance: float) -> tuple[float, float]:
        u, total = z / first, torch.zeros(len(z), dtype=DOUBLE)
        nodes = torch.linspace(float(low), float(high), segments + 1, dtype=DOUBLE)
        for a, b in zip(nodes, nodes[1:]):
            u, part, _ = dormand_prince(lambda rows: field, u, a.expand(len(z)), b.expand(len(z)), tolerance, tolerance)
            total = total + part
        stretch = (last / first).log()
        return float((u - z_end / last).abs().max()), float((total + stretch - log_det).abs().max())

    rows = []
    fixed = [errors(n, 1e30) for n in SEGMENTS]
    controlled = [errors(1, tolerance) for tolerance in TOLERANCES]
    exponents = [round(-math.log10(tolerance)) for tolerance in TOLERANCES]
    for place, what in enumerate(("state", "log-determinant")):
        name = f"dormand_prince, {what}"
        found = [pair[place] for pair in fixed]
        rows += _rows(f"{name}: step", sde_name, "log_ratio", SEGMENTS, found, 2.0, 5, 2 * TOLERANCE)
        found = [pair[place] for pair in controlled]
        rows += _rows(f"{name}: tolerance", sde_name, "log_ratio", exponents, found, 100.0, 1, 2 * TOLERANCE)
    return rows


def write_orders(rows: Sequence[OrderRow], path: Path) -> None:
    """The rows as CSV, written atomically."""
    import pandas as pd

    from bench.files import write_text_atomic

    table = pd.DataFrame([asdict(row) for row in rows])
    write_text_atomic(path, table.to_csv(index=False, float_format="%.6g"))
