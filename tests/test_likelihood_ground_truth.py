"""NELBO and NLL against problems known in closed form, in float64."""

import dataclasses
import math

import pytest
import torch
from analytic import AffineFlow, gaussian_model, gaussian_nll

from models.noise import IndexedGenerator
from models.sde import VESDE, VPSDE, SubVPSDE

SDES = {"vp": VPSDE, "subvp": SubVPSDE, "ve": VESDE}
N, DIMS = 1000, 3


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return 0.3 + 0.5 * torch.randn(N, DIMS, generator=generator, dtype=torch.float64)


def source(purpose="test"):
    return IndexedGenerator(0, purpose, torch.arange(N))


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def prior_gap(sde, mean=0.3, std=0.5):
    """KL(p_1 | prior) per dimension: what even an exact score cannot remove from the bound."""
    alpha, sigma = (float(v) for v in sde.marginal(torch.ones(1, dtype=torch.float64)))
    m, v, p = alpha * mean, (alpha * std) ** 2 + sigma**2, sde.prior_std**2
    return 0.5 * (v / p + m**2 / p - 1 - math.log(v / p))


def exact_ode_nll(sde, x, mean=0.3, std=0.5):
    """Density of the exact probability-flow ODE started at x at time eps, nats (B,): z_1 is affine in x."""
    ends = torch.tensor([sde.eps, 1.0], dtype=torch.float64)
    alpha, sigma = sde.marginal(ends)
    spread = ((alpha * std) ** 2 + sigma**2).sqrt()
    z = alpha[1] * mean + spread[1] * (x - alpha[0] * mean) / spread[0]
    return -sde.prior_log_prob(z) - x.shape[1] * (spread[1] / spread[0]).log()


@pytest.mark.parametrize("name", SDES)
def test_nelbo_of_the_exact_score_is_the_entropy(name, data):
    sde = SDES[name]()
    mean, error = mean_and_error(gaussian_model(sde).nelbo(data, times=64, generator=source()) - gaussian_nll(data))
    assert abs(mean - DIMS * prior_gap(sde)) < 3 * error + 1e-3 * DIMS
    assert error < 0.06


@pytest.mark.parametrize("name", SDES)
def test_nll_of_the_exact_score_is_the_density(name, data):
    sde = SDES[name]()
    model = gaussian_model(sde)
    clean = model.nll(data, corrected=False, probes="exact", rtol=1e-7, atol=1e-7)
    # per sample: the exact ODE moves Gaussian data affinely, so that its own density has a closed form
    assert (clean - exact_ode_nll(sde, data)).abs().max() < 1e-4
    assert float((clean - gaussian_nll(data)).mean()) == pytest.approx(0, abs=1e-3 * DIMS)
    mean, error = mean_and_error(model.nll(data, generator=source(), probes="exact") - gaussian_nll(data))
    assert abs(mean - DIMS * prior_gap(sde)) < 3 * error + 1e-3 * DIMS


@pytest.mark.parametrize("name", SDES)
def test_total_does_not_depend_on_eps(name, data):
    """With the residual counted, a truncation a hundred times larger leaves bound and likelihood where they were."""
    options = {"sigma_min": 0.01, "sigma_max": 50.0} if name == "ve" else {}
    differences = []
    for eps in (1e-5, 1e-3):
        model = gaussian_model(SDES[name](eps=eps, **options))
        bound = model.nelbo(data, times=64, generator=source()) - gaussian_nll(data)
        ode = model.nll(data, generator=source(), probes="exact") - gaussian_nll(data)
        differences.append((mean_and_error(bound), mean_and_error(ode)))
    for (a, error_a), (b, error_b) in zip(*differences, strict=True):
        assert abs(a - b) < 3 * math.hypot(error_a, error_b) + 1e-3 * DIMS


@pytest.mark.parametrize("name", SDES)
def test_a_wrong_score_raises_the_bound_by_the_predicted_integral(name, data):
    """noise_hat off by a constant c adds 1/2 int g^2/sigma^2 D c^2 dt = D c^2 Z / 2, and D c^2 / 2 at the decoder."""
    sde, c = SDES[name](), 0.2
    right = gaussian_model(sde).nelbo(data, times=64, generator=source())
    wrong = gaussian_model(sde, error=c).nelbo(data, times=64, generator=source())
    z = 2 * float(
        sde.log_ratio(torch.tensor(1.0, dtype=torch.float64))
        - sde.log_ratio(torch.tensor(sde.eps, dtype=torch.float64))
    )
    mean, error = mean_and_error(wrong - right)
    assert abs(mean - 0.5 * DIMS * c**2 * (z + 1)) < 3 * error + 1e-3 * DIMS
    assert error < 0.1 * mean


