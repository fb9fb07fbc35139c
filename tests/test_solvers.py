"""Adaptive solvers: their orders, both ways to run a batch, and what they cost beside the published method."""

import math

import numpy as np
import pytest
import torch
from analytic import GaussianScore
from scipy.integrate import solve_ivp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from models.adams import Adams, weights
from models.adaptive import Control, IntegrationError, integrate
from models.flows.residual import ResidualFlow
from models.integrators import GaussianFrame, flow_field, likelihood_path, resolve_probes, value_and_trace
from models.runge_kutta import DORMAND_PRINCE
from models.score.adapter import noise_function
from models.sde import VESDE, VPSDE, SubVPSDE, expand

CASES = {"vp": (VPSDE(), 0.3, 0.5), "ve": (VESDE(), 0.5, 0.25)}  # the specification's: SDE, mean, std of the data
METHODS = {"runge-kutta": DORMAND_PRINCE, "adams": Adams()}


def problem(kind, count=16, dims=3):
    """(exact noise, SDE, data, their moments) of the analytic cases, in float64."""
    sde, mean, std = CASES[kind]
    source = torch.Generator().manual_seed(0)
    data = mean + std * torch.randn(count, dims, generator=source, dtype=torch.float64)
    return noise_function(GaussianScore(sde, mean, std), sde), sde, data, (mean, std)


def exact(sde, z, mean, std):
    """z_1 and log|det dz_1/dz| of the exact ODE from z at eps: standardised positions stay where they are."""
    alpha, sigma = sde.marginal(torch.tensor([sde.eps, 1.0], dtype=torch.float64))
    spread = ((alpha * std) ** 2 + sigma**2).sqrt()
    return alpha[1] * mean + spread[1] * (z - alpha[0] * mean) / spread[0], z.shape[1] * (spread[1] / spread[0]).log()


def published(noise, sde, z, tolerance):
    """(-log p (B,), evaluations) as the official code has it: RK45 in t, one norm for the batch and its divergences."""
    size = z.numel()

    def field(t, state):
        t = torch.full((len(z),), t, dtype=z.dtype)
        with torch.enable_grad():
            leaf = torch.from_numpy(state[:size]).view(z.shape).requires_grad_()
            output = noise(leaf, t)
            columns = [torch.autograd.grad(output[:, d].sum(), leaf, retain_graph=True)[0][:, d] for d in range(3)]
        f, share = sde.drift(t), sde.diffusion(t).square() / (2 * sde.marginal(t)[1])
        slope = expand(f, z) * leaf + expand(share, z) * output
        divergence = f * z.shape[1] + share * sum(columns)
        return torch.cat([slope.flatten(), divergence]).detach().numpy()

    start = np.concatenate([z.flatten().numpy(), np.zeros(len(z))])
    solved = solve_ivp(field, (sde.eps, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45")
    end = torch.from_numpy(solved.y[:, -1])
    return -sde.prior_log_prob(end[:size].view(z.shape)) - end[size:], solved.nfev


def ours(noise, sde, z, tolerance, **options):
    end, log_det, nfe = likelihood_path(noise, sde, z, "exact", tolerance, tolerance, **options)
    return -sde.prior_log_prob(end) - log_det, float(nfe.double().mean())


@pytest.mark.parametrize(("kind", "evaluations", "tolerance"), [("vp", 44, 4e-4), ("ve", 116, 4e-4), ("ve", 116, 1e-4)])
def test_analytic_cases_take_at_most_half_of_the_published_evaluations(kind, evaluations, tolerance):
    noise, sde, z, moments = problem(kind)
    end, log_det = exact(sde, z, *moments)
    truth = -sde.prior_log_prob(end) - log_det
    theirs, spent = published(noise, sde, z, 1e-5)
    assert spent == evaluations  # as the specification has it
    error = (theirs - truth).abs().mean()
    for known in ({}, {"reference": moments}):  # without knowing the data's moments, and with
        value, nfe = ours(noise, sde, z, tolerance, solver="adams", **known)
        assert nfe <= evaluations / 2 and (value - truth).abs().mean() <= error


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()])
@pytest.mark.parametrize("reference", [(0.3, 0.5), (torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64), 0.8)])
def test_any_frame_gives_the_exact_density(sde, reference):
    noise = noise_function(GaussianScore(sde, 0.3, 0.5), sde)
    z = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)
    end, log_det = exact(sde, z, 0.3, 0.5)
    found = likelihood_path(noise, sde, z, "exact", 1e-8, 1e-8, solver="adams", reference=reference)
    assert torch.allclose(found[0], end, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[1], log_det.expand(4), rtol=0, atol=1e-6)


