"""How many evaluations the probability-flow ODE takes, and its error, by this solver and by the official code's method.

The official method is SciPy's RK45 in t, one error norm for the whole batch. Between the two lie the variable (t or
lambda = log(sigma / alpha)) and the norm (one for the batch or one an image); all four are measured, and the harness's
other method, Adams' in the variable tau of a Gaussian reference, at 40 to 100 times the tolerance: its error is theirs
at the first for analytic scores, between them for networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.integrators import (
    MAX_STEP,
    dormand_prince,
    flow_field,
    hutchinson_probes,
    likelihood_path,
    probed_trace,
    state_scale,
)
from models.sde import VESDE, VPSDE, LinearSDE, Noise, expand

OFFICIAL, OURS, CLOSE, MIDDLE, ADAMS = (
    "t, one norm, RK45",
    "lambda, a norm an image",
    "tau, a norm an image, Adams at 40 times the tolerance",
    "tau, a norm an image, Adams at 60 times the tolerance",
    "tau, a norm an image, Adams at 100 times the tolerance",
)


@dataclass(frozen=True)
class Problem:
    """Solve from ``z`` (B, ...) at eps to 1 with the ``probes`` (1, B, ...) of the divergence."""

    noise: Noise
    sde: LinearSDE
    z: Tensor
    probes: Tensor


def gaussian(kind: str, count: int = 16, side: int = 4) -> tuple[Problem, Callable[[Tensor], Tensor]]:
    """The specification's analytic cases in float64, and log p_t(z) in nats (B,) at t = 1.

    "vp": data N(0.3, 0.5^2); "ve": N(0.5, 0.25^2), each dimension alone, images 3 x side x side.
    """
    sde, mean, std = (VPSDE(), 0.3, 0.5) if kind == "vp" else (VESDE(), 0.5, 0.25)

    def law(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = sde.marginal(t)
        return expand(alpha * mean, like), expand((alpha * std).square() + sigma.square(), like)

    def noise(z: Tensor, t: Tensor) -> Tensor:
        centre, variance = law(t, z)
        return expand(sde.marginal(t)[1], z) * (z - centre) / variance

    def log_density(z: Tensor, t: float = 1.0) -> Tensor:
        centre, variance = law(torch.full((len(z),), t, dtype=z.dtype), z)
        return -0.5 * ((z - centre).square() / variance + (2 * torch.pi * variance).log()).flatten(1).sum(1)

    source = torch.Generator().manual_seed(0)
    centre, variance = law(torch.full((count,), sde.eps, dtype=torch.float64), torch.zeros(1, 1, 1, 1))
    z = centre + variance.sqrt() * torch.randn((count, 3, side, side), generator=source, dtype=torch.float64)
    # of a diagonal Jacobian random signs give the trace itself
    return Problem(noise, sde, z, hutchinson_probes(1, z.shape, source, dtype=torch.float64)), log_density


def of_network(model: Any, x: Tensor) -> Problem:
    """The ODE of a trained model's latents of ``x`` (B, C, H, W), in the dtype of x."""
    with torch.no_grad():
        z = model.latent(x, torch.Generator().manual_seed(1))
    probes = hutchinson_probes(1, z.shape, torch.Generator().manual_seed(2), dtype=z.dtype)
    return Problem(model.noise, model.sde, z, probes)


