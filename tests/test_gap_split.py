"""The path estimate of the generative SDE's density against laws known in closed form and on a grid."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analytic import AffineFlow, gaussian_model
from mutated_checks import DIMS, ERROR, MEAN, SDES, STD, check_path_densities, points

from bench.data import load, make_dataset
from bench.studies import Context
from bench.studies.gap_split import COLUMNS, measure, path_density
from bench.studies.paths import ascending_times, log_weights, mean_errors, reverse_chain
from models.noise import IndexedGenerator
from models.samplers import time_grid
from models.sde import VESDE, VPSDE, SubVPSDE


def context(model, x):
    data = make_dataset("gaussian", None, x, x)
    run = SimpleNamespace(seed=0, evaluate=SimpleNamespace(images=None, rtol=1e-5, atol=1e-5))
    return Context(model, run, data, torch.device("cpu"))


def table(rows, grid=None):
    """Column -> array over images, of one grid."""
    grid = max(row["steps"] for row in rows) if grid is None else grid
    kept = [row for row in rows if row["steps"] == grid]
    return {name: np.array([row[name] for row in kept]) for name in COLUMNS if name != "status"}


def generated_law(sde, error):
    """(mean, std) of each coordinate of the decoded plug-in reverse SDE with score s + error / sigma, prior N(0, P I).

    With S^2 = alpha^2 STD^2 + sigma^2, the deviation of the mean from alpha MEAN obeys
    d' = (f + g^2 / S^2) d - g^2 error / sigma in time, and S^2 / alpha solves the homogeneous equation. The variance's
    deviation from S^2 obeys the homogeneous equation at twice the rate. With x = sigma / alpha and
    g^2 dt = 2 sigma^2 d log x, the source integrates to 2 error / STD atan(x / STD).
    """
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    alpha, sigma = (v.numpy() for v in sde.marginal(ends))
    square = (alpha * STD) ** 2 + sigma**2
    scale, x = square / alpha, sigma / alpha
    source = 2 * error / STD * (math.atan(x[1] / STD) - math.atan(x[0] / STD))
    mean = alpha[0] * MEAN + scale[0] * (-alpha[1] * MEAN / scale[1] + source)
    variance = square[0] + (scale[0] / scale[1]) ** 2 * (sde.prior_std**2 - square[1])
    # the decoder's mean (z + sigma^2 s(z)) / alpha is affine in z
    gain = (1 - sigma[0] ** 2 / square[0]) / alpha[0]
    shift = sigma[0] ** 2 * MEAN / square[0] + sigma[0] * error / alpha[0]
    return gain * mean + shift, math.sqrt(gain**2 * variance + (sigma[0] / alpha[0]) ** 2)


def ode_nll(sde, x, error):
    """Expected corrected NLL of the probability-flow ODE with score s + error / sigma, nats (B,).

    The mean's deviation obeys d' = (f + g^2 / (2 S^2)) d - g^2 error / (2 sigma), solved by S; with x = sigma / alpha
    the source integrates to error asinh(x / STD). Standard deviations are multiples of S. The rest is a Gaussian's
    moments.
    """
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    alpha, sigma = (v.numpy() for v in sde.marginal(ends))
    scale, ratio = np.sqrt((alpha * STD) ** 2 + sigma**2), sigma / alpha
    source = error * (math.asinh(ratio[1] / STD) - math.asinh(ratio[0] / STD))
    mean = alpha[0] * MEAN + scale[0] * (-alpha[1] * MEAN / scale[1] + source)
    std = scale[0] * sde.prior_std / scale[1]
    offset = sigma[0] * alpha[0] * (x.numpy() - MEAN) / scale[0] ** 2 - error
    residual = 0.5 * (offset**2 + (1 - (sigma[0] / scale[0]) ** 2) ** 2 - 1).sum(1) - DIMS * math.log(alpha[0])
    return residual + DIMS * 0.5 * (sigma[0] / std) ** 2 - log_prob(alpha[0] * x, mean, std)


def log_prob(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1).numpy()


def exact_bound(sde, error):
    """E NELBO over the data: entropy, KL of the prior, and what the score's constant error costs along lambda."""
    low, high = (float(v) for v in sde.log_ratio_range(torch.zeros((), dtype=torch.float64)))
    alpha, sigma = (float(v) for v in sde.marginal(torch.ones((), dtype=torch.float64)))
    variance, prior = (alpha * STD) ** 2 + sigma**2, sde.prior_std**2
    gap = 0.5 * (variance / prior + (alpha * MEAN) ** 2 / prior - 1 - math.log(variance / prior))
    end = math.exp(2 * low)
    # at eps the decoder knows z_0 up to sigma^2 / alpha^2, the exact posterior a little better
    decoder = 0.5 * (STD**2 / (STD**2 + end) - 1 + math.log((STD**2 + end) / STD**2))
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    return DIMS * (entropy + gap + decoder + error**2 * (high - low + 0.5))


