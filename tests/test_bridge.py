"""Schrodinger bridges: the schedule of halves, what each loss trains, and its minimiser where that is known."""

import math

import pytest
import torch
from torch import nn

from models.bridge import Bridge
from models.noise import StepRandom

NET = {"name": "mlp", "width": 16, "depth": 1}
BATCH = 64


def small(**options):
    torch.manual_seed(0)
    schedule = {"steps": 6, "warm_steps": 4, "stage_steps": 3, "refresh": 2}
    return Bridge.from_options((2,), NET, NET, **schedule | options)


def points(seed=0):
    return torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(seed))


def test_halves_alternate_after_the_warm_one():
    model = small()
    halves = [model.half_at(step)[0] for step in range(13)]
    assert halves == ["warm"] * 4 + ["forward"] * 3 + ["backward"] * 3 + ["forward"] * 3
    forward, backward = model.phases()
    assert [step for step in range(10) if forward.due(step)] == [4, 5, 6]
    assert [step for step in range(10) if backward.due(step)] == [0, 1, 2, 3, 7, 8, 9]


@pytest.mark.parametrize("method", ["fbsde", "dsb"])
@pytest.mark.parametrize("step", [0, 4, 7])
def test_a_half_trains_its_own_policy_only(method, step):
    model = small(method=method)
    (phase,) = (phase for phase in model.phases() if phase.due(step))
    loss, _ = phase.loss_fn(points(), StepRandom(0, step, BATCH))
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    own = "forward_policy" if step == 4 else "backward_policy"
    assert torch.isfinite(loss) and trained and all(name.startswith(own) for name in trained)


def test_frozen_policy_follows_the_live_one_in_the_other_half_only():
    model = small()
    with torch.no_grad():
        for parameter in model.backward_policy.parameters():
            parameter.fill_(0.5)
    before = [p.clone() for p in model.frozen_backward.parameters()]
    model.forward_loss(points(), StepRandom(0, 4, BATCH))
    for old, new in zip(before, model.frozen_backward.parameters(), strict=True):
        assert torch.allclose(new, torch.lerp(old, torch.full_like(old, 0.5), 1 - model.average))
    still = [p.clone() for p in model.frozen_forward.parameters()]
    model.forward_loss(points(), StepRandom(0, 5, BATCH))
    assert all(torch.equal(a, b) for a, b in zip(still, model.frozen_forward.parameters(), strict=True))


class Linear(nn.Module):
    """x -> factor x."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x, t):
        return self.factor * x


@pytest.mark.parametrize("reversion", [0.0, 0.7])
def test_denoising_recovers_the_score_of_a_gaussian(reversion):
    """One step of the base process from N(0, v): Zhat = g score is -g x / (alpha^2 v + sigma^2)."""
    n, v, g = 200_000, 0.6, 1.3
    model = Bridge(Linear(0.0), Linear(0.0), (1,), steps=1, g=g, reversion=reversion, warm_steps=10)
    x = v**0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = (float(part) for part in model.base_marginal(torch.tensor(1.0, dtype=torch.float64)))
    best = -g / (alpha**2 * v + sigma**2)
    for factor, sign in ((best, 0), (best - 0.3, -1), (best + 0.3, 1)):
        model.backward_policy.factor.data.fill_(factor)
        loss, _ = model._denoising_loss(x, StepRandom(0, 0, n))
        (slope,) = torch.autograd.grad(loss, model.backward_policy.factor)
        assert (abs(float(slope)) < 0.01) if sign == 0 else float(slope) * sign > 0.02


@pytest.mark.parametrize("method", ["fbsde", "dsb"])
def test_backward_half_finds_the_reverse_of_a_known_path(method):
    """With Z = 0 and f = 0, x_1 ~ N(0, v + g^2): both losses are least at Zhat = g score, the denoising one's minimum."""
    n, v, g = 100_000, 0.6, 1.0
    model = Bridge(Linear(0.0), Linear(0.0), (1,), method=method, steps=1, g=g, warm_steps=0, stage_steps=1, points=1)
    x = v**0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = -g / (v + g**2)
    model.backward_policy.factor.data.fill_(best)
    loss, _ = model.backward_loss(x, StepRandom(0, 1, n))
    (slope,) = torch.autograd.grad(loss, model.backward_policy.factor)
    model.backward_policy.factor.data.fill_(best + 0.2)
    other, _ = model.backward_loss(x, StepRandom(0, 1, n))
    assert abs(float(slope)) < 0.02 and float(other.detach()) > float(loss.detach())


def test_joint_loss_is_a_bound_of_the_whole_path():
    model = small(method="joint", scale=1.5)
    (phase,) = model.phases()
    loss, _ = phase.loss_fn(points(), StepRandom(0, 0, BATCH))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for policy in (model.forward_policy, model.backward_policy):
        assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
