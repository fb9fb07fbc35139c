"""A 3x3 convolution from many channels to few as a matrix product, on a CPU.

A vectorised convolution computes 16 output channels at a time; with 3 of them it throws four fifths of the arithmetic
away. With the nine taps among the rows, 27 of them, a matrix product wastes next to nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# At most so many channels out, and images from 16x16: on smaller ones the setting up costs what the arithmetic saves.
CHANNELS, PIXELS = 4, 256


def is_narrow(weight: Tensor, x: Tensor) -> bool:
    """Whether :func:`narrow_convolution` is the faster way for this weight (out, in, k, k) and batch (B, in, H, W)."""
    return (
        weight.shape[2:] == (3, 3)
        and weight.shape[0] <= CHANNELS < weight.shape[1]
        and x.device.type == "cpu"
        and x.shape[2] * x.shape[3] >= PIXELS
        and not torch.is_autocast_enabled("cpu")
    )


def narrow_convolution(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`conv2d(x, weight, bias, padding=1)`; x (B, in, H, W) is best channels_last. Differentiable to any order."""
    outputs, inputs = weight.shape[:2]
    # The products of every tap at every pixel, then the sum of their shifts. Taps gather what lies around a pixel,
    # their adjoint scatters: hence the mirrored kernel.
    matrix = weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, inputs)
    products = matrix @ x.permute(0, 2, 3, 1).reshape(-1, inputs).t()
    y = _Scatter.apply(products.view(outputs, 3, 3, len(x), *x.shape[2:]))
    return y if bias is None else y + bias.view(-1, 1, 1)


class _Taps(torch.autograd.Function):
    """x (B, C, H, W) -> (C, 3, 3, B, H, W): at [c, i, j] what lies (i - 1, j - 1) from each pixel, zeros beyond."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        padded = F.pad(x.transpose(0, 1), (1, 1, 1, 1))
        return padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Scatter.apply(grad)


class _Scatter(torch.autograd.Function):
    """The adjoint of :class:`_Taps`, (C, 3, 3, B, H, W) -> (B, C, H, W): each tap is put back where it was taken."""

    @staticmethod
    def forward(taps: Tensor) -> Tensor:
        width = taps.shape[-1]
        # rows first: all rows of an image are one stretch of memory
        rows = taps.flatten(4)
        total = rows[:, 1].clone()
        total[..., :-width] += rows[:, 0, ..., width:]
        total[..., width:] += rows[:, 2, ..., :-width]
        total = total.unflatten(-1, taps.shape[4:])
        image = total[:, 1].clone()
        image[..., :-1] += total[:, 0, ..., 1:]
        image[..., 1:] += total[:, 2, ..., :-1]
        return image.transpose(0, 1).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Taps.apply(grad)
