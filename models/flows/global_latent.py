"""The flow of INDM's official code: residual blocks that a global latent h ~ q(h|x) conditions.

Na et al. 2022 (arXiv:2205.13699); encoder and prior after Ma et al. 2021 (arXiv:2004.11820). With z = z(x; h),
log p(x) >= E_q[log p(z) + log|det dz/dx| + log p(h) - log q(h|x)]: where a flow without h gives its log-determinant,
this one gives that for fixed h less a sample of the divergence of q from p. The likelihood becomes a bound too.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.flows.branch import Series, branch_and_log_det
from models.flows.latent_encoder import Encoder, WeightNormLinear
from models.flows.latent_prior import LatentPrior, draw_normal
from models.flows.lipschitz import TWO_PI, Chain, Jacobian
from models.flows.log_det import ProbeKind, RouletteKind
from models.flows.residual import LogDet, ResidualFlow
from models.flows.shapes import check_input
from models.noise import Generator
from models.options import Count, Fraction, Natural, Positive, require

# A sample's number, as a tag beside its entries: exact in float32 and too small to count among them.
TAG = 2.0**-24


@dataclass
class ConditionedChain:
    """g(a; h) = tail(head(a) + shift): a block's layers 1 and 2, what h adds to them, and layer 3; a `Chain` to all."""

    head: Chain
    tail: Chain
    shift: Tensor  # (B, hidden, 1, 1), angle coordinate

    def value(self, a: Tensor) -> Tensor:
        """g(a), shape of `a` (B, ...)."""
        return self.tail.value(self.head.value(a) + self.shift)

    def linearise(self, a: Tensor) -> tuple[Tensor, Jacobian]:
        """g(a) and its Jacobian at `a` for fixed h."""
        hidden, first = self.head.linearise(a)
        value, last = self.tail.linearise(hidden + self.shift)
        return value, Jacobian([*first.weights, *last.weights], [*first.slopes, *last.slopes])

    def tagged(self, shape: Sequence[int]) -> "TaggedChain":
        """The same on rows that say which sample they are; `shape` is one sample's (C, H, W)."""
        return TaggedChain(self, tuple(shape))


@dataclass
class TaggedChain:
    """A conditioned chain on rows (B, C H W + 1). `invert` drops samples it has solved; the tag says who is left."""

    chain: ConditionedChain
    shape: tuple[int, ...]

    def value(self, a: Tensor) -> Tensor:
        """(g(a), 0): the tag is a fixed point from the start."""
        shift = self.chain.shift[(a[:, -1] / TAG).round().long()]
        value = ConditionedChain(self.chain.head, self.chain.tail, shift).value(a[:, :-1].unflatten(1, self.shape))
        return F.pad(value.flatten(1), (0, 1))


