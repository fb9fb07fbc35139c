"""Linear forward SDEs dz = f(t) z dt + g(t) dw on [0, 1] with closed-form Gaussian marginals.

Everything a likelihood or a sampler needs follows from two functions of time: ``alpha(t)`` and ``sigma(t)`` with
z_t | z_0 ~ N(alpha z_0, sigma^2 I). The log noise-to-signal ratio ``lambda = log(sigma / alpha)`` satisfies
d lambda = g^2 / (2 sigma^2) dt for every linear SDE, so the likelihood-importance density, proportional to
g^2 / sigma^2 (Song et al. 2021, arXiv 2101.09258, section 5), is *uniform in lambda*. That one identity gives the
importance sampler, its normaliser Z and a time variable in which the probability-flow ODE is smooth.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from models.noise import Generator, normal
from models.options import Fraction, Positive

# noise(z (B, ...), t (B,)) -> the noise predicted in z = z_t, -sigma score, (B, ...)
Noise = Callable[[Tensor, Tensor], Tensor]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """View per-sample ``values`` (B,) so that they broadcast against ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def normal_log_prob(z: Tensor, std: float) -> Tensor:
    """log N(z; 0, std^2 I) of z (B, ...) in nats (B,)."""
    square = z.flatten(1).square().sum(1)
    return -0.5 * (square / std**2 + z[0].numel() * math.log(2 * math.pi * std**2))


