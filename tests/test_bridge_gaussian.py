"""Schrodinger bridges against ground truth: between two Gaussians the bridge is known in closed form.

The optimal coupling of N(m, a) and N(0, b) under a linear base process with transition N(alpha x, sigma^2) is Gaussian
with covariance c = (sqrt(4ab + e^2) - e) / 2, e = sigma^2 / alpha (Janati et al. 2020, "Entropic optimal transport
between unbalanced Gaussian measures has a closed form", theorem 1; Mallasto et al. 2022; Bunne et al. 2023 for paths).
"""

import math

import pytest
import torch
from torch import nn

from models.bridge import Bridge
from models.noise import StepRandom

MEAN, DATA_STD, PRIOR_STD, G = 0.5, 0.6, 0.8, 0.9
REVERSIONS = (0.0, 0.8)


class Truth:
    """Marginals, coupling and policies of the bridge from N(MEAN, DATA_STD^2) to N(0, PRIOR_STD^2) over [0, 1]."""

    def __init__(self, reversion: float):
        self.reversion = reversion
        alpha, variance = (float(v) for v in self.transition(torch.tensor(1.0)))
        a, b, cost = DATA_STD**2, PRIOR_STD**2, variance / alpha
        self.covariance = 0.5 * (math.sqrt(4 * a * b + cost**2) - cost)
        determinant = a * b - self.covariance**2
        # the coupling divided by the base transition: potentials exp(-k x^2 / 2 + l x) at either end
        self.curvature = b / determinant - alpha**2 / variance, a / determinant - 1 / variance
        self.slope = b / determinant * MEAN, -self.covariance / determinant * MEAN

    def transition(self, elapsed):
        """(alpha, sigma^2) of the base process over a time."""
        if self.reversion == 0:
            return torch.ones_like(elapsed), G**2 * elapsed
        alpha = torch.exp(-self.reversion * elapsed)
        return alpha, G**2 * (1 - alpha**2) / (2 * self.reversion)

    def forward_policy(self, x, t):
        """Z = g grad log of the later potential, carried back to t by the base process."""
        alpha, variance = (v[:, None] for v in self.transition(1 - t))
        return G * alpha * (self.slope[1] - self.curvature[1] * alpha * x) / (1 + self.curvature[1] * variance)

    def backward_policy(self, x, t):
        """Zhat = g grad log of the earlier potential, carried on to t."""
        alpha, variance = (v[:, None] for v in self.transition(t))
        return G * (alpha * self.slope[0] - self.curvature[0] * x) / (alpha**2 + self.curvature[0] * variance)

    def marginal(self, t):
        """(mean, variance) at t: what is expected and what is left of the base process pinned at both ends."""
        (before, early), (after, late) = self.transition(t), self.transition(1 - t)
        spread = 1 / (1 / early + after**2 / late)
        first, last = spread * before / early, spread * after / late
        moved = first**2 * DATA_STD**2 + last**2 * PRIOR_STD**2 + 2 * first * last * self.covariance
        return first * MEAN, moved + spread


class Field(nn.Module):
    """A policy without parameters."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, x, t):
        return self.field(x, t)


class Affine(nn.Module):
    """A policy that is affine in x whose coefficients are four cosines of t, from zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))

    def forward(self, x, t):
        waves = torch.cos(math.pi * torch.arange(4) * t[:, None])
        slope, offset = (waves @ self.weight).split(1, 1)
        return slope * x + offset


def optimal(reversion, steps):
    truth = Truth(reversion)
    policies = Field(truth.forward_policy), Field(truth.backward_policy)
    return truth, Bridge(*policies, (1,), steps=steps, g=G, reversion=reversion, prior_std=PRIOR_STD)


@torch.no_grad()
def moments(model, forward):
    """Exact (means, variances, covariances with the start) along the chain, by the affine kernels' own coefficients."""
    ahead, back = model.kernels(model.times)
    steps = len(model.times) - 1
    mean, variance = (MEAN, DATA_STD**2) if forward else (0.0, PRIOR_STD**2)
    rows, shared = [(mean, variance, variance)], variance
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for i in range(steps) if forward else reversed(range(steps)):
        kernel = (ahead if forward else back)(probe, i)
        offset, slope = float(kernel.mean[0]), float(kernel.mean[1] - kernel.mean[0])
        mean, variance, shared = offset + slope * mean, slope**2 * variance + float(kernel.variance), slope * shared
        rows.append((mean, variance, shared))
    return torch.tensor(rows if forward else rows[::-1], dtype=torch.float64)


