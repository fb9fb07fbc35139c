"""The U-Net of Ho et al. (2020) as score_sde trains it: the diffusers library's, with its attention on the way up."""

from collections.abc import Iterator
from typing import Annotated

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn

from models.options import Count, require
from models.score.dropout import LibraryDropout
from models.score.layers import PositionalEmbedding, init_fan_avg, level_heights

GROUPS = 32


class DDPMUNet(ModelMixin, ConfigMixin):
    """U-Net `net(z, condition)`: z (B, C, H, W), condition (B,) -> (B, C, H, W).

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B; `ddpm` among the networks of Song et al. 2021 (arXiv
    2011.13456), whose released code attends once at a level on the way up, after its last block, where Ho et al. do
    after every block. The condition is 999 t and the output is the noise (`time_input`, `output`).

    shape: [C, H, W]; nf: channels at the finest level; ch_mult: their multiples by level, each level half the size;
    num_res_blocks: blocks per level (one more on the way up); attn_resolutions: heights with attention;
    centered: data lie in [-1, 1]; if false they lie in [0, 1] and the network maps them to 2 x - 1.

    Raises ValueError if H or W cannot be halved `len(ch_mult) - 1` times, if an attention resolution never occurs, or
    if `nf` is no multiple of 32, the number of normalisation groups.
    """

    time_input, output = "time999", "noise"

    @register_to_config
    def __init__(
        self,
        shape: Annotated[tuple[int, ...], Field(min_length=3, max_length=3)],
        nf: Annotated[int, Field(ge=GROUPS)] = 128,
        ch_mult: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2, 2),
        num_res_blocks: Count = 2,
        attn_resolutions: tuple[Count, ...] = (16,),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        centered: bool = True,
    ):
        super().__init__()
        # 80 MB that only a process with such a network needs
        from diffusers import UNet2DModel
        from diffusers.models.attention_processor import Attention, AttnProcessor

        heights = level_heights(shape, ch_mult, attn_resolutions)
        require(nf > 0 and nf % GROUPS == 0, "nf", nf, f"is a multiple of {GROUPS}")
        require(num_res_blocks > 0, "num_res_blocks", num_res_blocks, "is a positive integer")
        require(0 <= dropout < 1, "dropout", dropout, "is a number from 0 to below 1")
        attends = [height in attn_resolutions for height in heights]
        self.unet = UNet2DModel(
            in_channels=shape[0],
            out_channels=shape[0],
            center_input_sample=not centered,
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
            block_out_channels=tuple(nf * multiple for multiple in ch_mult),
            layers_per_block=num_res_blocks,
            downsample_padding=0,  # the library then adds a row and a column of zeros at the far ends
            dropout=dropout,
            attention_head_dim=None,  # one head
            norm_num_groups=GROUPS,
            attn_norm_num_groups=GROUPS,
            norm_eps=1e-6,
        )
        for part in self.unet.modules():
            if hasattr(part, "time_emb_proj"):
                part.dropout = LibraryDropout(dropout)
        self.unet.time_proj = PositionalEmbedding(nf)  # the library rounds the frequencies otherwise
        for level in self.unet.up_blocks:
            if hasattr(level, "attentions"):
                for left in range(num_res_blocks):
                    level.attentions[left] = nn.Identity()
        for part in self.unet.modules():
            if isinstance(part, Attention):
                part.set_processor(AttnProcessor())  # unlike fused attention it has second derivatives everywhere
                part.upcast_softmax = False  # to float32, which is down for float64
        self._initialise()

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.unet(z, condition, return_dict=False)[0]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Variance 1 / mean(fan_in, fan_out); next to nothing where a residual branch or the network ends."""
        last = set(self._last())
        for part in self.unet.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                init_fan_avg(part, 0.0 if part in last else 1.0)

    def _last(self) -> Iterator[nn.Module]:
        from diffusers.models.attention_processor import Attention

        yield self.unet.conv_out
        for part in self.unet.modules():
            if isinstance(part, Attention):
                yield part.to_out[0]
            elif hasattr(part, "time_emb_proj"):
                yield part.conv2