def chain_bound(sde, times, errors, error):
    """The expected bound of the chain on ``times``: a Gaussian integral each step, no random number."""
    alpha, sigma = sde.marginal(times)
    nodes = sde.log_ratio(times)
    posterior = (alpha * STD) ** 2 / ((alpha * STD) ** 2 + sigma**2) + error**2  # E|e|^2 / D
    square = torch.expm1(2 * (nodes[1:] - nodes[:-1]))
    spread = 1 + square * errors[1:]
    steps = 0.5 * ((1 + square * posterior[1:]) / spread - 1 + spread.log())
    ratio = float(sigma[0] / alpha[0])
    decoder = 0.5 * float(posterior[0]) + math.log(ratio) + 0.5 * math.log(2 * math.pi)
    moments = (alpha[-1] * MEAN) ** 2 + (alpha[-1] * STD) ** 2 + sigma[-1] ** 2
    prior = 0.5 * float(moments) / sde.prior_std**2 + math.log(sde.prior_std / float(sigma[-1])) - 0.5
    return DIMS * (float(steps.sum()) + decoder + prior)


@pytest.mark.parametrize("name", SDES)
def test_weight_is_the_ratio_of_the_two_path_densities(name):
    check_path_densities(name)


@pytest.mark.parametrize("error", [0.0, ERROR], ids=["exact score", "wrong score"])
@pytest.mark.parametrize("name", SDES)
def test_density_is_that_of_the_sde(name, error):
    sde = SDES[name]()
    x = points(60)
    fine = table(measure(context(gaussian_model(sde, DIMS, MEAN, STD, error), x), images=60, paths=64, steps=128))
    exact = -log_prob(x, *generated_law(sde, error))
    differences, errors = fine["sde"] - exact, fine["sde_se"]
    assert np.abs(differences / errors).max() < 4.5  # 60 images
    assert abs(differences.mean()) < 4 * differences.std(ddof=1) / math.sqrt(60)
    assert math.sqrt(np.mean(differences**2)) == pytest.approx(errors.mean(), rel=0.4)
    assert errors.mean() < (0.2 if error else 0.06)
    if error:  # the shift that the wrong score causes is resolved
        right = -log_prob(x, *generated_law(sde, 0.0))
        assert np.abs(right - exact).mean() > 0.2 > 4 * differences.std(ddof=1) / math.sqrt(60)


@pytest.mark.parametrize("name", SDES)
def test_ode_is_that_of_the_same_points_with_little_noise(name):
    sde = SDES[name]()
    x = points(40)
    rows = measure(context(gaussian_model(sde, DIMS, MEAN, STD, ERROR), x), images=40, paths=2, steps=2)
    differences = table(rows)["ode"] - ode_nll(sde, x, ERROR)
    # what is left is z_eps = alpha z_0 + sigma n: sigma(eps) times the slope of log p, and the draws of the residual
    noise = (0.05 if name == "ve" else 0.01) + ERROR / math.sqrt(64)
    assert np.abs(differences).max() < 5 * noise and abs(differences.mean()) < 5 * noise / math.sqrt(40)
    assert np.abs(ode_nll(sde, x, ERROR) - ode_nll(sde, x, 0.0)).mean() > 0.1


