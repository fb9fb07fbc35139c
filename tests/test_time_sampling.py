"""Noise levels for the bound: every proposal and draw estimates one integral, and the default is what it was."""

import math

import pytest
import torch
from analytic import gaussian_model

from models.noise import IndexedGenerator, normal, uniform
from models.options import choose
from models.sde import VESDE, VPSDE, SubVPSDE, expand
from models.time_sampling import DRAWS, PROPOSALS, debiased, debiased_share, importance, log_ratio_rate

DOUBLE = torch.float64
SDES = pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=["vp", "subvp", "ve"])


def ends(sde):
    return (float(v) for v in sde.log_ratio_range(torch.zeros((), dtype=DOUBLE)))


def logistic(log_ratio):
    """A curve that rises from 0 to 1 about lambda = -1, and its integral in lambda."""
    return torch.sigmoid(2 * (log_ratio + 1))


def logistic_integral(low, high):
    return 0.5 * (math.log1p(math.exp(2 * (high + 1))) - math.log1p(math.exp(2 * (low + 1))))


# --- proposals --------------------------------------------------------------------------------------------------------


@SDES
@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
def test_weighted_mean_is_the_integral_over_lambda(sde, name, rising):
    """The midpoint rule in u has no noise: weight times a function of lambda integrates to its closed form."""
    u = (torch.arange(400_000, dtype=DOUBLE) + 0.5) / 400_000
    t, weight = PROPOSALS[name](sde, u)
    low, high = ends(sde)
    value = logistic(sde.log_ratio(t))
    expected = logistic_integral(low, high)
    if not rising:
        value, expected = 1 - value, high - low - expected
    assert t.min() >= sde.eps and t.max() <= 1
    assert float((weight * value).mean()) == pytest.approx(expected, rel=2e-3)


@SDES
@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("draws", DRAWS)
def test_draws_are_unbiased(sde, name, draws):
    u = DRAWS[draws](4000, 8, torch.Generator().manual_seed(0), dtype=DOUBLE)
    assert u.shape == (4000, 8) and u.min() >= 0 and u.max() < 1
    t, weight = PROPOSALS[name](sde, u.flatten())
    means = (weight * logistic(sde.log_ratio(t))).reshape(4000, 8).mean(1)
    expected = logistic_integral(*ends(sde))
    assert abs(float(means.mean()) - expected) < 3 * float(means.std()) / math.sqrt(4000)
    assert float(means.std()) / math.sqrt(4000) < 0.02 * expected


@SDES
@pytest.mark.parametrize("name", PROPOSALS)
def test_float32_agrees_with_float64(sde, name):
    u = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    t, weight = PROPOSALS[name](sde, u)
    exact, exact_weight = PROPOSALS[name](sde, u.double())
    assert t.dtype == weight.dtype == torch.float32
    assert torch.allclose(t.double(), exact, rtol=1e-3)
    assert torch.allclose(weight.double(), exact_weight, rtol=1e-3)


def test_debiased_constants_of_huang_lim_courville():
    """VP (0.1, 20) from time 0 with t_eps = 1e-3: Z, mass below, mean and inverse CDF (baselines, section 4.3)."""
    sde = VPSDE(eps=0.0)
    share, normaliser = debiased_share(sde)
    assert normaliser == pytest.approx(20.256, abs=5e-4)
    assert share == pytest.approx(0.054, abs=5e-4)
    rate = 2 * float(log_ratio_rate(sde, torch.tensor(1e-3, dtype=DOUBLE)))
    assert rate == pytest.approx(1090.56, abs=5e-3)
    u = (torch.arange(200_000, dtype=DOUBLE) + 0.5) / 200_000
    t, weight = debiased(sde, u)
    assert float(t.mean()) == pytest.approx(0.364, abs=5e-4)
    assert float((t < 0.01).double().mean()) == pytest.approx(0.197, abs=5e-4)
    start = math.log(math.expm1(float(sde.integrated_beta(torch.tensor(1e-3, dtype=DOUBLE)))))
    integrated = torch.log1p(torch.exp(normaliser * u + start - rate * 1e-3))
    above = (-0.1 + (0.01 + 2 * 19.9 * integrated).sqrt()) / 19.9
    published = torch.where(u <= share, normaliser * u / rate, above)
    assert torch.allclose(t, published, rtol=1e-9)
    # what their training leaves out: constant above t_eps, so its gradient is the bound's there
    assert torch.allclose(weight[u > share], torch.tensor(normaliser / 2, dtype=DOUBLE))