def in_time(problem: Problem, rows: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """field(t (B,), z) -> (dz/dt, divergence (B,)): the ODE as published, dz/dt = f z + g^2 noise / (2 sigma)."""
    sde, probes = problem.sde, problem.probes[:, rows]

    def field(t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        f, share = sde.drift(t), sde.diffusion(t).square() / (2 * sde.marginal(t)[1])
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            output = problem.noise(leaf, t)
            trace = probed_trace(output, leaf, probes)
        return expand(f, z) * z + expand(share, z) * output.detach(), f * z[0].numel() + share * trace

    return field


def in_log_ratio(problem: Problem, rows: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The field that the harness solves."""
    return flow_field(problem.noise, problem.sde, problem.probes[:, rows])


@dataclass(frozen=True)
class Solution:
    """z (B, ...) at t = 1, the change of log-density in nats (B,), evaluations of each image (B,)."""

    z: Tensor
    change: Tensor
    evaluations: Tensor

    def log_density(self, at_the_end: Callable[[Tensor], Tensor]) -> Tensor:
        """log p(z_eps), nats (B,), float64."""
        return at_the_end(self.z.double()) + self.change.double()


def solve(problem: Problem, variable: str, norm: str, tolerance: float) -> Solution:
    """Dormand and Prince in ``variable`` ("t", "lambda") with a ``norm`` for "each" image or the "batch"."""
    sde, z = problem.sde, problem.z
    like = torch.zeros(1, dtype=z.dtype)
    if variable == "t":
        ends, start, make = (like + sde.eps, like + 1.0), z, in_time
        scale, shift, longest = 1.0, 0.0, float("inf")
    else:
        scales = state_scale(sde, torch.tensor([sde.eps, 1.0], dtype=torch.float64))[0]
        ends, start, make = sde.log_ratio_range(like), z / scales[0].to(z), in_log_ratio
        scale, longest = float(scales[1]), MAX_STEP
        shift = z[0].numel() * float((scales[1] / scales[0]).log())
    whole = torch.arange(len(z))
    if norm == "each":
        u, change, used = dormand_prince(
            lambda rows: make(problem, rows),
            start,
            ends[0].expand(len(z)),
            ends[1].expand(len(z)),
            tolerance,
            tolerance,
            max_step=longest,
        )
    else:
        field = make(problem, whole)

        # the batch as one image, its divergences as further entries of the state: their sum would hide their errors
        def joint(place: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            images = state[0, : z.numel()].view_as(z)
            slope, divergence = field(place.expand(len(z)), images)
            return torch.cat([slope.flatten(), divergence])[None], place.new_zeros(1)

        state = torch.cat([start.flatten(), start.new_zeros(len(z))])[None]
        out, _, used = dormand_prince(
            lambda rows: joint, state, ends[0].view(1), ends[1].view(1), tolerance, tolerance, max_step=longest
        )
        u, change, used = out[0, : z.numel()].view_as(z), out[0, z.numel() :], used.expand(len(z))
    return Solution(u * scale, change + shift, used)


def solve_rk45(problem: Problem, tolerance: float) -> Solution:
    """SciPy's RK45 in t over the batch as one state, as the official code calls it; the state is float64 there too."""
    from scipy.integrate import solve_ivp

    z, size = problem.z, problem.z.numel()
    field = in_time(problem, torch.arange(len(z)))

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        images = torch.as_tensor(state[:size], dtype=z.dtype, device=z.device).view_as(z)
        drift, divergence = field(z.new_full((len(z),), t), images)
        return np.concatenate([drift.double().flatten().cpu().numpy(), divergence.double().cpu().numpy()])

    start = np.concatenate([z.double().flatten().cpu().numpy(), np.zeros(len(z))])
    found = solve_ivp(slope, (problem.sde.eps, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45")
    end = torch.as_tensor(found.y[:, -1], device=z.device)
    return Solution(end[:size].view_as(z), end[size:], torch.full((len(z),), found.nfev, device=z.device))


def by_the_harness(problem: Problem, solver: str, tolerance: float) -> Solution:
    """As the models' likelihoods are solved."""
    return Solution(
        *likelihood_path(problem.noise, problem.sde, problem.z, problem.probes, tolerance, tolerance, solver)
    )


WAYS: dict[str, Callable[[Problem, float], Solution]] = {
    OFFICIAL: solve_rk45,
    "t, one norm": lambda problem, tolerance: solve(problem, "t", "batch", tolerance),
    "t, a norm an image": lambda problem, tolerance: solve(problem, "t", "each", tolerance),
    "lambda, one norm": lambda problem, tolerance: solve(problem, "lambda", "batch", tolerance),
    OURS: lambda problem, tolerance: by_the_harness(problem, "dopri5", tolerance),
    CLOSE: lambda problem, tolerance: by_the_harness(problem, "adams", 40 * tolerance),
    MIDDLE: lambda problem, tolerance: by_the_harness(problem, "adams", 60 * tolerance),
    ADAMS: lambda problem, tolerance: by_the_harness(problem, "adams", 100 * tolerance),
}


def compare(
    problem: Problem,
    tolerance: float = 1e-5,
    truth: Tensor | None = None,
    at_the_end: Callable[[Tensor], Tensor] | None = None,
    ways: Sequence[str] = tuple(WAYS),
) -> dict[str, dict[str, float]]:
    """Each way's evaluations an image, and its error against ``truth`` (B,) nats if given: nats a dimension."""
    dims, found = problem.z[0].numel(), {}
    for name in ways:
        solution = WAYS[name](problem, tolerance)
        found[name] = {
            "evaluations": float(solution.evaluations.double().mean()),
            "evaluations_max": float(solution.evaluations.max()),
        }
        if truth is not None and at_the_end is not None:
            error = (solution.log_density(at_the_end) - truth.double()).abs() / dims
            found[name] |= {"error_mean": float(error.mean()), "error_max": float(error.max())}
    return found