def test_adams_weights_integrate_polynomials_exactly():
    places = torch.tensor([[1.3, 0.0, -0.4, -1.9, -2.2, -2.9, -3.1]], dtype=torch.float64)
    length = torch.tensor([1.3], dtype=torch.float64)
    for known in range(1, 7):
        found = weights(places, length, torch.tensor([known]))
        assert found[0, known:].count_nonzero() == 0
        for power in range(known):
            exactly = 1.3 ** (power + 1) / (power + 1)
            assert float((found * places**power).sum()) == pytest.approx(exactly)
        assert float((found * places**known).sum()) != pytest.approx(1.3 ** (known + 1) / (known + 1))
    # of seven slopes the interpolant would be exact, and its quadrature is not
    assert float((weights(places, length, torch.tensor([7])) * places**6).sum()) != pytest.approx(1.3**7 / 7)


def test_adams_refuses_orders_that_its_quadrature_is_not_exact_for():
    assert [Adams(order).order for order in (1, 5)] == [1, 5]
    for order in (0, 6):
        with pytest.raises(ValueError, match=f"order = {order}: accepted are 1 to 5"):
            Adams(order)


def test_adams_needs_no_past_to_start():
    """The first step is the trapezium rule's, with a third-order local error, and so is worth a third of a span."""
    start, end = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.3, dtype=torch.float64)
    method = Adams(first=1.0)
    u, _, nfe = integrate(method, lambda rows: lambda x, u: (x[:, None] + 0 * u, x), start[:, None], start, end, 1, 1)
    assert int(nfe) == 2 and float(u) == pytest.approx(0.3**2 / 2)


def oscillators(count=9):
    """(field_for, u, start, end) of du = i w u, each sample with its own w and span, divergence cos(x)."""
    rates = torch.linspace(0.5, 6, count, dtype=torch.float64)

    def field_for(rows):
        own = rates[rows][:, None]
        return lambda x, u: (own * torch.stack([-u[:, 1], u[:, 0]], 1), x.cos())

    u = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(count, 2)
    end = torch.linspace(1, 3, count, dtype=torch.float64)
    return field_for, u, torch.zeros_like(end), end, rates


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fixed_shape", [False, True])
def test_every_sample_is_integrated_to_its_own_end(name, fixed_shape):
    field_for, u, start, end, rates = oscillators()
    found, log_det, nfe = integrate(METHODS[name], field_for, u, start, end, 1e-7, 1e-7, fixed_shape=fixed_shape)
    assert torch.allclose(found, torch.stack([(rates * end).cos(), (rates * end).sin()], 1), atol=2e-5)
    assert torch.allclose(log_det, end.sin(), atol=1e-5)
    assert nfe[0] < nfe[-1]


class HostReads(TorchFunctionMode):
    """Counts the calls for which the host waits for a device: values read, and shapes that depend on values."""

    NAMES = ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "equal", "allclose", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        masked = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        self.count += name in self.NAMES or masked
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("look_every", [1, 5])
def test_a_batch_of_fixed_shape_gives_the_same_and_is_looked_at_rarely(name, look_every):
    field_for, u, start, end, _ = oscillators()
    plain = integrate(METHODS[name], field_for, u, start, end, 1e-4, 1e-4, fixed_shape=False)
    with HostReads() as reads:
        options = {"fixed_shape": True, "look_every": look_every}
        frozen = integrate(METHODS[name], field_for, u, start, end, 1e-4, 1e-4, **options)
    assert torch.equal(plain[2], frozen[2])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(plain[:2], frozen[:2], strict=True))
    steps = (int(frozen[2].max()) - 1) / METHODS[name].evaluations
    assert reads.count == math.ceil(steps / look_every)
    with HostReads() as reads:
        integrate(METHODS[name], field_for, u, start, end, 1e-4, 1e-4, fixed_shape=False)
    assert reads.count > steps


