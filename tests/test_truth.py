"""The battery of `indm-bench validate`, group by group, and the closed forms that it rests on."""

from __future__ import annotations

import csv
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from bench.toy import draw_checkerboard
from bench.truth import battery, convergence
from bench.truth.densities import DiffusedCheckerboard, DiffusedMixture
from bench.truth.estimates import Recorder, controlled_mean, variates
from bench.truth.laws import Impulses, affine_law, sampler_law
from bench.truth.likelihood_rows import NARROW, SETTINGS
from bench.truth.problems import DOUBLE, Gaussian, Truth, wasserstein
from bench.truth.process import SDES, process_of
from bench.truth.rows import BOUND, NATS, ODE, Case, largest, print_battery, summary_line, write_battery
from models.indm import INDM
from models.noise import IndexedGenerator

PLANE = Gaussian.with_spectrum([0.3, -0.5], [1.0, 0.2])


@cache
def rows_of(function, *args):
    return tuple(function(*args))


# one case for each group and SDE, so that a failure is named and no test takes long
CASES = [
    *(
        pytest.param((function, sde), id=f"{group}, {function.__name__}, {sde}")
        for group, functions in battery.PER_SDE.items()
        for function in functions
        for sde in SDES
    ),
    *(pytest.param((f,), id=group) for group, functions in battery.COMMON.items() for f in functions),
]


