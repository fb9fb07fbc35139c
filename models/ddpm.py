"""DDPM: a variance-preserving chain of N noise levels (Ho, Jain, Abbeel, NeurIPS 2020, arXiv 2006.11239).

One network serves the chain and its continuous embedding. It is conditioned on a continuous noise level, and level i
of the chain is the time t_i at which the continuous VP diffusion has the same alpha_bar; so the chain has its own loss,
bounds and ancestral sampler, and the embedding gives the ODE's likelihood and every sampler of the linear diffusions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.base import Loss, NotDefined, Phase
from models.chain import chain_bound
from models.indm import INDM
from models.linear_chain import LinearChain, ReverseVariance
from models.noise import Generator, StepRandom, normal
from models.options import Count, Positive
from models.samplers import chain_samples
from models.score.adapter import NetworkScore, Preconditioning
from models.sde import VPSDE, expand


def ddpm_chain(
    steps: int,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    reverse_variance: ReverseVariance = "fixed_large",
    clip: float | None = None,
) -> LinearChain:
    """The chain of beta_i from beta_min / N to beta_max / N in N equal strides: 1e-4 to 0.02 at the published N = 1000.

    Rescaling with N keeps z_N close to N(0, I). ValueError where a beta is not below 1 or there is no second level.
    """
    if steps < 2 or steps <= beta_max:
        raise ValueError(f"steps = {steps}: must be at least 2 and above beta_max = {beta_max}, so that every beta < 1")
    beta = torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float64, device="cpu")
    # products by way of logarithms: 1 - alpha_bar keeps its digits at the first levels
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    variance = -torch.expm1(log_alpha_bar)
    log_ratio = 0.5 * (variance.log() - log_alpha_bar)
    times = VPSDE(beta_min, beta_max).time(log_ratio)
    return LinearChain((0.5 * log_alpha_bar).exp(), variance.sqrt(), times, reverse_variance, clip)


class DDPM(INDM):
    """The chain and its embedding: a VP diffusion on [t_1, 1], t_1 the time of the chain's first level.

    Times of the last levels may exceed 1 by a little, since 1 - beta < exp(-beta); the network's condition is the noise
    level, which knows no end. ``nelbo_parts`` and ``nll_parts`` are those of the continuous diffusion with the same
    network (Song et al. 2021); the chain's own bounds are ``chain_parts`` and ``discrete_parts``.

    ``score`` as INDM's. ``clip``: keep predicted data in [-1, 1] in the chain's bounds and ancestral samples, as
    published; for images only, since points have no range.
    """

    name = "ddpm"
    family = "linear, discrete"
    curve_sampler = "ancestral"
    compilable = False

    def __init__(
        self,
        score: nn.Module,
        shape: Sequence[int],
        steps: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        reverse_variance: ReverseVariance = "fixed_large",
        clip: bool = True,
        scale: float = 1.0,
        time_sampling: Literal["stratified", "independent"] = "stratified",
    ):
        bound = 1 / scale if clip and len(shape) == 3 else None
        chain = ddpm_chain(steps, beta_min, beta_max, reverse_variance, bound)
        sde = VPSDE(beta_min, beta_max, float(chain.times[0]))
        super().__init__(sde, score, shape=shape, scale=scale, time_sampling=time_sampling)
        self.chain = chain
        # on the model's device, where training looks levels up
        self.register_buffer("levels", torch.stack([chain.alpha, chain.sigma, chain.times]), persistent=False)

    @classmethod
    def from_options(
        cls,
        shape: Sequence[int],
        score: dict[str, Any],
        steps: Count = 1000,
        beta_min: Positive = 0.1,
        beta_max: Positive = 20.0,
        reverse_variance: ReverseVariance = "fixed_large",
        clip: bool = True,
        preconditioning: Preconditioning = "none",
        scale: Positive = 1.0,
        time_sampling: Literal["stratified", "independent"] = "stratified",
    ) -> DDPM:
        """Build from component options; the signature is the configuration schema."""
        from models.registry import component

        network = NetworkScore(component("score", score, shape=list(shape)), VPSDE(beta_min, beta_max), preconditioning)
        return cls(network, shape, steps, beta_min, beta_max, reverse_variance, clip, scale, time_sampling)

    # Training ------------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """One phase: the network on its own loss."""
        score = [p for p in self.score.parameters() if p.requires_grad]
        return [Phase("score", {"score": score}, self.simple_loss)]

    def simple_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """|noise - noise_hat|^2 / D at levels drawn uniformly from 1..N, the batch's mean (L_simple, eq. 14)."""
        levels = (self._uniforms(random, x.dtype) * len(self.chain)).long().clamp_max(len(self.chain) - 1)
        alpha, sigma, t = self.levels[:, levels].to(x.dtype)
        z0 = self.latent(x)
        noise = random.normal("noise", x.shape[1:], dtype=x.dtype)
        z = expand(alpha, z0) * z0 + expand(sigma, z0) * noise
        loss = (self.noise(z, t) - noise).square().mean()
        return loss, {"score": loss.detach()}

    # Likelihood ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def chain_parts(self, x: Tensor, generator: Generator = None) -> dict[str, Tensor]:
        """Bound of the chain on the density of dequantised x, nats (B,): prior, diffusion, flow (the data's scale)."""
        z0, log_det = self.encode(x)
        parts = chain_bound(
            z0,
            len(self.chain),
            self.chain.forward,
            partial(self.chain.backward, self.noise),
            self.sde.prior_log_prob,
            generator,
        )
        return parts | {"flow": -log_det}

    @torch.no_grad()
    def discrete_parts(self, levels: Tensor, count: int, generator: Generator = None) -> dict[str, Tensor]:
        """Bound on -log P(k) of images of grey levels k (B, *shape), 0..count-1, nats (B,): prior, diffusion,
        reconstruction (Ho et al. 2020, eq. 5 and 13), one draw a level; one evaluation of the network for each.

        Training data are dequantised, level k to [2k / K - 1, 2 (k + 1) / K - 1); here level k is the centre of that
        interval, x = (2k + 1) / K - 1, and the decoder gives it the interval's mass, those at the edges being open.
        This is the published map 2k / (K - 1) - 1 shrunk by (K - 1) / K, so that both bounds see the same data. The
        discretised decoder has the variance of q(z_1 | z_2, z_0), as in the official code for both reverse variances.
        """
        z0 = level_centres(levels, count, next(self.parameters(), torch.zeros(()))) / self.scale
        parts = self.chain.divergences(self.noise, z0, self.sde.prior_std, generator)
        first = self.chain.perturb(z0, 1, normal(z0.shape, generator, z0.device, z0.dtype))
        mean = self.chain.denoised(self.noise, first, 1)
        std = self.chain.posterior(first, z0, 1).variance.sqrt()
        mass = discretised_log_prob(levels, count, mean * self.scale, std * self.scale)
        return parts | {"reconstruction": -mass.flatten(1).sum(1)}

    # Sampling ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int = 100,
        sampler: str = "ancestral",
        generator: Generator = None,
        end: float | None = None,
        reverse_variance: ReverseVariance | None = None,
        **options: Any,
    ) -> Tensor:
        """n samples (n, *shape). "ancestral" is the chain's own sampler, on ``steps`` of its levels; the last step adds
        no noise. Others are those of the continuous embedding. NotDefined for more steps than the chain has, and for
        an ``end`` or options that this sampler has not.
        """
        if sampler != "ancestral":
            return super().sample(n, steps, sampler, generator, end, **options)
        if steps > len(self.chain):
            raise NotDefined(f"not defined: the chain has {len(self.chain)} levels, asked for {steps} steps")
        refused = options if end in (None, self.sde.eps) else {"end": end, **options}
        if refused:
            given = ", ".join(f"{name} = {value}" for name, value in refused.items())
            raise NotDefined(
                f"not defined: {given}; ancestral sampling of the chain ends at its first level, and has "
                "the option reverse_variance alone"
            )
        chain = self.chain.strided(steps).with_variance(reverse_variance)
        like = next(self.parameters(), torch.zeros(()))
        z = self.sde.sample_prior((n, *self.shape), generator, like.device, like.dtype)
        z0, self.nfe = chain_samples(self.noise, chain, z, generator)
        return self.decode(z0)


def level_centres(levels: Tensor, count: int, like: Tensor) -> Tensor:
    """Centres (2k + 1) / count - 1 of the intervals that dequantisation gives to levels k, in ``like``'s type."""
    return ((2 * levels.to(like.device).double() + 1) / count - 1).to(like.dtype)


def discretised_log_prob(levels: Tensor, count: int, mean: Tensor, std: Tensor) -> Tensor:
    """log of the mass that N(mean, std^2) gives the interval of each level, nats, of mean's shape; in float64.

    Intervals of width 2 / count tile [-1, 1], the first and the last are open to their sides, so that the masses of all
    levels sum to 1 (Ho et al. 2020, eq. 13).
    """
    levels, mean, std = levels.to(mean.device), mean.double(), std.double()
    lower = (2 * levels.double() / count - 1 - mean) / std
    upper = (2 * (levels.double() + 1) / count - 1 - mean) / std
    lower = lower.masked_fill(levels == 0, -math.inf)
    upper = upper.masked_fill(levels == count - 1, math.inf)
    # the tail on the nearer side: a difference of two numbers near 1 would lose it
    flip = lower > 0
    low, high = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return log_high + torch.log1p(-(log_low - log_high).exp())