@pytest.mark.parametrize("reversion", REVERSIONS)
def test_coupling_is_the_entropic_plan(reversion):
    """Sinkhorn's iterations on a grid, which know nothing of Gaussians' closed form, find the same covariance."""
    truth = Truth(reversion)
    alpha, variance = truth.transition(torch.tensor(1.0, dtype=torch.float64))
    x = torch.linspace(-5, 6, 400, dtype=torch.float64)
    mu, nu = (torch.softmax(-0.5 * ((x - mean) / std) ** 2, 0) for mean, std in ((MEAN, DATA_STD), (0.0, PRIOR_STD)))
    kernel = torch.exp(-0.5 * (x - alpha * x[:, None]) ** 2 / variance)
    v = torch.ones_like(x)
    for _ in range(100):
        u = mu / (kernel @ v)
        v = nu / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    found = (plan * (x[:, None] - MEAN) * x).sum()
    assert abs(float(found) - truth.covariance) < 1e-4


@pytest.mark.parametrize("reversion", REVERSIONS)
def test_policies_sum_to_the_score(reversion):
    truth, model = optimal(reversion, 4)
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]
    mean, variance = (v[:, None] for v in truth.marginal(t))
    total = model.forward_policy(x, t) + model.backward_policy(x, t)
    assert torch.allclose(total, -G * (x - mean) / variance, atol=1e-10)


@pytest.mark.parametrize("reversion", REVERSIONS)
def test_both_directions_have_the_bridges_law_up_to_grid_error(reversion):
    """Mean, variance and the ends' covariance of both chains err by O(1/N), and the chains agree in between."""
    errors = {}
    for steps in (50, 100):
        truth, model = optimal(reversion, steps)
        mean, variance = truth.marginal(model.times[1:-1])
        inside = torch.stack([mean, variance], 1)
        worst = []
        for forward in (True, False):
            found = moments(model, forward)
            worst.append(float((found[1:-1, :2] - inside).abs().max()))
            end, target = (found[-1], (0.0, PRIOR_STD**2)) if forward else (found[0], (MEAN, DATA_STD**2))
            worst.append(float((end - torch.tensor([*target, truth.covariance])).abs().max()))
        errors[steps] = torch.tensor(worst)
    assert errors[100].max() < 0.012
    assert (errors[100] < 0.56 * errors[50]).all()


@pytest.mark.parametrize("reversion", REVERSIONS)
def test_samples_of_both_directions(reversion):
    """`sample` gives data, `to_prior` the prior, and `trajectory` the marginals in between."""
    n, steps = 20_000, 50
    truth, model = optimal(reversion, steps)
    source = torch.Generator().manual_seed(0)
    x = MEAN + DATA_STD * torch.randn(n, 1, generator=source, dtype=torch.float64)
    drawn, ends = model.sample(n, generator=source), model.to_prior(x, generator=source)
    middle = model.trajectory(x, [0.5], source)[0]
    mean, variance = (float(v) for v in truth.marginal(torch.tensor(0.5, dtype=torch.float64)))
    for points, target in ((drawn, (MEAN, DATA_STD)), (ends, (0.0, PRIOR_STD)), (middle, (mean, variance**0.5))):
        assert abs(float(points.mean()) - target[0]) < 0.03
        assert abs(float(points.std()) - target[1]) < 0.03
    # the plan's covariance, from the forward chain's two ends
    assert abs(float(torch.cov(torch.cat([x, ends], 1).T)[0, 1]) - truth.covariance) < 0.03


