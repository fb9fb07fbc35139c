"""p(h): the law of the global latent, a standard normal seen through a small flow with learned weights.

Steps of actnorm, a dense map and affine couplings, as in INDM (Na et al. 2022, arXiv:2205.13699), from Ma et al. 2021
(arXiv:2004.11820).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.flows.errors import FlowInverseError
from models.flows.latent_encoder import WeightNormLinear
from models.noise import Generator, IndexedGenerator, normal


class Actnorm(nn.Module):
    """u -> exp(l) u + b, l ~ N(0, 0.05^2) and b = 0 when fresh; no batch sets them."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(0.05 * torch.randn(dims))
        self.bias = nn.Parameter(torch.zeros(dims))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.bias, u, self.log_scale.exp()), self.log_scale.sum()

    def inverse(self, e: Tensor) -> Tensor:
        return (e - self.bias) * (-self.log_scale).exp()


class Dense(nn.Module):
    """u -> W u, W orthogonal when fresh. The inverse is that of the weights of the moment, never a stored one."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(dims, dims)))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(u, self.weight), torch.linalg.slogdet(self.weight).logabsdet

    def inverse(self, e: Tensor) -> Tensor:
        # a matrix that rounding has made singular shows as values that are not finite
        inverse = torch.linalg.inv_ex(self.weight.double())[0].to(e.dtype)
        return F.linear(e, inverse)


class Coupling(nn.Module):
    """Affine coupling of two halves of the entries: y -> (sigmoid(a + 2) + 0.001) y + m, a and m of the other half.

    `interleaved`: the halves are the even and the odd entries; otherwise the first and the second. `backward`: the
    second of them decides what happens to the first.
    """

    def __init__(self, dims: int, hidden: int, interleaved: bool, backward: bool) -> None:
        super().__init__()
        self.interleaved, self.backward = interleaved, backward
        self.layers = nn.ModuleList(
            [nn.Linear(dims // 2, hidden), nn.Linear(hidden, hidden), WeightNormLinear(hidden, dims)]
        )
        for layer in self.layers[:2]:
            nn.init.zeros_(layer.bias)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = self._split(u)
        shift, scale = self._affine(kept)
        return self._join(kept, torch.addcmul(shift, moved, scale)), scale.log().sum(1)

    def inverse(self, e: Tensor) -> Tensor:
        kept, moved = self._split(e)
        shift, scale = self._affine(kept)
        return self._join(kept, (moved - shift) / scale)

    def _affine(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        first, second, last = self.layers
        shift, raw = last(F.elu(second(F.elu(first(kept))))).chunk(2, dim=1)
        return shift, torch.sigmoid(raw + 2.0) + 1e-3

    def _split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> the half that decides and the half that moves, each (B, D/2)."""
        halves = (u[:, ::2], u[:, 1::2]) if self.interleaved else u.chunk(2, dim=1)
        return (halves[1], halves[0]) if self.backward else (halves[0], halves[1])

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        halves = (moved, kept) if self.backward else (kept, moved)
        return torch.stack(halves, dim=2).flatten(1) if self.interleaved else torch.cat(halves, dim=1)


class LatentPrior(nn.Module):
    """The density of h (B, D) by an invertible map h -> e ~ N(0, I); D is even. `steps` = 0: h itself is N(0, I)."""

    def __init__(self, dims: int, steps: int, hidden: int) -> None:
        super().__init__()
        self.dims = dims
        self.layers = nn.ModuleList()
        for _ in range(steps):
            self.layers += [Actnorm(dims), Dense(dims)]
            self.layers += [Coupling(dims, hidden, False, False), Coupling(dims, hidden, False, True)]
            self.layers += [Actnorm(dims)]
            self.layers += [Coupling(dims, hidden, True, False), Coupling(dims, hidden, True, True)]

    def log_prob(self, h: Tensor) -> Tensor:
        """log p(h) of h (B, D), nats (B,)."""
        log_det = h.new_zeros(len(h))
        for layer in self.layers:
            h, term = layer(h)
            log_det = log_det + term
        return log_det - 0.5 * h.square().sum(1) - 0.5 * self.dims * math.log(2 * math.pi)

    def sample(self, count: int, like: Tensor, generator: Generator = None) -> Tensor:
        """h (count, D) from p, in the dtype and on the device of `like`. FlowInverseError if a value is not finite."""
        h = draw_normal((count, self.dims), like, generator)
        for layer in reversed(self.layers):
            h = layer.inverse(h)
        if not (finite := h.isfinite().all(1)).all():
            raise FlowInverseError(
                f"inverse of the global latent's prior: {(~finite).sum()} of {count} draws are not finite"
            )
        return h


def draw_normal(shape: tuple[int, ...], like: Tensor, generator: Generator = None) -> Tensor:
    """Standard normals in the dtype and on the device of `like`; a torch generator may be on another device."""
    if generator is None or isinstance(generator, IndexedGenerator):
        return normal(shape, generator, like.device, like.dtype)
    return normal(shape, generator, generator.device, like.dtype).to(like.device)
