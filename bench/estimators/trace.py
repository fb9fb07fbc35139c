"""Divergence of the probability-flow ODE: kinds and numbers of probes, and the exact trace."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bench.estimators.common import COMMON, Budget, Measured, Subject, default_options, moments, source
from bench.estimators.problems import Problem
from models.indm import INDM
from models.integrators import ProbeKind, dormand_prince, flow_field, state_scale
from models.sde import expand

PROBE_KINDS = ProbeKind.__args__
# of the ODE, relative and absolute: closed forms, trained networks
TOLERANCES = {False: 1e-5, True: 1e-3}


def measure_trace(problem: Problem, budget: Budget, bar) -> list[Measured]:
    """Every kind and number of probes, and the exact trace, of the ODE likelihood started at the clean image.

    The probes of a trajectory are fixed, so their average is v'Mv with M the Jacobian integrated along it: from M the
    kinds' variances follow without noise. Evaluations, seconds and bias are measured, by ``nll_parts`` itself.
    """
    model, tolerance = problem.model, TOLERANCES[problem.trained]
    x = problem.x[: budget.probe_images_trained] if problem.trained else problem.x
    few = x[: budget.ode_images_trained] if problem.trained else x
    dims = x[0].numel()
    counts = [n for n in (budget.probes_trained if problem.trained else budget.probes) if n <= dims]
    matrix = integrated_jacobian(model, model.latent(x), budget.nodes, tolerance).double() / dims
    exact, nfe, seconds = _ode(model, few, tolerance, "exact", "rademacher")
    base = {"problem": problem.name, "dims": dims, "images": len(x), "tolerance": tolerance, "status": "ok"}
    rows = []
    for kind in PROBE_KINDS:
        for count in counts:
            variance = probe_variance(matrix, kind, count)
            value, own_nfe, own_seconds = _ode(model, few, tolerance, count, kind)
            cost = own_nfe * (1 + count)
            values = base | {"probe_kind": kind, "probes": count, "nfe": own_nfe, "evaluations": cost}
            values |= moments(variance, cost) | {"bias": float((value - exact).mean()) / dims}
            values |= {"bias_se": float(variance[: len(few)].sum().sqrt()) / len(few), "seconds": own_seconds}
            rows.append(Measured(values, variance, cost, problem.trained, options={"probe_kind": kind}))
            bar.update()
    values = base | {"probe_kind": "exact", "probes": dims, "nfe": nfe, "evaluations": nfe * (1 + dims)}
    values |= {"sd": 0.0, "work": 0.0, "bias": None, "bias_se": None, "seconds": seconds}
    rows.append(Measured(values, trained=problem.trained, candidate=False))
    bar.update(len(PROBE_KINDS) * (len(budget.probes) - len(counts)) + 1)
    return rows


def probe_variance(matrix: Tensor, kind: str, count: int) -> Tensor:
    """Variance (I,) of the average of v'Mv over ``count`` <= D probes, for matrices M (I, D, D).

    With S the symmetric part: Gaussian 2 |S|^2, signs 2 (|S|^2 - sum of S_ii^2), directions of norm sqrt(D)
    2 D (|S|^2 - tr(S)^2 / D) / (D + 2), all over ``count``; directions that are orthogonal sum to the trace once they
    are D, which takes off a share (count - 1) / (D - 1) of the last.
    """
    dims = matrix.shape[-1]
    symmetric = (matrix + matrix.mT) / 2
    diagonal = symmetric.diagonal(dim1=1, dim2=2)
    square = symmetric.square().sum((1, 2))
    if kind == "gaussian":
        return 2 * square / count
    if kind == "rademacher":
        return 2 * (square - diagonal.square().sum(1)).clamp_min(0) / count
    spread = 2 * dims / (dims + 2) * (square - diagonal.sum(1).square() / dims).clamp_min(0)
    return spread / count * (1 - (count - 1) / max(dims - 1, 1))


def _ode(model: INDM, x: Tensor, tolerance: float, probes: int | str, kind: str) -> tuple[Tensor, float, float]:
    """(-log p of each image in nats (I,), network evaluations and seconds an image) of one call."""
    random = source(f"{kind} {probes}", len(x))
    started = time.perf_counter()
    parts = model.nll_parts(x, tolerance, tolerance, probes, False, random, probe_kind=kind)
    seconds = (time.perf_counter() - started) / len(x)
    return parts["ode"].double() + parts["prior"].double(), float(parts["nfe"].double().mean()), seconds


def integrated_jacobian(model: INDM, z0: Tensor, nodes: int, tolerance: float) -> Tensor:
    """M (I, D, D) with v'Mv + a constant = the divergence integral of the ODE from latents z0 by the fixed probe v.

    M = int b J d lambda, J the Jacobian of the predicted noise in the unit-variance state, by Gauss's rule of ``nodes``
    points along a trajectory of the adaptive solver.
    """
    import numpy as np

    low, high = (float(v) for v in model.sde.log_ratio_range(z0.double()))
    points, weights = np.polynomial.legendre.leggauss(nodes)
    u, at, total = z0 / float(state_scale(model.sde, torch.tensor(model.sde.eps, dtype=torch.float64))[0]), low, 0.0
    move = flow_field(model.noise, model.sde)
    for point, weight in zip(points, weights, strict=True):
        level = low + (high - low) * (point + 1) / 2
        start, end = (z0.new_full((len(z0),), v) for v in (at, level))
        with torch.no_grad():
            u, _, _ = dormand_prince(lambda rows: move, u, start, end, tolerance, tolerance)
        t = model.sde.time(end)
        scale, b = state_scale(model.sde, t)
        leaf = u.detach().requires_grad_()
        flat = model.noise(expand(scale, leaf) * leaf, t).flatten(1)
        rows = [torch.autograd.grad(flat[:, d].sum(), leaf, retain_graph=True)[0] for d in range(flat.shape[1])]
        jacobian = torch.stack([row.flatten(1) for row in rows], 1)
        total = total + (high - low) / 2 * weight * b[:, None, None] * jacobian
        at = level
    return total


SUBJECT = Subject(
    "trace",
    "Divergence of the probability-flow ODE",
    "sd: of one image's NLL over the probes, from the Jacobian integrated along its trajectory; evaluations: forward "
    "passes and vector-Jacobian products, nfe (1 + probes); the exact trace takes as many products as "
    "dimensions. efficiency = variance x evaluations "
    "over that of the code's default kind at as many probes.",
    (
        "problem",
        "dims",
        "probe_kind",
        "probes",
        "tolerance",
        "nfe",
        "evaluations",
        "images",
        "sd",
        "bias",
        "bias_se",
    )
    + ("seconds", *COMMON),
    default_options(INDM.nll_parts, "probe_kind"),
    ("probes",),
    {"probes": default_options(INDM.nll_parts, "probes")["probes"]},
    measure_trace,
    lambda budget: len(PROBE_KINDS) * len(budget.probes) + 1,
)
