"""A linear diffusion in discrete time: noise levels, the kernels between them, and the bound of their chain.

Level 0 is the data (alpha = 1, sigma = 0), levels 1..N have z_i | z_0 ~ N(alpha_i z_0, sigma_i^2 I). DDPM is the chain
with alpha^2 + sigma^2 = 1, NCSN the one with alpha = 1; any other linear diffusion seen at N times is one too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.chain import Kernel
from models.noise import Generator, normal
from models.sde import Noise

ReverseVariance = Literal["fixed_large", "fixed_small"]


@dataclass(frozen=True)
class LinearChain:
    """Levels 1..N: ``alpha``, ``sigma`` and the ``times`` at which a continuous network knows them, float64 (N,), CPU.

    Generation is Ho et al. 2020 (arXiv 2006.11239, eq. 7): p(z_{i-1} | z_i) = N(mean of q(z_{i-1} | z_i, z_0) at the
    predicted z_0, v I), where v is that posterior's variance ("fixed_small") or the variance of the forward step
    ("fixed_large"; beta_i for DDPM). They are the best for data that are one point and N(0, I). The posterior of z_0
    has no variance; the decoder p(z_0 | z_1) has (sigma_1 / alpha_1)^2, best for a density that is flat on that scale.

    ``clip``: predicted z_0 are kept in [-clip, clip], the range of the data, where they have one.
    """

    alpha: Tensor
    sigma: Tensor
    times: Tensor
    reverse_variance: ReverseVariance = "fixed_large"
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.alpha)

    def level(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) of level i = 0..N."""
        return (float(self.alpha[i - 1]), float(self.sigma[i - 1])) if i else (1.0, 0.0)

    def transition(self, i: int) -> tuple[float, float]:
        """(a, v) of z_{i+1} | z_i ~ N(a z_i, v I), i = 0..N-1."""
        (alpha, sigma), (alpha_next, sigma_next) = self.level(i), self.level(i + 1)
        ratio = alpha_next / alpha
        return ratio, sigma_next**2 - (ratio * sigma) ** 2

    def strided(self, steps: int) -> LinearChain:
        """The chain of ``steps`` levels spread evenly over 1..N, the last among them (Nichol and Dhariwal 2021).

        ValueError unless 1 <= steps <= N.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps = {steps}: accepted are 1 to {len(self)}, the levels of the chain")
        first = 1 if steps > 1 else len(self)
        index = torch.linspace(first, len(self), steps, dtype=torch.float64, device="cpu").round().long() - 1
        return replace(self, alpha=self.alpha[index], sigma=self.sigma[index], times=self.times[index])

    def with_variance(self, reverse_variance: ReverseVariance | None) -> LinearChain:
        """The same levels with another variance of the reverse steps; None keeps it."""
        return replace(self, reverse_variance=reverse_variance or self.reverse_variance)

    def perturb(self, z0: Tensor, i: int, noise: Tensor) -> Tensor:
        """z_i of the latents z0 (B, ...), i = 0..N."""
        alpha, sigma = self.level(i)
        return alpha * z0 + sigma * noise

    def forward(self, z: Tensor, i: int) -> Kernel:
        """q(z_{i+1} | z_i = z), z (B, ...), i = 0..N-1."""
        ratio, variance = self.transition(i)
        return _kernel(ratio * z, variance)

    def posterior(self, z: Tensor, clean: Tensor, i: int) -> Kernel:
        """q(z_i | z_{i+1} = z, z_0 = clean), both (B, ...), i = 0..N-1."""
        (alpha, sigma), (ratio, variance) = self.level(i), self.transition(i)
        total = self.level(i + 1)[1] ** 2
        return _kernel(ratio * sigma**2 / total * z + alpha * variance / total * clean, variance * sigma**2 / total)

    def denoised(self, noise: Noise, z: Tensor, i: int) -> Tensor:
        """The predicted z_0 of z = z_i (B, ...), i = 1..N: (z_i - sigma_i noise) / alpha_i, clipped."""
        alpha, sigma = self.level(i)
        t = torch.full((len(z),), float(self.times[i - 1]), dtype=z.dtype, device=z.device)
        clean = (z - sigma * noise(z, t)) / alpha
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def backward(self, noise: Noise, z: Tensor, i: int) -> Kernel:
        """p(z_i | z_{i+1} = z), z (B, ...), i = 0..N-1."""
        kernel = self.posterior(z, self.denoised(noise, z, i + 1), i)
        if i == 0:
            return _kernel(kernel.mean, float(self.sigma[0] / self.alpha[0]) ** 2)
        return kernel if self.reverse_variance == "fixed_small" else _kernel(kernel.mean, self.transition(i)[1])

    def divergences(self, noise: Noise, z0: Tensor, prior_std: float, generator: Generator = None) -> dict[str, Tensor]:
        """Parts of the bound but for the decoder's, nats (B,), for latents z0 (B, ...).

        prior: KL(q(z_N | z_0) | N(0, prior_std^2 I)); diffusion: sum over i = 1..N-1 of KL(q(z_i | z_{i+1}, z_0) |
        p(z_i | z_{i+1})) at one z_{i+1} a level, all levels (Ho et al. 2020, eq. 5). With -log p(z_0 | z_1) it has the
        expectation of :func:`models.chain.chain_bound` on these kernels, and less variance: divergences are exact.
        """
        last = _kernel(self.perturb(z0, len(self), torch.zeros_like(z0)), self.level(len(self))[1] ** 2)
        total = torch.zeros(len(z0), dtype=z0.dtype, device=z0.device)
        for i in range(1, len(self)):
            later = self.perturb(z0, i + 1, normal(z0.shape, generator, z0.device, z0.dtype))
            total = total + kl_divergence(self.posterior(later, z0, i), self.backward(noise, later, i))
        return {"prior": kl_divergence(last, _kernel(torch.zeros_like(z0), prior_std**2)), "diffusion": total}


def _kernel(mean: Tensor, variance: float) -> Kernel:
    return Kernel(mean, torch.tensor(variance, dtype=mean.dtype, device=mean.device))


def kl_divergence(q: Kernel, p: Kernel) -> Tensor:
    """KL(q | p) of two isotropic Gaussians, nats (B,)."""
    ratio = q.variance / p.variance
    distance = (q.mean - p.mean).flatten(1).square().sum(1) / p.variance
    return 0.5 * (distance + q.mean[0].numel() * (ratio - 1 - ratio.log()))
