"""Checks that are tests of their own, and that test_mutations runs again with an error planted."""

import math

import pytest
import torch
from analytic import gaussian_model

from bench import statistics
from bench.studies.paths import ascending_times, log_weights
from models.noise import IndexedGenerator
from models.sde import VESDE, VPSDE, SubVPSDE

SDES = {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}
MEAN, STD, ERROR = 0.3, 0.5, 0.1
DIMS = 2


def points(count, purpose="points"):
    source = IndexedGenerator(0, purpose, torch.arange(count))
    return MEAN + STD * source.normal((count, DIMS), dtype=torch.float64)


def check_path_densities(name):
    """The weight of a path is the ratio of its two densities."""
    sde = SDES[name]()
    model, z0 = gaussian_model(sde, DIMS, MEAN, STD, ERROR), points(5)
    times = ascending_times(sde, 6, STD)
    errors = torch.linspace(0.9, 0.2, 7, dtype=torch.float64)

    def source():
        return IndexedGenerator(3, "weights", torch.arange(5))

    measured = log_weights(model.noise, sde, z0, times, errors, source())

    replay = source()
    alpha, sigma = sde.marginal(times)
    path, n = {}, replay.normal(z0.shape, dtype=torch.float64)
    for i in range(6, -1, -1):
        path[i] = alpha[i] * z0 + sigma[i] * n
        if i:
            rho = (sde.log_ratio(times[i - 1]) - sde.log_ratio(times[i])).exp()
            n = rho * n + (1 - rho**2).sqrt() * replay.normal(z0.shape, dtype=torch.float64)

    def gaussian(x, mean, variance):
        return torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).sum(1)

    for result, stride in zip(measured, (1, 2), strict=True):
        clean = path[0] + sigma[0] ** 2 * model.score(path[0], times[:1].expand(5))
        expected = sde.prior_log_prob(path[6]) + gaussian(z0, clean / alpha[0], (sigma[0] / alpha[0]) ** 2)
        expected -= gaussian(path[0], alpha[0] * z0, sigma[0] ** 2)
        for s, t in zip(range(0, 6, stride), range(stride, 7, stride)):
            a, v = sde.transition(times[s], times[t])
            expected -= gaussian(path[t], a * path[s], v)
            clean = (path[t] + sigma[t] ** 2 * model.score(path[t], times[t].expand(5))) / alpha[t]
            # the posterior q(z_s | z_t, z_0) by the rule for Gaussians, its variance raised by R
            variance = 1 / (1 / sigma[s] ** 2 + a**2 / v)
            mean = variance * (alpha[s] * clean / sigma[s] ** 2 + a * path[t] / v)
            raised = 1 + (((sigma[t] * alpha[s]) / (alpha[t] * sigma[s])) ** 2 - 1) * errors[t]
            expected += gaussian(path[s], mean, variance * raised)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def check_holm():
    """Adjusted p values worked out by hand."""
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to the one before it
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.5, 0.5]) == [1.0, 1.0, 1.0]
    assert statistics.holm([0.04]) == [0.04] and statistics.holm([]) == []
    with pytest.raises(ValueError, match=r"p_values\[1\]"):
        statistics.holm([0.1, math.nan])
