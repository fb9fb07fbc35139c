"""A dense residual block's value and full Jacobian in one node with a hand-written backward pass.

For points in a few dimensions the exact log-determinant is cheap in arithmetic, and autograd's bookkeeping for it is
half of a training step; written out, the step takes half the time. `log_det.columns` is the general way.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.flows.lipschitz import Chain

# Above so many dimensions the product with D versions of the middle weight is no longer the cheapest way.
MAX_DIMS = 8


class _ValueAndColumns(torch.autograd.Function):
    """g(a) = W3 sin(W2 sin(W1 v + b1) + b2) + b3, v = a or sin a, and the columns J[:, i, o] = d g_o / d a_i.

    J = W3 diag(c2) W2 diag(c1) W1 [diag(c0)] with the cosines c. Row i of `lifted` is W2 diag(W1[:, i]), so that
    c1 meets all D versions of W2 in one product and the tangents inside the first layer never exist.
    """

    @staticmethod
    def forward(
        ctx, a: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, preactivation: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, dims = w1.shape
        v, c0 = (torch.sin(a), torch.cos(a)) if preactivation else (a, None)
        angle = torch.addmm(b1, v, w1.t())
        c1, s1 = torch.cos(angle), angle.sin_()
        angle = torch.addmm(b2, s1, w2.t())
        c2, s2 = torch.cos(angle), angle.sin_()
        value = torch.addmm(b3, s2, w3.t())

        lifted = (w1.t().contiguous().unsqueeze(1) * w2).view(dims * hidden, hidden)
        inner = torch.mm(c1, lifted.t()).view(-1, dims, hidden)
        outer = inner * c2.unsqueeze(1)
        columns = torch.mm(outer.view(-1, hidden), w3.t()).view(-1, dims, dims)
        ctx.save_for_backward(w1, w2, w3, v, c0, c1, s1, c2, s2, lifted, inner, outer, columns)
        return value, columns if c0 is None else columns * c0.unsqueeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_value.device.type, enabled=False):  # as it was in the forward pass
            return _ValueAndColumns._pull_back(ctx, grad_value, grad_columns)

    @staticmethod
    def _pull_back(ctx, grad_value: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        w1, w2, w3, v, c0, c1, s1, c2, s2, lifted, inner, outer, columns = ctx.saved_tensors
        hidden, dims = w1.shape
        grad_c0 = None
        if c0 is not None:
            grad_c0 = (grad_columns * columns).sum(2)
            grad_columns = grad_columns * c0.unsqueeze(2)

        grad_columns = grad_columns.reshape(-1, dims)
        grad_w3 = torch.mm(grad_columns.t(), outer.view(-1, hidden)).addmm_(grad_value.t(), s2)
        grad_outer = torch.mm(grad_columns, w3).view(-1, dims, hidden)
        grad_c2 = grad_outer[:, 0] * inner[:, 0]
        for i in range(1, dims):
            grad_c2.addcmul_(grad_outer[:, i], inner[:, i])
        grad_inner = grad_outer.mul_(c2.unsqueeze(1)).view(-1, dims * hidden)

        # An angle is reached through its sine (the value) and its cosine (the Jacobian).
        grad_angle2 = torch.mm(grad_value, w3).mul_(c2).addcmul_(grad_c2, s2, value=-1.0)
        grad_lifted = torch.mm(grad_inner.t(), c1).view(dims, hidden, hidden)
        grad_w2 = torch.mm(grad_angle2.t(), s1).add_((grad_lifted * w1.t().unsqueeze(1)).sum(0))
        grad_c1 = torch.mm(grad_inner, lifted)
        grad_angle1 = torch.mm(grad_angle2, w2).mul_(c1).addcmul_(grad_c1, s1, value=-1.0)
        grad_w1 = torch.mm(grad_angle1.t(), v).add_((grad_lifted * w2).sum(1).t())
        grad_a = torch.mm(grad_angle1, w1)
        if c0 is not None:
            grad_a = grad_a.mul_(c0).addcmul_(grad_c0, v, value=-1.0)
        biases = grad_angle1.sum(0), grad_angle2.sum(0), grad_value.sum(0)
        return grad_a, grad_w1, biases[0], grad_w2, biases[1], grad_w3, biases[2], None


def value_and_columns(chain: Chain, a: Tensor) -> tuple[Tensor, Tensor]:
    """g(a) (B, D) and its Jacobian's columns (B, D, D), [b, i, o] = d g_o / d a_i; once differentiable."""
    (w1, b1), (w2, b2), (w3, b3) = chain.affines
    return _ValueAndColumns.apply(a, w1, b1, w2, b2, w3, b3, chain.preactivation)
