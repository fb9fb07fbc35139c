"""Building blocks of the score networks: embeddings, initialisation, resampling, residual and attention blocks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.options import require
from models.score.dropout import Dropout

FIR = (1.0, 3.0, 3.0, 1.0)

# On a CPU, a network for images of at least so many pixels keeps them in memory channels_last, where convolutions are a
# third faster; on smaller ones there is nothing to gain.
WIDE_PIXELS = 256


def level_heights(shape: Sequence[int], ch_mult: Sequence[int], attn_resolutions: Sequence[int]) -> list[int]:
    """The height at every level, finest first, each half the one before.

    Raises ValueError where a level or an attention resolution cannot exist.
    """
    require(len(shape) == 3 and min(shape) > 0, "shape", list(shape), "is [channels, height, width]")
    require(len(ch_mult) > 0 and min(ch_mult) > 0, "ch_mult", list(ch_mult), "is a list of positive integers")
    _, height, width = shape
    multiple = 2 ** (len(ch_mult) - 1)
    require(
        height % multiple == 0 and width % multiple == 0,
        "ch_mult",
        list(ch_mult),
        f"are at most as many levels as a {height}x{width} image can be halved, plus one",
    )
    heights = [height // 2**level for level in range(len(ch_mult))]
    for resolution in attn_resolutions:
        require(resolution in heights, "attn_resolutions", list(attn_resolutions), f"are heights out of {heights}")
    return heights


def init_fan_avg(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Fill the weight uniformly with variance `scale / mean(fan_in, fan_out)`, the bias with zeros; return the layer.

    A scale of 0 means 1e-10, as in the reference networks: every weight keeps a gradient from the first step on.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(inputs: int, outputs: int, scale: float = 1.0, **options) -> nn.Conv2d:
    return init_fan_avg(nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options}), scale)


def conv1x1(inputs: int, outputs: int, scale: float = 1.0) -> nn.Conv2d:
    return init_fan_avg(nn.Conv2d(inputs, outputs, 1), scale)


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    return init_fan_avg(nn.Linear(inputs, outputs), scale)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of `min(channels // 4, 32)` groups.

    Raises ValueError where that number of groups does not divide the channels.
    """
    groups = min(channels // 4, 32)
    if not groups or channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in {groups} groups")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class PositionalEmbedding(nn.Module):
    """(B,) -> (B, width): sines, then cosines, of the condition at frequencies from 1 down to 1/10000."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, condition: Tensor) -> Tensor:
        angle = condition[:, None] * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class FourierEmbedding(nn.Module):
    """(B,) -> (B, 2 width): sine and cosine of `2 pi w log(condition)` at frozen random frequencies w ~ N(0, scale^2).

    The frequencies are a parameter without gradient, because they are saved and counted as the reference does.
    """

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * scale, requires_grad=False)

    def forward(self, condition: Tensor) -> Tensor:
        angle = condition.log()[:, None] * (2 * math.pi * self.weight)
        return torch.cat((angle.sin(), angle.cos()), dim=1)


def _fir_kernel(channels: int, gain: float) -> Tensor:
    taps = torch.tensor(FIR)
    kernel = torch.outer(taps, taps)
    return (kernel * (gain / kernel.sum())).repeat(channels, 1, 1, 1)


class FIRDownsample(nn.Module):
    """Halve (B, C, H, W) with the [1, 3, 3, 1] filter, zeros beyond the border (Zhang 2019, StyleGAN2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("kernel", _fir_kernel(channels, 1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])


class FIRUpsample(nn.Module):
    """Double (B, C, H, W): insert zeros, then the [1, 3, 3, 1] filter with gain 4."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("kernel", _fir_kernel(channels, 4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=x.shape[1])


class MeanDownsample(nn.Module):
    """Halve (B, C, H, W) by the mean of 2x2 cells."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class NearestUpsample(nn.Module):
    """Double (B, C, H, W) by repeating pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class PyramidDownsample(nn.Module):
    """Halve (B, inputs, H, W) by a strided 3x3 convolution to `outputs` channels, after the FIR blur if `fir`."""

    def __init__(self, inputs: int, outputs: int, fir: bool):
        super().__init__()
        self.conv = conv3x3(inputs, outputs, stride=2, padding=0)
        self.register_buffer("kernel", _fir_kernel(inputs, 1.0) if fir else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            x = F.pad(x, (0, 1, 0, 1))
        else:
            x = F.conv2d(x, self.kernel.to(x.dtype), padding=2, groups=x.shape[1])
        return self.conv(x)


class ResidualBlock(nn.Module):
    """BigGAN residual block: (B, inputs, H, W) and the activated embedding (B, E) -> (B, outputs, H', W').

    `resample` is "none", "down" or "up"; it acts on both branches, in the main one before the first convolution.
    `wide`: constant factors go into the weights on a CPU, which saves passes over images and rounds differently.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        init_scale: float,
        resample: str,
        fir: bool,
        rescale: float,
        wide: bool = False,
    ):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.embed = linear(embedding, outputs)
        self.norm2 = group_norm(outputs)
        self.dropout = Dropout(dropout)
        self.conv2 = conv3x3(outputs, outputs, init_scale)
        self.shortcut = conv1x1(inputs, outputs) if inputs != outputs or resample != "none" else None
        self.resample = None
        if resample == "down":
            self.resample = FIRDownsample(inputs) if fir else MeanDownsample()
        elif resample == "up":
            self.resample = FIRUpsample(inputs) if fir else NearestUpsample()
        self.rescale = rescale
        self.wide = wide

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.wide and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return self._folded(x, embedding)
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.embed(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return (x + h) * self.rescale

    def _folded(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The same with fewer passes over the images: constant factors are in the weights, sums are made in place."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h).add_(self.embed(embedding)[:, :, None, None])
        h = self.dropout.unscaled(F.silu(self.norm2(h)))
        weight, bias = self.conv2.weight * (self.rescale * self.dropout.gain), self.conv2.bias * self.rescale
        h = F.conv2d(h, weight, bias, padding=1)
        if self.shortcut is None:
            return h.add_(x, alpha=self.rescale)
        return h.add_(F.conv2d(x, self.shortcut.weight * self.rescale, self.shortcut.bias * self.rescale))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of (B, C, H, W), with residual connection."""

    def __init__(self, channels: int, init_scale: float, rescale: float):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = linear(channels, 3 * channels)
        # Three maps in one layer: each has its own fan, so each is initialised alone.
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part, gain=math.sqrt(0.1))
        self.out = linear(channels, channels, init_scale)
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        # Linear layers on (B, pixels, C): with channels_last memory no copy, elsewhere faster than 1x1 convolutions.
        h = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=3)
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return (x + h.transpose(1, 2).unflatten(2, x.shape[2:])) * self.rescale
