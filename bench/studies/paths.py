"""Chains of Gaussian kernels for the generative SDE of a latent diffusion: path weights and samples.

A grid of N + 1 times from eps to 1 turns forward and reverse diffusion into chains. Given z_0, the *forward* chain is
exact: its noise n = (z - alpha z_0) / sigma is an Ornstein-Uhlenbeck process in lambda = log(sigma / alpha),
n_s = rho n_t + sqrt(1 - rho^2) xi for neighbours s < t at distance d, with rho = e^-d and standard normal xi
independent of z_t, whatever the linear SDE. It can thus be drawn downwards from z_1.

The *backward* kernel from t to s has the mean of q(z_s | z_t, z_0) at the predicted z_0 = (z_t - sigma n_hat) / alpha.
For the exact score that is E[z_s | z_t] without any error of discretisation, because the mean of q is affine in z_0 and
Tweedie's formula gives E[z_0 | z_t]. Its variance is that of q times R = 1 + k^2 E|n_hat - n|^2 / D, where
k^2 = e^{2d} - 1: the uncertainty of z_0 given z_t is added, averaged over the data (the best isotropic variance that
does not depend on z_t; Bao et al. 2022, arXiv 2201.06503, theorem 1, with the model's own error for its estimate).
For Gaussian data of variance c^2 I the kernel is then exact at every d. Since R = 1 + O(d), the chain tends to the
plug-in reverse SDE dz = [f z - g^2 score] dt + g dw as N grows, for any score and any estimate of E|n_hat - n|^2.

With q(z_s | z_t, z_0) = N(mu, V I), z_s = mu + sqrt(V) xi and e = n_hat - n at t, the kernel's mean is
mu - k sqrt(V) e, so that both densities need xi and e only: no small difference of large numbers is formed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from models.noise import Generator, normal
from models.sde import LinearSDE, Noise

LOG_2PI = math.log(2 * math.pi)
_FOCUS = 0.6  # share of the focused steps
_WIDTH = 0.6  # of their law, nats
_TABLE = 20_001  # nodes of its inverse


def ascending_times(sde: LinearSDE, steps: int, std: float | None = None) -> Tensor:
    """steps + 1 times from eps to 1, float64 (steps + 1,) on the CPU: uniform in lambda, or denser where it pays.

    With ``std``, the standard deviation of the latents, three fifths of the steps follow a logistic law in lambda about
    log(std) - 1. A kernel of isotropic variance is exact where the noise hides the data or is finer than all their
    structure: the error of a chain comes from the few nats between, about half of VE's range and a third of VP's.
    """
    low, high = (float(v) for v in sde.log_ratio_range(torch.zeros((), dtype=torch.float64)))
    nodes = np.linspace(low, high, steps + 1)
    if std is not None:
        dense = np.linspace(low, high, _TABLE)
        law = 0.5 * np.tanh((dense - math.log(std) + 1.0) / (2 * _WIDTH))
        share = (dense - low) / (high - low)
        share = (1 - _FOCUS) * share + _FOCUS * (law - law[0]) / (law[-1] - law[0])
        nodes = np.interp(np.linspace(0.0, 1.0, steps + 1), share, dense)
    times = sde.time(torch.from_numpy(nodes))
    times[0], times[-1] = sde.eps, 1.0
    return times


def _squares(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(1)


def _predict(noise: Noise, z: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """The network's prediction at one time, in float64; the network itself runs in ``dtype``."""
    return noise(z.to(dtype), t.to(z.device, dtype).expand(len(z))).double()


@torch.no_grad()
def mean_errors(noise: Noise, sde: LinearSDE, z0: Tensor, times: Tensor, generator: Generator = None) -> Tensor:
    """E|n_hat - n|^2 / D at each of ``times``, averaged over latents z0 (B, ...); float64 (len(times),), on the CPU."""
    clean, errors = z0.double(), []
    for t, alpha, sigma in zip(times, *sde.marginal(times), strict=True):
        n = normal(z0.shape, generator, z0.device, torch.float64)
        error = _predict(noise, float(alpha) * clean + float(sigma) * n, t, z0.dtype) - n
        errors.append(error.square().mean().cpu())
    return torch.stack(errors)


def _log_ratio_of_kernels(error: Tensor, xi: Tensor, step: float, mean_error: float) -> Tensor:
    """log p(z_s | z_t) - log q(z_s | z_t, z_0), nats (B,), for a step of length ``step`` in lambda; see above."""
    square = math.expm1(2 * step)
    spread = 1 + square * mean_error
    dims = xi[0].numel()
    return 0.5 * (_squares(xi) - _squares(xi + math.sqrt(square) * error) / spread - dims * math.log(spread))


def _joint(first: Tensor, second: Tensor, before: float, step: float) -> Tensor:
    """The xi of one step of length ``before`` + ``step`` that two with ``first`` and ``second`` make together.

    n two nodes down is rho' rho n + rho' sqrt(1 - rho^2) first + sqrt(1 - rho'^2) second, rho' of the second step.
    """
    own, earlier = (math.sqrt(-math.expm1(-2 * length)) for length in (step, before))
    return (math.exp(-step) * earlier * first + own * second) / math.sqrt(-math.expm1(-2 * (before + step)))


