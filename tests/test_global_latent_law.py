"""The law of the global latent: encoder, batch statistics, prior, and the sampled divergence between the two."""

import copy
import math
import threading

import pytest
import torch
from global_latent_problems import DOUBLE, PLAIN, make, points
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.averages import Ema
from models.flows import FlowInverseError, GlobalLatentFlow, latent_encoder
from models.flows.latent_encoder import BatchNorm, processes_in_step
from models.flows.latent_prior import Coupling, LatentPrior


def test_divergence_is_unbiased_where_the_prior_is_standard_normal():
    flow, count = make(PLAIN, prior_steps=0), 10000
    x = points(PLAIN, 3)
    mean, log_var = flow.moments(x)
    exact = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
    _, samples = flow.posterior(x.repeat_interleave(count, 0), torch.Generator().manual_seed(0))
    samples = samples.view(3, count)
    error = samples.std(1) / math.sqrt(count)
    assert exact.min() > 0.05 and (error < 0.1 * exact).all()
    assert ((samples.mean(1) - exact).abs() < 4 * error).all()


def test_density_of_the_prior_equals_autograd_and_is_one_in_all():
    torch.manual_seed(0)
    prior = LatentPrior(6, 2, 8).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)

    def latent(h: Tensor) -> Tensor:
        for layer in prior.layers:
            h = layer(h)[0]
        return h

    h = torch.randn(3, 6, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(lambda h: latent(h).sum(0), h).movedim(1, 0)
    e = latent(h)
    expected = torch.linalg.slogdet(jacobian).logabsdet - 0.5 * e.square().sum(1) - 3 * math.log(2 * math.pi)
    assert torch.allclose(prior.log_prob(h), expected, atol=1e-12)
    drawn = prior.sample(7, h, torch.Generator().manual_seed(1))
    assert torch.allclose(latent(drawn), torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE))
    plane = LatentPrior(2, 2, 8).double().requires_grad_(False)
    axis = torch.linspace(-14, 14, 400, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    assert math.isclose(plane.log_prob(grid).exp().sum() * (28 / 399) ** 2, 1.0, abs_tol=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_coupling_keeps_the_half_that_decides(interleaved, backward):
    torch.manual_seed(0)
    layer, u = Coupling(6, 8, interleaved, backward).double(), torch.randn(4, 6, dtype=DOUBLE)
    kept = {(False, False): [0, 1, 2], (False, True): [3, 4, 5], (True, False): [0, 2, 4], (True, True): [1, 3, 5]}
    same = kept[interleaved, backward]
    moved = [i for i in range(6) if i not in same]
    e, log_det = layer(u)
    assert torch.equal(e[:, same], u[:, same]) and (e[:, moved] != u[:, moved]).all()
    first, second, last = layer.layers
    weight = last.gain[:, None] * F.normalize(last.direction, dim=1)
    out = F.elu(second(F.elu(first(u[:, same])))) @ weight.T + last.bias
    scale = torch.sigmoid(out[:, 3:] + 2) + 1e-3
    assert torch.allclose(e[:, moved], scale * u[:, moved] + out[:, :3], atol=1e-13)
    assert torch.allclose(log_det, scale.log().sum(1), atol=1e-13)
    assert torch.allclose(layer.inverse(e), u, atol=1e-12)
    assert torch.allclose(last.gain, last.direction.norm(dim=1))  # fresh: no data has set it


def test_order_of_a_prior_step():
    kinds = [(type(layer).__name__, *_flags(layer)) for layer in LatentPrior(4, 2, 4).layers]
    step = ["Actnorm", "Dense", ("Coupling", False, False), ("Coupling", False, True), "Actnorm"]
    step += [("Coupling", True, False), ("Coupling", True, True)]
    assert kinds == 2 * [entry if isinstance(entry, tuple) else (entry,) for entry in step]


def _flags(layer: nn.Module) -> tuple[bool, ...]:
    return (layer.interleaved, layer.backward) if isinstance(layer, Coupling) else ()


def test_prior_is_inverted_with_the_weights_of_the_moment():
    """The published code draws h through inverses stored when the prior was built."""
    prior = LatentPrior(4, 1, 4).double()
    with torch.no_grad():
        prior.layers[1].weight += 0.5 * torch.eye(4)
        h = prior.sample(5, torch.zeros(1, dtype=DOUBLE), torch.Generator().manual_seed(0))
        for layer in prior.layers:
            h = layer(h)[0]
        assert torch.allclose(h, torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))
        prior.layers[1].weight.zero_()
        with pytest.raises(FlowInverseError, match="3 of 3 draws are not finite"):
            prior.sample(3, torch.zeros(1, dtype=DOUBLE))


def test_encoder_equals_the_layers_of_pytorch():
    """Batch statistics, running statistics and output, against torch.nn's own batch normalisation."""
    flow, x = make(PLAIN), points(PLAIN, 8)
    norms = [nn.BatchNorm2d(4).double() for _ in range(6)] + [nn.BatchNorm2d(6).double() for _ in range(6)]
    queue = iter(norms)

    def copied(ours: nn.Module, x: Tensor) -> Tensor:
        norm = next(queue)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name).copy_(getattr(ours, name))
        return norm.train(flow.training)(x)

    def reference(x: Tensor) -> Tensor:
        for block in flow.encoder.blocks:
            u = F.elu(copied(block.norm1, block.conv1(x)))
            u = copied(block.norm2, block.conv2(u))
            x = F.elu(u + (x if block.shortcut is None else copied(block.norm3, block.shortcut(x))))
        return F.elu(flow.encoder.top(x)).flatten(1)

    assert torch.allclose(flow.encoder(x), reference(x), atol=1e-12)
    assert not torch.allclose(flow.encoder(x[:2]), flow.train().encoder(x)[:2], atol=1e-3)
    queue = iter(norms)
    assert torch.allclose(reference(x), flow.encoder(x), atol=1e-12)
    moved = iter(norms)
    for block in flow.encoder.blocks:
        for ours in (block.norm1, block.norm2, block.norm3):
            if ours is not None:
                theirs = next(moved)
                assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-12)
                assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-12)


