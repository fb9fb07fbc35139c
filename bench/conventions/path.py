"""SB-FBSDE's likelihood code: the divergence summed along a noisy path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from bench.conventions.case import Case, Row, dot, noise_trace
from models.indm import INDM
from models.noise import IndexedGenerator, normal


def _grid(case: Case) -> Tensor:
    return torch.linspace(case.model.sde.eps, 1.0, case.steps, dtype=torch.float64)


def walk(case: Case, z0: Tensor, source: IndexedGenerator) -> Tensor:
    """-log pi(z_1) - sum of div v along one Euler path of dz = f z dt + g dw from the clean z_0, nats (B,).

    v = f z - g^2 score / 2; the grid has ``case.steps`` times, whose first SB-FBSDE's code leaves out of the sum.
    """
    model, z = case.model, z0
    probes, total = case.probes(z0, source), torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
    for earlier, later in pairwise(_grid(case)):
        step = float(later - earlier)
        f, g = float(model.sde.drift(earlier)), float(model.sde.diffusion(earlier))
        z = z + f * step * z + g * math.sqrt(step) * normal(z.shape, source, z.device, z.dtype)
        trace = noise_trace(model, z, later.to(z).expand(len(z)), probes)[1]
        total = total + step * _divergence(model, later, trace, z0[0].numel())
    return -model.sde.prior_log_prob(z) - total


def _divergence(model: INDM, t: Tensor, trace: Tensor, dims: int) -> Tensor:
    """div v of the probability-flow velocity from the trace of the noise prediction's Jacobian."""
    g, sigma = model.sde.diffusion(t), model.sde.marginal(t)[1]
    return float(model.sde.drift(t)) * dims + float(0.5 * g**2 / sigma) * trace


@torch.no_grad()
def expected_walk(case: Case, z0: Tensor, source: IndexedGenerator) -> Tensor:
    """The mean of :func:`walk` over paths, nats (B,), without a path and without a derivative.

    Given z_0 the Euler chain is Gaussian, z_k ~ N(a_k z_0, v_k I), so Stein's identity gives the mean trace as
    E[n . noise(a_k z_0 + sqrt(v_k) n)] / sqrt(v_k); n is used with both signs.
    """
    model, dims = case.model, z0[0].numel()
    mean, variance = 1.0, 0.0
    total = torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
    for earlier, later in pairwise(_grid(case)):
        step = float(later - earlier)
        grow = 1 + float(model.sde.drift(earlier)) * step
        mean, variance = grow * mean, grow**2 * variance + float(model.sde.diffusion(earlier)) ** 2 * step
        t, std = later.to(z0).expand(len(z0)), math.sqrt(variance)
        noise = normal(z0.shape, source, z0.device, z0.dtype)
        both = torch.cat([mean * z0 + std * noise, mean * z0 - std * noise])
        odd = 0.5 * torch.sub(*model.noise(both, t.repeat(2)).chunk(2))
        total = total + step * _divergence(model, later, dot(noise, odd) / std, dims)
    square, prior = mean**2 * dot(z0, z0) + dims * variance, model.sde.prior_std**2
    return 0.5 * (square / prior + dims * math.log(2 * math.pi * prior)) - total


def stochastic_path(case: Case) -> Iterator[Row]:
    """The path's value against the ODE's likelihood; closed form: the path's exact mean against the same likelihood."""
    model = case.model

    def one(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        z0, log_det = model.encode(x, case.source("flow", rows))
        found, mean = walk(case, z0, case.source("path", rows)), expected_walk(case, z0, case.source("mean path", rows))
        return found - log_det, mean - log_det

    few = case.x[: case.path_images]
    found, mean = case.per_image(one, few)
    right = case.right_nll[: len(few)]
    yield case.likelihood_row("NLL", right, found, mean - right)
