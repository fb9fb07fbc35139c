"""NCSN: a variance-exploding chain of L noise levels (Song and Ermon, NeurIPS 2019, arXiv 1907.05600).

One network serves the chain and its continuous embedding, the VE diffusion from sigma_min to sigma_max whose times
i / (L - 1) are the chain's levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.base import Loss, NotDefined, Phase
from models.chain import chain_bound
from models.indm import INDM
from models.linear_chain import LinearChain
from models.noise import Generator, StepRandom
from models.options import Positive
from models.score.adapter import NetworkScore, Preconditioning
from models.sde import VESDE


class NCSN(INDM):
    """Score at ``levels`` noise levels, geometric from sigma_min to sigma_max (in units of data / scale).

    The sampler is annealed Langevin dynamics, which has no density and of which no bound is known. A likelihood needs
    another way to generate from the same network: ``chain_parts`` bounds that of ancestral sampling on the levels,
    ``nll_parts`` is that of the continuous embedding's probability-flow ODE.
    """

    name = "ncsn"
    family = "linear, discrete"
    curve_sampler = "annealed_langevin"
    compilable = False

    def __init__(
        self,
        score: nn.Module,
        shape: Sequence[int],
        levels: int = 10,
        sigma_min: float = 0.01,
        sigma_max: float = 1.0,
        scale: float = 1.0,
        time_sampling: Literal["stratified", "independent"] = "stratified",
    ):
        super().__init__(VESDE(sigma_min, sigma_max), score, shape=shape, scale=scale, time_sampling=time_sampling)
        times = torch.linspace(0, 1, levels, dtype=torch.float64, device="cpu")
        self.chain = LinearChain(*self.sde.marginal(times), times, "fixed_small")

    @classmethod
    def from_options(
        cls,
        shape: Sequence[int],
        score: dict[str, Any],
        levels: Annotated[int, Field(ge=2)] = 10,
        sigma_min: Positive = 0.01,
        sigma_max: Positive = 1.0,
        preconditioning: Preconditioning = "none",
        scale: Positive = 1.0,
        time_sampling: Literal["stratified", "independent"] = "stratified",
    ) -> NCSN:
        """Build from component options; the signature is the configuration schema."""
        from models.registry import component

        network = NetworkScore(
            component("score", score, shape=list(shape)), VESDE(sigma_min, sigma_max), preconditioning
        )
        return cls(network, shape, levels, sigma_min, sigma_max, scale, time_sampling)

    def phases(self) -> list[Phase]:
        """One phase: the network on its own loss."""
        score = [p for p in self.score.parameters() if p.requires_grad]
        return [Phase("score", {"score": score}, self.level_loss)]

    def level_loss(self, x: Tensor, random: StepRandom) -> Loss:
        """sigma_i^2 |score + noise / sigma_i|^2 / (2 D) at levels drawn uniformly, the batch's mean (eqs. 5 and 6)."""
        last = len(self.chain) - 1
        levels = (self._uniforms(random, x.dtype) * len(self.chain)).floor().clamp_max(last)
        t = levels / last
        noise = random.normal("noise", x.shape[1:], dtype=x.dtype)
        loss = 0.5 * (self.noise(self.perturb(self.latent(x), t, noise), t) - noise).square().mean()
        return loss, {"score": loss.detach()}

    def nelbo_parts(self, x: Tensor, times: int = 1, generator: Generator = None) -> dict[str, Tensor]:
        """NotDefined: annealed Langevin dynamics has no bound."""
        raise NotDefined("not defined: annealed Langevin dynamics has no density, and no bound of it is known")

    @torch.no_grad()
    def chain_parts(self, x: Tensor, generator: Generator = None) -> dict[str, Tensor]:
        """Bound of ancestral sampling on the levels from N(0, sigma_max^2 I), nats (B,): prior, diffusion, flow.

        Reverse variances are those of q(z_{i-1} | z_i, z_0), the decoder is N(z_1 + sigma_min^2 score, sigma_min^2 I).
        """
        z0, log_det = self.encode(x)
        backward = partial(self.chain.backward, self.noise)
        prior = self.sde.prior_log_prob
        return chain_bound(z0, len(self.chain), self.chain.forward, backward, prior, generator) | {"flow": -log_det}

    def sample(
        self,
        n: int,
        steps: int = 1000,
        sampler: str = "annealed_langevin",
        generator: Generator = None,
        end: float | None = None,
        **options: Any,
    ) -> Tensor:
        """n samples (n, *shape): by default annealed Langevin dynamics on the model's levels, ``steps`` evaluations in
        all, from N(0, sigma_max^2 I). Other samplers are those of the continuous embedding.
        """
        if sampler == "annealed_langevin":
            options["levels"] = options.get("levels") or len(self.chain)
        return super().sample(n, steps, sampler, generator, end, **options)