@SDES
def test_density_of_debiased_is_flat_below_its_floor_and_that_of_importance_above(sde):
    u = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    t = debiased(sde, u)[0]
    share, normaliser = debiased_share(sde)
    assert (t.diff() > 0).all()
    below = t[u < share]
    assert torch.allclose(below.diff(), below.diff()[:1], rtol=1e-6)
    above = t[u > share]
    assert torch.allclose(sde.log_ratio(above).diff(), torch.tensor(normaliser / 2e5, dtype=DOUBLE), rtol=1e-5)


def test_debiased_is_importance_where_nothing_is_held_constant():
    u = torch.rand(500, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    for mine, other in zip(debiased(VPSDE(eps=1e-2), u), importance(VPSDE(eps=1e-2), u), strict=True):
        assert torch.equal(mine, other)
    # for VE lambda is linear in time and all three are one
    for name in PROPOSALS:
        for mine, other in zip(PROPOSALS[name](VESDE(), u), importance(VESDE(), u), strict=True):
            assert torch.allclose(mine, other, rtol=1e-9)


def test_draws_of_an_image_are_its_own():
    for draw in DRAWS.values():
        whole = draw(9, 4, IndexedGenerator(0, "u", torch.arange(9)), dtype=DOUBLE)
        parts = [draw(3, 4, IndexedGenerator(0, "u", torch.arange(9)[k : k + 3]), dtype=DOUBLE) for k in (0, 3, 6)]
        assert torch.equal(whole, torch.cat(parts))
    grid = DRAWS["stratified"](9, 4, torch.Generator().manual_seed(0), dtype=DOUBLE)
    assert torch.allclose(grid.diff(), torch.full((9, 3), 0.25, dtype=DOUBLE)) and grid[:, 0].unique().numel() == 9


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="proposal = 'sobol': accepted are importance, uniform, debiased"):
        choose(PROPOSALS, "proposal", "sobol")
    model, x = gaussian_model(VPSDE()), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="draws = 'grid'"):
        model.nelbo_parts(x, draws="grid")
    with pytest.raises(ValueError, match="proposal = 'sobol'"):
        model.nelbo_parts(x, proposal="sobol")


# --- the bound --------------------------------------------------------------------------------------------------------


def plain_diffusion(model, x, times, generator):
    """The diffusion part as it was before there were options, written out; the default must equal it bit for bit."""
    z0, _ = model.encode(x, generator)
    sde, dims = model.sde, x[0].numel()
    low, high = sde.log_ratio_range(x)
    shift = uniform((len(x), 1), generator, x.device, x.dtype)
    grid = (torch.arange(times, dtype=x.dtype) + shift) / times
    total = x.new_zeros(len(x))
    for k in range(times):
        t = sde.time(low + grid[:, k] * (high - low)).clamp(sde.eps, 1.0)
        alpha, sigma = sde.marginal(t)
        noise = normal(x.shape, generator, x.device, x.dtype)
        predicted = model.noise(expand(alpha, z0) * z0 + expand(sigma, z0) * noise, t)
        share = (alpha.square() / (alpha.square() + sigma.square())).square()
        total += (predicted - noise).flatten(1).square().sum(1) - share * (noise.flatten(1).square().sum(1) - dims)
    return (high - low) * (total / times - dims) - dims * (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))


