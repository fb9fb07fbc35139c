"""Problems whose every likelihood is known in closed form."""

import math

import torch
from torch import nn

from models.flows import Identity
from models.indm import INDM


class GaussianScore(nn.Module):
    """The exact score of N(mean, std^2 I) data under a linear SDE, plus ``error`` / sigma(t) along every axis."""

    def __init__(self, sde, mean=0.3, std=0.5, error=0.0):
        super().__init__()
        self.sde, self.mean, self.std, self.error = sde, mean, std, error

    def forward(self, z, t):
        alpha, sigma = (v[:, None] for v in self.sde.marginal(t))
        return -(z - alpha * self.mean) / ((alpha * self.std) ** 2 + sigma**2) + self.error / sigma


class AffineFlow(nn.Module):
    """z = scale x + shift: log-determinant D log scale."""

    def __init__(self, scale=1.7, shift=-0.4):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x, generator=None):
        return self.scale * x + self.shift, x.new_full((len(x),), x[0].numel() * math.log(self.scale))

    def inverse(self, z):
        return (z - self.shift) / self.scale


def gaussian_model(sde, dims=3, mean=0.3, std=0.5, error=0.0, flow=None):
    """INDM with an exact score in the latent space of ``flow``; data space holds N(mean, std^2 I) when flow is None."""
    return INDM(sde, GaussianScore(sde, mean, std, error), flow or Identity(), shape=(dims,))


def gaussian_nll(x, mean=0.3, std=0.5):
    """-log N(x; mean, std^2 I), nats (B,)."""
    return -torch.distributions.Normal(mean, std).log_prob(x).sum(1)
