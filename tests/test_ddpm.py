"""DDPM against closed forms: Gaussian data with the exact denoiser, levels of a known law, its chain's recursion."""

import math

import pytest
import torch
from analytic import GaussianScore, gaussian_nll
from torch import nn

from bench.data import dequantise, quantise
from models import build
from models.base import NotDefined
from models.ddpm import DDPM, ddpm_chain, discretised_log_prob, level_centres
from models.noise import IndexedGenerator, StepRandom
from models.sde import VPSDE, expand

MEAN, STD, DIMS, STEPS = 0.3, 0.5, 2, 40
VARIANCES = ("fixed_large", "fixed_small")


def gaussian_ddpm(steps=STEPS, **options):
    return DDPM(GaussianScore(VPSDE(), MEAN, STD), (DIMS,), steps, **options)


def source(n, purpose="test"):
    return IndexedGenerator(0, purpose, torch.arange(n))


def data(n):
    return MEAN + STD * source(n, "data").normal((n, DIMS), dtype=torch.float64)


def schedule(steps):
    """(beta, alpha_bar, beta_tilde) as plain lists; beta_tilde of the first step is that of the second."""
    beta = [(0.1 + 19.9 * i / (steps - 1)) / steps for i in range(steps)]
    bars, bar = [], 1.0
    for value in beta:
        bar *= 1 - value
        bars.append(bar)
    tilde = [beta[i] * (1 - bars[i - 1]) / (1 - bars[i]) for i in range(1, steps)]
    return beta, bars, [tilde[0], *tilde]


def noise_error(bar):
    """E (noise - noise_hat)^2 of the exact denoiser, a dimension."""
    return bar * STD**2 / (bar * STD**2 + 1 - bar)


def expected_bound(steps, variance):
    """(prior, diffusion, decoder) a dimension, from Ho et al.'s weights of |noise - noise_hat|^2."""
    beta, bars, tilde = schedule(steps)
    prior = 0.5 * (1 - bars[-1] + bars[-1] * (STD**2 + MEAN**2) - 1 - math.log(1 - bars[-1]))
    diffusion = 0.0
    for t in range(1, steps):
        v = beta[t] if variance == "fixed_large" else tilde[t]
        diffusion += beta[t] ** 2 / (2 * v * (1 - beta[t]) * (1 - bars[t])) * noise_error(bars[t])
        diffusion += 0.5 * (tilde[t] / v - 1 - math.log(tilde[t] / v))
    decoder = (1 - bars[0]) / bars[0]
    point = decoder * noise_error(bars[0])
    return prior, diffusion, 0.5 * (math.log(2 * math.pi * decoder) + point / decoder)


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def test_published_schedule_and_its_times():
    chain = ddpm_chain(1000)
    assert float(1 - chain.alpha[0] ** 2) == pytest.approx(1e-4, rel=1e-9)
    # 1 - beta_N of the last step is the ratio of the last two alpha_bars
    assert float(1 - (chain.alpha[-1] / chain.alpha[-2]) ** 2) == pytest.approx(0.02, rel=1e-9)
    assert torch.allclose(chain.alpha.square() + chain.sigma.square(), torch.ones(1000, dtype=torch.float64))
    alpha, sigma = VPSDE().marginal(chain.times)
    assert torch.allclose(alpha, chain.alpha, rtol=1e-9) and torch.allclose(sigma, chain.sigma, rtol=1e-9)
    assert abs(float(chain.times[499]) - 0.5) < 0.01 and float(chain.times[-1]) < 1.01


@pytest.mark.parametrize("variance", VARIANCES)
def test_chain_bound_of_the_exact_denoiser_is_the_closed_form(variance):
    x = data(20_000)
    parts = gaussian_ddpm(reverse_variance=variance).chain_parts(x, source(len(x), "chain"))
    mean, error = mean_and_error(sum(parts.values()))
    assert error < 0.03 * DIMS
    assert abs(mean - DIMS * sum(expected_bound(STEPS, variance))) < 4 * error
    # and it is a bound: above the entropy, which it nears with more steps
    assert DIMS * sum(expected_bound(STEPS, variance)) > float(gaussian_nll(x).mean())


