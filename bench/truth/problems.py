"""Gaussian data under a linear process: every likelihood, bound and generated law in closed form.

For data N(m, C) the noise that the exact score predicts is sigma (alpha^2 C + sigma^2)^-1 (z - alpha m). A known error
may be put on it, noise_hat = scale * exact + shift, under which the generative SDE and ODE stay affine, so that their
laws stay Gaussian. In the eigenbasis of C all is one-dimensional. With y = z / alpha and rho = sigma / alpha both
processes read the same for every linear SDE (Song, Meng, Ermon 2021, arXiv 2010.02502, eq. 14):

    ODE  dy = noise_hat drho,      reverse SDE  dy = 2 noise_hat drho + sqrt(2 rho) dw,      w = y - m, a = c + rho^2:
    noise_hat = scale rho w / a + shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.truth.process import integrate, process_of
from models.noise import IndexedGenerator
from models.sde import LinearSDE, expand

DOUBLE = torch.float64


class GaussianScore(nn.Module):
    """Score of N(mean, C) data at every t, with noise prediction ``scale`` * exact + ``shift``.

    ``values`` and ``basis``: eigenvalues (D,) and eigenvectors (columns) of C; without ``basis`` C is diagonal, and
    scalars stand for all dimensions. Inputs (B, *shape) are flattened to D. The numbers are parameters that ask for
    no gradient, so that a model built on this module knows its type and device.
    """

    def __init__(
        self,
        sde: LinearSDE,
        mean: Tensor | float,
        values: Tensor | float,
        basis: Tensor | None = None,
        scale: float = 1.0,
        shift: Tensor | float = 0.0,
    ):
        super().__init__()
        self.sde, self.scale = sde, scale
        for name, value in (("mean", mean), ("values", values), ("basis", basis), ("shift", shift)):
            value = None if value is None else torch.as_tensor(value, dtype=DOUBLE)
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z), of z's shape; t (B,)."""
        flat = z.flatten(1)
        alpha, sigma = (expand(value, flat) for value in self.sde.marginal(t))
        w = flat - alpha * self.mean.to(flat)
        w = w if self.basis is None else w @ self.basis.to(flat)
        w = w / (alpha**2 * self.values.to(flat) + sigma**2)
        w = w if self.basis is None else w @ self.basis.to(flat).T
        return -(self.scale * w + self.shift.to(flat) / sigma).view_as(z)


class Gaussian:
    """N(mean (D,), covariance (D, D)), float64."""

    def __init__(self, mean: Sequence[float] | Tensor, covariance: Sequence[Sequence[float]] | Tensor):
        self.mean = torch.as_tensor(mean, dtype=DOUBLE)
        self.covariance = torch.as_tensor(covariance, dtype=DOUBLE)
        self.values, self.basis = torch.linalg.eigh(self.covariance)
        if float(self.values[0]) <= 0:
            raise ValueError(f"covariance: smallest eigenvalue {float(self.values[0])}, must be positive")

    @classmethod
    def with_spectrum(cls, mean: Sequence[float], values: Sequence[float]) -> Gaussian:
        """Eigenvalues ``values`` in a basis that mixes all axes: I - 2 v v' / |v|^2 with v = (1, ..., D)."""
        v = torch.arange(1, len(values) + 1, dtype=DOUBLE)
        basis = torch.eye(len(values), dtype=DOUBLE) - 2 * torch.outer(v, v) / v.square().sum()
        return cls(mean, basis @ torch.diag(torch.tensor(values, dtype=DOUBLE)) @ basis.T)

    @property
    def dims(self) -> int:
        """D."""
        return len(self.mean)

    @cached_property
    def entropy(self) -> float:
        """Nats."""
        return 0.5 * float(self.values.log().sum()) + 0.5 * self.dims * (1 + math.log(2 * math.pi))

    def draw(self, count: int, seed: int = 0, purpose: str = "data") -> Tensor:
        """(count, D); row i is a function of (seed, purpose, i)."""
        noise = IndexedGenerator(seed, purpose, torch.arange(count)).normal((count, self.dims), dtype=DOUBLE)
        return self.mean + noise * self.values.sqrt() @ self.basis.T

    def rotated(self, z: Tensor) -> Tensor:
        """z - mean in the eigenbasis, (B, D)."""
        return (z.flatten(1) - self.mean) @ self.basis

    def nll(self, z: Tensor) -> Tensor:
        """-log N(z), nats (B,)."""
        return normal_nll(self.rotated(z), self.values)

    def score(self, sde: LinearSDE, scale: float = 1.0, shift: float = 0.0) -> GaussianScore:
        """The exact score under ``sde``, or one that predicts the noise ``scale`` * exact + ``shift`` on each axis."""
        shift = torch.full((self.dims,), float(shift), dtype=DOUBLE)
        return GaussianScore(sde, self.mean, self.values, self.basis, scale, shift)