@pytest.mark.parametrize("reversion", REVERSIONS)
def test_bound_of_the_bridge_tends_to_the_entropy(reversion):
    """The gap of the chain's bound is positive and falls as 1/N; the ODE's likelihood is exact."""
    n = 20_000
    x = MEAN + DATA_STD * torch.randn(n, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = 0.5 * ((x[:, 0] - MEAN) / DATA_STD) ** 2 + math.log(DATA_STD * math.sqrt(2 * math.pi))
    gaps = []
    for steps in (10, 40):
        _, model = optimal(reversion, steps)
        parts = model.nelbo_parts(x, generator=torch.Generator().manual_seed(2))
        gaps.append(float((sum(parts.values()) - exact).mean()))
    assert 0.001 < gaps[1] < 0.4 * gaps[0] < 0.1
    parts = model.nll_parts(x[:50], rtol=1e-8, atol=1e-8, probes="exact")
    parts.pop("nfe")
    assert torch.allclose(sum(parts.values()), exact[:50], atol=1e-5)


def train(model, steps, rate):
    """Adam on every phase; the rate falls linearly to zero in each half, as each is a problem of its own."""
    phases = model.phases()
    groups = {name: parameters for phase in phases for name, parameters in phase.parameters.items()}
    optimizers = {name: torch.optim.Adam(parameters, betas=(0.9, 0.98)) for name, parameters in groups.items()}
    for step in range(steps):
        random = StepRandom(0, step, 512)
        x = MEAN + DATA_STD * random.normal("data", (1,), torch.float64)
        for phase in (phase for phase in phases if phase.due(step)):
            for name in phase.parameters:
                optimizers[name].zero_grad()
            phase.loss_fn(x, random)[0].backward()
            for name in phase.parameters:
                optimizers[name].param_groups[0]["lr"] = rate(step)
                optimizers[name].step()


@torch.no_grad()
def policy_errors(model, truth):
    """Root-mean-square errors of Z and Zhat under the bridge, at times inside the first and the last step."""
    t = torch.linspace(1 / 32, 31 / 32, 64, dtype=torch.float64)
    mean, variance = truth.marginal(t)
    place = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    x = (mean + variance.sqrt() * place).reshape(-1, 1)
    weight, t = torch.softmax(-0.5 * place.square().expand(21, 64).flatten(), 0), t.repeat(21)
    pairs = (model.forward_policy, truth.forward_policy), (model.backward_policy, truth.backward_policy)
    return [float((weight * (found(x, t) - exact(x, t))[:, 0] ** 2).sum()) ** 0.5 for found, exact in pairs]


@pytest.mark.parametrize("method", ["fbsde", "dsb"])
def test_stages_find_the_bridge(method):
    """Zero policies err by 0.66 and 0.95; three stages bring both below 0.22, and below what the warm half left.

    What remains is the error of a grid of 32 steps (7 % in Zhat) and the noise of training.
    """
    truth = Truth(0.0)
    schedule = {"warm_steps": 150, "stage_steps": 60, "forward_steps": 60, "refresh": 5, "points": 16, "average": 0.98}
    model = Bridge(Affine(), Affine(), (1,), method, steps=32, g=G, prior_std=PRIOR_STD, **schedule)
    start = policy_errors(model, truth)
    assert start[0] > 0.6 and start[1] > 0.9
    train(model, 150, lambda step: 0.1 * (1 - step / 150))
    warm = policy_errors(model, truth)
    assert warm[0] == start[0] and warm[1] < 0.4

    # the same steps again, and the stages after them
    model = Bridge(Affine(), Affine(), (1,), method, steps=32, g=G, prior_std=PRIOR_STD, **schedule)
    train(model, 510, lambda step: 0.1 * (1 - model.half_at(step)[1] / (150 if step < 150 else 60)))
    error = policy_errors(model, truth)
    assert max(error) < 0.22 and error[0] < warm[0] and error[1] < 0.7 * warm[1]


def test_joint_training_finds_policies_that_reverse_one_another():
    """The joint bound is least, the entropy, at every pair of mutually reverse processes that end in the prior.

    The Schrodinger bridge is one such pair, and the loss does not say which. As a Riemann sum of the continuous bound
    it falls a little below the entropy, which the chain's own bound cannot.
    """
    model = Bridge(Affine(), Affine(), (1,), "joint", steps=30, growth=4.0, g=G, prior_std=PRIOR_STD)
    entropy = 0.5 * math.log(2 * math.pi * math.e * DATA_STD**2)
    x = MEAN + DATA_STD * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def chain():
        return float(sum(model.nelbo_parts(x, generator=torch.Generator().manual_seed(2)).values()).mean())

    assert chain() > entropy + 0.7
    train(model, 120, lambda step: 0.1 * (1 - step / 120))
    assert model.forward_policy.weight.abs().max() > 0.2
    assert abs(model.joint_loss(x, StepRandom(0, 1, len(x)))[0].item() - entropy) < 0.1
    assert entropy < chain() < entropy + 0.35
    mean, variance, _ = moments(model, forward=True)[-1].tolist()
    assert abs(mean) < 0.05 and abs(variance - PRIOR_STD**2) < 0.08
