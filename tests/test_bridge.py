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
    schedule = {"steps": 6, "warm_steps": 4, "stage_steps": 3, "forward_steps": 2, "refresh": 2}
    return Bridge.from_options((2,), NET, NET, **schedule | options)


def points(seed=0):
    return torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(seed))


def test_halves_alternate_after_the_warm_one():
    model = small()
    halves = [model.half_at(step)[0] for step in range(11)]
    assert halves == ["warm"] * 4 + ["forward"] * 2 + ["backward"] * 3 + ["forward"] * 2
    assert [model.half_at(step)[1] for step in range(11)] == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1]
    forward, backward = model.phases()
    assert [step for step in range(9) if forward.due(step)] == [4, 5]
    assert [step for step in range(9) if backward.due(step)] == [0, 1, 2, 3, 6, 7, 8]
    assert model.milestones(15) == [4, 9, 14]
    assert small(method="joint").milestones(15) == []


@pytest.mark.parametrize("method", ["fbsde", "dsb"])
@pytest.mark.parametrize("step", [0, 4, 6])
def test_a_half_trains_its_own_policy_only(method, step):
    model = small(method=method)
    (phase,) = (phase for phase in model.phases() if phase.due(step))
    loss, _ = phase.loss_fn(points(), StepRandom(0, step, BATCH))
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    own = "forward_policy" if step == 4 else "backward_policy"
    assert torch.isfinite(loss) and trained and all(name.startswith(own) for name in trained)


def test_frozen_policy_is_the_average_over_its_own_half():
    """The first step of a half forgets earlier halves; the other half finds the copy as it was left."""
    model = small(average=0.5)
    for step, value in ((0, 0.5), (1, 0.7), (2, 0.1)):
        with torch.no_grad():
            for parameter in model.backward_policy.parameters():
                parameter.fill_(value)
        model.backward_loss(points(), StepRandom(0, step, BATCH))
    decays = [min(0.5, place / (10 + place)) for place in range(3)]
    expected = 0.5
    for decay, value in zip(decays[1:], (0.7, 0.1), strict=True):
        expected = decay * expected + (1 - decay) * value
    model.forward_loss(points(), StepRandom(0, 4, BATCH))
    assert all(torch.allclose(p, torch.full_like(p, expected)) for p in model.frozen_backward.parameters())
    # and the paths were drawn with it: the first step back from the prior is the frozen drift's
    times, prior = model.times.float(), model.prior_std * StepRandom(0, 4, BATCH).normal("prior", (2,))
    assert torch.equal(model.paths[-1], prior)
    with torch.no_grad():
        drift = model.g * model.frozen_backward(prior, times[-1].expand(BATCH))
    width = times[-1] - times[-2]
    noise = StepRandom(0, 4, BATCH).source("paths").normal((BATCH, 2))
    assert torch.allclose(model.paths[-2], prior + width * drift + model.g * width.sqrt() * noise, atol=1e-5)


@pytest.mark.parametrize("method", ["fbsde", "dsb"])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resumed_training_is_bit_identical(method, stop):
    """A fresh model that loads the state in the middle of a half, between two draws of the paths, continues exactly."""

    def run(model, optimizer, steps):
        for step in steps:
            random = StepRandom(0, step, BATCH)
            for phase in (phase for phase in model.phases() if phase.due(step)):
                optimizer.zero_grad(set_to_none=True)
                phase.loss_fn(points(step), random)[0].backward()
                optimizer.step()

    def fresh():
        model = small(method=method)
        return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)

    whole = fresh()
    run(*whole, range(11))
    first, second = fresh(), fresh()
    run(*first, range(stop))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    run(*second, range(stop, 11))
    states = whole[0].state_dict(), second[0].state_dict()
    assert states[0].keys() == states[1].keys() and len(states[0]["paths"]) == 7
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_state_loads_with_and_without_paths():
    """The paths are not part of the weights: averages that hold none load into a model with some, and conversely."""
    model = small()
    empty = {name: value.clone() for name, value in model.state_dict().items()}
    model.forward_loss(points(), StepRandom(0, 4, BATCH))
    other = small()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.paths, model.paths) and other.paths.data_ptr() != model.paths.data_ptr()
    other.load_state_dict(empty)
    assert other.paths.numel() == 0


@pytest.mark.parametrize("method", ["fbsde", "dsb"])
@pytest.mark.parametrize("step", [4, 6])
def test_loss_is_that_of_several_processes(method, step, monkeypatch):
    """Two halves of the batch, each with its rows' own draws and the gathered paths, average to the whole batch's."""
    import models.bridge

    shape = {"shape": (6,), "average": 0.5}  # six dimensions: with probes of the divergence
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(0))

    def build():
        torch.manual_seed(0)
        schedule = {"steps": 6, "warm_steps": 4, "stage_steps": 3, "forward_steps": 2, "refresh": 2}
        model = Bridge.from_options(drift=NET, score=NET, method=method, **shape, **schedule)
        for policy in (model.forward_policy, model.backward_policy):
            nn.init.normal_(policy.net.net.head.weight, std=0.3)
        model.frozen_forward.load_state_dict(model.forward_policy.state_dict())
        model.frozen_backward.load_state_dict(model.backward_policy.state_dict())
        return model

    def loss(rows):
        model = build()
        (phase,) = (phase for phase in model.phases() if phase.due(step))
        return phase.loss_fn(x[rows[0] : sum(rows)], StepRandom(0, step, BATCH, rows))[0].item(), model.paths

    whole, paths = loss((0, BATCH))
    half, own = BATCH // 2, []
    monkeypatch.setattr(models.bridge, "gathered_rows", lambda made: own.append(made) or paths)
    parts = [loss((first, half))[0] for first in (0, half)]
    assert torch.allclose(torch.cat(own, 1), paths, atol=1e-6)
    assert abs(sum(parts) / 2 - whole) < 1e-5 * max(1, abs(whole))
    assert abs(parts[0] - parts[1]) > 1e-3  # the halves see different points


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
    """With Z = 0 and f = 0, x_1 ~ N(0, v + g^2): both losses are least at Zhat = g score, as the denoising one."""
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


def test_divergence_of_a_network_with_attention_can_be_trained():
    """The loss differentiates the divergence once more, which fused attention does not allow."""
    options = {"nf": 8, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    torch.manual_seed(0)
    model = Bridge.from_options((1, 8, 8), NET, {"name": "ncsnpp", **options}, steps=2, warm_steps=0, forward_steps=1)
    with torch.no_grad():
        for parameter in model.backward_policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loss, _ = model.backward_loss(x, StepRandom(0, 1, 4))
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.backward_policy.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.backward_policy.parameters() if p.grad is not None) > 0


def test_joint_loss_is_a_bound_of_the_whole_path():
    model = small(method="joint", scale=1.5)
    (phase,) = model.phases()
    loss, _ = phase.loss_fn(points(), StepRandom(0, 0, BATCH))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    for policy in (model.forward_policy, model.backward_policy):
        assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
