"""The branch of a conditioned residual block and the series of its log-determinant, with a gradient written by hand.

For training on a CPU. Autograd remembers and reads again what a block's wide tensors were at each step; here J u is
computed only where its gradient is, tangents and values go through their layers' adjoints in one product, the adjoints
of 3x3 convolutions to few channels are those of :mod:`models.flows.narrow`, and sums are formed in place. The estimate
is that of :func:`models.flows.log_det.series`, up to rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from models.flows.lipschitz import Affine, linear
from models.flows.log_det import Roulette

# Samples are worked on in groups, whose widest tensor has so many elements: it bounds the memory beside what the step
# remembers. Groups that fit in a core's cache (2^17) were slower by a seventh.
GROUP = 2**20


@dataclass(frozen=True)
class Series:
    """What an estimate needs beside tensors: the depths' law, the fixed terms, and whether the branch begins by sin."""

    roulette: Roulette
    fixed: int
    preactivation: bool


def branch_and_log_det(
    affines: list[Affine], shift: Tensor, a: Tensor, probe: Tensor, depth: Tensor, series: Series
) -> tuple[Tensor, Tensor]:
    """g(a) (B, C, H, W) and an estimate of log|det(I + J)|, nats (B,), for affines 3x3, 1x1, 3x3.

    `shift` (B, hidden) is added behind the second of them; `probe` is like `a`, `depth` (B,) int64. Differentiable
    once, with the gradient of the Neumann series.
    """
    (w1, b1), (w2, b2), (w3, b3) = affines
    return _Branch.apply(a, w1, b1, w2.flatten(1), b2, w3, b3, shift, probe, depth, series)


def _adjoint(weight: Tensor) -> Tensor:
    """The 3x3 weight (in, out, 3, 3) of a convolution's adjoint, channels_last."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels_last, -> (B H W, C), a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _dense(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution by `weight` (out, in) as a matrix product, channels_last to channels_last."""
    return torch.mm(_rows(x), weight.t()).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def _groups(a: Tensor, hidden: int) -> list[slice]:
    size = max(1, GROUP // (hidden * a.shape[2] * a.shape[3]))
    return [slice(start, min(start + size, len(a))) for start in range(0, len(a), size)]


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, w1, b1, w2, b2, w3, b3, shift, probe, depth, series: Series) -> tuple[Tensor, Tensor]:
        order = torch.argsort(depth, descending=True, stable=True)
        lengths, back = depth[order].tolist(), torch.argsort(order)
        a, probe, shift = _last(a[order]), _last(probe[order]), shift[order]
        # of each of the two activations inside, sine and cosine; channels_last
        wide = a.new_empty(4, len(a), *a.shape[2:], len(w1)).permute(0, 1, 4, 2, 3)
        change, neumann = torch.empty_like(a), probe.clone()
        value = a.new_zeros(len(a))
        for part in _groups(a, w1.shape[0]):
            x, slope = a[part], None
            if series.preactivation:
                x, slope = x.sin(), x.cos()
            sine1, cosine1, sine2, cosine2 = wide[:, part]
            angle = F.conv2d(x, w1, b1, padding=1)
            torch.sin(angle, out=sine1)
            torch.cos(angle, out=cosine1)
            angle = _dense(w2, sine1).add_((shift[part] + b2)[:, :, None, None])
            torch.sin(angle, out=sine2)
            torch.cos(angle, out=cosine2)
            change[part] = linear(w3, sine2, b3)
            slopes = (slope, cosine1, cosine2)
            _sum(slopes, (w1, w2, w3), probe[part], neumann[part], value[part], lengths[part], series)
        ctx.save_for_backward(a, w1, w2, w3, probe, neumann, order, back, wide)
        ctx.preactivation = series.preactivation
        return change[back], value[back]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_change: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        a, w1, w2, w3, probe, neumann, order, back, wide = ctx.saved_tensors
        w1_adjoint, w3_adjoint = _adjoint(w1), _adjoint(w3)
        grad_change = _last(grad_change[order])
        probe = probe * grad_value[order][:, None, None, None]
        grad_w1, grad_w2, grad_w3 = torch.zeros_like(w1), torch.zeros_like(w2), torch.zeros_like(w3_adjoint)
        grad_b1, grad_a = w1.new_zeros(len(w1)), torch.empty_like(a)
        grad_shift = a.new_empty(len(a), len(w2))
        for part in _groups(a, w1.shape[0]):
            x, tangent, slope = a[part], neumann[part], None
            count = len(x)
            if ctx.preactivation:
                x, slope = x.sin(), x.cos()
                tangent = tangent * slope
            sine1, cosine1, sine2, cosine2 = wide[:, part]
            # the values' gradients and then the tangents' are rows of one product; their layers' inputs lie apart
            first = torch.cat([x, tangent])
            tangent1 = _last(F.conv2d(tangent, w1, padding=1))
            second = tangent1 * cosine1
            tangent2 = _dense(w2, second)

            grads = torch.cat([grad_change[part], probe[part]])
            for own, hidden in zip(grads.chunk(2), (sine2, tangent2 * cosine2), strict=True):
                grad_w3 += conv2d_weight(own, w3_adjoint.shape, hidden, padding=1)
            grads = _through(_last(F.conv2d(grads, w3_adjoint, padding=1)), tangent2, sine2, cosine2)
            grad_shift[part] = grads[:count].sum((2, 3))
            for own, hidden in zip(grads.chunk(2), (sine1, second), strict=True):
                grad_w2.addmm_(_rows(own).t(), _rows(hidden))
            grads = _through(_dense(w2.t(), grads), tangent1, sine1, cosine1)
            grad_b1 += grads[:count].sum((0, 2, 3))
            grad_w1 += conv2d_weight(first, w1.shape, grads, padding=1)
            grads = linear(w1_adjoint, grads)
            if slope is None:
                grad_a[part] = grads[:count]
            else:
                by_slope = (grads[count:] * neumann[part]).mul_(x)
                grad_a[part] = (grads[:count] * slope).sub_(by_slope)
        grad_w3 = grad_w3.flip(2, 3).transpose(0, 1)
        grad_b3 = grad_change.sum((0, 2, 3))
        grad_b2 = grad_shift.sum(0)
        layers = grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3
        return grad_a[back], *layers, grad_shift[back], None, None, None