@pytest.mark.parametrize("case", CASES)
def test_battery(case, record_property):
    rows = rows_of(*case)
    likelihoods = [row for row in rows if row.group in (BOUND, ODE) and row.unit == NATS]
    if likelihoods:
        worst = largest(likelihoods)
        # shown at the end of the session by the root conftest, across workers
        record_property("ground truth", [worst.error, worst.name, len(likelihoods)])
    assert rows and [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("sde", SDES)
def test_every_setting_has_its_bound_and_its_likelihood(sde):
    seen = {(row.setting, row.estimator) for f in (battery.bound_rows, battery.ode_rows) for row in rows_of(f, sde)}
    for setting in SETTINGS:
        assert (setting, "NELBO") in seen and (setting, "NELBO before correction") in seen
        assert any(name.startswith("NLL") for where, name in seen if where == setting)
    for name in ("diffusion", "reconstruction", "prior, each image", "flow, each image"):
        assert ("identity flow", f"NELBO {name}") in seen


def test_rows_are_deterministic():
    assert battery.bound_rows("vp", ("identity flow",)) == battery.bound_rows("vp", ("identity flow",))


# --- the closed forms, against formulas that share nothing with them --------------------------------------------------


def moments_over_time(truth, end, stochastic):
    """Mean and variance of z on each axis by integrating the moment equations in t, from the prior to ``end``."""
    process, c = truth.process, truth.values.numpy()
    scale, shift, m = truth.scale, truth.shift.numpy(), truth.mean.numpy()

    def slopes(t, state):
        mean, variance = state.reshape(2, -1)
        time = torch.tensor(t, dtype=DOUBLE)
        f, g, alpha, sigma = (float(v(time)) for v in (process.drift, process.diffusion, process.alpha, process.sigma))
        factor = (1.0 if stochastic else 0.5) * g**2 / sigma
        p = scale * sigma / (alpha**2 * c + sigma**2)
        drift = f + factor * p
        # time runs backwards, so the noise of the SDE enters with a minus sign
        d_mean = drift * mean + factor * (shift - p * alpha * m)
        return np.concatenate([d_mean, 2 * drift * variance - (g**2 if stochastic else 0.0)])

    start = np.concatenate([np.zeros_like(c), np.full_like(c, process.prior_std**2)])
    final = solve_ivp(slopes, (1.0, end), start, method="LSODA", rtol=1e-9, atol=1e-11).y[:, -1].reshape(2, -1)
    basis = truth.gaussian.basis
    mean, variance = torch.from_numpy(final)
    return basis @ mean, basis @ torch.diag(variance) @ basis.T


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])
def test_generated_laws_solve_their_moment_equations(sde, stochastic):
    truth = Truth(PLANE, SDES[sde](), scale=1.3, shift=-0.4)
    law = truth.sde_law(0.01, False) if stochastic else truth.ode_law(0.01, False)
    for found, expected in zip(law, moments_over_time(truth, 0.01, stochastic), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sde", SDES)
def test_exact_score_generates_the_diffused_data(sde):
    """Up to the prior's mismatch, which the SDE forgets and the ODE carries."""
    truth = Truth(PLANE, SDES[sde]())
    alpha, sigma = truth.process.at(0.1)
    exact = alpha * PLANE.mean, alpha**2 * PLANE.covariance + sigma**2 * torch.eye(2, dtype=DOUBLE)
    assert wasserstein(truth.sde_law(0.1, False), exact) < 1e-3
    assert wasserstein(truth.ode_law(0.1, False), exact) < 2e-2


def test_normaliser_and_bound_constants_equal_published_ones():
    """Z/2 - (B(1) - B(eps))/2 = 6.907237 for VP and Z/2 = 8.517108 for VE: the constant of the published bound."""
    vp, ve = process_of(SDES["vp"]()), process_of(SDES["ve"]())
    assert vp.normaliser() / 2 + float(vp.over_time(vp.drift)) == pytest.approx(6.907237, abs=1e-6)
    assert ve.normaliser() / 2 == pytest.approx(8.517108, abs=1e-6)


def test_a_wrong_score_only_raises_the_expected_bound():
    for sde in SDES:
        right = float(sum(Truth(NARROW, SDES[sde]()).nelbo_parts(None).values()))
        for error in ({"scale": 1.1}, {"scale": 0.9}, {"shift": 0.1}):
            assert float(sum(Truth(NARROW, SDES[sde](), **error).nelbo_parts(None).values())) > right + 1e-3


@pytest.mark.parametrize("sde", SDES)
def test_checkerboard_density_is_the_convolution(sde):
    """Against the average over the board of Gaussian kernels, by quadrature on each filled square."""
    model = DiffusedCheckerboard(SDES[sde]())
    time = torch.tensor([0.35], dtype=DOUBLE)
    alpha, sigma = (float(v) for v in model.sde.marginal(time))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    inside = (torch.from_numpy(nodes) + 1) / 2
    w = torch.outer(*[torch.from_numpy(weights) / 2] * 2).flatten()
    z = alpha * torch.tensor([[0.2, 0.3], [-1.6, 1.1], [2.5, -2.2], [0.0, 0.0]], dtype=DOUBLE)
    density = torch.zeros(len(z), dtype=DOUBLE)
    corners = [(i - 2, j - 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    for corner in corners:
        square = torch.cartesian_prod(inside, inside) + torch.tensor(corner, dtype=DOUBLE)
        kernel = torch.exp(-0.5 * (z[:, None] - alpha * square).square().sum(2) / sigma**2) / (2 * math.pi * sigma**2)
        density += (kernel * w).sum(1) / len(corners)
    assert torch.allclose(model.log_prob(z, time.expand(4)), density.log(), atol=1e-9)


def test_checkerboard_score_is_finite_far_away_and_at_little_noise():
    model = DiffusedCheckerboard(SDES["vp"]())
    x = draw_checkerboard(200, torch.Generator().manual_seed(0)).double()
    for points in (x, 20 * x, torch.zeros(200, 2, dtype=DOUBLE)):
        for time in (1e-5, 1e-3, 0.1):
            score = model(points, torch.full((200,), time, dtype=DOUBLE))
            assert torch.isfinite(score).all()
    # from afar the board is a point: the score is that of the nearest square's rim
    far = torch.tensor([[30.0, 0.0]], dtype=DOUBLE)
    assert float(model(far, torch.tensor([0.1], dtype=DOUBLE))[0, 0]) < -10


def test_a_mixture_of_one_is_a_gaussian():
    sde, z = SDES["vp"](), PLANE.draw(20)
    line = Gaussian([0.3, -0.2], torch.eye(2) * 0.49)
    mixture = DiffusedMixture(sde, line.mean[None], 0.7)
    t = torch.linspace(0.01, 1, 20, dtype=DOUBLE)
    assert torch.allclose(mixture(z, t), line.score(sde)(z, t), atol=1e-12)


def test_wasserstein_of_commuting_gaussians_is_the_general_formula():
    other = Gaussian.with_spectrum([0.0, 0.1], [0.4, 2.0])
    root = torch.linalg.cholesky(PLANE.covariance)
    cross = torch.linalg.eigvalsh(root.T @ other.covariance @ root).sqrt().sum()
    square = (PLANE.mean - other.mean).square().sum() + torch.trace(PLANE.covariance + other.covariance) - 2 * cross
    found = wasserstein((PLANE.mean, PLANE.covariance), (other.mean, other.covariance))
    assert found == pytest.approx(float(square) ** 0.5, rel=1e-12)


# --- exact laws of samplers -------------------------------------------------------------------------------------------


def test_impulses_give_the_law_of_an_affine_map():
    source = Impulses(1 + 2 * 3)
    draws = [source.normal((7, 2), dtype=DOUBLE) for _ in range(3)]
    matrix = torch.tensor([[2.0, 0.5], [0.0, -1.0]], dtype=DOUBLE)
    outputs = draws[0] @ matrix.T + 3 * draws[1] - draws[2] + torch.tensor([1.0, 4.0], dtype=DOUBLE)
    mean, covariance = affine_law(outputs)
    assert torch.equal(mean, torch.tensor([1.0, 4.0], dtype=DOUBLE))
    assert torch.allclose(covariance, matrix @ matrix.T + 10 * torch.eye(2, dtype=DOUBLE))
    with pytest.raises(ValueError, match="7 rows are too few"):
        source.normal((7, 2))
    with pytest.raises(TypeError, match="uniform"):
        source.uniform((7, 1))


@pytest.mark.parametrize("sampler", ["euler_maruyama", "predictor_corrector", "ddim"])
def test_exact_laws_are_those_of_samples(sampler):
    """The one Monte Carlo check: 20,000 samples have the mean and covariance that the impulses predict."""
    sde, count = SDES["vp"](), 20_000
    model, options = INDM(sde, PLANE.score(sde), shape=(2,)), {"eta": 0.7} if sampler == "ddim" else {}
    mean, covariance = sampler_law(model, 8, sampler, end=1e-3, **options)
    source = IndexedGenerator(0, "law", torch.arange(count))
    x = model.sample(count, steps=8, sampler=sampler, generator=source, end=1e-3, **options)
    spread = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * spread / math.sqrt(count)).all()
    assert ((x.T.cov() - covariance).abs() < 6 * torch.outer(spread, spread) / math.sqrt(count)).all()


# --- orders -----------------------------------------------------------------------------------------------------------


def test_orders_cover_every_sampler_and_the_integrator():
    rows = [row for sde in SDES for row in battery.orders(sde)]
    methods = {row.method for row in rows}
    for name in ("euler_maruyama", "predictor_corrector (0)", "ddim", "ddim (eta 1)", "heun"):
        assert name in methods
    assert {row.expected for row in rows if row.method.endswith("step")} == {5}
    assert {row.sde for row in rows} == set(SDES)
    for row, finer in zip(rows, rows[1:]):
        if finer.order is not None:
            assert finer.error < row.error


def test_a_first_order_method_is_not_taken_for_second_order():
    rows = convergence._rows("euler", "vp", "time", (1, 2, 4), (1.0, 0.5, 0.25), 2.0, 2, convergence.TOLERANCE)
    assert not any(row.ok for row in rows) and rows[-1].order == pytest.approx(1.0)


# --- control variates -------------------------------------------------------------------------------------------------


def test_control_variates_keep_the_mean_and_remove_the_noise():
    count = 4000
    d = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    source = Recorder(0, "test", torch.arange(count))
    plain = IndexedGenerator(0, "test", torch.arange(count))
    n, u = source.normal((count, 3), dtype=DOUBLE), source.uniform((count, 1), dtype=DOUBLE)
    assert torch.equal(n, plain.normal((count, 3), dtype=DOUBLE))
    assert torch.equal(u, plain.uniform((count, 1), dtype=DOUBLE))
    values = 0.7 + (n**2 - 1).sum(1) + (n * d)[:, 0] * 3 + 2 * (u[:, 0] - 0.5)
    mean, se = controlled_mean(values, variates(source, torch.eye(3, dtype=DOUBLE), d))
    assert mean == pytest.approx(0.7, abs=1e-9) and se < 1e-9
    mean, se = controlled_mean(values)
    assert se == pytest.approx(float(values.std()) / math.sqrt(count), rel=1e-6)
    assert mean == pytest.approx(float(values.mean()), rel=1e-9)


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_know_their_bounds():
    case = Case(BOUND, "problem", "vp", "setting")
    assert case.row("a", 1.0005, 1.0).ok and not case.row("a", 1.002, 1.0).ok
    assert case.row("a", 1.002, 1.0, se=1e-3).ok and case.row("a", 1.002, 1.0, se=1e-3).bound == 3e-3
    assert not case.row("a", math.nan, 1.0).ok and not case.row("a", 1.0, 1.0, se=math.nan).ok
    assert not case.row("a", math.inf).ok


def test_table_and_files_and_exit_code(tmp_path, capsys, monkeypatch):
    good, bad = (
        Case(BOUND, "problem", "vp").row("good | one", 1.0, 1.0),
        Case(ODE, "problem", "ve").row("bad", 1.5, 1.0),
    )
    monkeypatch.setattr(battery, "run_battery", lambda **_: [good, bad])
    monkeypatch.setattr(
        battery, "orders", lambda sde: convergence._rows("m", sde, "time", (1, 2), (2.0, 1.0), 2.0, 1, 0.1)
    )
    assert battery.validate(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 within bounds; largest error of a likelihood 5.0e-01 nats/dim (bad, ve)" in shown
    assert f"\n{BOUND}\n" in shown and f"\n{ODE}\n" in shown and " NO\n" in shown
    with open(tmp_path / "validate.csv") as stream:
        records = list(csv.DictReader(stream))
    assert [record["ok"] for record in records] == ["True", "False"]
    assert float(records[1]["error"]) == 0.5
    page = (tmp_path / "validate.md").read_text()
    assert "good \\| one" in page and summary_line([good, bad]) in page
    assert len((tmp_path / "convergence.csv").read_text().splitlines()) == 1 + 2 * len(SDES)

    monkeypatch.setattr(battery, "run_battery", lambda **_: [good])
    assert battery.validate() == 0
    print_battery([good])
    write_battery([good], tmp_path / "again")
    assert (tmp_path / "again" / "validate.csv").is_file()


def test_unknown_group_is_refused_by_name():
    with pytest.raises(ValueError, match="group = 'bounds': accepted are processes, bound"):
        battery.run_group("bounds")