@pytest.mark.parametrize("variance", VARIANCES)
def test_divergences_are_the_published_weights(variance):
    """The form with exact divergences has the chain bound's expectation, part by part, and less variance."""
    x, model = data(20_000), gaussian_ddpm(reverse_variance=variance)
    parts = model.chain.divergences(model.noise, x, 1.0, source(len(x), "levels"))
    for name, expected in zip(("prior", "diffusion"), expected_bound(STEPS, variance), strict=False):
        mean, error = mean_and_error(parts[name])
        assert abs(mean - DIMS * expected) < 4 * error + 1e-12
        assert error < 0.05


def test_bound_nears_the_entropy_with_more_steps():
    """For fixed_large as 1 / N. At the first levels, where data are flat, fixed_small never has the right variance."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    large, small = ([sum(expected_bound(steps, v)) - entropy for steps in (50, 200, 800)] for v in VARIANCES)
    assert large[0] / large[1] == pytest.approx(4, rel=0.1) and large[1] / large[2] == pytest.approx(4, rel=0.1)
    assert 0 < large[2] < 0.002
    assert min(small) > 0.4


def test_loss_of_the_exact_denoiser_is_its_minimum():
    model, n = gaussian_ddpm(), 40_000
    loss, terms = model.simple_loss(data(n), StepRandom(0, 0, n))
    expected = sum(noise_error(bar) for bar in schedule(STEPS)[1]) / STEPS
    assert float(loss) == pytest.approx(expected, rel=0.015)
    assert float(terms["score"]) == float(loss)
    worse = DDPM(GaussianScore(VPSDE(), MEAN, STD, error=0.1), (DIMS,), STEPS)
    # the error of 0.1 in the predicted noise is independent of the noise
    assert float(worse.simple_loss(data(n), StepRandom(0, 0, n))[0]) == pytest.approx(float(loss) + 0.01, abs=2e-3)


@pytest.mark.parametrize("steps", [STEPS, 7])
@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_samples_have_the_law_of_their_recursion(variance, steps):
    model, n = gaussian_ddpm(reverse_variance=variance), 20_000
    _, bars, _ = schedule(STEPS)
    kept = [bars[round(1 + (STEPS - 1) * k / (steps - 1)) - 1] for k in range(steps)]
    mean, spread = 0.0, 1.0
    for i in reversed(range(steps)):
        bar, before = kept[i], kept[i - 1] if i else 1.0
        beta = 1 - bar / before
        # the score -(z - alpha m) / total of the marginal in Ho's mean (z + beta score) / sqrt(1 - beta)
        total = bar * STD**2 + 1 - bar
        mean = (mean - beta * (mean - math.sqrt(bar) * MEAN) / total) / math.sqrt(1 - beta)
        added = beta if variance == "fixed_large" else beta * (1 - before) / (1 - bar)
        spread = ((1 - beta / total) ** 2 * spread) / (1 - beta) + (added if i else 0.0)
    x = model.double().sample(n, steps, "ancestral", source(n, "sample"))
    assert model.nfe == steps
    assert x.dtype == torch.float64 and x.shape == (n, DIMS)
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(spread / (n * DIMS))
    assert float(x.var()) == pytest.approx(spread, rel=4 * math.sqrt(2 / (n * DIMS)))


def test_evaluations_are_counted_and_samples_depend_on_their_index_alone():
    model, calls = gaussian_ddpm(), []
    model.score.register_forward_hook(lambda *_: calls.append(1))
    whole = model.sample(8, 9, "ancestral", IndexedGenerator(0, "s", torch.arange(8)))
    assert model.nfe == 9 == len(calls)
    part = model.sample(5, 9, "ancestral", IndexedGenerator(0, "s", torch.arange(3, 8)))
    assert torch.allclose(whole[3:], part, rtol=0, atol=1e-12)


def test_ancestral_sampling_beyond_the_chain_is_not_defined():
    with pytest.raises(NotDefined, match="the chain has 40 levels, asked for 41 steps"):
        gaussian_ddpm().sample(2, 41, "ancestral")
    assert gaussian_ddpm().sample(2, 1, "ancestral").shape == (2, DIMS)


def test_options_that_the_chain_has_not_are_not_dropped():
    model = gaussian_ddpm()
    plain = model.sample(2, 5, "ancestral", source(2))
    for same in (
        {"end": None},
        {"end": model.sde.eps},
        {"reverse_variance": None},
        {"reverse_variance": "fixed_large"},
    ):
        assert torch.equal(model.sample(2, 5, "ancestral", source(2), **same), plain)
    assert not torch.equal(model.sample(2, 5, "ancestral", source(2), reverse_variance="fixed_small"), plain)
    with pytest.raises(NotDefined, match=r"not defined: end = 0\.1; .* ends at its first level"):
        model.sample(2, 5, "ancestral", end=0.1)
    with pytest.raises(NotDefined, match=r"not defined: end = 0\.1, eta = 0\.5; .*the option reverse_variance alone"):
        model.sample(2, 5, "ancestral", end=0.1, eta=0.5)


def test_embedding_has_the_density_of_the_data():
    """The ODE through the continuous levels, from the first level on, with the residual of that level."""
    x, model = data(1000), gaussian_ddpm(100)
    difference = model.nll(x, generator=source(1000), probes="exact") - gaussian_nll(x)
    mean, error = mean_and_error(difference)
    assert model.sde.eps == pytest.approx(float(ddpm_chain(100).times[0]))
    assert abs(mean) < 4 * error + 5e-3
    bound, error = mean_and_error(model.nelbo(x, times=32, generator=source(1000)) - gaussian_nll(x))
    assert abs(bound) < 4 * error + 5e-3


# Grey levels ----------------------------------------------------------------------------------------------------------


def test_level_centres_are_the_middle_of_what_dequantisation_gives():
    levels = torch.arange(17, dtype=torch.uint8)
    centres = level_centres(levels, 17, torch.zeros((), dtype=torch.float64))
    assert torch.allclose(centres, dequantise(levels, torch.full((17,), 0.5, dtype=torch.float64), 17))
    assert torch.equal(quantise(centres, 17), levels)


@pytest.mark.parametrize("std", [0.003, 0.05, 2.0])
def test_discretised_gaussian_sums_to_one(std):
    mean = torch.tensor([-3.0, -1.0, -0.31, 0.0, 0.4, 0.999, 2.0], dtype=torch.float64)
    levels = torch.arange(17)
    mass = torch.stack([discretised_log_prob(k.expand(7), 17, mean, torch.tensor(std)) for k in levels])
    assert torch.isfinite(mass).all()
    assert torch.allclose(mass.exp().sum(0), torch.ones(7, dtype=torch.float64), atol=1e-12)
    # an inner interval against erf
    edges = [(2 * k / 17 - 1 - 0.4) / (std * math.sqrt(2)) for k in (11, 12)]
    assert float(mass[11, 4].exp()) == pytest.approx(0.5 * (math.erf(edges[1]) - math.erf(edges[0])), rel=1e-5)


class CategoricalScore(nn.Module):
    """The exact score of pixels that take the centre of level k with probability p_k, all independent."""

    def __init__(self, sde, probabilities):
        super().__init__()
        self.sde = sde
        count = len(probabilities)
        self.register_buffer("log_p", probabilities.log())
        self.register_buffer("centres", (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1)
        self.type_of = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, z, t):
        alpha, sigma = (expand(v, z) for v in self.sde.marginal(t))
        scaled = (z[..., None] - alpha[..., None] * self.centres) / sigma[..., None]
        mean = ((self.log_p - 0.5 * scaled.square()).softmax(-1) * self.centres).sum(-1)
        return (alpha * mean - z) / sigma**2


def excess(count, steps, variance, n):
    """(mean, standard error) of the bound less -log p of pixels of a known law, nats a pixel; and its entropy."""
    weight = [1.0 + 10.0 * (k == 0) + 0.3 * (k % 3) for k in range(count)]
    p = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    model = DDPM(CategoricalScore(VPSDE(), p), (1, 2, 2), steps, reverse_variance=variance)
    uniforms = source(n, "levels").uniform((n, 1, 2, 2), dtype=torch.float64)
    levels = torch.bucketize(uniforms, p.cumsum(0)).clamp_max(count - 1)
    parts = model.discrete_parts(levels.to(torch.uint8), count, source(n, "bound"))
    assert set(parts) == {"prior", "diffusion", "reconstruction"}
    truth = -p.log()[levels].flatten(1).sum(1)
    return *mean_and_error((sum(parts.values()) - truth) / 4), -float((p * p.log()).sum())


@pytest.mark.parametrize(("count", "steps", "n"), [(17, 100, 600), (256, 30, 700)])
def test_discrete_bound_is_above_the_entropy_of_the_levels(count, steps, n):
    """By little, with the exact denoiser: what two wrong variances and the first level leave."""
    mean, error, entropy = excess(count, steps, "fixed_large", n)
    assert mean > 4 * error
    assert mean < 0.12 * entropy


def test_smaller_variance_needs_more_steps():
    (coarse, _, _), (fine, error, _) = excess(17, 30, "fixed_small", 300), excess(17, 100, "fixed_small", 300)
    assert coarse > fine + 10 * error
    assert fine > excess(17, 100, "fixed_large", 300)[0] + 5 * error


def test_reconstruction_is_the_mass_of_the_decoder():
    """One pixel, a constant denoiser: the decoder's mean is known, so that the term is one difference of erf."""
    model = DDPM(GaussianScore(VPSDE(), 0.2, 0.0), (1, 1, 1), 100)
    decoder = math.sqrt(schedule(100)[2][0])
    levels = torch.arange(17, dtype=torch.uint8).view(17, 1, 1, 1)
    parts = model.discrete_parts(levels, 17, source(17))
    for k in (9, 10, 11):
        low, high = ((2 * edge / 17 - 1 - 0.2) / (decoder * math.sqrt(2)) for edge in (k, k + 1))
        expected = -math.log(0.5 * (math.erf(high) - math.erf(low)))
        assert float(parts["reconstruction"][k]) == pytest.approx(expected, rel=1e-6)


