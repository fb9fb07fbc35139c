"""NCSN against closed forms: Gaussian data with the exact score, its levels' own recursion, and what it has not."""

import math

import pytest
import torch
from analytic import GaussianScore, gaussian_nll

from models import build
from models.base import NotDefined
from models.ncsn import NCSN
from models.noise import IndexedGenerator, StepRandom
from models.samplers import SAMPLERS, annealed_langevin
from models.score.adapter import noise_function
from models.sde import VESDE, VPSDE, SubVPSDE

MEAN, STD, DIMS = 0.3, 0.5, 2
LOW, HIGH, LEVELS = 0.02, 8.0, 30


def gaussian_ncsn(levels=LEVELS, low=LOW, high=HIGH, **options):
    return NCSN(GaussianScore(VESDE(low, high), MEAN, STD), (DIMS,), levels, low, high, **options)


def source(n, purpose="test"):
    return IndexedGenerator(0, purpose, torch.arange(n))


def data(n):
    return MEAN + STD * source(n, "data").normal((n, DIMS), dtype=torch.float64)


def sigmas(levels, low=LOW, high=HIGH):
    return [low * (high / low) ** (i / (levels - 1)) for i in range(levels)]


def noise_error(sigma):
    """E (noise + sigma score)^2 of the exact score, a dimension."""
    return STD**2 / (STD**2 + sigma**2)


def expected_bound(levels):
    """The bound a dimension, term by term from the score's errors at the levels."""
    sigma = sigmas(levels)
    total = (STD**2 + MEAN**2) / (2 * sigma[-1] ** 2)
    total += sum(0.5 * (b**2 / a**2 - 1) * noise_error(b) for a, b in zip(sigma, sigma[1:], strict=False))
    return total + 0.5 * math.log(2 * math.pi * sigma[0] ** 2) + 0.5 * noise_error(sigma[0])


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def test_chain_bound_of_the_exact_score_is_the_closed_form():
    x = data(20_000)
    parts = gaussian_ncsn().chain_parts(x, source(len(x), "chain"))
    mean, error = mean_and_error(sum(parts.values()))
    assert error < 0.04 * DIMS
    assert abs(mean - DIMS * expected_bound(LEVELS)) < 4 * error


def test_chain_bound_is_that_of_exact_divergences():
    x, model = data(20_000), gaussian_ncsn()
    parts = model.chain.divergences(model.noise, x, HIGH, source(len(x), "levels"))
    assert torch.allclose(parts["prior"], x.square().sum(1) / (2 * HIGH**2))
    mean, error = mean_and_error(parts["diffusion"])
    decoder = 0.5 * math.log(2 * math.pi * LOW**2) + 0.5 * noise_error(LOW)
    expected = expected_bound(LEVELS) - decoder - (STD**2 + MEAN**2) / (2 * HIGH**2)
    assert abs(mean - DIMS * expected) < 4 * error
    assert error < 0.04


def test_bound_nears_the_entropy_with_more_levels():
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    gaps = [expected_bound(levels) - entropy for levels in (10, 100, 1000)]
    assert gaps[0] > 1
    assert gaps[0] > 5 * gaps[1] > 0
    assert gaps[2] < 0.05


def test_loss_of_the_exact_score_is_its_minimum():
    model, n = gaussian_ncsn(), 40_000
    loss, terms = model.level_loss(data(n), StepRandom(0, 0, n))
    expected = sum(0.5 * noise_error(sigma) for sigma in sigmas(LEVELS)) / LEVELS
    assert float(loss) == pytest.approx(expected, rel=0.015)
    assert float(terms["score"]) == float(loss)


def test_embedding_has_the_density_of_the_data():
    """Up to KL(p_1 | prior), which no score can remove."""
    x, model = data(1000), gaussian_ncsn(high=50.0)
    mean, error = mean_and_error(model.nll(x, generator=source(1000), probes="exact") - gaussian_nll(x))
    v, m = (STD**2 + 50.0**2) / 50.0**2, MEAN / 50.0
    assert abs(mean - DIMS * 0.5 * (v + m**2 - 1 - math.log(v))) < 4 * error + 5e-3


