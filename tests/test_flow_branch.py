"""The training gradient written by hand, against autograd through the Jacobian's products."""

import pytest
import torch

from models.flows import branch
from models.flows.global_latent import ConditionedFlow
from models.flows.residual import ResidualFlow


def gradients(flow: ConditionedFlow, x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
    """z, log-determinant, and the gradients of a weighted sum of both by x, h and all weights."""
    flow.zero_grad()
    x, h = x.clone().requires_grad_(), h.clone().requires_grad_()
    z, log_det = flow.given(h)(x, torch.Generator().manual_seed(5))
    weights = torch.linspace(-1, 2, len(x), dtype=x.dtype)
    ((z**3).sum() + (weights * log_det).sum()).backward()
    return [z.detach(), log_det.detach(), x.grad, h.grad, *(p.grad.clone() for p in flow.parameters())]


@pytest.mark.parametrize("size", [4, 16])  # 16: as matrix products where the channels are few
@pytest.mark.parametrize("samples", [2, 6])
def test_equals_autograd(size, samples, monkeypatch):
    """Every gradient to float64's rounding, depths that differ between samples included, in groups or not."""
    torch.manual_seed(0)
    flow = ConditionedFlow(4, [3, size, size], hidden=8, blocks=[2, 2], roulette_entry=1.0).double().train()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.5)  # rows far above the cap: its gradient is seen too
    x, h = torch.rand(6, 3, size, size).double(), torch.randn(6, 4).double()
    monkeypatch.setattr(branch, "GROUP", samples * 8 * size**2)
    ours = gradients(flow, x, h)
    monkeypatch.setattr(ConditionedFlow, "_estimate", ResidualFlow._estimate)
    reference = gradients(flow, x, h)
    assert reference[1].abs().min() > 1e-6
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * float(other.abs().max()) + 1e-14)


def test_is_used_in_training_only(monkeypatch):
    """Evaluation keeps the products that any device has, sample by sample."""
    calls = []
    real = branch.branch_and_log_det
    monkeypatch.setattr("models.flows.global_latent.branch_and_log_det", lambda *args: calls.append(1) or real(*args))
    flow = ConditionedFlow(4, [3, 8, 8], hidden=8, blocks=[1, 1], log_det="series")
    x, h = torch.rand(2, 3, 8, 8), torch.randn(2, 4)
    flow.eval().given(h)(x)
    with torch.no_grad():
        flow.train().given(h)(x)
    assert not calls
    flow.given(h)(x)
    assert len(calls) == 2