@SDES
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
def test_defaults_are_what_they_were_bit_for_bit(sde, dtype):
    model = gaussian_model(sde, error=0.2)
    x = torch.randn(37, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for source in (lambda: IndexedGenerator(1, "x", torch.arange(37)), lambda: torch.Generator().manual_seed(3)):
        for times in (1, 5):
            assert torch.equal(
                model.nelbo_parts(x, times, source())["diffusion"], plain_diffusion(model, x, times, source())
            )


def closed_form_diffusion(sde, x, mean=0.3, std=0.5, error=0.2):
    """int (e - D) d lambda - D log alpha(1) / alpha(eps) of `gaussian_model` by the trapezoidal rule, nats (B,)."""
    low, high = ends(sde)
    levels = torch.linspace(low, high, 20_001, dtype=DOUBLE)
    alpha, sigma = sde.marginal(sde.time(levels))
    total = (alpha * std) ** 2 + sigma**2
    offset = (sigma * alpha / total) * (x[..., None] - mean) - error
    values = (offset.square() + (alpha * std).pow(4) / total.square() - 1).sum(1)
    dims = x.shape[1]
    return torch.trapezoid(values, levels) - dims * (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))


def estimates(sde, repeats, times, **options):
    """Diffusion parts (4 images, repeats) of a Gaussian model with a wrong score, and their closed form (4,)."""
    x = torch.tensor([[0.3, 0.3, 0.3], [1.0, -0.5, 0.2], [0.0, 0.9, 0.4], [-0.6, 0.1, 1.1]], dtype=DOUBLE)
    many = x.repeat_interleave(repeats, 0)
    source = IndexedGenerator(0, str(options), torch.arange(len(many)))
    parts = gaussian_model(sde, error=0.2).nelbo_parts(many, times, source, **options)
    return parts["diffusion"].reshape(4, repeats), closed_form_diffusion(sde, x)


@SDES
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("control_variate", [True, False])
def test_every_option_estimates_the_same_bound(sde, proposal, draws, control_variate):
    values, exact = estimates(sde, 3000, 4, proposal=proposal, draws=draws, control_variate=control_variate)
    error = values.std(1) / math.sqrt(3000)
    assert ((values.mean(1) - exact).abs() < 4 * error).all()
    mean_error = float(error.square().sum().sqrt()) / 4
    assert abs(float((values.mean(1) - exact).mean())) < 3 * mean_error


@SDES
def test_variances_are_ordered_as_theory_predicts(sde):
    """Evenly spread times and the control variate each take variance off; far from all of it is left."""

    def variance(**options):
        return float(estimates(sde, 1500, 16, **options)[0].var(1).mean())

    default = variance()
    assert default < 0.6 * variance(draws="independent")
    assert default < 0.5 * variance(control_variate=False)
    if not isinstance(sde, VESDE):
        # the weight near eps, of 1 / t, is what uniform time pays for
        assert variance(proposal="uniform", control_variate=False) > 20 * variance(control_variate=False)


def test_options_do_not_depend_on_the_batch():
    model, x = gaussian_model(VPSDE(), error=0.2), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    for proposal in PROPOSALS:
        for draws in DRAWS:

            def bound(rows, proposal=proposal, draws=draws):
                source = IndexedGenerator(0, "x", torch.arange(7)[rows])
                return model.nelbo(x[rows], 3, source) + sum(
                    model.nelbo_parts(x[rows], 3, source, proposal, draws, False).values()
                )

            whole = bound(slice(0, 7))
            assert torch.allclose(whole, torch.cat([bound(slice(0, 2)), bound(slice(2, 7))]), rtol=1e-5)


def test_integrand_averages_to_the_mean_over_lambda():
    """``integrand`` alone: E ratio (error - control - D) over uniform u, times lambda's span, is the integral."""
    sde, x = VPSDE(), torch.tensor([[0.4, -0.2, 0.9]], dtype=DOUBLE)
    model, low_high = gaussian_model(sde, error=0.2), list(ends(VPSDE()))
    source = torch.Generator().manual_seed(0)
    u = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    noise = torch.randn(len(u), 3, generator=source, dtype=DOUBLE)
    expected = closed_form_diffusion(sde, x) + 3 * (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))
    for proposal in PROPOSALS:
        ratio, error, control = model.integrand(x.expand(len(u), 3), u, noise, proposal)
        drawn = (low_high[1] - low_high[0]) * ratio * (error - control - 3)
        # u is a grid: the times bring no noise, and the standard error over draws is an upper bound
        assert abs(float(drawn.mean() - expected)) < 3 * float(drawn.std()) / math.sqrt(len(u))
        assert abs(float(control.mean())) < 4 * float(control.std()) / math.sqrt(len(u))