def langevin_law(steps, levels, low, high, snr=0.316, alpha=1.0):
    """(mean, variance) of annealed Langevin dynamics on Gaussian data, by the scalar recursion of a linear score."""
    sigma = sigmas(levels, low, high)[::-1]
    mean, variance = 0.0, high**2
    for i in range(steps - 1):
        now = sigma[i * levels // (steps - 1)]
        h = 2 * (snr * now) ** 2
        a = 1 - h / (STD**2 + now**2)
        mean, variance = MEAN + a * (mean - MEAN), a**2 * variance + 2 * h
    kept = STD**2 / (STD**2 + sigma[-1] ** 2)
    return MEAN + kept * (mean - MEAN), kept**2 * variance


@pytest.mark.parametrize("steps", [8, 31, 200])
def test_annealed_langevin_has_the_law_of_its_recursion(steps):
    model, n = gaussian_ncsn(10).double(), 4000
    x = model.sample(n, steps, "annealed_langevin", source(n, "sample"), end=1e-9)
    mean, variance = langevin_law(steps, min(10, steps - 1), LOW, HIGH)
    assert model.nfe == steps
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / (n * DIMS))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / (n * DIMS)))


def test_annealed_langevin_reaches_the_data_with_many_steps():
    """Long enough at every level, the dynamics forget where they began."""
    model, n = gaussian_ncsn(10, low=0.1, high=2.0).double(), 2000
    x = model.sample(n, 300, "annealed_langevin", source(n, "sample"))
    assert abs(float(x.mean()) - MEAN) < 4 * STD / math.sqrt(n * DIMS)
    assert float(x.std()) == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE()])
def test_annealed_langevin_of_other_diffusions_is_that_of_their_noise_ratio(sde):
    """In z / alpha every linear SDE is variance exploding: the same draws take the same path."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([1e-3, 1.0], dtype=torch.float64)
    low, high = (float(v) for v in sde.log_ratio(ends).exp())
    twin = VESDE(low, high)
    y = high * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    alpha = sde.marginal(ends)[0][1]
    results = []
    for process, z, end in ((sde, alpha * y, 1e-3), (twin, y, 1e-12)):
        noise = noise_function(GaussianScore(process, MEAN, STD), process)
        results.append(annealed_langevin(noise, process, z, 60, torch.Generator().manual_seed(1), end, levels=12)[0])
    assert torch.allclose(*results, rtol=1e-5, atol=1e-7)


def test_published_step_size_is_the_default():
    """h = 2e-5 sigma_i^2 / sigma_L^2 with sigma_L = 0.01: one step from a point, whose score vanishes there."""
    n, sde = 20_000, VESDE(0.01, 1.0)
    point = noise_function(GaussianScore(sde, 0.0, 0.0), sde)
    steps = []

    def record(z, t):
        steps.append(z)
        return 0 * point(z, t)

    annealed_langevin(record, sde, torch.zeros(n, 1, dtype=torch.float64), 2, source(n), end=1e-9, levels=1)
    # one level: the smallest
    assert float(steps[1].var()) == pytest.approx(2 * 2e-5, rel=0.04)


def test_what_it_has_not_is_said():
    model = gaussian_ncsn()
    with pytest.raises(NotDefined, match="not defined: annealed Langevin dynamics has no density"):
        model.nelbo(data(4))
    with pytest.raises(NotDefined, match="not a law of grey levels"):
        model.discrete_parts(torch.zeros(4, DIMS, dtype=torch.uint8), 17)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_from_few_steps(name):
    x = gaussian_ncsn().sample(16, 3, name, torch.Generator().manual_seed(0))
    assert torch.isfinite(x).all() and x.shape == (16, DIMS)


def test_scale_of_the_data_shifts_the_bound():
    x = data(2000)
    half = GaussianScore(VESDE(LOW, HIGH), MEAN / 2, STD / 2)
    options = {"shape": (DIMS,), "levels": LEVELS, "sigma_min": LOW, "sigma_max": HIGH}
    scaled = NCSN(half, scale=2.0, **options).chain_parts(x, source(2000))
    small = NCSN(half, **options).chain_parts(x / 2, source(2000))
    assert torch.allclose(sum(scaled.values()), sum(small.values()) + DIMS * math.log(2))


def test_built_from_options():
    options = {"name": "ncsn", "shape": [2], "score": {"name": "mlp", "width": 8, "depth": 1}, "sigma_max": 4.0}
    with torch.device("meta"):
        assert len(build(options | {"levels": 7}).chain) == 7
    model = build(options | {"preconditioning": "gaussian"})
    assert model.chain.level(10)[1] == pytest.approx(4.0) and model.chain.level(1)[1] == pytest.approx(0.01)
    (phase,) = model.phases()
    loss, _ = phase.loss_fn(torch.randn(8, 2), StepRandom(0, 0, 8))
    loss.backward()
    assert all(p.grad is not None for p in phase.parameters["score"])