def test_statistics_move_once_a_step_and_averages_take_the_last_ones():
    flow, x = make(PLAIN).train().requires_grad_(True), points(PLAIN, 8)
    ema = Ema(flow, 0.5)
    before = copy.deepcopy(dict(flow.named_buffers()))
    with torch.no_grad():  # the score's step looks at latents of the batch that the flow's step has counted
        flow.latent(x)
    assert all(torch.equal(value, before[name]) for name, value in flow.named_buffers())
    flow.latent(x)
    assert not any(torch.equal(value, before[name]) for name, value in flow.named_buffers())
    ema.update()
    assert all(torch.equal(a, b) for a, b in zip(ema.model.buffers(), flow.buffers(), strict=True))
    mean, _ = flow.eval().moments(x)  # in evaluation no image sees another
    assert torch.allclose(mean[:3], flow.moments(x[:3])[0], atol=1e-13)


class Exchange:
    """The sum of what two threads bring, as a collective of two processes gives it."""

    def __init__(self):
        self.brought, self.barrier = [None, None], threading.Barrier(2)

    def __call__(self, rank: int, value: Tensor) -> Tensor:
        self.brought[rank] = value
        self.barrier.wait(10)
        total = self.brought[0] + self.brought[1]
        self.barrier.wait(10)
        return total


def test_two_processes_normalise_as_one(monkeypatch):
    """Each with half of the batch: outputs, gradients and running statistics are those of the whole batch."""
    torch.manual_seed(0)
    x, weight = 3 + 2 * torch.randn(8, 5, 4, 4, dtype=DOUBLE), torch.randn(8, 5, 4, 4, dtype=DOUBLE)
    whole = BatchNorm(5).double()
    with torch.no_grad():
        whole.weight.uniform_(0.5, 2.0)
    halves = [copy.deepcopy(whole) for _ in range(2)]
    inputs = x.clone().requires_grad_(True)
    expected = whole(inputs)
    (weight * expected).sum().backward()

    rank, exchange, outputs = threading.local(), Exchange(), [None, None]
    monkeypatch.setattr(latent_encoder, "processes_in_step", lambda: 2)
    monkeypatch.setattr(latent_encoder, "total", lambda value: exchange(rank.number, value))
    shared = x.clone().requires_grad_(True)

    def work(number: int) -> None:
        rank.number = number
        outputs[number] = halves[number](shared[4 * number : 4 * number + 4])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = torch.cat(outputs)
    (weight * found).sum().backward()
    assert torch.allclose(found, expected, atol=1e-12) and torch.allclose(shared.grad, inputs.grad, atol=1e-12)
    for name in ("weight", "bias"):
        total = sum(getattr(half, name).grad for half in halves)
        assert torch.allclose(total, getattr(whole, name).grad, atol=1e-11)
    for half in halves:
        assert torch.allclose(half.running_mean, whole.running_mean, atol=1e-13)
        assert torch.allclose(half.running_var, whole.running_var, atol=1e-13)


def test_only_a_step_of_many_processes_waits_for_others(monkeypatch):
    assert processes_in_step() == 1
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert processes_in_step() == 1  # an evaluation, which one process may do alone
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", object())
    assert processes_in_step() == 3


@torch.no_grad()
def test_published_size_equals_the_reference_implementation():
    """Expected numbers: github.com/byeonghu-na/INDM at 0ef0626 on a CPU, with these weights, this input and eps = 1."""
    flow = GlobalLatentFlow((3, 32, 32)).double().train()
    weights = [p for part in (flow.encoder, flow.head, flow.prior) for p in part.parameters()]
    for k, p in enumerate(weights):
        wave = (torch.arange(p.numel(), dtype=DOUBLE) + k).cos().view(p.shape)
        p.copy_(wave * math.sqrt(0.25 / (p[0].numel() if p.ndim > 1 else 4)))
        if p.shape == (64, 64):
            p += torch.eye(64)
    x = torch.arange(2 * 3072, dtype=DOUBLE).sin().view(2, 3, 32, 32)
    mean, log_var = flow.moments(x)
    expected = [-0.007106, -0.156331, -0.234694, -0.218784, 0.228262, 0.110326, -0.068528]
    found = torch.cat([mean, log_var], 1).flatten()[::37]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=2e-6)
    log_q = -0.5 * ((log_var + 1).sum(1) + 64 * math.log(2 * math.pi))
    divergence = log_q - flow.prior.log_prob(mean + (0.5 * log_var).exp())
    torch.testing.assert_close(divergence, torch.tensor([37.29908, 37.29806], dtype=DOUBLE), rtol=0, atol=2e-5)
