"""From a raw network to the score of a linear SDE's marginals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.sde import LinearSDE, expand

Preconditioning = Literal["none", "gaussian", "drift"]


class NetworkScore(nn.Module):
    """score(z, t) and noise(z, t) = -sigma(t) score(z, t) from a raw network and the SDE it was built for.

    ``preconditioning="none"`` is the published parametrisation: the network sees z. "gaussian" feeds it z at unit
    variance and adds its output to the exact answer for N(0, I) data, noise = b u + a net(u) with u = z / s,
    s^2 = alpha^2 + sigma^2, a = alpha / s, b = sigma / s (the mixed score of Vahdat et al. 2021, arXiv 2106.05931,
    section 3.2): at the noisy end, where likelihood is easily lost, the network has nothing to correct. "drift" lets
    the network put out a = g score, the free function of Huang, Lim and Courville 2021 (arXiv 2106.02808, section 4),
    so that noise = -(sigma / g) a; for VP that is -sqrt(t) a near t = 0, where a has to grow.
    """

    def __init__(self, net: nn.Module, sde: LinearSDE, preconditioning: Preconditioning = "none"):
        super().__init__()
        self.net, self.sde, self.preconditioning = net, sde, preconditioning
        self._sign = -1.0 if net.output == "score_times_sigma" else 1.0

    def _condition(self, t: Tensor) -> Tensor:
        kind = self.net.time_input
        if kind == "time999":
            return 999.0 * t
        # for VE, where alpha = 1, the noise-to-signal ratio is sigma itself, the input of NCSN++
        log_ratio = self.sde.log_ratio(t)
        return log_ratio.exp() if kind == "sigma" else log_ratio

    def noise(self, z: Tensor, t: Tensor) -> Tensor:
        """The noise predicted in z_t, of z's shape; t has shape (B,)."""
        alpha, sigma = self.sde.marginal(t)
        condition = self._condition(t)
        if self.preconditioning == "none":
            return self._sign * self.net(z, condition)
        if self.preconditioning == "drift":
            return -expand(sigma / self.sde.diffusion(t), z) * self.net(z, condition)
        scale = torch.hypot(alpha, sigma)
        a, b = expand(alpha / scale, z), expand(sigma / scale, z)
        u = z / expand(scale, z)
        return b * u + (self._sign * a) * self.net(u, condition)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z), of z's shape."""
        return -self.noise(z, t) / expand(self.sde.marginal(t)[1], z)


def noise_function(score: nn.Module, sde: LinearSDE):
    """noise(z, t) = -sigma score(z, t) of any score; a network's own, where it has one, avoids a round trip."""
    if hasattr(score, "noise"):
        return score.noise
    return lambda z, t: -expand(sde.marginal(t)[1], z) * score(z, t)