@pytest.mark.parametrize("name", SDES)
def test_an_affine_flow_adds_its_log_determinant(name, data):
    """Data pushed through a known map: the model must report the density of x, not of z."""
    flow = AffineFlow()
    x = flow.inverse(data)
    log_det = DIMS * math.log(flow.scale)
    truth = gaussian_nll(data) - log_det
    model = gaussian_model(SDES[name](), flow=flow)
    for options in ({"rtol": 1e-7, "atol": 1e-7}, {"rtol": 1e-6, "atol": 1e-6, "solver": "adams"}):
        clean = model.nll(x, corrected=False, probes="exact", **options)
        assert (clean - (exact_ode_nll(model.sde, data) - log_det)).abs().max() < 1e-4
    mean, error = mean_and_error(model.nelbo(x, times=64, generator=source()) - truth)
    assert abs(mean - DIMS * prior_gap(model.sde)) < 3 * error + 1e-3 * DIMS


def test_scale_is_a_linear_flow(data):
    sde = VPSDE()
    scaled, plain = gaussian_model(sde), gaussian_model(sde)
    scaled.scale = 2.0
    options = {"corrected": False, "probes": "exact"}
    shifted = scaled.nll(2 * data, **options) - plain.nll(data, **options)
    assert torch.allclose(shifted, torch.full_like(shifted, DIMS * math.log(2)), atol=1e-6)


def test_hutchinson_probes_are_unbiased_and_divided_by_their_number(data):
    """A rotation-like score has off-diagonal Jacobian entries, so that one probe is noisy and many agree with exact."""

    class Coupled(torch.nn.Module):
        def __init__(self, sde):
            super().__init__()
            self.sde = sde
            covariance = torch.tensor([[1.0, 0.6, 0.2], [0.6, 1.0, -0.3], [0.2, -0.3, 1.0]], dtype=torch.float64)
            self.values, self.vectors = torch.linalg.eigh(0.25 * covariance)

        def forward(self, z, t):
            alpha, sigma = (v[:, None] for v in self.sde.marginal(t))
            return -((z @ self.vectors) / (alpha**2 * self.values + sigma**2)) @ self.vectors.T

    model = gaussian_model(VPSDE())
    model.score = Coupled(model.sde)
    few = data[:400]
    exact = model.nll(few, corrected=False, probes="exact")
    for probes in (1, 4):
        generator = IndexedGenerator(3, "probes", torch.arange(len(few)))
        mean, error = mean_and_error(model.nll(few, corrected=False, probes=probes, generator=generator) - exact)
        assert 0 < error < 0.2
        assert abs(mean) < 3.5 * error


def test_batch_composition_changes_nothing(data):
    """Per-sample step control and noise by index: 3 and 5 samples equal 8."""
    model = gaussian_model(VPSDE())

    def both(rows):
        generator = IndexedGenerator(0, "batch", torch.arange(N)[rows])
        return model.nelbo(data[rows], times=4, generator=generator), model.nll(data[rows], generator=generator)

    for whole, first, second in zip(both(slice(0, 8)), both(slice(0, 3)), both(slice(3, 8)), strict=True):
        assert torch.allclose(whole, torch.cat([first, second]), rtol=0, atol=1e-12)


def test_tighter_tolerance_costs_more_and_errs_less(data):
    model, few = gaussian_model(VPSDE()), data[:100]
    reference = model.nll(few, corrected=False, probes="exact", rtol=1e-10, atol=1e-10)
    errors, costs = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        parts = model.nll_parts(few, corrected=False, probes="exact", rtol=tolerance, atol=tolerance)
        costs.append(float(parts.pop("nfe").double().mean()))
        errors.append(float((sum(parts.values()) - reference).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 1e-3
    assert costs[0] < costs[1] < costs[2] < 400


def test_parts_are_named_and_sum(data):
    model = gaussian_model(VPSDE())
    parts = model.nelbo_parts(data[:10], times=2, generator=IndexedGenerator(0, "x", torch.arange(10)))
    assert set(parts) == {"prior", "diffusion", "reconstruction", "flow"}
    total = model.nelbo(data[:10], times=2, generator=IndexedGenerator(0, "x", torch.arange(10)))
    assert torch.equal(sum(parts.values()), total)


def test_phase_is_immutable():
    phase = gaussian_model(VPSDE()).phases()[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        phase.name = "other"
