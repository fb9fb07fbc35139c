"""The exact law of a sampler as it is written: no Monte Carlo, no model of what it does.

With an affine score each sampler is an affine map of the normals it draws. Fed with unit impulses, one call gives that
map column by column, hence mean and covariance of its output, exactly and at any number of steps. Beside it stands a
recursion for mean and variance that shares no code with the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.truth.problems import Truth
from models.noise import IndexedGenerator


class Impulses(IndexedGenerator):
    """Row 0 draws zeros; row 1 + d D + j draws 1 at coordinate j of draw d, and zeros otherwise; D from the shape."""

    def __init__(self, rows: int):
        super().__init__(0, "impulses", torch.arange(rows))
        self.used = 1

    def normal(self, shape, device=None, dtype=None) -> Tensor:
        rows, dims = shape[0], math.prod(shape[1:])
        if self.used + dims > rows:
            raise ValueError(f"{rows} rows are too few: this draw alone needs rows up to {self.used + dims}")
        draw = torch.zeros(rows, dims, device=device, dtype=dtype or torch.get_default_dtype())
        draw[self.used : self.used + dims] = torch.eye(dims, device=device, dtype=draw.dtype)
        self.used += dims
        return draw.reshape(shape)

    def uniform(self, shape, device=None, dtype=None) -> Tensor:
        raise TypeError("uniform numbers have no impulse response; only normal draws enter a law affinely")


def affine_law(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), covariance (D, D)) from the responses (rows, D) to :class:`Impulses`."""
    response = outputs[1:] - outputs[0]
    return outputs[0], response.T @ response


def sampler_law(model, steps: int, sampler: str, **options) -> tuple[Tensor, Tensor]:
    """(mean (D,), covariance (D, D)) of ``model.sample(steps=steps, sampler=sampler, **options)``, affine score."""
    draws = 1 + steps * (1 + options.get("corrector_steps", 1))
    if sampler in ("heun", "ode") or (sampler == "ddim" and not options.get("eta")):
        draws = 1  # the prior's
    rows = 1 + draws * model.dims
    outputs = model.sample(rows, steps=steps, sampler=sampler, generator=Impulses(rows), **options)
    return affine_law(outputs.flatten(1))


def recursion(
    truth: Truth,
    sampler: str,
    steps: int,
    end: float,
    grid: str = "time",
    eta: float = 0.0,
    snr: float = 0.16,
    corrector_steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a sampler for Gaussian data by one recursion an axis, in the process's textbook terms.

    Noise prediction on an axis: noise_hat = p z + q with p = scale sigma / v, v = alpha^2 c + sigma^2.
    """
    process, c = truth.process, truth.values
    if sampler == "heun":
        times = process.grid("log_ratio", max(steps - 1, 1), end)
    else:
        times = process.grid(grid, steps, end)
    mean, variance = torch.zeros_like(c), torch.full_like(c, process.prior_std**2)

    def prediction(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha(t), process.sigma(t)
        p = truth.scale * sigma / (alpha**2 * c + sigma**2)
        return p, truth.shift - p * alpha * truth.mean

    def move(gain, offset, fresh=0.0) -> None:
        nonlocal mean, variance
        mean, variance = gain * mean + offset, gain**2 * variance + fresh

    step = _STEPS[sampler]
    last = steps - 1 if sampler != "heun" else max(steps - 1, 1)
    settings = {"eta": eta, "snr": snr, "corrector_steps": corrector_steps}
    for i in range(steps if sampler != "heun" else steps - 1):
        step(process, prediction, move, times[i], times[i + 1], i + 1 == steps, settings)
    if sampler == "heun":
        _denoise(process, prediction, move, times[last] if steps > 1 else times[0])
    basis = truth.gaussian.basis
    return basis @ mean, basis @ torch.diag(variance) @ basis.T


Prediction = Callable[[Tensor], tuple[Tensor, Tensor]]


def _denoise(process, prediction: Prediction, move, t: Tensor) -> None:
    (p, q), alpha, sigma = prediction(t), process.alpha(t), process.sigma(t)
    move((1 - sigma * p) / alpha, -sigma * q / alpha)


def _euler_maruyama(process, prediction: Prediction, move, t, t_next, is_last, settings) -> None:
    (p, q), h = prediction(t), t - t_next
    pull = process.diffusion(t) ** 2 / process.sigma(t)
    move(1 - h * process.drift(t) - h * pull * p, -h * pull * q, 0.0 if is_last else process.diffusion(t) ** 2 * h)


def _predictor_corrector(process, prediction: Prediction, move, t, t_next, is_last, settings) -> None:
    (p, q), sigma = prediction(t), process.sigma(t)
    langevin = 2 * (settings["snr"] * sigma) ** 2
    for _ in range(settings["corrector_steps"]):
        move(1 - langevin * p / sigma, -langevin * q / sigma, 2 * langevin)
    ratio = process.alpha(t) / process.alpha(t_next)
    fresh = sigma**2 - (ratio * process.sigma(t_next)) ** 2
    move(2 - ratio - fresh / sigma * p, -fresh / sigma * q, 0.0 if is_last else fresh)


def _ddim(process, prediction: Prediction, move, t, t_next, is_last, settings) -> None:
    if is_last:
        return _denoise(process, prediction, move, t)
    (p, q), alpha, sigma = prediction(t), process.alpha(t), process.sigma(t)
    alpha_next, sigma_next = process.alpha(t_next), process.sigma(t_next)
    # Song, Meng, Ermon 2021, eq. 16, with their alpha the square of this one
    fresh = (settings["eta"] * sigma_next / sigma) ** 2 * (sigma**2 - (alpha / alpha_next * sigma_next) ** 2)
    kept = (sigma_next**2 - fresh).sqrt()
    towards = kept - alpha_next * sigma / alpha
    move(alpha_next / alpha + towards * p, towards * q, fresh)


def _heun(process, prediction: Prediction, move, t, t_next, is_last, settings) -> None:
    """Trapezoidal rule after an Euler predictor, in u = z / s, s^2 = alpha^2 + sigma^2, over lambda."""

    def field(at: Tensor) -> tuple[Tensor, Tensor]:  # du / dlambda = b (noise_hat(s u) - b u)
        scale = torch.hypot(process.alpha(at), process.sigma(at))
        (p, q), b = prediction(at), process.sigma(at) / scale
        return b * (p * scale - b), b * q

    def level(at: Tensor) -> Tensor:
        return (process.sigma(at) / process.alpha(at)).log()

    h = level(t_next) - level(t)
    (a_0, b_0), (a_1, b_1) = field(t), field(t_next)
    gain = 1 + 0.5 * h * (a_0 + a_1 * (1 + h * a_0))
    offset = 0.5 * h * (b_0 + a_1 * h * b_0 + b_1)
    before = torch.hypot(process.alpha(t), process.sigma(t))
    after = torch.hypot(process.alpha(t_next), process.sigma(t_next))
    move(gain * after / before, offset * after)


_STEPS = {
    "euler_maruyama": _euler_maruyama,
    "predictor_corrector": _predictor_corrector,
    "ddim": _ddim,
    "heun": _heun,
}
