"""Layers with a bounded Lipschitz constant, and a chain of them linearised at a point.

The layers of an invertible residual block (Chen et al. 2019, "Residual Flows", arXiv:1906.02735; sine activations and
infinity norms as in INDM, Na et al. 2022, arXiv:2205.13699) are affine maps whose induced infinity-to-infinity norm is
capped, with a sine between them. Everything here lives in the *angle coordinate* a = 2 pi x, in which the activation
sin(2 pi x) / (2 pi) is the plain sine and only biases are rescaled. A linear change of unit leaves every Jacobian, and
so every log-determinant, as it was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.flows.narrow import is_narrow, narrow_convolution

TWO_PI = 2 * math.pi


class _SineAndSlope(torch.autograd.Function):
    """(sin a, cos a) in one node: each is the other's derivative, so the backward pass evaluates neither again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(angle: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(angle), torch.cos(angle)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_sine: Tensor | None, grad_slope: Tensor | None) -> Tensor | None:
        sine, slope = ctx.saved_tensors
        if grad_slope is None:
            return None if grad_sine is None else grad_sine * slope
        if grad_sine is None:
            return -grad_slope * sine
        return torch.addcmul(grad_sine * slope, grad_slope, sine, value=-1.0)


def linear(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense (out, in) or convolution (out, in, k, k) weight, odd k, applied to (B, in, ...) or (K, B, in, ...)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    if x.ndim == 5:
        return linear(weight, x.flatten(0, 1), bias).unflatten(0, x.shape[:2])
    if is_narrow(weight, x):
        return narrow_convolution(weight, x, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


class Affine(NamedTuple):
    """An affine map with its weight already capped and its bias in the angle coordinate: what one call works with."""

    weight: Tensor  # (out, in) or (out, in, k, k)
    bias: Tensor  # (out,)


def constrain(layers: Sequence[nn.Linear | nn.Conv2d], coefficient: float) -> list[Affine]:
    """Cap each layer's induced infinity norm: row o of the weight becomes w_o / max(1, ||w_o||_1 / coefficient).

    A convolution's row is all weights that reach one output channel, so the bound holds under zero padding too. The cap
    is differentiable, has no state and needs no power iteration: averaged weights (EMA) are as valid as trained ones.
    All layers must have weights of one shape: they are capped in one batch, since the small flows would otherwise
    spend more time launching these operations than running them.
    """
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers]) * TWO_PI
    norm = weight.abs().flatten(2).sum(2)
    scale = (coefficient / norm).clamp(max=1.0)
    weights = (weight * scale.reshape(scale.shape + (1,) * (weight.ndim - 2))).unbind()
    if weights[0].ndim == 4:
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]  # the faster layout by a third
    return [Affine(w, b) for w, b in zip(weights, bias.unbind(), strict=True)]


@dataclass
class Chain:
    """g = A_n sin ... sin A_1 [sin], the residual branch of one block with the weights of one call."""

    affines: Sequence[Affine]
    preactivation: bool

    def value(self, a: Tensor) -> Tensor:
        """g(a), shape of `a` (B, ...), angle coordinate."""
        for index, affine in enumerate(self.affines):
            a = linear(affine.weight, torch.sin(a) if index or self.preactivation else a, affine.bias)
        return a

    def linearise(self, a: Tensor) -> tuple[Tensor, "Jacobian"]:
        """g(a) and the Jacobian of g at `a`, from one forward pass."""
        slopes: list[Tensor | None] = []
        for index, affine in enumerate(self.affines):
            slope = None
            if index or self.preactivation:
                a, slope = _SineAndSlope.apply(a)
            slopes.append(slope)
            a = linear(affine.weight, a, affine.bias)
        return a, Jacobian([affine.weight for affine in self.affines], slopes)


@dataclass
class Jacobian:
    """J = dg/da at a batch of points, as the product of weights and activation slopes. Never built unless asked for.

    Products with it run forward through the layers and are ordinary graph operations, so the gradient of a function of
    J needs one backward pass and no double backward.
    """

    weights: Sequence[Tensor]
    slopes: Sequence[Tensor | None]

    def __matmul__(self, v: Tensor) -> Tensor:
        """J v for tangents (B, ...) or (K, B, ...), in the same shape."""
        recorded = torch.is_grad_enabled()
        for index, (weight, slope) in enumerate(zip(self.weights, self.slopes, strict=True)):
            if slope is not None:
                # what a layer has just put out may be overwritten, unless a graph remembers it
                v = v.mul_(slope) if index and not recorded and v.dtype == slope.dtype else v * slope
            v = linear(weight, v)
        return v

    def detach(self) -> "Jacobian":
        """The same numbers outside the graph."""
        return Jacobian([w.detach() for w in self.weights], [None if s is None else s.detach() for s in self.slopes])

    def at(self, index: Tensor | slice) -> "Jacobian":
        """The Jacobians of the samples `index` only."""
        return Jacobian(self.weights, [None if s is None else s[index] for s in self.slopes])
