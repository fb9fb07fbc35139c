"""Samplers of the reverse diffusion: plain functions of one signature.

``sampler(noise, sde, z, steps, generator, end, **options) -> (z_0, nfe)``: ``noise(z, t)`` predicts the noise in
z_t, ``z`` (B, ...) is a draw of the prior at t = 1, ``end`` the smallest time (the truncation), ``z_0`` (B, ...) the
samples, ``nfe`` the network evaluations of one of them, counted by the wrapper that the sampler calls. The last step of
each adds no noise. A sampler's signature is the schema of its options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor

from models.chain import backward_path
from models.integrators import MAX_STEP, dormand_prince, flow_field, state_scale
from models.linear_chain import LinearChain, ReverseVariance
from models.noise import Generator, normal
from models.options import Count, Fraction, Natural, Positive, Probability, require
from models.sde import LinearSDE, Noise, expand
from models.variational import sample_member

Grid = Literal["time", "log_ratio"]


def _counting(sampler: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The sampler, returning (its samples, the evaluations of the noise predictor that it was called with)."""

    @wraps(sampler)
    def counting(noise: Noise, *args: Any, **options: Any) -> tuple[Tensor, int]:
        nfe = 0

        def counted(z: Tensor, t: Tensor) -> Tensor:
            nonlocal nfe
            nfe += 1
            return noise(z, t)

        return sampler(counted, *args, **options), nfe

    return counting


def time_grid(sde: LinearSDE, steps: int, end: float, grid: Grid, like: Tensor) -> Tensor:
    """Times (steps + 1,) from 1 down to ``end``, equidistant in t or in lambda = log(sigma / alpha), as ``like``."""
    if grid == "time":
        return torch.linspace(1.0, end, steps + 1, dtype=torch.float64).to(like)
    low, high = sde.log_ratio_range(torch.zeros((), dtype=torch.float64), end)
    times = sde.time(torch.linspace(float(high), float(low), steps + 1, dtype=torch.float64)).to(like)
    times[0], times[-1] = 1.0, end
    return times


