"""Samplers against the known law of Gaussian data: laws, order of convergence, counted evaluations."""

import math

import pytest
import torch
from analytic import AffineFlow, GaussianScore, gaussian_model

from models.indm import mean_latent
from models.noise import IndexedGenerator
from models.samplers import SAMPLERS, ddim, euler_maruyama, heun, published_ode, published_pc
from models.score.adapter import noise_function
from models.sde import VESDE, VPSDE, SubVPSDE

SDES = [VPSDE(), SubVPSDE(), VESDE()]
MEAN, STD = 0.3, 0.5


def noise_of(sde):
    return noise_function(GaussianScore(sde, MEAN, STD), sde)


@pytest.mark.parametrize("sde", SDES)
# annealed Langevin dynamics mix too slowly for this: tests/test_ncsn.py has their law at any number of steps
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "annealed_langevin"])
def test_samples_have_the_data_law(sde, name):
    model = gaussian_model(sde, dims=2)
    n = 4000
    x = model.sample(n, steps=150, sampler=name, generator=torch.Generator().manual_seed(0), end=1e-3)
    assert abs(float(x.mean()) - MEAN) < 5 * STD / math.sqrt(2 * n) + 0.012
    # discretisation error at 150 steps: the next tests pin it down exactly
    tolerance = {"predictor_corrector": 0.06, "published_pc": 0.06, "euler_maruyama": 0.05}.get(name, 0.03)
    assert float(x.std()) == pytest.approx(STD, rel=tolerance)


def exact_map(sde, z, end):
    """The probability-flow ODE of Gaussian data moves z affinely: standardised positions are constant."""
    one, last = torch.ones(1, dtype=z.dtype), torch.full((1,), end, dtype=z.dtype)
    (a1, s1), (a0, s0) = sde.marginal(one), sde.marginal(last)
    std_1, std_0 = ((a1 * STD) ** 2 + s1**2).sqrt(), ((a0 * STD) ** 2 + s0**2).sqrt()
    z_end = a0 * MEAN + std_0 * (z - a1 * MEAN) / std_1
    return (z_end - s0 * noise_of(sde)(z_end, last.expand(len(z)))) / a0


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2)])
def test_order_of_convergence_to_the_exact_ode(sde, sampler, order):
    end = 1e-3
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * sde.prior_std
    options = {"grid": "log_ratio"} if sampler is ddim else {}
    truth = exact_map(sde, z, end)
    counts = (64, 128, 256) if sampler is ddim else (65, 129, 257)
    errors = [float((sampler(noise_of(sde), sde, z, n, end=end, **options)[0] - truth).abs().max()) for n in counts]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes[-1] == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE()])
