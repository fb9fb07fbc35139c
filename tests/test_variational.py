"""The plug-in reverse SDEs and their bounds (Huang, Lim, Courville 2021): numbers, equivalences, laws."""

import math

import pytest
import torch
from analytic import AffineFlow, GaussianScore, gaussian_model, gaussian_nll

from models.noise import IndexedGenerator
from models.samplers import SAMPLERS, plugin_sde
from models.score.adapter import NetworkScore, noise_function
from models.score.mlp import ScoreMLP
from models.sde import VESDE, VPSDE, SubVPSDE
from models.variational import hutchinson_elbo, negative_elbo

SDES = [VPSDE(), SubVPSDE(), VESDE()]
MEAN, STD, POINT = 0.7, 0.5, 1.1
# baselines.md 4.2: N(0.7, 0.5^2) at x = 1.1, VP; the ODE's 0.5495 holds the prior's mismatch at t = 1
BOUND, PATH_STD = 0.5495, {0.0: 3.3, 0.5: 2.3, 0.9: 0.96}


def source(n, purpose="v"):
    return IndexedGenerator(0, purpose, torch.arange(n))


def exact_noise(sde, mean=MEAN, std=STD):
    return noise_function(GaussianScore(sde, mean, std), sde)


def points(n):
    return torch.full((n, 1), POINT, dtype=torch.float64)


@pytest.mark.parametrize(("weight", "spread"), PATH_STD.items())
def test_published_numbers_of_the_family(weight, spread):
    """Every member of an exact score has the same bound; only its variance differs, and falls with the weight."""
    n, sde = 4000, VPSDE()
    bound = negative_elbo(exact_noise(sde), sde, points(n), weight, 96, source(n))
    assert abs(float(bound.mean()) - BOUND) < 3.5 * float(bound.std()) / math.sqrt(n) + 4e-3
    assert float(bound.std()) == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize("proposal", ["importance", "debiased", "uniform"])
def test_hutchinson_elbo_is_the_bound_without_simulation(proposal):
    n, sde = 20_000, VPSDE()
    bound = hutchinson_elbo(exact_noise(sde), sde, points(n), 16, source(n), proposal=proposal)
    assert abs(float(bound.mean()) - BOUND) < 4 * float(bound.std()) / math.sqrt(n)
    assert float(bound.std()) / math.sqrt(n) < 0.03


@pytest.mark.parametrize("sde", SDES)
def test_hutchinson_elbo_equals_the_denoising_bound_of_a_network(sde):
    """(B) with a divergence and (C) with denoising are one integral, for any score (baselines.md 0.3)."""
    torch.manual_seed(0)
    net = ScoreMLP([2], width=16, depth=1)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    model = gaussian_model(sde, dims=2)
    model.score = NetworkScore(net, sde, "gaussian")
    n = 3000
    x = 0.3 + 0.5 * source(n, "x").normal((n, 2))
    parts = model.nelbo_parts(x, 12, source(n, "denoising"))
    # the denoising bound holds for z_0; its residual turns it into that of z_eps, which the other starts from
    z_eps, _ = model._truncate(x, source(n, "start"))
    ours = hutchinson_elbo(model.noise, sde, z_eps, 12, source(n, "divergence"))
    theirs = parts["prior"] + parts["diffusion"]
    difference = ours - theirs
    # one is at z_eps, one at z_0: the prior and the integral agree in the mean
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(n)
    assert float(difference.std()) / math.sqrt(n) < 0.15