@pytest.mark.parametrize("name", SDES)
def test_bound_of_the_chain_converges_to_the_nelbo(name):
    sde = SDES[name]()
    model, x = gaussian_model(sde, DIMS, MEAN, STD, ERROR), points(1500)
    truth, plain, raised = exact_bound(sde, ERROR), {}, {}
    for steps in (512, 1024, 2048):
        times = ascending_times(sde, steps, STD)
        alpha, sigma = sde.marginal(times)
        levels = (alpha * STD) ** 2 / ((alpha * STD) ** 2 + sigma**2) + ERROR**2
        plain[steps] = chain_bound(sde, times, torch.zeros_like(levels), ERROR) - truth
        raised[steps] = chain_bound(sde, times, levels, ERROR) - truth
    # first order in 1/N with the posterior's variance; raised by R, an error of a hundredth is left of it
    assert plain[512] / plain[1024] == pytest.approx(2, abs=0.1)
    assert 2 * plain[2048] - plain[1024] == pytest.approx(0, abs=0.05 * plain[1024])
    assert all(abs(raised[steps]) < 0.02 * plain[steps] for steps in raised)

    times = ascending_times(sde, 32, STD)
    errors = mean_errors(model.noise, sde, x, times, IndexedGenerator(0, "errors", torch.arange(1500)))
    weights = log_weights(model.noise, sde, x, times, errors, IndexedGenerator(0, "paths", torch.arange(1500)))
    for log_w, stride in zip(weights, (1, 2), strict=True):
        error = float(log_w.std()) / math.sqrt(1500)
        expected = chain_bound(sde, times[::stride], errors[::stride], ERROR)
        assert abs(-float(log_w.mean()) - expected) < 4 * error < 0.3
    nelbo = model.nelbo(x, times=64, generator=IndexedGenerator(0, "nelbo", torch.arange(1500)))
    assert abs(float(nelbo.mean()) - truth) < 4 * float(nelbo.std()) / math.sqrt(1500)


@pytest.mark.parametrize("name", SDES)
def test_variational_part_is_the_divergence_of_the_paths(name):
    # E[NELBO + log p_SDE] in closed form: the bound's mean less the cross entropy of two Gaussians
    sde = SDES[name]()
    x = points(60)
    rows = measure(context(gaussian_model(sde, DIMS, MEAN, STD, ERROR), x), images=50, paths=48, steps=256)
    mean, std = generated_law(sde, ERROR)
    cross = DIMS * (0.5 * math.log(2 * math.pi * std**2) + (STD**2 + (MEAN - mean) ** 2) / (2 * std**2))
    truth = exact_bound(sde, ERROR) - cross
    bound, density = (2 * table(rows)[name] - table(rows, 128)[name] for name in ("nelbo", "sde"))
    parts = bound - density  # in the limit of a fine grid
    assert truth > 0.08
    assert abs(parts.mean() - truth) < 4 * parts.std(ddof=1) / math.sqrt(len(parts)) < 0.5 * truth


def test_flow_and_scale_are_counted_once():
    flow = AffineFlow(1.7, -0.4)
    plain, x = gaussian_model(VPSDE(), DIMS, MEAN, STD), points(10)
    warped = gaussian_model(VPSDE(), DIMS, MEAN, STD, flow=flow)
    warped.scale = 2.0
    y = 2.0 * flow.inverse(x)
    a, b = (measure(context(model, p), images=10, paths=8, steps=16) for model, p in ((plain, x), (warped, y)))
    change = DIMS * math.log(1.7 / 2.0)
    for column in ("nelbo", "sde", "ode"):
        np.testing.assert_allclose(table(b)[column], table(a)[column] - change, atol=1e-9)


