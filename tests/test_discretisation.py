"""The three terms of the total-variation bound against Gaussian laws whose bin masses are known."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analytic import AffineFlow, gaussian_model

from bench import toy
from bench.data import load, make_dataset
from bench.studies import Context, discretisation
from bench.studies.discretisation import COLUMNS, measure, prior_distance
from bench.studies.partition import (
    Partition,
    data_partition,
    sampling_floor,
    standard_error,
    total_variation,
)
from models.samplers import time_grid
from models.sde import VESDE, VPSDE

SDES = {"vp": VPSDE(), "ve": VESDE(0.01, 3.0)}  # sigma_max is small: the prior's mismatch can be seen
MEAN, STD, ERROR = 0.3, 0.5, 0.3
BOARD = Partition(8)


def masses(mean, std, board=BOARD):
    return board.normal_masses(torch.full((2,), float(mean)), torch.full((2,), float(std)))


def context(model, monkeypatch, board=BOARD):
    def draw(n, generator):
        return MEAN + STD * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    sets = draw(8, torch.Generator().manual_seed(0)), draw(8, torch.Generator().manual_seed(1))
    data = make_dataset("gaussian", None, *sets, draw=draw)
    monkeypatch.setattr(discretisation, "data_partition", lambda name: (board, masses(MEAN, STD, board)))
    return Context(model, SimpleNamespace(seed=0), data, torch.device("cpu"))


def sde_law(sde, error):
    """(mean, std) of the fine process from the prior, decoder's mean; derivation in test_gap_split.generated_law."""
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    alpha, sigma = (v.numpy() for v in sde.marginal(ends))
    square = (alpha * STD) ** 2 + sigma**2
    scale, x = square / alpha, sigma / alpha
    source = 2 * error / STD * (math.atan(x[1] / STD) - math.atan(x[0] / STD))
    mean = alpha[0] * MEAN + scale[0] * (-alpha[1] * MEAN / scale[1] + source)
    variance = square[0] + (scale[0] / scale[1]) ** 2 * (sde.prior_std**2 - square[1])
    gain = (1 - sigma[0] ** 2 / square[0]) / alpha[0]
    return gain * mean + sigma[0] ** 2 * MEAN / square[0] + sigma[0] * error / alpha[0], gain * math.sqrt(variance)


def sampler_law(sde, steps, error):
    """(mean, std) of Euler-Maruyama on the plug-in reverse SDE, one affine Gaussian step after the other."""
    times = time_grid(sde, steps, sde.eps, "time", torch.zeros((), dtype=torch.float64))
    mean, variance = 0.0, sde.prior_std**2
    for i in range(steps):
        t, h = times[i], float(times[i] - times[i + 1])
        alpha, sigma = (float(v) for v in sde.marginal(t))
        f, g2 = float(sde.drift(t)), float(sde.diffusion(t)) ** 2
        square = (alpha * STD) ** 2 + sigma**2
        gain = 1 - h * f - h * g2 / square
        mean = gain * mean + h * g2 * (alpha * MEAN / square + error / sigma)
        variance = gain**2 * variance + (g2 * h if i + 1 < steps else 0.0)
    return mean, math.sqrt(variance)


def expected(p, q, variance):
    """E of half the sum of |N(p - q, variance)|: what shares of finite samples give on average."""
    d, s = (p - q).numpy(), np.sqrt(variance.numpy()) + 1e-300
    erf = torch.erf(torch.from_numpy(d / (s * math.sqrt(2)))).numpy()
    return 0.5 * float((s * math.sqrt(2 / math.pi) * np.exp(-0.5 * (d / s) ** 2) + d * erf).sum())


@pytest.mark.parametrize("error", [0.0, ERROR], ids=["exact score", "wrong score"])
@pytest.mark.parametrize("name", SDES)
def test_terms_agree_with_the_laws(name, error, monkeypatch):
    sde, n = SDES[name], 3000
    model = gaussian_model(sde, 2, MEAN, STD, error)
    rows = measure(context(model, monkeypatch), steps=[4, 16, 64], samples=n, fine=64)
    data, b = masses(MEAN, STD), masses(*sde_law(sde, error))
    for row in rows:
        c = masses(*sampler_law(sde, row["steps"], error))
        noise = (c * (1 - c)) / n
        assert row["tv"] == pytest.approx(expected(c, data, noise), abs=4 * row["se"] + 2e-3)
        two = noise + b * (1 - b) / n
        assert row["discretisation"] == pytest.approx(expected(b, c, two), abs=4 * standard_error(b, c, n, n) + 2e-3)
        assert row["tv"] <= row["bound"] + 0.01
        assert row["bound"] == row["prior"] + row["estimation"] + row["discretisation"]
        assert row["floor"] == pytest.approx(sampling_floor(data, n, n)) and row["status"] == "ok"
        assert set(row) == set(COLUMNS) and row["bins"] == 65 and row["samples"] == n
    assert rows[0]["discretisation"] > 3 * min(rows[1]["discretisation"], rows[2]["discretisation"])
    if not error:  # nothing to estimate: what is left is the sampling error of one sample
        assert rows[0]["estimation"] == pytest.approx(sampling_floor(data, n), rel=0.4)
    else:
        assert rows[0]["estimation"] > 10 * sampling_floor(data, n)