@pytest.mark.parametrize("sde", SDES)
def test_last_member_is_the_normalising_flow_whose_likelihood_is_the_odes(sde):
    """With an exact score, behind a flow, point by point; and that is the data's density."""
    model = gaussian_model(sde, dims=2, mean=0.3, std=0.5, flow=AffineFlow(1.7, -0.4))
    z = 0.3 + 0.5 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (z + 0.4) / 1.7
    bound = sum(model.member_parts(x, 1.0, 128, source(8)).values())
    ode = model.nll(x, rtol=1e-7, atol=1e-7, probes="exact", generator=source(8))
    assert float((bound - ode).abs().max()) < 2e-4
    truth = gaussian_nll(z, 0.3, 0.5) - 2 * math.log(1.7)
    # z_eps is a draw of its own: on average over it the likelihood is the data's
    assert abs(float((bound - truth).mean())) < 0.02


def test_a_probe_estimates_the_last_members_likelihood():
    """Hutchinson's estimate with Rademacher probes of an isotropic Jacobian is exact."""
    model = gaussian_model(VPSDE(), dims=3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    z = model.encode(x)[0]
    exact = negative_elbo(model.noise, model.sde, z, 1.0, 48)
    probe = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(1)).sign()
    assert torch.allclose(negative_elbo(model.noise, model.sde, z, 1.0, 48, probes=probe), exact, atol=1e-3)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_sampler_of_every_member_has_the_data_law(sde, weight):
    n = 8000
    model = gaussian_model(sde, dims=1, mean=MEAN, std=STD)
    x = model.sample(n, steps=64, sampler="plugin_sde", generator=source(n), weight=weight)
    # the prior's own mismatch at t = 1 moves the mean of the deterministic member
    assert abs(float(x.mean()) - MEAN) < 4 * STD / math.sqrt(n) + 0.005
    assert float(x.std()) == pytest.approx(STD, rel=4 / math.sqrt(2 * n) + 0.01)


def test_members_differ_where_the_score_is_wrong():
    """Weight 0 forgets its errors, the ODE keeps them: with a score 1.3 times too steep the spreads part."""
    sde = VPSDE()
    exact = exact_noise(sde)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stds = [
        float(plugin_sde(lambda y, t: 1.3 * exact(y, t), sde, z, 64, source(4000), weight=weight)[0].std())
        for weight in (0.0, 1.0)
    ]
    assert stds[1] < 0.8 * stds[0]


def test_the_last_member_is_deterministic_and_the_others_are_not():
    sde = VPSDE()
    z = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    for weight, equal in ((1.0, True), (0.5, False)):
        first, second = (
            SAMPLERS["plugin_sde"](exact_noise(sde), sde, z, 8, source(50, k), weight=weight) for k in "ab"
        )
        assert torch.equal(first[0], second[0]) is equal
        assert first[1] == 8


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_counted_and_stay_finite(sde, steps):
    z = sde.prior_std * torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    x, nfe = plugin_sde(exact_noise(sde), sde, z, steps, source(50))
    assert nfe == steps and bool(torch.isfinite(x).all()) and float(x.abs().max()) < 10


@pytest.mark.parametrize("sde", SDES)
def test_drift_parametrisation_is_a_equals_g_score(sde):
    """a is what the network puts out: score = a / g and noise = -sigma a / g, whichever head the network has."""
    torch.manual_seed(0)
    net = ScoreMLP([2], width=8, depth=1)
    torch.nn.init.normal_(net.head.weight)
    score = NetworkScore(net, sde, "drift")
    z, t = torch.randn(6, 2), torch.linspace(0.01, 1, 6)
    a = net(z, score._condition(t))
    g, sigma = sde.diffusion(t)[:, None], sde.marginal(t)[1][:, None]
    assert torch.allclose(score(z, t), a / g, rtol=1e-5)
    assert torch.allclose(score.noise(z, t), -sigma * a / g, rtol=1e-5)
    net.output = "score_times_sigma"
    assert torch.equal(NetworkScore(net, sde, "drift").noise(z, t), score.noise(z, t))


def test_unknown_proposal_is_refused():
    with pytest.raises(ValueError, match="proposal = 'halton': accepted are importance, uniform, debiased"):
        hutchinson_elbo(exact_noise(VPSDE()), VPSDE(), points(2), proposal="halton")