def test_euler_maruyama_has_the_law_of_its_own_recursion(sde):
    """For a linear score the chain's mean and variance follow a scalar recursion, exact at any number of steps."""
    steps, end, n = 40, 1e-3, 20_000
    times = torch.linspace(1, end, steps + 1, dtype=torch.float64)
    mean, variance = 0.0, sde.prior_std**2
    for i in range(steps):
        t, h = times[i : i + 1], float(times[i] - times[i + 1])
        alpha, sigma = (float(v) for v in sde.marginal(t))
        total = (alpha * STD) ** 2 + sigma**2
        f, g2 = float(sde.drift(t)), float(sde.diffusion(t)) ** 2
        a = 1 - h * (f + g2 / total)
        mean = a * mean + h * g2 * alpha * MEAN / total
        variance = a**2 * variance + (g2 * h if i + 1 < steps else 0.0)
    z = sde.prior_std * IndexedGenerator(0, "prior", torch.arange(n)).normal((n, 1), dtype=torch.float64)
    x, nfe = euler_maruyama(noise_of(sde), sde, z, steps, IndexedGenerator(0, "noise", torch.arange(n)), end=end)
    assert nfe == steps
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize(
    ("name", "steps", "nfe"),
    [
        ("euler_maruyama", 7, 7),
        ("predictor_corrector", 7, 14),
        ("ddim", 7, 7),
        ("ancestral", 7, 7),
        ("annealed_langevin", 7, 7),
        ("heun", 7, 13),
        ("plugin_sde", 7, 7),
        ("published_pc", 7, 14),
    ],
)
def test_evaluations_are_counted(name, steps, nfe):
    calls = []
    model = gaussian_model(VPSDE(), dims=2)
    model.score.register_forward_hook(lambda *_: calls.append(1))
    model.sample(4, steps=steps, sampler=name, generator=torch.Generator().manual_seed(0))
    assert model.nfe == nfe == len(calls)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sample_depends_on_its_index_alone(name):
    model = gaussian_model(VESDE(), dims=2)
    options = {"convention": "exact"} if name == "published_pc" else {}  # as published it averages over the batch

    def draw(index):
        return model.sample(len(index), steps=9, sampler=name, generator=IndexedGenerator(0, "s", index), **options)

    whole = draw(torch.arange(8))
    parts = torch.cat([draw(torch.arange(3)), draw(torch.arange(3, 8))])
    assert torch.allclose(whole, parts, rtol=0, atol=1e-6)
    assert whole.std() > 0


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", ["euler_maruyama", "predictor_corrector", "ddim", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_stay_finite(sde, name, steps):
    x = gaussian_model(sde, dims=2).sample(16, steps=steps, sampler=name, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(x).all()


def test_ancestral_sampling_is_exact_for_a_known_point():
    """eta = 1 with the score of a point mass ends at the point, whatever the noise on the way."""
    sde = VPSDE()
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise_function(GaussianScore(sde, MEAN, 0.0), sde)
    x, _ = ddim(noise, sde, z, 20, torch.Generator().manual_seed(1), end=1e-3, eta=1.0)
    assert torch.allclose(x, torch.full_like(x, MEAN), atol=1e-6)


def test_unknown_sampler_is_refused_by_name():
    with pytest.raises(ValueError, match="sampler = 'leapfrog': accepted are euler_maruyama"):
        gaussian_model(VPSDE(), dims=2).sample(2, sampler="leapfrog")


# The samplers of INDM's official code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_the_published_ve_sampler_follows_its_table(late):
    """The code's recursion, written with its table sigma_i = smin (smax / smin)^(i / (N - 1)): adjacent differences."""
    sde, steps, snr = VESDE(), 5, 0.16
    score = GaussianScore(sde, MEAN, STD)
    table = 0.01 * 5000 ** torch.linspace(0, 1, steps, dtype=torch.float64)
    z = 50 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"end": 1e-9, "snr": snr, "late_denoising": late}
    found, nfe = published_pc(noise_of(sde), sde, z, steps, torch.Generator().manual_seed(1), **options)
    source = torch.Generator().manual_seed(1)

    def normal():
        return torch.randn(6, 3, generator=source, dtype=torch.float64)

    def at(x, i):
        return score(x, torch.full((6,), i / (steps - 1), dtype=torch.float64))

    for i in reversed(range(steps)):
        if late and not i:
            # g(0)^2 / 2, g^2 = 2 sigma^2 ln(smax / smin): 8.52e-4 for the published CIFAR-10 network
            z = z + 8.5172e-4 * at(z, 0)
            break
        gradient, draw = at(z, i), normal()
        step = 2 * (snr * draw.norm(dim=1).mean() / gradient.norm(dim=1).mean()) ** 2
        z = z + step * gradient + (2 * step).sqrt() * draw
        removed = table[i] ** 2 - (table[i - 1] ** 2 if i else 0)
        z = z + removed * at(z, i)
        z = z + removed.sqrt() * normal() if i else z
    assert torch.allclose(found, z, rtol=1e-6, atol=1e-6)
    assert nfe == (2 * steps - 1 if late else 2 * steps)


def test_the_published_vp_sampler_denoises_by_its_own_formula():
    """From the exact ODE's end, known in closed form, z + g^2 eps score; and latents times the temperature."""
    sde, end = VPSDE(), 1e-3
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    found, _ = published_ode(noise_of(sde), sde, z, end=end, rtol=1e-9, atol=1e-9, temperature=1.05)
    one, last = torch.ones(9, dtype=torch.float64), torch.full((9,), end, dtype=torch.float64)
    (a1, s1), (a0, s0) = sde.marginal(one), sde.marginal(last)
    std_1, std_0 = ((a1 * STD) ** 2 + s1**2).sqrt(), ((a0 * STD) ** 2 + s0**2).sqrt()
    z_end = (a0 * MEAN)[:, None] + (std_0 / std_1)[:, None] * (z - (a1 * MEAN)[:, None])
    beta = 0.1 + 19.9 * end
    expected = 1.05 * (z_end + beta * end * GaussianScore(sde, MEAN, STD)(z_end, last))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()])
def test_the_mean_latent_moves_the_prior(sde):
    flow = AffineFlow()
    model = gaussian_model(sde, dims=2, flow=flow)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = mean_latent(model, [(part, None) for part in x.split(4)])
    expected = sde.marginal(torch.ones(()).double())[0] * (1.7 * x - 0.4).mean(0)
    assert torch.allclose(mean.double(), expected, atol=1e-6)

    def sampled(**options):
        return model.sample(5, 4, "published_pc", torch.Generator().manual_seed(1), convention="exact", **options)

    with pytest.raises(ValueError, match="data_mean = True: prior_mean is missing"):
        sampled(data_mean=True)
    plain = sampled()
    model.prior_mean = torch.tensor([3.0, -1.0])
    assert torch.equal(sampled(), plain)
    moved = sampled(data_mean=True)
    draws, seen = sde.sample_prior, []
    sde.sample_prior = lambda *args, **options: seen.append(draws(*args, **options)) or seen[0] + model.prior_mean
    assert torch.equal(sampled(), moved) and not torch.equal(moved, plain)
    with pytest.raises(ValueError, match="no sample; accepted: one or more"):
        mean_latent(model, [])
    with pytest.raises(ValueError, match="this model's prior has no mean to move"):
        published_ode(noise_of(sde), sde, x, data_mean=True)