def _through(grads: Tensor, tangent: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Gradients behind an activation, values' and then tangents' (2B, ...), -> those before it; both are overwritten.

    Behind it are sin(angle) and cos(angle) `tangent`.
    """
    value, along = grads.chunk(2)
    tangent.mul_(along)
    value.mul_(cosine).addcmul_(tangent, sine, value=-1.0)
    along.mul_(cosine)
    return grads


def _sum(
    slopes: tuple[Tensor | None, Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor],
    probe: Tensor,
    neumann: Tensor,
    value: Tensor,
    lengths: list[int],
    series: Series,
) -> None:
    """Adds the terms of both series to `neumann`, which begins as the probe, and `value`; `lengths` do not grow."""
    slope, cosine1, cosine2 = slopes
    w1, w2, w3 = weights
    power, tiny = probe, 0.01 * torch.finfo(probe.dtype).eps
    for k in range(1, series.fixed + lengths[0] + 1):
        weight, count = (-1.0) ** k, len(probe)
        if k > series.fixed:
            weight /= series.roulette.survival(k - series.fixed)
            count = sum(length >= k - series.fixed for length in lengths)
        power = power[:count]
        v = power if slope is None else power * slope[:count]
        v = _last(F.conv2d(v, w1, padding=1)).mul_(cosine1[:count])
        power = linear(w3, _dense(w2, v).mul_(cosine2[:count]))
        value[:count] -= weight / k * (probe[:count] * power).flatten(1).sum(1)
        neumann[:count].add_(power, alpha=weight)
        # below rounding there is nothing to add, and denormal numbers are slow
        if k % 4 == 0 and power.abs().amax() < tiny:
            break