@pytest.mark.parametrize("name", SDES)
def test_prior_term_is_the_distance_of_two_gaussians(name):
    sde, n = SDES[name], 5000
    alpha, sigma = (float(v) for v in sde.marginal(torch.ones(1, dtype=torch.float64)))
    z0 = MEAN + STD * torch.randn(n, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mean, std = alpha * float(z0.mean()), math.sqrt((alpha * float(z0.std())) ** 2 + sigma**2)
    # along the diagonal, direction of the shift, and across it the two Gaussians are products
    axis = np.linspace(-9, 9, 901) * sde.prior_std
    shift = math.sqrt(2) * mean

    def normal(x, m, s):
        return np.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))

    prior = np.outer(normal(axis, 0, sde.prior_std), normal(axis, 0, sde.prior_std))
    diffused = np.outer(normal(axis, shift, std), normal(axis, 0, std))
    truth = 0.5 * np.abs(diffused - prior).sum() * (axis[1] - axis[0]) ** 2
    assert prior_distance(sde, z0) == pytest.approx(truth, rel=0.02)
    assert truth > (0.03 if name == "ve" else 1e-4)


def test_processes_run_in_latent_space(monkeypatch):
    # the same laws seen through an affine flow: exact score of the latents, data N(MEAN, STD^2)
    flow, sde, n = AffineFlow(1.7, -0.4), VPSDE(), 3000
    model = gaussian_model(sde, 2, 1.7 * MEAN - 0.4, 1.7 * STD, flow=flow)
    (row,) = measure(context(model, monkeypatch), steps=[64], samples=n, fine=48)
    floor = sampling_floor(masses(MEAN, STD), n)
    assert row["estimation"] == pytest.approx(floor, rel=0.4) and row["tv"] < 3 * floor


@pytest.mark.parametrize("name", ["checkerboard", "gaussians"])
def test_exact_masses_are_those_of_many_draws(name):
    board, truth = data_partition(name)
    n = 200_000
    shares = board.masses(toy.DENSITIES[name].draw(n, torch.Generator().manual_seed(3)))
    assert float(truth.sum()) == pytest.approx(1) and len(truth) == board.bins
    assert total_variation(shares, truth) == pytest.approx(sampling_floor(truth, n), rel=0.25)
    z = (shares - truth) / (truth * (1 - truth) / n).sqrt().clamp_min(1e-12)
    assert float(z[truth > 1e-4].abs().max()) < 4.5
    if name == "checkerboard":
        assert int((truth > 0).sum()) == 32 and float(truth[-1]) == 0
        torch.testing.assert_close(truth[truth > 0], torch.full((32,), 1 / 32, dtype=torch.float64))
    else:
        assert 0 < float(truth[-1]) < 0.01


def test_every_point_has_one_bin():
    board = Partition(4, 0.5)
    assert board.bins == 17 and board.edges.tolist() == [-1, -0.5, 0, 0.5, 1]
    x = [[-1, -1], [-1, 0.99], [0, 0], [0.99, 0.99], [1, 0], [-1.01, 0], [math.nan, 0], [0, math.inf]]
    assert board.index(torch.tensor(x)).tolist() == [0, 3, 10, 15, 16, 16, 16, 16]
    shares = board.masses(torch.tensor(x))
    assert float(shares[16]) == 0.5 and float(shares.sum()) == 1


def test_floor_and_error_are_those_of_repeated_samples():
    p, q, n, m = masses(0.3, 0.5), masses(0.5, 0.6), 1000, 1500
    source = np.random.default_rng(0)

    def shares(law, size):
        return torch.from_numpy(source.multinomial(size, law.numpy() / law.numpy().sum(), 400) / size)

    p_n, p_m, q_m = shares(p, n), shares(p, m), shares(q, m)
    same = [total_variation(a, b) for a, b in zip(p_n, p_m, strict=True)]
    assert np.mean(same) == pytest.approx(sampling_floor(p, n, m), rel=0.05)
    assert np.mean([total_variation(a, p) for a in p_n]) == pytest.approx(sampling_floor(p, n), rel=0.05)
    other = [total_variation(a, b) for a, b in zip(p_n, q_m, strict=True)]
    assert np.std(other) == pytest.approx(standard_error(p, q, n, m), rel=0.15)
    exact = [total_variation(a, q) for a in p_n]
    assert np.std(exact) == pytest.approx(standard_error(p, q, n), rel=0.15)


def test_values_do_not_depend_on_the_chunks(monkeypatch):
    model = gaussian_model(VPSDE(), 2, MEAN, STD)
    whole = measure(context(model, monkeypatch), steps=[3], samples=300, fine=6)
    monkeypatch.setattr(discretisation, "CHUNK", 300 // 4)
    assert measure(context(model, monkeypatch), steps=[3], samples=300, fine=6) == whole


def test_latents_that_are_not_finite_are_a_status(monkeypatch):
    model = gaussian_model(VPSDE(), 2, MEAN, STD, flow=AffineFlow(math.inf, 0.0))
    rows = measure(context(model, monkeypatch), steps=[3, 4], samples=50, fine=4)
    assert rows == [{"status": "not defined: latents are not all finite"}]


def test_what_has_no_density_says_so(monkeypatch):
    model = gaussian_model(VPSDE(), 2)
    plane = context(model, monkeypatch)
    monkeypatch.undo()
    for data in (load("swissroll"), load("digits")):
        (row,) = measure(dataclasses.replace(plane, data=data))
        assert row["status"].startswith("not defined: ") and data.name in row["status"] and set(row) == {"status"}