def test_scale_of_the_data_changes_no_probability():
    """Data and levels in units twice as large: the exact denoiser of the halved data, decoded in those of the data."""
    x = data(4000)
    scaled = DDPM(GaussianScore(VPSDE(), MEAN / 2, STD / 2), (DIMS,), STEPS, scale=2.0)
    small = DDPM(GaussianScore(VPSDE(), MEAN / 2, STD / 2), (DIMS,), STEPS)
    a, b = scaled.chain_parts(x, source(4000)), small.chain_parts(x / 2, source(4000))
    assert torch.allclose(sum(a.values()), sum(b.values()) + DIMS * math.log(2))


def test_clipping_is_for_images_and_in_units_of_the_data():
    exact = GaussianScore(VPSDE(), MEAN, STD)
    assert DDPM(exact, (1, 2, 2), 40).chain.clip == 1.0
    assert DDPM(exact, (1, 2, 2), 40, scale=0.5).chain.clip == 2.0
    assert DDPM(exact, (1, 2, 2), 40, clip=False).chain.clip is None
    assert DDPM(exact, (2,), 40).chain.clip is None
    far = DDPM(GaussianScore(VPSDE(), 5.0, 0.1), (1, 2, 2), 40).double()
    assert float(far.sample(8, 10, "ancestral", source(8)).max()) <= 1.0


def test_built_from_options_and_refused_where_a_beta_reaches_one():
    options = {"name": "ddpm", "shape": [2], "score": {"name": "mlp", "width": 8, "depth": 1}}
    with torch.device("meta"):
        assert len(build(options | {"steps": 100}).chain) == 100
    model = build(options | {"steps": 30, "preconditioning": "gaussian"})
    (phase,) = model.phases()
    loss, _ = phase.loss_fn(torch.randn(8, 2), StepRandom(0, 0, 8))
    loss.backward()
    assert all(p.grad is not None for p in phase.parameters["score"])
    with pytest.raises(ValueError, match="steps = 20: must be at least 2 and above beta_max = 20"):
        build(options | {"steps": 20})