def test_density_of_a_nonlinear_score_agrees_with_the_fokker_planck_equation():
    """Score 0.9 x that of two Gaussians in one dimension: its reverse SDE's density by finite volumes."""
    from scipy.linalg import solve_banded

    sde, centre, width = VESDE(0.2, 4.0), 1.2, 0.3

    def score(z, t):
        square = width**2 + sde.marginal(t)[1].view(-1, *[1] * (z.dim() - 1)) ** 2
        return 0.9 * (-z + centre * torch.tanh(centre * z / square)) / square

    def noise(z, t):
        return -sde.marginal(t)[1].view(-1, 1) * score(z, t)

    half, cells, steps = 20.0, 2500, 600
    h = 2 * half / cells
    z = torch.linspace(-half + h / 2, half - h / 2, cells, dtype=torch.float64)
    faces = (z[1:] + z[:-1]) / 2
    nodes = np.linspace(math.log(4.0), math.log(0.2) + sde.eps * math.log(20.0), steps + 1)
    d = nodes[0] - nodes[1]
    p = sde.prior_log_prob(z[:, None]).exp().numpy()
    for i in range(steps):  # Crank-Nicolson on dp/dtau = -(2 sigma^2 s p)' + sigma^2 p'', tau = -lambda
        middle = 0.5 * (nodes[i] + nodes[i + 1])
        square = math.exp(2 * middle)
        time = sde.time(torch.tensor([middle], dtype=torch.float64))
        drift = 2 * square * score(faces[None], time)[0].numpy()
        left, right = drift / 2 + square / h, drift / 2 - square / h  # flux at a face: left p_j + right p_{j+1}
        bands = np.zeros((3, cells))
        bands[0, 1:], bands[2, :-1] = -right / h, left / h
        bands[1, :-1] -= left / h
        bands[1, 1:] += right / h
        explicit = bands[1] * p
        explicit[:-1] += bands[0, 1:] * p[1:]
        explicit[1:] += bands[2, :-1] * p[:-1]
        implicit = -0.5 * d * bands
        implicit[1] += 1
        p = solve_banded((1, 1), implicit, p + 0.5 * d * explicit)
    assert p.sum() * h == pytest.approx(1, abs=1e-6)
    x = torch.tensor([[-2.0], [-1.2], [-0.5], [0.1], [0.8], [1.3], [1.9]], dtype=torch.float64)
    sigma = float(sde.marginal(torch.tensor(sde.eps, dtype=torch.float64))[1])
    decoded = (z + sigma**2 * score(z[None], torch.tensor([sde.eps], dtype=torch.float64))[0]).numpy()
    kernel = np.exp(-0.5 * ((x.numpy() - decoded) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    truth = np.log(kernel @ p * h)

    paths, times = 2000, ascending_times(sde, 96, 1.2)
    data = centre * torch.sign(torch.arange(500, dtype=torch.float64) - 249.5)[:, None]
    data = data + width * IndexedGenerator(0, "data", torch.arange(500)).normal((500, 1), dtype=torch.float64)
    errors = mean_errors(noise, sde, data, times, IndexedGenerator(0, "errors", torch.arange(500)))
    index = torch.arange(len(x) * paths)
    draws = IndexedGenerator(0, "paths", index)
    weights = [w.view(-1, paths) for w in log_weights(noise, sde, x[index // paths], times, errors, draws)]
    (_, fine, error, ess), (_, half_grid, _, _) = (path_density(w) for w in weights)
    estimate = 2 * fine - half_grid
    assert float(error.max()) < 0.03 and float(ess.min()) > 300
    assert np.abs((estimate.numpy() - truth) / (4 * error.numpy() + 2e-3)).max() < 1
    # what a score 10 % too small changes is far larger: the exact score gives the mixture
    square = width**2 + torch.zeros(1, dtype=torch.float64)
    mixture = torch.logsumexp(torch.stack([-((x[:, 0] - s * centre) ** 2) / (2 * square) for s in (-1, 1)]), 0)
    mixture = mixture - math.log(2) - 0.5 * math.log(2 * math.pi * width**2)
    assert np.abs(mixture.numpy() - truth).max() > 0.1


def test_reverse_chain_draws_from_the_chain():
    # Gaussian data and exact score: after the backward chain from p_1 the latents are the data, at any number of steps
    sde = VPSDE()
    model, count = gaussian_model(sde, DIMS, MEAN, STD), 20_000
    alpha, sigma = sde.marginal(torch.ones(1, dtype=torch.float64))
    source = IndexedGenerator(1, "reverse", torch.arange(count))
    start = alpha * points(count) + sigma * source.normal((count, DIMS), dtype=torch.float64)
    times = ascending_times(sde, 4, STD)
    a, s = sde.marginal(times)
    errors = (a * STD) ** 2 / ((a * STD) ** 2 + s**2)
    z = reverse_chain(model.noise, sde, start, times, errors, source)
    assert float(z.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(2 * count))
    assert float(z.std()) == pytest.approx(STD, abs=4 * STD / math.sqrt(4 * count))
    # with the posterior's variance alone, R = 1, four steps are visibly too narrow
    narrow = reverse_chain(model.noise, sde, start, times, torch.zeros_like(errors), source)
    assert float(narrow.std()) < 0.9 * STD


def test_grid_ends_at_eps_and_one_and_is_uniform_without_a_focus():
    for sde in (VPSDE(), SubVPSDE(), VESDE()):
        plain, focused = ascending_times(sde, 32), ascending_times(sde, 32, 1.2)
        expected = time_grid(sde, 32, sde.eps, "log_ratio", plain).flip(0)
        torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-12)
        for times in (plain, focused):
            assert times[0] == sde.eps and times[-1] == 1
            assert bool((times[1:] > times[:-1]).all())
        gaps = sde.log_ratio(focused).diff()
        assert float(gaps.max() / gaps.min()) > 2


def test_one_path_gives_its_own_bound_and_many_the_jackknife():
    log_w = torch.tensor([[0.3, -1.2, 0.9, 0.1], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    bound, single, error, ess = path_density(log_w[:, :1])
    assert torch.equal(bound, single) and error is None and ess.tolist() == [1, 1]
    bound, density, error, ess = path_density(log_w)
    w = log_w[0].exp()
    rest = torch.stack([torch.cat([w[:k], w[k + 1 :]]).mean().log() for k in range(4)])
    assert float(density[0]) == pytest.approx(float(4 * w.mean().log() - 3 * rest.mean()))
    assert float(error[0]) == pytest.approx(math.sqrt(3 / 4 * float(((rest - rest.mean()) ** 2).sum())))
    assert float(ess[0]) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))
    assert density[1] == pytest.approx(2.0) and error[1] == pytest.approx(0.0) and ess[1] == pytest.approx(4.0)
    assert bool((density >= bound).all())


def test_values_do_not_depend_on_the_chunks(monkeypatch):
    model, x = gaussian_model(VPSDE(), DIMS, MEAN, STD, ERROR), points(6)
    whole = measure(context(model, x), images=6, paths=6, steps=8)
    monkeypatch.setattr("bench.studies.gap_split.CHUNK", 5)
    parts = measure(context(model, x), images=6, paths=6, steps=8)
    for a, b in zip(whole, parts, strict=True):
        assert {**a, "status": 0} == pytest.approx({**b, "status": 0}, rel=1e-12)
    assert set(whole[0]) == set(COLUMNS)
    assert [row["steps"] for row in whole] == [4] * 6 + [8] * 6


def test_what_has_no_path_density_says_so(monkeypatch):
    model, x = gaussian_model(VPSDE(), DIMS), points(4)
    images = dataclasses.replace(context(model, x), data=load("digits"))
    other = dataclasses.replace(context(model, x), model=torch.nn.Identity())
    for unusable in (images, other):
        (row,) = measure(unusable)
        assert row["status"].startswith("not defined: ") and set(row) == {"status"}
    monkeypatch.setattr("bench.studies.gap_split.log_weights", lambda noise, sde, z0, *rest: 2 * (z0[:, 0] / 0,))
    rows = measure(context(model, x), images=4, paths=2, steps=2)
    assert all(row["status"].startswith("not defined: ") and row["sde"] is None for row in rows)