def normal_nll(w: Tensor, variances: Tensor) -> Tensor:
    """-log N(w; 0, diag(variances)), nats: (..., D) -> (...)."""
    return 0.5 * (w.square() / variances + variances.log() + math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean: Tensor, variances: Tensor, std: float) -> float:
    """KL(N(mean, diag(variances)) || N(0, std^2 I)), nats."""
    ratio = variances / std**2
    return float(0.5 * (ratio + (mean / std).square() - 1 - ratio.log()).sum())


class Truth:
    """What an estimator must give for Gaussian latents z_0 ~ N(m, C) and noise prediction scale * exact + shift.

    Values are nats an image (n,), expectations over the estimator's own noise and times. ``z`` are latents (n, D).
    """

    def __init__(self, gaussian: Gaussian, sde: LinearSDE, scale: float = 1.0, shift: float = 0.0):
        self.gaussian, self.process, self.scale = gaussian, process_of(sde), scale
        self.mean = gaussian.mean @ gaussian.basis
        self.shift = torch.full((gaussian.dims,), float(shift), dtype=DOUBLE) @ gaussian.basis
        self.values, self.dims = gaussian.values, gaussian.dims

    # Squared error of the noise prediction -------------------------------------------------------------------------

    def _coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c), each (D, Q), of E|noise_hat - noise|^2 = sum_i a d_i^2 + b d_i + c, d = z_0 - m."""
        total = alpha**2 * self.values[:, None] + sigma**2
        slope, shift = self.scale * sigma * alpha / total, self.shift[:, None]
        return slope**2, 2 * slope * shift, shift**2 + (self.scale * sigma**2 / total - 1) ** 2

    def _quadratic(self, z: Tensor | None, coefficients: Sequence[Tensor]) -> Tensor:
        a, b, c = coefficients
        if z is None:  # over the data: E d = 0, E d^2 = c_i
            return (a * self.values + c).sum()
        d = self.gaussian.rotated(z)
        return d.square() @ a + d @ b + c.sum()

    def _integrated(self, z: Tensor | None, weight) -> Tensor:
        process = self.process

        def integrand(t: Tensor) -> Tensor:
            coefficients = self._coefficients(process.alpha(t), process.sigma(t))
            return torch.stack(coefficients) * weight(t)

        return self._quadratic(z, process.over_time(integrand))

    # Bound ---------------------------------------------------------------------------------------------------------

    def score_term(self, z: Tensor | None) -> Tensor:
        """1/2 int g^2 / sigma^2 E|noise_hat - noise|^2 dt: the likelihood-weighted training loss, undivided."""
        process = self.process
        return self._integrated(z, lambda t: 0.5 * (process.diffusion(t) / process.sigma(t)).square())

    def uniform_term(self, z: Tensor | None) -> Tensor:
        """1/2 E|noise_hat - noise|^2 averaged over t in [eps, 1]: the variance-weighted training loss, undivided."""
        return self._integrated(z, lambda t: 0.5 * torch.ones_like(t)) / (1 - self.process.eps)

    def nelbo_parts(self, z: Tensor | None) -> dict[str, Tensor]:
        """Expected prior, diffusion and reconstruction, nats (n,); for ``z`` None scalars, expected over the data too.

        Song et al. 2021, arXiv 2101.09258, theorems 3 and 5: the bound is the prior's cross-entropy plus
        int 1/2 g^2 / sigma^2 (E|noise_hat - noise|^2 - D) dt - D int f dt; the residual is that of the decoder
        N((z + sigma^2 score) / alpha, sigma^2 / alpha^2) at eps.
        """
        process = self.process
        alpha, sigma = process.at(1.0)
        w = self.mean.square() + self.values if z is None else (self.gaussian.rotated(z) + self.mean).square()
        variance = process.prior_std**2
        prior = 0.5 * ((alpha**2 * w + sigma**2) / variance + math.log(2 * math.pi * variance)).sum(-1)
        drift = float(process.over_time(process.drift))
        diffusion = self.score_term(z) - 0.5 * self.dims * process.normaliser() - self.dims * drift
        alpha_eps, sigma_eps = (torch.tensor([value], dtype=DOUBLE) for value in process.at(process.eps))
        error = self._quadratic(z, [value[:, 0] for value in self._coefficients(alpha_eps, sigma_eps)])
        reconstruction = 0.5 * (error - self.dims) - self.dims * math.log(float(alpha_eps))
        return {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}

    @cached_property
    def prior_kl(self) -> float:
        """KL(p_1 || prior), nats: what even an exact score leaves in the bound."""
        alpha, sigma = self.process.at(1.0)
        return gaussian_kl(alpha * self.mean, alpha**2 * self.values + sigma**2, self.process.prior_std)

    @cached_property
    def decoder_gap(self) -> float:
        """E KL(p(z_0 | z_eps) || decoder) of the exact score, nats: the true posterior is narrower than the decoder."""
        shrink = self.values / (self.values + self.process.ratio(self.process.eps) ** 2)
        return float(0.5 * (shrink - 1 - shrink.log()).sum())

    # Generative ODE ------------------------------------------------------------------------------------------------

    def _gain(self, power: float, low: float, high: float) -> Tensor:
        """((c + high^2) / (c + low^2))^power of each axis."""
        return ((self.values + high**2) / (self.values + low**2)) ** power

    def _drifted(self, power: float, low: float, high: float, at: float) -> Tensor:
        """int_low^high ((c + at^2) / (c + rho^2))^power drho of each axis, (D,)."""

        def integrand(s: Tensor) -> Tensor:
            rho = s.exp()
            return ((self.values[:, None] + at**2) / (self.values[:, None] + rho**2)) ** power * rho

        return integrate(integrand, math.log(low), math.log(high))

    @cached_property
    def _flow(self) -> tuple[Tensor, Tensor]:
        """(gain, offset): w_1 = gain w_eps + offset along the ODE from eps to 1."""
        low, high = self.process.ratio(self.process.eps), self.process.ratio(1.0)
        power = 0.5 * self.scale
        return self._gain(power, low, high), self.shift * self._drifted(power, low, high, high)

    def ode_end(self, z_eps: Tensor) -> tuple[Tensor, Tensor]:
        """(z_1 (n, D), log|det dz_1 / dz_eps|, a scalar) of the ODE started at z_eps (n, D)."""
        alpha_eps, _ = self.process.at(self.process.eps)
        alpha, _ = self.process.at(1.0)
        gain, offset = self._flow
        w = gain * self.gaussian.rotated(z_eps / alpha_eps) + offset
        log_det = self.dims * math.log(alpha / alpha_eps) + gain.log().sum()
        return alpha * (self.mean + w) @ self.gaussian.basis.T, log_det

    def ode_nll(self, z: Tensor, noise_std: float = 0.0) -> Tensor:
        """-log density of the ODE at eps in alpha z + noise of ``noise_std``, expected over that noise, nats (n,).

        With ``noise_std`` 0 and ``z`` divided by alpha(eps) it is the density at a point; see :meth:`nll`.
        """
        alpha_eps, _ = self.process.at(self.process.eps)
        alpha, _ = self.process.at(1.0)
        gain, offset = self._flow
        w = self.mean + gain * self.gaussian.rotated(z) + offset
        square = alpha**2 * (w.square() + (gain * noise_std / alpha_eps) ** 2)
        variance = self.process.prior_std**2
        stretch = self.dims * math.log(alpha / alpha_eps) + float(gain.log().sum())
        return 0.5 * (square / variance + math.log(2 * math.pi * variance)).sum(-1) - stretch

    def nll(self, z: Tensor, corrected: bool) -> Tensor:
        """Expected negative log-likelihood of the ODE, nats (n,): from z_eps with the residual, or from z itself."""
        alpha, sigma = self.process.at(self.process.eps)
        if corrected:
            return self.ode_nll(z, sigma) + self.nelbo_parts(z)["reconstruction"]
        return self.ode_nll(z / alpha)

    # Generated laws ------------------------------------------------------------------------------------------------

    def _law(self, w: Tensor, variances: Tensor, end: float, denoise: bool) -> tuple[Tensor, Tensor]:
        rho, (alpha, _) = self.process.ratio(end), self.process.at(end)
        factor, shift = torch.ones_like(variances), torch.zeros_like(variances)
        if denoise:  # E[z_0 | z_t] = y - rho noise_hat
            factor, shift = 1 - self.scale * rho**2 / (self.values + rho**2), -rho * self.shift
            alpha = 1.0
        mean, variances = alpha * (self.mean + factor * w + shift), (alpha * factor) ** 2 * variances
        return self.gaussian.basis @ mean, self.gaussian.basis @ torch.diag(variances) @ self.gaussian.basis.T

    def ode_law(self, end: float, denoise: bool = True) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)) of the ODE's samples from the prior to ``end``, then denoised."""
        low, high = self.process.ratio(end), self.process.ratio(1.0)
        start = (self.process.prior_std / self.process.at(1.0)[0]) ** 2
        gain = self._gain(-0.5 * self.scale, low, high)
        w = -gain * self.mean - self.shift * self._drifted(0.5 * self.scale, low, high, low)
        return self._law(w, gain.square() * start, end, denoise)

    def sde_law(self, end: float, denoise: bool) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D, D)) of the generative SDE's samples from the prior to ``end``."""
        low, high = self.process.ratio(end), self.process.ratio(1.0)
        start = (self.process.prior_std / self.process.at(1.0)[0]) ** 2
        gain = self._gain(-self.scale, low, high)
        w = -gain * self.mean - 2 * self.shift * self._drifted(self.scale, low, high, low)

        def injected(s: Tensor) -> Tensor:  # noise of variance 2 rho drho, contracted from rho on
            rho = s.exp()
            total = self.values[:, None] + rho**2
            return 2 * rho**2 * ((self.values[:, None] + low**2) / total) ** (2 * self.scale)

        fresh = integrate(injected, math.log(low), math.log(high))
        return self._law(w, gain.square() * start + fresh, end, denoise)


def wasserstein(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """2-Wasserstein distance of two Gaussians (mean (D,), covariance (D, D)) whose covariances commute.

    Then it is (|m_a - m_b|^2 + |C_a^1/2 - C_b^1/2|^2)^1/2 (Dowson and Landau 1982), without the cancellation of the
    general formula, so that distances far below 1e-8 are still right.
    """

    def root(matrix: Tensor) -> Tensor:
        values, basis = torch.linalg.eigh(matrix)
        return basis @ torch.diag(values.clamp_min(0).sqrt()) @ basis.T

    return math.sqrt(float((a[0] - b[0]).square().sum() + (root(a[1]) - root(b[1])).square().sum()))
