"""DiffFlow: the replayed gradient, the chain's bound against closed forms, the ODE's likelihood, refinement."""

import math

import pytest
import torch
from torch import nn

from bench.config import load_suite, suite_files
from bench.step_costs import peak_bytes
from models.base import NotDefined
from models.chain import Kernel, chain_bound, step_term
from models.diffflow import DiffFlow, warped_times
from models.noise import IndexedGenerator, StepRandom
from models.replay import Path, replayed_energy, stored_energy

NET = {"name": "mlp", "width": 24, "depth": 1}


def small(steps=10, **options):
    torch.manual_seed(0)
    model = DiffFlow.from_options((2,), NET, NET, steps=steps, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


class Linear(nn.Module):
    """x -> factor x, at every time."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x, t):
        return self.factor * x


@pytest.mark.parametrize("steps", [1, 2, 11])
def test_replayed_gradient_is_that_of_full_back_propagation(steps):
    model = small(steps)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    parameters = [*model.drift.parameters(), *model.score.parameters()]

    def of(energy):
        path = Path(model.drift, model.score, model.times, model.diffusion, 1.0, torch.Generator().manual_seed(3))
        value, spent = energy(path)
        return value, spent, torch.autograd.grad(value.mean(), [x, *parameters], allow_unused=True)

    ours, spent, replayed = of(lambda path: replayed_energy(path, x, parameters))
    theirs, same, stored = of(lambda path: stored_energy(path, x))
    assert torch.allclose(ours, theirs, rtol=1e-12) and torch.equal(spent, same)
    for a, b in zip(replayed, stored, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp_min(1e-9)


def test_training_step_needs_no_memory_for_more_steps():
    """The suite's network: beside the graph of one step only the states x_0..x_N are kept."""
    net, peaks = {"name": "mlp", "width": 64, "depth": 1}, {}
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    for steps in (10, 100):
        model = DiffFlow.from_options((2,), net, net, steps=steps, first_steps=steps)

        def step(model=model):
            model.bound_loss(x, StepRandom(0, 0, len(x)))[0].backward()

        peaks[steps] = peak_bytes(step)
    assert peaks[10] < peaks[100] < 1.2 * peaks[10]

    def stored(steps):
        path = Path(model.drift, model.score, model.grid(steps), model.diffusion, 1.0, torch.Generator().manual_seed(0))
        return peak_bytes(lambda: stored_energy(path, x)[0].mean().backward())

    # the measure can tell: back-propagation through the whole path keeps every step's graph
    assert stored(12) > 3 * stored(3)


def test_unequal_weights_are_refused():
    model = small(3)
    path = Path(model.drift, model.score, model.times, model.diffusion, 1.0)
    parameters = [*model.drift.parameters(), *model.score.parameters()]
    energy, _ = replayed_energy(path, torch.randn(4, 2, dtype=torch.float64), parameters)
    with pytest.raises(ValueError, match="mean over the batch"):
        (energy * torch.arange(4.0)).sum().backward()


def test_loss_is_the_bound_that_is_reported():
    model = small(8, scale=1.5)
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, _ = model.bound_loss(x, StepRandom(0, 10**6, len(x)))
    nelbo = model.nelbo(x, generator=IndexedGenerator(0, "bound", torch.arange(len(x)))) / 2
    error = float(nelbo.std()) / math.sqrt(len(x))
    assert float(loss.detach()) == pytest.approx(float(nelbo.mean()), abs=4.5 * error)


def gaussian_chain_bound(times, drift, score, g, variance):
    """E of the chain's bound a dimension for N(0, variance) data and linear drift and score, by each step's moments."""
    total, v = 0.0, variance
    for a, b in zip(times, times[1:], strict=False):
        h = b - a
        m, q = 1 + h * drift, g * g * h  # x' = m x + noise of variance q
        r = 1 - h * (drift - g * g * score)  # the backward mean is r x'
        later = m * m * v + q
        # E(x - r x')^2 = v - 2 r m v + r^2 E x'^2
        total += 0.5 * ((v - 2 * r * m * v + r * r * later) / q - 1)
        v = later
    return total + 0.5 * (v + math.log(2 * math.pi))


def test_chain_bound_of_linear_fields_is_known():
    """With the drift of a linear diffusion DiffFlow's chain is the discrete linear model's; so is its bound."""
    times = warped_times(0.01, 1.0, 12, 0.7)
    drift, score, g, variance = -0.8, -1.1, 0.9, 0.6
    model = DiffFlow(Linear(drift), Linear(score), (3,), steps=12, start=0.01, end=1.0, power=0.7, g=g)
    n = 20_000
    x = variance**0.5 * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = model.nelbo(x, generator=IndexedGenerator(0, "chain", torch.arange(n)))
    truth = 3 * gaussian_chain_bound(times.tolist(), drift, score, g, variance)
    assert float(values.mean()) == pytest.approx(truth, abs=4 * float(values.std()) / math.sqrt(n))

    # the same kernels, written down as those of a discrete linear diffusion
    widths = (times[1:] - times[:-1]).tolist()

    def forward(z, i):
        return Kernel((1 + widths[i] * drift) * z, torch.tensor(g**2 * widths[i], dtype=z.dtype))

    def backward(z, i):
        return Kernel((1 - widths[i] * (drift - g**2 * score)) * z, torch.tensor(g**2 * widths[i], dtype=z.dtype))

    def prior(z):
        return -0.5 * (z.square().sum(1) + 3 * math.log(2 * math.pi))

    source = IndexedGenerator(0, "chain", torch.arange(n))
    assert torch.allclose(sum(chain_bound(x, 12, forward, backward, prior, source).values()), values, rtol=1e-9)


class Table(nn.Module):
    """x -> value of the nearest tabulated time times x."""

    def __init__(self, times, values):
        super().__init__()
        self.register_buffer("times", torch.as_tensor(times, dtype=torch.float64))
        self.register_buffer("values", torch.as_tensor(values, dtype=torch.float64))

    def forward(self, x, t):
        return self.values[(t[:, None] - self.times).abs().argmin(1)][:, None] * x


def ddpm_bound(betas, variance):
    """Closed form a dimension: DDPM's bound with exact means, kernel variances beta, on N(0, variance) data.

    By its own decomposition, KL(q(x_N | x_0) || pi) + sum KL(q(x_i | x_{i+1}, x_0) || p) - E log p(x_0 | x_1), in which
    no forward density is ever evaluated along a path.
    """
    alphas, v = [1 - beta for beta in betas], variance
    bars = [math.prod(alphas[:i]) for i in range(len(betas) + 1)]
    total = 0.5 * (bars[-1] * variance + (1 - bars[-1]) - 1 - math.log(1 - bars[-1]))
    for i, beta in enumerate(betas):
        later = alphas[i] * v + beta
        mean = math.sqrt(alphas[i]) * v / later  # E[x_i | x_{i+1}] / x_{i+1}
        if i == 0:
            total += 0.5 * (math.log(2 * math.pi * beta) + (v - mean**2 * later) / beta)
        else:
            spread = beta * (1 - bars[i]) / (1 - bars[i + 1])
            of_x0 = math.sqrt(bars[i]) * beta / (1 - bars[i + 1])
            of_x = math.sqrt(alphas[i]) * (1 - bars[i]) / (1 - bars[i + 1]) - mean
            square = of_x0**2 * variance + of_x**2 * later + 2 * of_x0 * of_x * math.sqrt(bars[i + 1]) * variance
            total += 0.5 * (math.log(beta / spread) + (spread + square) / beta - 1)
        v = later
    return total


def test_drift_of_a_linear_diffusion_gives_the_discrete_linear_models_bound():
    """Forward drift fixed to DDPM's kernels N(sqrt(1 - beta) x, beta), exact score: DDPM's bound in closed form."""
    variance, n = 0.4, 20_000
    betas = torch.linspace(0.02, 0.5, 9, dtype=torch.float64).tolist()
    times = [0.01]  # with g = 1 a step of width beta has DDPM's noise
    for beta in betas:
        times.append(times[-1] + beta)
    model = DiffFlow(Linear(0.0), Linear(0.0), (3,), steps=len(betas), start=times[0], end=times[-1], g=1.0)
    model.times = torch.tensor(times, dtype=torch.float64)
    drift = [(math.sqrt(1 - beta) - 1) / beta for beta in betas]
    score, v = [0.0], variance
    # the drift at a step's end serves the backward kernel; the score makes its mean E[x_i | x_{i+1}]
    for beta, at_end in zip(betas, [*drift[1:], 0.0], strict=True):
        later = (1 - beta) * v + beta
        score.append(at_end + (math.sqrt(1 - beta) * v / later - 1) / beta)
        v = later
    model.drift, model.score = Table(times, [*drift, 0.0]), Table(times, score)
    x = variance**0.5 * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = sum(model.chain_parts(x, IndexedGenerator(0, "chain", torch.arange(n))).values())
    error = float(values.std()) / math.sqrt(n)
    assert error < 0.02
    assert float(values.mean()) == pytest.approx(3 * ddpm_bound(betas, variance), abs=4 * error)


def test_step_term_is_a_difference_of_log_densities():
    a, b = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    forward, backward = Kernel(0.9 * a, torch.tensor(0.3).double()), Kernel(1.1 * b, torch.tensor(0.2).double())
    normal = torch.distributions.Normal
    truth = normal(0.9 * a, 0.3**0.5).log_prob(b).sum(1) - normal(1.1 * b, 0.2**0.5).log_prob(a).sum(1)
    assert torch.allclose(step_term(a, b, forward, backward), truth)


def test_ode_likelihood_of_linear_fields_is_known():
    """dx = (f - g^2 s / 2) dt with linear fields multiplies x by a known factor."""
    drift, score, g = -0.8, -1.1, 0.9
    model = DiffFlow(Linear(drift), Linear(score), (2,), steps=5, start=0.01, end=1.0, g=g, scale=2.0)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stretch = (drift - 0.5 * g**2 * score) * 0.99
    z = x / 2 * math.exp(stretch)
    truth = -model.prior_log_prob(z) - 2 * stretch + 2 * math.log(2)
    assert torch.allclose(model.nll(x, rtol=1e-9, atol=1e-9, probes="exact"), truth, atol=1e-7)


def test_grid_grows_towards_the_noise_and_is_refined_while_training():
    times = warped_times(1e-3, 0.05, 30, 0.9)
    widths = times[1:] - times[:-1]
    assert float(widths[-1] / widths[0]) == pytest.approx(1.41, abs=0.02)
    assert (float(times[0]), float(times[-1])) == (pytest.approx(1e-3), pytest.approx(0.05))
    model = small(30, first_steps=4, refined=100)
    assert [model.steps_at(step) for step in (0, 24, 25, 50, 75, 99, 100, 10**6)] == [4, 4, 8, 16, 30, 30, 30, 30]
    fine = model.grid(60)
    assert torch.allclose(fine[::2], model.times.cpu())


def test_refined_training_minimises_the_shorter_chains_bound():
    model = small(16, first_steps=4, refined=100, power=0.5)
    short = DiffFlow(model.drift, model.score, (2,), steps=4, power=0.5)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(short.times, model.grid(4))
    for step, same in ((0, True), (99, False)):
        loss, expected = (m.bound_loss(x, StepRandom(0, step, 16))[0] for m in (model, short))
        assert torch.allclose(loss, expected, rtol=1e-12) is same


def test_loss_and_gradient_depend_on_the_step_alone():
    """Twice the same, whatever was drawn between; and two halves of a batch make the whole, as two processes do."""
    model = small(5)
    parameters = list(model.parameters())
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def of(first, count):
        loss, _ = model.bound_loss(x[first : first + count], StepRandom(7, 3, 16, (first, count)))
        return torch.autograd.grad(loss, parameters)

    whole = of(0, 16)
    torch.randn(5)
    assert all(torch.equal(a, b) for a, b in zip(whole, of(0, 16), strict=True))
    for a, b, c in zip(whole, of(0, 8), of(8, 8), strict=True):
        assert torch.allclose(a, (b + c) / 2, rtol=1e-9, atol=1e-12)


def test_dropout_is_refused():
    net = {"name": "ncsnpp", "nf": 8, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
    with pytest.raises(ValueError, match=r"score.dropout = 0.1: accepted is 0"):
        DiffFlow.from_options((1, 8, 8), net | {"dropout": 0.0}, net | {"dropout": 0.1})


@pytest.mark.parametrize("end", [0.01, 0.02])
def test_times_out_of_order_are_refused(end):
    with pytest.raises(ValueError, match=f"start = 0.02: must be greater than 0 and less than end = {end}"):
        DiffFlow.from_options((2,), NET, NET, start=0.02, end=end)


def test_chain_bound_is_the_reported_bound():
    """One path is the chain's bound; the NELBO averages as many as the times asked for allow."""
    model, rows = small(6, scale=1.5), torch.arange(5)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = model.chain_parts(x, IndexedGenerator(0, "b", rows))
    assert {name: value.tolist() for name, value in one.items()} == {
        name: value.tolist() for name, value in model.nelbo_parts(x, 1, IndexedGenerator(0, "b", rows)).items()
    }
    source = IndexedGenerator(0, "b", rows)
    two = [sum(model.chain_parts(x, source).values()) for _ in range(2)]
    assert torch.allclose(model.nelbo(x, 12, IndexedGenerator(0, "b", rows)), (two[0] + two[1]) / 2)


def test_samples_depend_on_their_index_alone():
    model = small(6)
    whole = model.sample(8, 6, generator=IndexedGenerator(0, "s", torch.arange(8)))
    part = model.sample(3, 6, generator=IndexedGenerator(0, "s", torch.arange(5, 8)))
    assert torch.allclose(whole[5:], part, atol=1e-12) and model.nfe == 6
    assert torch.isfinite(model.sample(4, sampler="ode", generator=IndexedGenerator(0, "s", torch.arange(4)))).all()


def test_likelihood_honours_its_options_and_refuses_those_of_linear_diffusions():
    model = small(6)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def nll(**options):
        return model.nll(x, 1e-6, 1e-6, generator=IndexedGenerator(0, "p", torch.arange(5)), **options)

    exact = nll(probes="exact")
    # as many orthogonal probes as dimensions give the trace itself; as many random signs do not
    assert torch.allclose(nll(probes=2, probe_kind="orthogonal"), exact, atol=1e-9)
    assert (nll(probes=2) - exact).abs().max() > 1e-4
    assert torch.allclose(nll(probes="exact", fixed_shape=True), exact, rtol=0, atol=1e-12)
    with pytest.raises(NotDefined, match="reference"):
        nll(reference=(0.0, 1.0))
    with pytest.raises(NotDefined, match="the solver adams"):
        nll(solver="adams")
    with pytest.raises(TypeError, match="control_varate"):
        model.nelbo_parts(x, control_varate=False)


def test_samplers_of_every_suite_are_defined_and_options_of_linear_diffusions_are_not():
    model, tried = small(4), 0
    for suite in map(load_suite, suite_files()):
        for variant in (name for name in suite.variants if name.startswith(("diffflow", "sbp"))):
            (run, *_) = suite.runs(variant)
            for entry in run.evaluate.samplers:
                options = {key: value for key, value in entry.items() if key not in ("name", "steps")}
                assert model.sample(2, entry["steps"][0], entry["name"], torch.Generator(), **options).shape == (2, 2)
                tried += 1
    assert tried > 10
    for sampler in ("euler_maruyama", "ode"):
        drawn = [model.sample(3, 4, sampler, torch.Generator().manual_seed(0), end=end) for end in (None, 1e-5)]
        assert torch.equal(*drawn)
    for options in ({"end": 1e-3}, {"grid": "log_ratio"}, {"eta": 0.0}, {"sampler": "ode", "end": 1e-3}):
        with pytest.raises(NotDefined, match=f"{list(options)[-1]} = .* is for linear diffusions"):
            model.sample(3, 4, **options)
