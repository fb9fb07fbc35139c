"""Glow: steps of actnorm, invertible 1x1 convolution and affine coupling, on several scales.

Kingma & Dhariwal 2018, "Glow" (arXiv:1807.03039), as a flow in front of a diffusion, which asks three things that Glow
as a density model of its own does not:

- Latent and data have one shape: what a level splits off returns to the pixels it came from, so that the score network
  sees an image and not a stack of channels.
- The fresh flow is the identity, bit for bit, so that INDM begins as the linear diffusion. A step's 1x1 convolution
  begins as a fixed shuffle of the channels rather than a random rotation, and each level ends with the shuffle that
  undoes them all; the coupling's scale is exp(c tanh(h / c)) and not sigmoid(h + 2), which is 0.88 at h = 0.
- Actnorm begins as the identity too. Setting it by the first batch would be a state that depends on how a batch is
  shared among processes, and that averaged weights (EMA) do not follow; data come centred and scaled anyway. For the
  same reason the coupling's hidden layers have biases in place of actnorm.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.flows.errors import FlowInverseError
from models.flows.shapes import check_input, check_levels, three_layers
from models.options import Count, Positive, require


def shuffle_order(channels: int) -> list[int]:
    """The channel that moves to each place in a step's shuffle, such that all channels soon play both roles.

    Even counts: the in-shuffle of a pack of cards. Position x, counted from 1, goes to 2x mod (channels + 1); no
    channel stays in one half, since doubling leaves the first half and the second is its mirror image. It splits the
    channels anew each time, where exchanging the halves would keep the same two sets. Odd counts, which only points
    have: a rotation by half, whose cycle passes through every place.
    """
    if channels % 2:
        return [(i + channels // 2) % channels for i in range(channels)]
    half = channels // 2
    return [half + i // 2 if i % 2 == 0 else i // 2 for i in range(channels)]


class Coupling(nn.Module):
    """Affine coupling on the last axis: the first half decides scale and shift of the second. Identity when fresh.

    log scale = c tanh(h / c) with c = `bound`, so that one coupling stretches by a factor in [e^-c, e^c].
    """

    def __init__(self, channels: int, hidden: int, image: bool, bound: float) -> None:
        super().__init__()
        self.bound, self.image, self.half = bound, image, channels // 2
        self.layers = three_layers(self.half, hidden, 2 * (channels - self.half), image)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, y: Tensor, mixed: bool) -> tuple[Tensor, Tensor]:
        """y (B, ..., C) -> its image and log|det| (B,) in nats. `mixed`: autocast inside the network."""
        kept, moved = y.tensor_split((self.half,), dim=-1)
        log_scale, shift = self._affine(kept, mixed)
        return torch.cat((kept, torch.addcmul(shift, moved, log_scale.exp())), -1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The point (B, ..., C) that `forward` maps to y."""
        kept, moved = y.tensor_split((self.half,), dim=-1)
        log_scale, shift = self._affine(kept, mixed=False)
        return torch.cat((kept, (moved - shift) * (-log_scale).exp()), -1)

    def _affine(self, kept: Tensor, mixed: bool) -> tuple[Tensor, Tensor]:
        first, second, last = self.layers
        # the channels are the last axis in memory: for a convolution that is the channels_last format
        h = kept.contiguous().permute(0, 3, 1, 2) if self.image else kept
        with torch.autocast(kept.device.type, enabled=mixed):
            h = last(F.relu(second(F.relu(first(h)))))
        h = h.to(kept.dtype)
        raw, shift = (h.permute(0, 2, 3, 1) if self.image else h).chunk(2, dim=-1)
        return self.bound * torch.tanh(raw / self.bound), shift