def denoised(sde: LinearSDE, z: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
    """E[z_0 | z_t = z] (B, ...) for the noise predicted at times t (B,), by Tweedie's formula."""
    alpha, sigma = sde.marginal(t)
    return (z - expand(sigma, z) * predicted) / expand(alpha, z)


def _score(noise: Noise, sde: LinearSDE, z: Tensor, t: Tensor) -> Tensor:
    return -noise(z, t) / expand(sde.marginal(t)[1], z)


def _noisy(z: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """z (B, ...) and fresh noise of standard deviation ``std`` (B,)."""
    return z + expand(std, z) * normal(z.shape, generator, z.device, z.dtype)


@_counting
def euler_maruyama(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    grid: Grid = "time",
) -> Tensor:
    """Euler-Maruyama on the reverse SDE dz = [f z - g^2 score] dt + g dw (Song et al. 2021, arXiv 2011.13456)."""
    times = time_grid(sde, steps, end, grid, z)
    for i in range(steps):
        t = times[i].expand(len(z))
        h = times[i] - times[i + 1]
        drift, diffusion, sigma = sde.drift(t), sde.diffusion(t), sde.marginal(t)[1]
        z = z - h * (expand(drift, z) * z + expand(diffusion.square() / sigma, z) * noise(z, t))
        if i + 1 < steps:
            z = _noisy(z, diffusion * h.sqrt(), generator)
    return z


@_counting
def predictor_corrector(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    grid: Grid = "time",
    snr: Positive = 0.16,
    corrector_steps: Natural = 1,
) -> Tensor:
    """Reverse-diffusion predictor, a Langevin corrector before it (Song et al. 2021, arXiv 2011.13456, alg. 2 to 5).

    The corrector's step is 2 (snr sigma)^2, what the published 2 (snr |n| / |score|)^2 tends to in high dimension,
    without its dependence on the batch (norms averaged over it) or on the drawn noise (norms of each sample, whose
    bias is large in few dimensions). The predictor z - (a - 1) z + v score uses the exact transition (a, v) of the
    SDE, which stays finite at any number of steps, where beta dt > 1 breaks the usual discretisation.
    """
    times = time_grid(sde, steps, end, grid, z)
    for i in range(steps):
        t, t_next = times[i].expand(len(z)), times[i + 1].expand(len(z))
        for _ in range(corrector_steps):
            z = _corrector(noise, sde, z, t, snr, generator)
        z, variance = _predictor(noise, sde, z, t, t_next)
        if i + 1 < steps:
            z = _noisy(z, variance.sqrt(), generator)
    return z


def _corrector(
    noise: Noise, sde: LinearSDE, z: Tensor, t: Tensor, snr: float, generator: Generator, official: bool = False
) -> Tensor:
    """z (B, ...) after a Langevin step at times t (B,), of 2 (snr sigma)^2 or ``official`` (:func:`published_pc`)."""
    sigma, score = sde.marginal(t)[1], _score(noise, sde, z, t)
    draw = normal(z.shape, generator, z.device, z.dtype)
    step = 2 * (snr * sigma).square()
    if official:
        # of a network that predicts no noise yet, the published step has no end
        size = torch.maximum(_mean_norm(score), 1e-3 * _mean_norm(draw) / sigma)
        step = 2 * (snr * _mean_norm(draw) / size).square()
    return z + expand(step, z) * score + expand((2 * step).sqrt(), z) * draw


def _predictor(noise: Noise, sde: LinearSDE, z: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and variance (B,) of a reverse-diffusion step from z at times t (B,) to t_next (B,)."""
    a, v = sde.transition(t_next, t)
    return (2 - expand(a, z)) * z - expand(v / sde.marginal(t)[1], z) * noise(z, t), v


def _mean_norm(values: Tensor) -> Tensor:
    """The samples' norms, averaged over the batch, a scalar."""
    return values.flatten(1).norm(dim=1).mean()


@_counting
def ddim(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    grid: Grid = "time",
    eta: Probability = 0.0,
) -> Tensor:
    """Exponential integrator with the noise prediction held over a step (Song, Meng, Ermon 2021, arXiv 2010.02502).

    eta = 0 is exact for the linear part of the probability-flow ODE; eta = 1 is ancestral sampling.
    """
    times = time_grid(sde, steps, end, grid, z)
    for i in range(steps):
        t, t_next = times[i].expand(len(z)), times[i + 1].expand(len(z))
        predicted = noise(z, t)
        clean = denoised(sde, z, t, predicted)
        if i + 1 == steps:
            return clean
        alpha_next, sigma_next = sde.marginal(t_next)
        v = sde.transition(t_next, t)[1]
        fresh = eta * sigma_next / sde.marginal(t)[1] * v.sqrt()
        kept = (sigma_next.square() - fresh.square()).clamp_min(0).sqrt()
        z = expand(alpha_next, z) * clean + expand(kept, z) * predicted
        if eta > 0:
            z = _noisy(z, fresh, generator)
    return z


@_counting
def heun(
    noise: Noise, sde: LinearSDE, z: Tensor, steps: int, generator: Generator = None, end: Fraction = 1e-5
) -> Tensor:
    """Heun's method for the probability-flow ODE at fixed steps in lambda, then one denoising evaluation.

    The last step is the denoising, so ``steps`` steps cost 2 (steps - 1) + 1 evaluations.
    """
    field = flow_field(noise, sde)
    times = time_grid(sde, max(steps - 1, 1), end, "log_ratio", z)
    nodes = sde.log_ratio(times.double()).to(z)
    if steps == 1:
        t = times[0].expand(len(z))
        return denoised(sde, z, t, noise(z, t))
    u = z / state_scale(sde, times[0])[0]
    for i in range(steps - 1):
        h = nodes[i + 1] - nodes[i]
        first = field(nodes[i].expand(len(u)), u)[0]
        second = field(nodes[i + 1].expand(len(u)), u + h * first)[0]
        u = u + 0.5 * h * (first + second)
    z, t = u * state_scale(sde, times[-1])[0], times[-1].expand(len(z))
    return denoised(sde, z, t, noise(z, t))


def ode(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int = 0,
    generator: Generator = None,
    end: Fraction = 1e-5,
    rtol: Positive = 1e-4,
    atol: Positive = 1e-4,
) -> tuple[Tensor, float]:
    """Probability-flow ODE by the adaptive solver with per-sample steps, then one denoising evaluation.

    ``steps`` is ignored: the tolerances decide. ``nfe`` is the mean over samples.
    """
    z, last, nfe = _probability_flow(noise, sde, z, end, rtol, atol)
    return denoised(sde, z, last, noise(z, last)), float(nfe.double().mean()) + 1


def _probability_flow(
    noise: Noise, sde: LinearSDE, z: Tensor, end: float, rtol: float, atol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(z at the end, its time (B,), evaluations (B,)) from z at t = 1 along the probability-flow ODE."""
    high = sde.log_ratio(torch.ones(len(z), dtype=torch.float64)).to(z)
    low = sde.log_ratio(torch.full((len(z),), end, dtype=torch.float64)).to(z)
    ones = torch.ones(len(z), dtype=z.dtype, device=z.device)
    field = flow_field(noise, sde)
    u = z / expand(state_scale(sde, ones)[0], z)
    u, _, nfe = dormand_prince(lambda rows: field, u, high, low, rtol, atol, max_step=MAX_STEP)
    last = sde.time(low)
    return u * expand(state_scale(sde, last)[0], u), last, nfe


def ancestral(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    reverse_variance: ReverseVariance | None = None,
) -> tuple[Tensor, int]:
    """Ancestral sampling of the chain of ``steps`` levels, equidistant in t from 1 to ``end`` (Ho et al. 2020, alg. 2).

    ``reverse_variance``: that of models.linear_chain, by default "fixed_large". A model with levels of its own (DDPM)
    samples on those.
    """
    times = time_grid(sde, max(steps - 1, 1), end, "time", z.new_zeros(1, dtype=torch.float64))[:steps].flip(0).cpu()
    chain = LinearChain(*sde.marginal(times), times).with_variance(reverse_variance)
    return chain_samples(noise, chain, z, generator)


@_counting
def chain_samples(noise: Noise, chain: LinearChain, z: Tensor, generator: Generator = None) -> Tensor:
    """Ancestral samples (z_0 (B, ...), nfe) by all levels of ``chain`` from draws z (B, ...) of its last."""
    return backward_path(z, len(chain), partial(chain.backward, noise), generator)[0]


@_counting
def plugin_sde(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    weight: Probability = 0.0,
) -> Tensor:
    """The member ``weight`` of the plug-in reverse SDEs (Huang, Lim and Courville 2021, arXiv 2106.02808).

    ``steps`` - 1 steps of :func:`models.variational.sample_member` and one evaluation more, for E[z_0 | z_end].
    """
    if steps > 1:
        z, _ = sample_member(noise, sde, z, weight, steps - 1, generator, end=end)
    t = torch.full((len(z),), end if steps > 1 else 1.0, dtype=z.dtype, device=z.device)
    return denoised(sde, z, t, noise(z, t))


@_counting
def annealed_langevin(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    levels: Count | None = None,
    snr: Positive = 0.316,
) -> Tensor:
    """Annealed Langevin dynamics (Song and Ermon 2019, arXiv 1907.05600, algorithm 1), then one denoising evaluation.

    y <- y + h score + sqrt(2 h) n with h = 2 (snr sigma)^2, which at 0.316 is the published 2e-5 sigma^2 / 0.01^2. In
    y = z / alpha every linear SDE is variance exploding with sigma / alpha for sigma. ``steps`` counts all evaluations:
    one denoises (Jolicoeur-Martineau et al. 2021, arXiv 2009.05475), the others are shared out evenly over ``levels``
    noise levels (by default a fifth as many; never more than there are), geometric for VE, from t = 1 to ``end``.
    """
    moves = steps - 1
    used = max(min(levels or -(-moves // 5), moves), 1)
    times = time_grid(sde, max(used - 1, 1), end, "log_ratio", z)
    times = times if used > 1 else times[-1:]
    y = z / expand(sde.marginal(torch.ones_like(times[0]).expand(len(z)))[0], z)
    for i in range(moves):
        t = times[i * used // moves].expand(len(z))
        alpha, sigma = (expand(value, z) for value in sde.marginal(t))
        ratio = sigma / alpha
        draw = normal(z.shape, generator, z.device, z.dtype)
        y = y - 2 * snr**2 * ratio * noise(alpha * y, t) + 2 * snr * ratio * draw
    t = times[-1].expand(len(z))
    z = expand(sde.marginal(t)[0], z) * y
    return denoised(sde, z, t, noise(z, t))


def published_ode(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int = 0,
    generator: Generator = None,
    end: Fraction = 1e-5,
    rtol: Positive = 1e-5,
    atol: Positive = 1e-5,
    temperature: Positive = 1.0,
    data_mean: bool = False,
) -> tuple[Tensor, float]:
    """The VP sampler of INDM's official code: :func:`ode` with its last step, z + g(end)^2 end score, f dropped.

    ``temperature`` multiplies the latents before the flow is inverted, about 0; published: 1.05 for CIFAR-10 in the
    FID setting, else 1. ``data_mean``: the model moves the prior's draws by its ``prior_mean``; no published VP
    configuration does. For VE this last step takes away no noise: g(end)^2 end is 2e-4 of sigma^2.
    """
    _check_moved(data_mean)
    z, last, nfe = _probability_flow(noise, sde, z, end, rtol, atol)
    z = z + expand(sde.diffusion(last).square() * end, z) * _score(noise, sde, z, last)
    return temperature * z, float(nfe.double().mean()) + 1


@_counting
def published_pc(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    steps: int,
    generator: Generator = None,
    end: Fraction = 1e-5,
    snr: Positive = 0.16,
    convention: Literal["official", "exact"] = "official",
    late_denoising: bool = False,
    temperature: Positive = 1.0,
    data_mean: bool = False,
) -> Tensor:
    """The VE sampler of INDM's official code: ``steps`` levels equidistant in t from 1 to ``end``, both included.

    Published: 1000 steps, snr 0.16 for CIFAR-10 and 0.15 for CelebA. At each level a corrector step, then the
    predictor's to the next one; from the last level all noise goes, sigma(end)^2 score.
    ``convention``: a corrector step of 2 (snr |n| / |score|)^2, norms averaged over the batch, so that a sample depends
    on its neighbours ("official"); or of 2 (snr sigma)^2, as in :func:`predictor_corrector` ("exact").
    ``late_denoising`` (the code's pc_denoise): the last corrector and predictor steps are replaced by
    z + g(end)^2 / 2 (end + 1) score, for VE 8.5 sigma_min^2 score; published for CIFAR-10, VE, as is ``data_mean``, for
    which and ``temperature`` see :func:`published_ode`.
    """
    _check_moved(data_mean)
    require(steps >= 1, "steps", steps, "1 or more")
    times = time_grid(sde, max(steps - 1, 1), end, "time", z)[:steps]
    official = convention == "official"
    for i in range(steps - 1):
        t, t_next = times[i].expand(len(z)), times[i + 1].expand(len(z))
        z = _corrector(noise, sde, z, t, snr, generator, official)
        z, variance = _predictor(noise, sde, z, t, t_next)
        z = _noisy(z, variance.sqrt(), generator)
    t = times[-1].expand(len(z))
    if late_denoising:
        z = z + expand(0.5 * (end + 1) * sde.diffusion(t).square(), z) * _score(noise, sde, z, t)
    else:
        z = _corrector(noise, sde, z, t, snr, generator, official)
        z = denoised(sde, z, t, noise(z, t))
    return temperature * z


def _check_moved(data_mean: bool) -> None:
    if data_mean:
        raise ValueError("data_mean = True: this model's prior has no mean to move; accepted: an INDM model, or false")


SAMPLERS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "ddim": ddim,
    "ancestral": ancestral,
    "annealed_langevin": annealed_langevin,
    "heun": heun,
    "ode": ode,
    "plugin_sde": plugin_sde,
    "published_ode": published_ode,
    "published_pc": published_pc,
}
