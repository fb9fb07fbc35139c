"""NCSN++ and DDPM++, the image score networks of Song et al. (2021), as one class with options."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn

from models.options import Count, NonNegative, Positive, require
from models.score.layers import (
    WIDE_PIXELS,
    AttentionBlock,
    FourierEmbedding,
    PositionalEmbedding,
    PyramidDownsample,
    ResidualBlock,
    conv3x3,
    group_norm,
    level_heights,
    linear,
)

PRESETS: dict[str, dict] = {
    "ddpmpp": {},
    "ddpmpp_deep": {"num_res_blocks": 8},
    "ncsnpp": {"embedding": "fourier", "fir": True, "progressive_input": "residual", "centered": False},
    "ncsnpp_deep": {
        "embedding": "fourier",
        "fir": True,
        "progressive_input": "residual",
        "centered": False,
        "num_res_blocks": 8,
    },
}
"""Options of the published CIFAR-10 networks (shape [3, 32, 32]), as differences from the defaults of `NCSNpp`.

The published NCSN++ takes data in [0, 1], hence `centered=False`; with data in [-1, 1] set it to true.
"""


class Step(nn.Module):
    """A residual block and, where given, the attention that follows it."""

    def __init__(self, block: ResidualBlock, attention: AttentionBlock | None = None):
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.block(h, embedding)
        return h if self.attention is None else self.attention(h)


class DownLevel(nn.Module):
    """The blocks of one resolution and, but for the coarsest, the step to the next with the merge of the pyramid."""

    def __init__(
        self, steps: list[Step], shrink: ResidualBlock | None, merge: PyramidDownsample | None, rescale: float
    ):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.shrink = shrink
        self.merge = merge
        self.rescale = rescale

    def forward(self, h: Tensor, pyramid: Tensor, embedding: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        for step in self.steps:
            h = step(h, embedding)
            skips.append(h)
        if self.shrink is not None:
            h = self.shrink(h, embedding)
            if self.merge is not None:
                h = pyramid = (self.merge(pyramid) + h) * self.rescale
            skips.append(h)
        return h, pyramid


class UpLevel(nn.Module):
    """The blocks of one resolution, each on its input and a skip, and, but for the finest, the step to the next."""

    def __init__(self, steps: list[Step], grow: ResidualBlock | None):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.grow = grow

    def forward(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        for step in self.steps:
            h = step(torch.cat((h, skips.pop()), dim=1), embedding)
        return h if self.grow is None else self.grow(h, embedding)


class NCSNpp(ModelMixin, ConfigMixin):
    """U-Net `net(z, condition)`: z (B, C, H, W), condition (B,) -> (B, C, H, W).

    Source: Song et al. 2021 (arXiv 2011.13456), section 4.4 and appendix H, and its released configurations.

    embedding "positional" (DDPM++): the condition is 999 t and the output is the noise (`time_input`, `output`).
    embedding "fourier" (NCSN++): the condition is sigma(t) and the output is sigma times the score.

    shape: [C, H, W]; nf: channels at the finest level; ch_mult: their multiples by level, each level half the size;
    num_res_blocks: blocks per level (one more on the way up); attn_resolutions: heights with attention;
    fourier_scale: standard deviation of the Fourier frequencies; fir: resample with the [1, 3, 3, 1] filter instead of
    2x2 means and repetition; progressive_input: "residual" feeds the downsampled input to every level;
    centered: data lie in [-1, 1]; if false they lie in [0, 1] and the network maps them to 2 x - 1;
    init_scale: variance scale of the last convolution of every block and of the output (0 means 1e-10);
    skip_rescale: divide every residual sum by sqrt 2.

    Raises ValueError if H or W cannot be halved `len(ch_mult) - 1` times, if an attention resolution never occurs, or
    if `nf` does not fit the embedding or the normalisation groups.
    """

    @register_to_config
    def __init__(
        self,
        shape: Annotated[tuple[int, ...], Field(min_length=3, max_length=3)],
        nf: Annotated[int, Field(ge=4)] = 128,
        ch_mult: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2, 2),
        num_res_blocks: Count = 4,
        attn_resolutions: tuple[Count, ...] = (16,),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        embedding: Literal["positional", "fourier"] = "positional",
        fourier_scale: Positive = 16.0,
        fir: bool = False,
        progressive_input: Literal["none", "residual"] = "none",
        centered: bool = True,
        init_scale: NonNegative = 0.0,
        skip_rescale: bool = True,
    ):
        super().__init__()
        heights = level_heights(shape, ch_mult, attn_resolutions)
        require(embedding in ("positional", "fourier"), "embedding", embedding, "are 'positional', 'fourier'")
        require(
            progressive_input in ("none", "residual"), "progressive_input", progressive_input, "are 'none', 'residual'"
        )
        require(num_res_blocks > 0, "num_res_blocks", num_res_blocks, "is a positive integer")
        require(0 <= dropout < 1, "dropout", dropout, "is a number from 0 to below 1")
        fourier = embedding == "fourier"
        require(nf >= 4 and (fourier or nf % 2 == 0), "nf", nf, "is 4 or more, and even if embedding is 'positional'")
        self.time_input = "sigma" if fourier else "time999"
        self.output = "score_times_sigma" if fourier else "noise"
        self.centered = centered
        self.wide = shape[1] * shape[2] >= WIDE_PIXELS
        rescale = 1 / math.sqrt(2) if skip_rescale else 1.0
        width = 4 * nf
        channels = [nf * multiple for multiple in ch_mult]

        def block(inputs: int, outputs: int, resample: str = "none") -> ResidualBlock:
            try:
                return ResidualBlock(inputs, outputs, width, dropout, init_scale, resample, fir, rescale, self.wide)
            except ValueError as error:
                examples = f"for example 16, 32, 64 or 128; with ch_mult = {list(ch_mult)}, {error}"
                raise ValueError(f"nf = {nf}: accepted {examples}") from None

        def attention(level: int) -> AttentionBlock | None:
            here = heights[level] in attn_resolutions
            return AttentionBlock(channels[level], init_scale, rescale) if here else None

        # Registered in the order of the reference implementation, so that its weights can be mapped one after another.
        self.encode = FourierEmbedding(nf, fourier_scale) if fourier else PositionalEmbedding(nf)
        self.condition = nn.Sequential(linear(2 * nf if fourier else nf, width), nn.SiLU(), linear(width, width))
        self.stem = conv3x3(shape[0], nf)

        skips = [nf]
        self.down = nn.ModuleList()
        pyramid, here = shape[0], nf
        for level, out in enumerate(channels):
            steps = []
            for _ in range(num_res_blocks):
                steps.append(Step(block(here, out), attention(level)))
                here = out
                skips.append(here)
            shrink = merge = None
            if level < len(channels) - 1:
                shrink = block(here, here, "down")
                if progressive_input == "residual":
                    merge = PyramidDownsample(pyramid, here, fir)
                    pyramid = here
                skips.append(here)
            self.down.append(DownLevel(steps, shrink, merge, rescale))

        self.middle = nn.ModuleList(
            [Step(block(here, here), AttentionBlock(here, init_scale, rescale)), block(here, here)]
        )

        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            steps = []
            for left in reversed(range(num_res_blocks + 1)):
                steps.append(Step(block(here + skips.pop(), out), None if left else attention(level)))
                here = out
            self.up.append(UpLevel(steps, block(here, here, "up") if level else None))

        self.norm = group_norm(here)
        self.head = conv3x3(here, shape[0], init_scale)

    @classmethod
    def ddpmpp(cls, shape: tuple[int, ...] = (3, 32, 32), deep: bool = False, **options) -> "NCSNpp":
        """The published DDPM++ (61,804,419 parameters at [3, 32, 32]; deep: 106,632,579), with any option replaced."""
        return cls(shape, **{**PRESETS["ddpmpp_deep" if deep else "ddpmpp"], **options})

    @classmethod
    def ncsnpp(cls, shape: tuple[int, ...] = (3, 32, 32), deep: bool = False, **options) -> "NCSNpp":
        """The published NCSN++ (62,758,787 trainable parameters at [3, 32, 32]; deep: 107,586,947), likewise."""
        return cls(shape, **{**PRESETS["ncsnpp_deep" if deep else "ncsnpp"], **options})

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        if not self.centered:
            z = 2 * z - 1
        if self.wide and z.device.type == "cpu":
            z = z.contiguous(memory_format=torch.channels_last)
        # Every block takes the embedding through SiLU first, so it is applied once here.
        embedding = F.silu(self.condition(self.encode(condition)))
        h, pyramid = self.stem(z), z
        skips = [h]
        for level in self.down:
            h, pyramid = level(h, pyramid, embedding, skips)
        for part in self.middle:
            h = part(h, embedding)
        for level in self.up:
            h = level(h, embedding, skips)
        return self.head(F.silu(self.norm(h)))