class Level(nn.Module):
    """Steps at one scale, on the last axis of (B, ..., C): y = P L U (e^s (x + b)), then the coupling.

    P is the shuffle, L unit lower and U upper triangular with a positive diagonal, all stored for every step at once:
    their small products are then one batch, and actnorm and 1x1 convolution one matrix.
    """

    def __init__(self, channels: int, steps: int, hidden: int, image: bool, bound: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(steps, channels))
        self.log_scale = nn.Parameter(torch.zeros(steps, channels))
        self.lower = nn.Parameter(torch.zeros(steps, channels * (channels - 1) // 2))
        self.upper = nn.Parameter(torch.zeros(steps, channels * (channels - 1) // 2))
        self.log_diagonal = nn.Parameter(torch.zeros(steps, channels))
        self.couplings = nn.ModuleList(Coupling(channels, hidden, image, bound) for _ in range(steps))
        # these follow from the sizes and are no state; lists, so that a build on the meta device computes nothing
        order = shuffle_order(channels)
        place = list(range(channels))
        for _ in range(steps):
            place = [place[channel] for channel in order]
        restored = sorted(range(channels), key=place.__getitem__)
        below = [(row, column) for row in range(channels) for column in range(row)]
        for name, value in (("order", order), ("place", place), ("restored", restored)):
            self.register_buffer(name, torch.tensor(value), persistent=False)
        self.register_buffer("below", torch.tensor(below).t().contiguous(), persistent=False)

    def forward(self, x: Tensor, mixed: bool) -> tuple[Tensor, Tensor]:
        """x (B, ..., C) -> its image, the channels in their old order, and log|det| (B,) in nats."""
        positions = math.prod(x.shape[1:-1])
        log_det = positions * (self.log_scale.sum() + self.log_diagonal.sum())
        matrices, biases = self._affine_maps()
        for matrix, bias, coupling in zip(matrices.unbind(), biases.unbind(), self.couplings, strict=True):
            x, term = coupling(F.linear(x, matrix, bias), mixed)
            log_det = log_det + term
        return x.index_select(-1, self.restored), log_det

    def inverse(self, y: Tensor) -> Tensor:
        """The point (B, ..., C) that `forward` maps to y."""
        y = y.index_select(-1, self.place)
        matrices, biases = self._affine_maps()
        # a matrix that rounding has made singular shows as values that are not finite
        inverses = torch.linalg.inv_ex(matrices.double())[0].to(y.dtype)
        for matrix, bias, coupling in reversed(
            list(zip(inverses.unbind(), biases.unbind(), self.couplings, strict=True))
        ):
            y = F.linear(coupling.inverse(y) - bias, matrix)
        return y

    def _affine_maps(self) -> tuple[Tensor, Tensor]:
        """Matrix (steps, C, C) and bias (steps, C) of each step's actnorm and 1x1 convolution together."""
        row, column = self.below
        lower = torch.eye(len(self.order), dtype=self.lower.dtype, device=self.lower.device).repeat(
            len(self.lower), 1, 1
        )
        lower[:, row, column] = self.lower
        upper = torch.diag_embed(self.log_diagonal.exp())
        upper[:, column, row] = self.upper
        matrices = (lower @ upper).index_select(1, self.order) * self.log_scale.exp().unsqueeze(1)
        return matrices, (matrices @ self.shift.unsqueeze(2)).squeeze(2)


class Glow(nn.Module):
    """Invertible map h by couplings, data and latent of one shape, log-determinant and inverse in closed form.

    Images (C, H, W): each level squeezes 2x2, does `steps[level]` steps and splits off half of the channels, the upper
    row of each 2x2 square, which return to their pixels in the end; H and W are divisible by 2^levels. Vectors (D,),
    D >= 2: one count of steps of dense layers. Each coupling's network has two hidden layers of `hidden` units (3x3,
    1x1, 3x3 convolutions for images), its log-scale stays within `log_scale_bound`. The defaults are the paper's for
    CIFAR-10.

    Under autocast, training on images runs the couplings' networks in it; everything else, and all of evaluation and
    inversion, is in the dtype of the weights, since z itself passes through every layer.

    Raises ValueError on a combination that cannot be built.
    """

    def __init__(
        self,
        shape: Sequence[Count],
        steps: Count | Sequence[Count] = (32, 32, 32),
        hidden: Count = 512,
        log_scale_bound: Positive = 2.0,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.steps = (steps,) if isinstance(steps, int) else tuple(steps)
        self.image = len(self.shape) == 3
        self._check(hidden, log_scale_bound)
        self.levels = nn.ModuleList()
        channels = self.shape[0] * 4 if self.image else self.shape[0]
        for count in self.steps:
            self.levels.append(Level(channels, count, hidden, self.image, log_scale_bound))
            channels *= 2  # half is split off, the squeeze makes four of each

    def _check(self, hidden: int, bound: float) -> None:
        require(hidden > 0, "hidden", hidden, "is a positive integer")
        require(0 < bound < math.inf, "log_scale_bound", bound, "is a finite number above 0")
        check_levels(self.shape, "steps", self.steps, len(self.steps))
        accepted = "is [D] with D >= 2: the moved half of a coupling depends on the other"
        require(self.image or self.shape[0] > 1, "shape", list(self.shape), accepted)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, *shape) -> z (B, *shape) and log|det dz/dx| (B,) in nats, exact."""
        device = x.device.type
        mixed = self.training and self.image and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            x = self._enter(x)
            log_det, finished = x.new_zeros(len(x)), []
            for number, level in enumerate(self.levels):
                x, term = level(squeeze(x) if self.image else x, mixed)
                log_det = log_det + term
                if number + 1 < len(self.levels):
                    done, x = x.chunk(2, dim=-1)
                    finished.append(done)
            while finished:
                x = torch.cat((finished.pop(), unsqueeze(x)), -1)
            return self._leave(x), log_det

    def latent(self, x: Tensor) -> Tensor:
        """z alone; the log-determinant is a by-product that costs next to nothing."""
        return self.forward(x)[0]

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """z (B, *shape) -> x with h(x) = z, in closed form; no gradient.

        Raises FlowInverseError if a sample is not finite, before or after.
        """
        with torch.autocast(z.device.type, enabled=False):
            y, finished = self._enter(z), []
            _check_finite(y, "latents")
            for _ in self.levels[1:]:
                done, y = squeeze(y).chunk(2, dim=-1)
                finished.append(done)
            if self.image:
                y = squeeze(y)
            for level in reversed(self.levels):
                y = level.inverse(y)
                y = unsqueeze(y) if self.image else y
                if finished:
                    y = torch.cat((finished.pop(), y), -1)
            _check_finite(y, "samples")
            return y.permute(0, 3, 1, 2).contiguous() if self.image else y

    def _enter(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as (B, H, W, C): a 1x1 convolution is then the same dense map as for vectors."""
        check_input(x, self.shape)
        return x.permute(0, 2, 3, 1) if self.image else x

    def _leave(self, x: Tensor) -> Tensor:
        return unsqueeze(x).permute(0, 3, 1, 2).contiguous() if self.image else x


def squeeze(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H/2, W/2, 4C): pixel (2h+i, 2w+j) of channel c becomes channel (2i + j) C + c."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of `squeeze`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(2, 3)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def _check_finite(x: Tensor, what: str) -> None:
    finite = x.flatten(1).isfinite().all(1)
    if not finite.all():
        raise FlowInverseError(f"inverse of Glow: {(~finite).sum()} of {len(x)} {what} are not finite")
