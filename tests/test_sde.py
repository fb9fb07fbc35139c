"""Linear SDEs: closed forms against quadrature, inverses, and the constants of the specification."""

import math

import pytest
import torch

from models.sde import VESDE, VPSDE, SubVPSDE

SDES = [VPSDE(), SubVPSDE(), VESDE(), VESDE(0.02, 8.0)]
TIMES = torch.linspace(1e-4, 1, 57, dtype=torch.float64)


@pytest.mark.parametrize("sde", SDES)
def test_time_inverts_log_ratio(sde):
    assert torch.allclose(sde.time(sde.log_ratio(TIMES)), TIMES, atol=1e-12)
    alpha, sigma = sde.marginal(TIMES)
    assert torch.allclose(sde.log_ratio(TIMES), (sigma / alpha).log(), atol=1e-12)


@pytest.mark.parametrize("sde", SDES)
def test_marginals_solve_the_moment_equations(sde):
    """d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2, by automatic differentiation."""
    t = TIMES.clone().requires_grad_()
    alpha, sigma = sde.marginal(t)
    # VE's alpha is the constant 1, which has no graph: the added zero gives it one
    (d_alpha,) = torch.autograd.grad((alpha + 0 * t).sum(), t, retain_graph=True)
    (d_variance,) = torch.autograd.grad(sigma.square().sum(), t)
    f, g = sde.drift(TIMES), sde.diffusion(TIMES)
    assert torch.allclose(d_alpha, f * alpha.detach(), atol=1e-10)
    assert torch.allclose(d_variance, 2 * f * sigma.detach().square() + g.square(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sde", SDES)
def test_importance_density_is_uniform_in_log_ratio(sde):
    """d lambda / dt = g^2 / (2 sigma^2): the identity behind the importance sampler and the ODE's time variable."""
    t = TIMES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_ratio(t).sum(), t)
    assert torch.allclose(slope, sde.diffusion(TIMES).square() / (2 * sde.marginal(TIMES)[1].square()), rtol=1e-9)


@pytest.mark.parametrize(
    ("sde", "t_min", "expected"),
    [
        (VPSDE(), None, 23.864472),
        (VPSDE(), 1e-3, 19.165),
        (VPSDE(), 1e-2, 16.266),
        (SubVPSDE(), 1e-5, 37.679),
        (SubVPSDE(), 1e-2, 22.484),
        (VESDE(), None, 17.034216),
    ],
)
def test_normaliser_of_importance_time(sde, t_min, expected):
    t, z = sde.importance_time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), t_min)
    assert float(z) == pytest.approx(expected, abs=6e-4)
    assert float(t[0]) == pytest.approx(t_min or sde.eps, rel=1e-6)
    assert float(t[2]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("sde", SDES)
def test_prior_terms(sde):
    torch.manual_seed(0)
    z0 = torch.randn(3, 5, dtype=torch.float64)
    alpha, sigma = sde.marginal(torch.ones(1, dtype=torch.float64))
    draws = alpha * z0 + sigma * torch.randn(200_000, 3, 5, dtype=torch.float64)
    sampled = -sde.prior_log_prob(draws.reshape(-1, 5)).reshape(-1, 3)
    error = sampled.mean(0) - sde.prior_cross_entropy(z0)
    assert (error.abs() < 5 * sampled.std(0) / math.sqrt(len(sampled))).all()
    reference = torch.distributions.Normal(0.0, sde.prior_std).log_prob(z0).sum(1)
    assert torch.allclose(sde.prior_log_prob(z0), reference, atol=1e-9)


@pytest.mark.parametrize("sde", SDES)
def test_transition_composes_to_the_marginal(sde):
    earlier, later = TIMES[:-1], TIMES[1:]
    ratio, variance = sde.transition(earlier, later)
    alpha_0, sigma_0 = sde.marginal(earlier)
    alpha_1, sigma_1 = sde.marginal(later)
    assert torch.allclose(ratio * alpha_0, alpha_1, rtol=1e-12)
    assert torch.allclose(ratio.square() * sigma_0.square() + variance, sigma_1.square(), rtol=1e-12)


def test_float32_keeps_sigma_near_eps():
    """1 - exp(-B) loses 0.6 % of sigma at t = 1e-5 in float32 (specification, quirk A20); -expm1(-B) does not."""
    t = torch.tensor([1e-5])
    right = VPSDE().marginal(t.double())[1]
    assert float(VPSDE().marginal(t)[1] / right) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VPSDE(beta_min=20.0, beta_max=1.0), "beta_max = 1.0: must be greater than beta_min = 20.0"),
        (lambda: VESDE(sigma_min=2.0, sigma_max=1.0), "sigma_max = 1.0: must be greater than sigma_min = 2.0"),
    ],
)
def test_impossible_ranges_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