class LinearSDE(ABC):
    """A linear SDE on [0, 1], truncated to [eps, 1]. ``t`` has shape (B,); results have its shape and dtype."""

    eps: float
    prior_std: float = 1.0

    @abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of z_t | z_0 ~ N(alpha z_0, sigma^2 I)."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t) of dz = f(t) z dt + g(t) dw."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of dz = f(t) z dt + g(t) dw."""

    @abstractmethod
    def log_ratio(self, t: Tensor) -> Tensor:
        """lambda(t) = log(sigma / alpha), increasing in t."""

    @abstractmethod
    def time(self, log_ratio: Tensor) -> Tensor:
        """The inverse of :meth:`log_ratio`."""

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """log pi(z) in nats (B,), pi = N(0, prior_std^2 I)."""
        return normal_log_prob(z, self.prior_std)

    def prior_cross_entropy(self, z0: Tensor) -> Tensor:
        """-E[log pi(z_1) | z_0] in nats (B,), in closed form: no noise is drawn for it."""
        alpha, sigma = self.marginal(torch.ones((), dtype=z0.dtype, device=z0.device))
        dims = z0[0].numel()
        square = alpha**2 * z0.flatten(1).square().sum(1) + dims * sigma**2
        return 0.5 * (square / self.prior_std**2 + dims * math.log(2 * math.pi * self.prior_std**2))

    def sample_prior(self, shape, generator: Generator = None, device=None, dtype=None) -> Tensor:
        """Draw z_1 ~ pi of the given ``shape``."""
        return self.prior_std * normal(shape, generator, device=device, dtype=dtype)

    def importance_time(self, u: Tensor, t_min: float | None = None) -> tuple[Tensor, Tensor]:
        """Times with density proportional to g^2 / sigma^2 on [t_min, 1] from uniforms ``u`` (B,), and Z.

        Z = int_{t_min}^1 g^2 / sigma^2 dt = 2 (lambda(1) - lambda(t_min)), a scalar tensor.
        """
        low, high = self.log_ratio_range(u, t_min)
        return self.time(low + u * (high - low)).clamp(self.eps if t_min is None else t_min, 1.0), 2 * (high - low)

    def log_ratio_range(self, like: Tensor, t_min: float | None = None) -> tuple[Tensor, Tensor]:
        """(lambda(t_min), lambda(1)) as scalars of ``like``'s dtype and device; t_min defaults to eps."""
        ends = torch.tensor([self.eps if t_min is None else t_min, 1.0], dtype=torch.float64)
        low, high = self.log_ratio(ends).to(like.dtype).to(like.device, non_blocking=True)
        return low, high

    def log_alpha(self, t: float) -> float:
        """log alpha(t) = int_0^t f(s) ds, computed in float64."""
        return float(self.marginal(torch.tensor(t, dtype=torch.float64))[0].log())

    def transition(self, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """(a, v) of z_later | z_earlier ~ N(a z_earlier, v I), exact for every linear SDE."""
        alpha_0, sigma_0 = self.marginal(earlier)
        alpha_1, sigma_1 = self.marginal(later)
        ratio = alpha_1 / alpha_0
        return ratio, (sigma_1.square() - (ratio * sigma_0).square()).clamp_min(0)


class _BetaSDE(LinearSDE):
    """Shared schedule of VP and sub-VP: beta(t) = beta_min + (beta_max - beta_min) t, B(t) its integral."""

    def __init__(self, beta_min: Positive = 0.1, beta_max: Positive = 20.0, eps: Fraction = 1e-5):
        if beta_max <= beta_min:
            raise ValueError(f"beta_max = {beta_max}: must be greater than beta_min = {beta_min}")
        self.beta_min, self.beta_max, self.eps = beta_min, beta_max, eps

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integrated_beta(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time_of(self, integrated: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        # the form 2B / (b + sqrt) keeps full precision near t = 0, where (-b + sqrt) / slope cancels
        return 2 * integrated / (self.beta_min + (self.beta_min**2 + 2 * slope * integrated).sqrt())

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)


class VPSDE(_BetaSDE):
    """Variance preserving: f = -beta/2, g^2 = beta, sigma^2 = 1 - exp(-B) (Song et al. 2021, arXiv 2011.13456)."""

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integrated = self.integrated_beta(t)
        # -expm1 keeps sigma right near eps, where 1 - exp(-B) loses it in float32
        return torch.exp(-0.5 * integrated), (-torch.expm1(-integrated)).sqrt()

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def log_ratio(self, t: Tensor) -> Tensor:
        return 0.5 * torch.expm1(self.integrated_beta(t)).log()

    def time(self, log_ratio: Tensor) -> Tensor:
        # B = log(1 + e^{2 lambda}); log1p and not softplus, whose shortcut for large input costs digits
        return self._time_of(torch.log1p(torch.exp(2 * log_ratio)))


class SubVPSDE(_BetaSDE):
    """Sub-VP: f = -beta/2, g^2 = beta (1 - exp(-2B)), sigma = 1 - exp(-B) (Song et al. 2021, arXiv 2011.13456)."""

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integrated = self.integrated_beta(t)
        return torch.exp(-0.5 * integrated), -torch.expm1(-integrated)

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(-2 * self.integrated_beta(t))).sqrt()

    def log_ratio(self, t: Tensor) -> Tensor:
        return torch.log(2 * torch.sinh(0.5 * self.integrated_beta(t)))

    def time(self, log_ratio: Tensor) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2) has a closed inverse; no bisection is needed
        return self._time_of(2 * torch.asinh(0.5 * torch.exp(log_ratio)))


class VESDE(LinearSDE):
    """Variance exploding: f = 0, sigma(t) = sigma_min (sigma_max / sigma_min)^t, prior N(0, sigma_max^2 I).

    As in score_sde the marginal's standard deviation is sigma(t) itself: at t = 0 the data already carry sigma_min.
    """

    def __init__(self, sigma_min: Positive = 0.01, sigma_max: Positive = 50.0, eps: Fraction = 1e-5):
        if sigma_max <= sigma_min:
            raise ValueError(f"sigma_max = {sigma_max}: must be greater than sigma_min = {sigma_min}")
        self.sigma_min, self.sigma_max, self.eps = sigma_min, sigma_max, eps
        self.prior_std = sigma_max
        self._log_range = math.log(sigma_max / sigma_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.exp(self.log_ratio(t))

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_ratio(t)) * math.sqrt(2 * self._log_range)

    def log_ratio(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min) + t * self._log_range

    def time(self, log_ratio: Tensor) -> Tensor:
        return (log_ratio - math.log(self.sigma_min)) / self._log_range