@torch.no_grad()
def log_weights(
    noise: Noise, sde: LinearSDE, z0: Tensor, times: Tensor, errors: Tensor, generator: Generator = None
) -> tuple[Tensor, Tensor]:
    """log [p(z_0, z_eps, ..., z_1) / q(z_eps, ..., z_1 | z_0)] of one forward path from each row of z0, nats (B,).

    p is the chain from the prior down, with the decoder N((z + sigma^2 score) / alpha, sigma^2 / alpha^2 I) at eps.
    The mean of e^log w is the chain's density of z_0 and the mean of -log w its bound. ``times`` (N + 1,) ascend, N is
    even; ``errors`` (N + 1,) are from :func:`mean_errors`. The second result is for the chain on every other time: the
    same path, so that it costs no evaluation of the network and differs from the first by the discretisation alone.
    Both float64. Raises ValueError for an odd N.
    """
    steps = len(times) - 1
    if steps < 2 or steps % 2:
        raise ValueError(f"times: {len(times)} given; accepted: an odd number, at least 3")
    nodes, alphas, sigmas = sde.log_ratio(times).tolist(), *(v.tolist() for v in sde.marginal(times))
    clean, dims, levels = z0.double(), z0[0].numel(), errors.tolist()

    def draw() -> Tensor:
        return normal(z0.shape, generator, z0.device, torch.float64)

    n = draw()
    z = alphas[-1] * clean + sigmas[-1] * n
    fine = sde.prior_log_prob(z) + 0.5 * _squares(n) + dims * (math.log(sigmas[-1]) + 0.5 * LOG_2PI)
    coarse = fine.clone()
    for i in range(steps, 0, -1):
        error = _predict(noise, z, times[i], z0.dtype) - n
        step, xi = nodes[i] - nodes[i - 1], draw()
        fine += _log_ratio_of_kernels(error, xi, step, levels[i])
        if i % 2 == 0:
            first, double_error = xi, error
        else:
            wide = nodes[i + 1] - nodes[i - 1]
            coarse += _log_ratio_of_kernels(double_error, _joint(first, xi, wide - step, step), wide, levels[i + 1])
        n = math.exp(-step) * n + math.sqrt(-math.expm1(-2 * step)) * xi
        z = alphas[i - 1] * clean + sigmas[i - 1] * n
    error = _predict(noise, z, times[0], z0.dtype) - n
    decoder = -0.5 * _squares(error) - dims * (math.log(sigmas[0] / alphas[0]) + 0.5 * LOG_2PI)
    return fine + decoder, coarse + decoder


@torch.no_grad()
def residual(noise: Noise, sde: LinearSDE, z0: Tensor, draws: int, generator: Generator = None) -> Tensor:
    """E[|n_hat - n|^2 - D] / 2 - D log alpha at eps: what leads from -log p_eps to the data; nats, float64 (B,).

    The residual of ``INDM.nll_parts`` in expectation, by ``draws`` draws of the noise for each z0. Almost all of its
    variance is that of |n|^2, whose mean D is known, because no score can tell noise so small: |n|^2 stands for D here.
    """
    times = torch.full((1,), sde.eps, dtype=torch.float64)
    (alpha,), (sigma,) = (v.tolist() for v in sde.marginal(times))
    clean, total = z0.double(), torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
    for _ in range(draws):
        n = normal(z0.shape, generator, z0.device, torch.float64)
        total += _squares(_predict(noise, alpha * clean + sigma * n, times[0], z0.dtype) - n) - _squares(n)
    return 0.5 * total / draws - z0[0].numel() * math.log(alpha)


@torch.no_grad()
def reverse_chain(
    noise: Noise, sde: LinearSDE, z: Tensor, times: Tensor, errors: Tensor, generator: Generator = None
) -> Tensor:
    """The mean of the decoder at eps after the backward chain from z (B, ...) at t = 1: latents z_0 as z.

    ``times`` and ``errors`` as in :func:`log_weights`. Like the samplers' last step, the decoder adds no noise.
    """
    nodes, alphas, sigmas = sde.log_ratio(times).tolist(), *(v.tolist() for v in sde.marginal(times))
    dtype, z, levels = z.dtype, z.double(), errors.tolist()
    for i in range(len(times) - 1, 0, -1):
        predicted = _predict(noise, z, times[i], dtype)
        step = nodes[i] - nodes[i - 1]
        square = math.expm1(2 * step)
        # z_s = alpha_s z_0 + sigma_s (rho n + sqrt(1 - rho^2) sqrt(R) xi) at the predicted z_0 and n
        spread = math.sqrt(-math.expm1(-2 * step) * (1 + square * levels[i]))
        fresh = normal(z.shape, generator, z.device, torch.float64)
        clean = (z - sigmas[i] * predicted) / alphas[i]
        z = alphas[i - 1] * clean + sigmas[i - 1] * (math.exp(-step) * predicted + spread * fresh)
    return ((z - sigmas[0] * _predict(noise, z, times[0], dtype)) / alphas[0]).to(dtype)
