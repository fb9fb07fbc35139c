"""Problems whose every likelihood is known in closed form: one-number versions of those in bench.truth."""

from __future__ import annotations

import math

from bench.truth.maps import AffineMap
from bench.truth.problems import GaussianScore as _GaussianScore
from models.flows import Identity
from models.indm import INDM


class GaussianScore(_GaussianScore):
    """The exact score of N(mean, std^2 I) data under a linear SDE, plus ``error`` / sigma(t) along every axis."""

    def __init__(self, sde, mean=0.3, std=0.5, error=0.0):
        super().__init__(sde, mean, std**2, shift=-error)


class AffineFlow(AffineMap):
    """z = scale x + shift: log-determinant D log scale."""

    def __init__(self, scale=1.7, shift=-0.4):
        super().__init__(scale, shift)
        self.scale = scale


def gaussian_model(sde, dims=3, mean=0.3, std=0.5, error=0.0, flow=None):
    """INDM with an exact score in the latent space of ``flow``; data space holds N(mean, std^2 I) when flow is None."""
    return INDM(sde, GaussianScore(sde, mean, std, error), flow or Identity(), shape=(dims,))


def gaussian_nll(x, mean=0.3, std=0.5):
    """-log N(x; mean, std^2 I), nats (B,)."""
    return 0.5 * ((x - mean).square().sum(1) / std**2 + x.shape[1] * math.log(2 * math.pi * std**2))
