"""The identity flow: with it, INDM is a linear diffusion (DDPM++ or NCSN++)."""

import torch
from torch import Tensor, nn


class Identity(nn.Module):
    """z = x, log|det dz/dx| = 0."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (B, ...) -> the very same tensor, and zeros (B,) nats. `generator` is accepted and not used."""
        return x, x.new_zeros(x.shape[0])

    def latent(self, x: Tensor) -> Tensor:
        """x (B, ...) -> the very same tensor."""
        return x

    def inverse(self, z: Tensor) -> Tensor:
        """z (B, ...) -> the very same tensor."""
        return z