class ConditionedFlow(ResidualFlow):
    """A residual flow on images whose blocks all see h (B, `latent_dims`); `given` supplies it.

    A block's second layer, the 1x1 convolution, is applied to its input plus a linear map of h, the same at all pixels.
    h is no part of the map that is inverted, so that linear map needs no cap.
    """

    h: Tensor | None = None

    def __init__(self, latent_dims: int, shape: Sequence[int], hidden: int = 512, **options) -> None:
        super().__init__(shape, hidden=hidden, **options)
        accepted = "is [C, H, W]; for vectors use the flow 'residual'"
        require(len(self.shape) == 3, "shape", list(self.shape), accepted)
        self.conditions = nn.ModuleList(
            nn.ModuleList(nn.Linear(latent_dims, hidden) for _ in range(count)) for count in self.blocks
        )

    def given(self, h: Tensor) -> "ConditionedFlow":
        """The flow x -> z for this h (B, latent_dims): a `ResidualFlow` for batches of B that shares these weights."""
        flow = copy.copy(self)
        flow.h = h
        return flow

    def chains(self) -> Iterator[list[ConditionedChain]]:
        """As in `ResidualFlow`, for the h that was given. ValueError without one."""
        require(self.h is not None, "h", None, "is a tensor (B, latent_dims), by flow.given(h)")
        for chains, conditions in zip(super().chains(), self.conditions, strict=True):
            level = []
            for chain, condition in zip(chains, conditions, strict=True):
                first, second, last = chain.affines
                shift = F.linear(TWO_PI * condition(self.h), second.weight.flatten(1))
                head = Chain([first, second], chain.preactivation)
                level.append(ConditionedChain(head, Chain([last], True), shift[:, :, None, None]))
            yield level

    def _estimate(self, chain: ConditionedChain, a: Tensor, probe: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        recorded = self.training and torch.is_grad_enabled() and not torch.is_autocast_enabled(a.device.type)
        if not recorded or a.device.type != "cpu":
            return super()._estimate(chain, a, probe, depth)
        affines = [*chain.head.affines, *chain.tail.affines]
        options = Series(self.roulette, self.terms[True], chain.head.preactivation)
        return branch_and_log_det(affines, chain.shift.flatten(1), a, probe, depth, options)

    def _invert_block(
        self, chain: ConditionedChain, goal: Tensor, tolerance: float, max_iterations: int, number: int
    ) -> Tensor:
        shape = goal.shape[1:]
        tags = TAG * torch.arange(len(goal), dtype=goal.dtype, device=goal.device).unsqueeze(1)
        rows = torch.cat([goal.flatten(1), tags], 1)
        rows = super()._invert_block(chain.tagged(shape), rows, tolerance, max_iterations, number)
        return rows[:, :-1].unflatten(1, shape)


class GlobalLatentFlow(nn.Module):
    """Residual flow conditioned by a global latent h, images only; `forward` gives log|det dz/dx| - KL.

    h = mean(x) + exp(log_var(x) / 2) eps has `latent_dims` entries and is drawn anew at each call, in evaluation as in
    training. The encoder has two blocks and a halving for each of `encoder_widths`, then `encoder_out` channels; it
    sees the image as the first residual block does, squeezed if `squeeze_first` (CelebA). The prior of h is a flow of
    `prior_steps` steps with `prior_hidden` units. All other options are those of `ResidualFlow`; the defaults are the
    published ones for CIFAR-10.

    The published weights hold two numbers more for each block, the parameters of a roulette that are never trained:
    64 of the 13,164,376 (CIFAR-10) and of the 19,804,936 (CelebA), which here are 13,164,312 and 19,804,872.

    Averaged weights: see `BatchNorm` for what becomes of its statistics. Raises ValueError on a combination that cannot
    be built.
    """

    def __init__(
        self,
        shape: Sequence[Count],
        blocks: Count | Sequence[Count] = (16, 16),
        hidden: Count = 512,
        coefficient: Fraction = 0.98,
        squeeze_first: bool = False,
        log_det: LogDet = "auto",
        terms_train: Natural = 2,
        terms_eval: Natural = 2,
        roulette: RouletteKind = "geometric",
        roulette_entry: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25,
        roulette_stay: Fraction = 0.9,
        roulette_rate: Positive = 2.0,
        probes: ProbeKind = "rademacher",
        latent_dims: Count = 64,
        encoder_widths: Sequence[Count] = (48, 96, 96),
        encoder_out: Count = 8,
        prior_steps: Natural = 2,
        prior_hidden: Count = 256,
    ) -> None:
        super().__init__()
        sizes = {"latent_dims": latent_dims, "encoder_out": encoder_out, "prior_hidden": prior_hidden}
        for key, value in sizes.items():
            require(value > 0, key, value, "is a positive integer")
        require(latent_dims % 2 == 0, "latent_dims", latent_dims, "is an even number, for couplings of two halves")
        widths = list(encoder_widths)
        require(len(widths) > 0 and min(widths) > 0, "encoder_widths", widths, "is one or more positive integers")
        require(prior_steps >= 0, "prior_steps", prior_steps, "is 0 or a positive integer")
        self.residual = ConditionedFlow(
            latent_dims,
            shape,
            hidden,
            blocks=blocks,
            coefficient=coefficient,
            squeeze_first=squeeze_first,
            log_det=log_det,
            terms_train=terms_train,
            terms_eval=terms_eval,
            roulette=roulette,
            roulette_entry=roulette_entry,
            roulette_stay=roulette_stay,
            roulette_rate=roulette_rate,
            probes=probes,
        )
        self.shape, self.squeeze_first = self.residual.shape, squeeze_first
        channels, height, width = self.shape
        seen = (4 * channels, height // 2, width // 2) if squeeze_first else self.shape
        self.encoder = Encoder(seen, encoder_widths, encoder_out)
        self.head = WeightNormLinear(self.encoder.size, 2 * latent_dims)
        self.prior = LatentPrior(latent_dims, prior_steps, prior_hidden)

    def forward(self, x: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """x (B, *shape) -> z (B, *shape) and log|det dz/dx| - KL (B,) in nats, one sample of h.

        The randomness, first that of h and then that of the log-determinant's estimate, comes from `generator` (None:
        PyTorch's global one). The KL is a sample of log q(h|x) - log p(h) and may be negative.
        """
        h, divergence = self.posterior(x, generator)
        z, log_det = self.residual.given(h)(x, generator)
        return z, log_det - divergence

    def latent(self, x: Tensor, generator: Generator = None) -> Tensor:
        """z alone, (B, *shape), for one draw of h ~ q(h|x) from `generator`."""
        mean, log_var = self.moments(x)
        return self.given(_shifted(mean, log_var, generator)[0]).latent(x)

    def inverse(
        self, z: Tensor, generator: Generator = None, tolerance: float | None = None, max_iterations: int = 1000
    ) -> Tensor:
        """z (B, *shape) -> x, h drawn from its prior with `generator`; no gradient.

        Not the inverse of `forward`, whose h comes from x: for that, keep the h and use `given(h).inverse(z)`.
        Tolerance and failures (FlowInverseError) are those of `ResidualFlow.inverse`.
        """
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            h = self.prior.sample(len(z), z, generator)
        return self.given(h).inverse(z, tolerance, max_iterations)

    def given(self, h: Tensor) -> ConditionedFlow:
        """The invertible flow x <-> z for this h (B, latent_dims), with its own `forward`, `latent` and `inverse`."""
        return self.residual.given(h)

    def posterior(self, x: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """h ~ q(h|x), (B, latent_dims), and log q(h|x) - log p(h), nats (B,), whose mean is KL(q || p)."""
        mean, log_var = self.moments(x)
        h, eps = _shifted(mean, log_var, generator)
        with torch.autocast(x.device.type, enabled=False):
            log_q = -0.5 * ((log_var + eps.square()).sum(1) + h.shape[1] * math.log(2 * math.pi))
            return h, log_q - self.prior.log_prob(h)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(h|x), each (B, latent_dims). Under autocast, training runs the encoder in it."""
        check_input(x, self.shape)
        device = x.device.type
        with torch.autocast(device, enabled=self.training and torch.is_autocast_enabled(device)):
            features = self.encoder(F.pixel_unshuffle(x, 2) if self.squeeze_first else x)
        with torch.autocast(device, enabled=False):
            mean, log_var = self.head(features.to(x.dtype)).chunk(2, dim=1)
        return mean, log_var


def _shifted(mean: Tensor, log_var: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """h = mean + exp(log_var / 2) eps and eps ~ N(0, I), each (B, D)."""
    eps = draw_normal(tuple(mean.shape), mean, generator)
    return torch.addcmul(mean, (0.5 * log_var).exp(), eps), eps