def test_a_likelihood_of_fixed_shape_is_the_same():
    noise, sde, z, _ = problem("ve")
    for solver in ("dopri5", "adams"):
        both = [likelihood_path(noise, sde, z, "exact", solver=solver, fixed_shape=fixed) for fixed in (False, True)]
        assert all(torch.allclose(a.double(), b.double(), rtol=0, atol=1e-9) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_one_graph_of_fixed_shapes(name):
    """Traced with tensors that have shapes and no values, a step is the same function."""
    field_for, u, start, end, _ = oscillators()
    method, span = METHODS[name], end - start
    field = field_for(torch.arange(len(u)))

    def step(span, *state):
        state, error = method.advance(field, type(begun)(*state), Control(1e-5, 1e-5, math.inf, span))
        return *state, error

    begun = method.begin(field, u, start, span)
    state, graph = begun, make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(span, *begun)
    for _ in range(3):
        *state, error = step(span, *(before := state))
        assert all(torch.equal(a, b) for a, b in zip([*state, error], graph(span, *before), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fixed_shape", [False, True])
def test_failures_name_the_samples(name, fixed_shape):
    field_for, u, start, end, _ = oscillators()

    def poisoned(rows):
        field = field_for(rows)

        def spoilt(x, u):
            slope, divergence = field(x, u)
            return torch.where(((rows == 4) & (x > 0.5))[:, None], math.nan, slope), divergence

        return spoilt

    with pytest.raises(IntegrationError, match=r"non-finite value in the ODE for samples \[4\] after"):
        integrate(METHODS[name], poisoned, u, start, end, fixed_shape=fixed_shape)
    with pytest.raises(IntegrationError, match=r"of 9 trajectories unfinished after (19|20) evaluations"):
        integrate(METHODS[name], field_for, u, start, end, max_nfe=20, fixed_shape=fixed_shape)


def test_an_unknown_solver_is_refused_by_name():
    noise, sde, z, _ = problem("vp")
    with pytest.raises(ValueError, match="solver = 'euler': accepted are dopri5, adams"):
        likelihood_path(noise, sde, z, "exact", solver="euler")
    assert GaussianFrame(sde).std == 0.5


def test_value_and_trace_of_a_known_map():
    """x -> A x^3 has the divergence 3 sum A_dd x_d^2, and v' J v along a probe v."""
    matrix = torch.tensor([[0.7, 2.0], [-1.0, 0.4]], dtype=torch.float64)
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]], dtype=torch.float64)
    probes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.5]], dtype=torch.float64)[:, None].expand(3, 3, 2)
    jacobians = 3 * matrix * x.square()[:, None]
    products = torch.einsum("kbi,bij,kbj->kb", probes, jacobians, probes).mean(0)
    truths = {"exact": jacobians.diagonal(dim1=1, dim2=2).sum(1), None: torch.zeros(3).double(), probes: products}
    for given, truth in truths.items():
        value, trace = value_and_trace(lambda x: x**3 @ matrix.T, x, given)
        assert torch.allclose(value, x**3 @ matrix.T) and torch.allclose(trace, truth)
        assert not value.requires_grad and not trace.requires_grad


def test_unknown_probes_are_refused_by_name():
    noise, sde, z, _ = problem("vp")
    for field in (flow_field(noise, sde, "Exact"), GaussianFrame(sde).field(noise, "Exact")):
        with pytest.raises(ValueError, match="probes = 'Exact': accepted are exact, None and a tensor"):
            field(torch.zeros(len(z), dtype=z.dtype), z)
    for probes in ("Exact", 0, None):
        with pytest.raises(ValueError, match=f"probes = {probes!r}: accepted are exact and 1 or more"):
            resolve_probes(probes, z, None)
    assert resolve_probes("exact", z, None) == "exact"
    assert resolve_probes(2, z, torch.Generator()).shape == (2, *z.shape)


def test_the_inverse_of_a_flow_of_fixed_shape_is_the_same(monkeypatch):
    from models.flows import inverse, residual

    torch.manual_seed(0)
    flow = ResidualFlow([2], blocks=3, hidden=16).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(3)
    z = torch.randn(40, 2, dtype=torch.float64)
    plain = flow.inverse(z)
    original = inverse.invert
    monkeypatch.setattr(residual, "invert", lambda *args: original(*args, fixed_shape=True))
    with HostReads() as reads:
        frozen = flow.inverse(z)
    assert torch.allclose(plain, frozen, rtol=0, atol=1e-12)
    assert torch.allclose(flow(plain)[0], z, atol=1e-10)
    assert reads.count <= 3 * (1 + 1000 // inverse.LOOK_EVERY)
    with pytest.raises(inverse.FlowInverseError, match="samples not converged after 2 iterations"):
        flow.inverse(z, max_iterations=2)
