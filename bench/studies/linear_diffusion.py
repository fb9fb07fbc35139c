"""A linear diffusion written out by itself: a score and an SDE, no flow (Song et al. 2021, arXiv 2011.13456).

DDPM++ is this with a VP SDE and NCSN++ with a VE SDE. INDM with the identity flow claims to be the same thing; that is
decided by comparing numbers, and so this module shares with INDM the SDE, the score, the samplers and the ODE solver,
and none of its own arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.integrators import MAX_STEP, dormand_prince, flow_field, probes_of, resolve_probes, state_scale
from models.noise import Generator, StepRandom, normal, uniform
from models.samplers import SAMPLERS
from models.score.adapter import noise_function
from models.sde import LinearSDE, expand


def _squared_norms(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(1)


class LinearDiffusion:
    """dz = f z dt + g dw from z_0 = x / scale, and its reverse by a score. Likelihoods are nats of the density of x."""

    def __init__(self, sde: LinearSDE, score: nn.Module, scale: float = 1.0, stratified: bool = True):
        self.sde, self.scale, self.stratified = sde, scale, stratified
        self.noise = noise_function(score, sde)

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0, log volume lost by the division, nats (B,))."""
        if self.scale == 1:
            return x, x.new_zeros(len(x))
        lost = x[0].numel() * torch.tensor(self.scale, dtype=torch.float64).log()
        return x / self.scale, lost.to(x).expand(len(x))

    def _error(self, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self.sde.marginal(t)
        return _squared_norms(self.noise(expand(alpha, z0) * z0 + expand(sigma, z0) * noise, t) - noise)

    def _uniforms(self, random: StepRandom, dtype: torch.dtype) -> Tensor:
        return random.stratified("time", dtype=dtype) if self.stratified else random.uniform("time", dtype=dtype)

    def likelihood_loss(self, x: Tensor, random: StepRandom) -> Tensor:
        """Likelihood-weighted denoising loss with the prior's cross-entropy, nats/dim (arXiv 2101.09258, eq. 7)."""
        z0, lost = self._start(x)
        dims = x[0].numel()
        t, normaliser = self.sde.importance_time(self._uniforms(random, x.dtype))
        error = self._error(z0, t, random.normal("noise", x.shape[1:], dtype=x.dtype))
        return (
            (0.5 * normaliser * error).mean() / dims
            + lost.mean() / dims
            + self.sde.prior_cross_entropy(z0).mean() / dims
        )

    def variance_weighted_loss(self, x: Tensor, random: StepRandom) -> Tensor:
        """|predicted - drawn noise|^2 / (2D) at uniform time in [eps, 1]."""
        z0, _ = self._start(x)
        t = self.sde.eps + (1 - self.sde.eps) * self._uniforms(random, x.dtype)
        error = self._error(z0, t, random.normal("score noise", x.shape[1:], dtype=x.dtype))
        return 0.5 * error.mean() / x[0].numel()

    @torch.no_grad()
    def nelbo(self, x: Tensor, times: int, generator: Generator) -> Tensor:
        """The bound in its denoising form (arXiv 2101.09258, theorem 3), residual at eps included, nats (B,).

        Times are spread evenly in log(sigma / alpha), and a control variate of known mean is subtracted: the defaults
        of ``INDM.nelbo_parts``.
        """
        z0, lost = self._start(x)
        dims, sde = x[0].numel(), self.sde
        low, high = sde.log_ratio_range(x)
        shift = uniform((len(x), 1), generator, x.device, x.dtype)
        grid = (torch.arange(times, device=x.device, dtype=x.dtype) + shift) / times
        total = x.new_zeros(len(x))
        for place in grid.unbind(1):
            t = sde.time(low + place * (high - low)).clamp(sde.eps, 1.0)
            alpha, sigma = sde.marginal(t)
            noise = normal(x.shape, generator, x.device, x.dtype)
            known = (alpha.square() / (alpha.square() + sigma.square())).square()
            total += self._error(z0, t, noise) - known * (_squared_norms(noise) - dims)
        drift = sde.log_alpha(1.0) - sde.log_alpha(sde.eps)
        diffusion = (high - low) * (total / times - dims) - dims * drift
        _, residual = self._noisy_start(z0, generator)
        return sde.prior_cross_entropy(z0) + diffusion + residual + lost

    def _noisy_start(self, z0: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(z_eps, residual of the decoder at eps in nats (B,)) (arXiv 2101.09258, appendix C)."""
        t = torch.full((len(z0),), self.sde.eps, dtype=z0.dtype, device=z0.device)
        alpha, sigma = self.sde.marginal(t)
        noise = normal(z0.shape, generator, z0.device, z0.dtype)
        z = expand(alpha, z0) * z0 + expand(sigma, z0) * noise
        predicted = self.noise(z, t)
        # 1/2 (|noise - predicted|^2 - |noise|^2): the drawn |noise|^2 stands for its mean, D
        residual = (predicted * (0.5 * predicted - noise)).flatten(1).sum(1)
        return z, residual - z0[0].numel() * self.sde.log_alpha(self.sde.eps)

    @torch.no_grad()
    def nll(self, x: Tensor, rtol: float, atol: float, probes: int | str, generator: Generator) -> Tensor:
        """Negative log-likelihood of the probability-flow ODE from z_eps, residual included, nats (B,)."""
        z0, lost = self._start(x)
        dims, sde = x[0].numel(), self.sde
        vectors = resolve_probes(probes, x, generator)
        z, residual = self._noisy_start(z0, generator)
        low, high = sde.log_ratio_range(torch.zeros(1, dtype=x.dtype, device=x.device))
        first, last = state_scale(sde, torch.tensor([sde.eps, 1.0], dtype=torch.float64))[0]
        u, divergence, _ = dormand_prince(
            lambda rows: flow_field(self.noise, sde, probes_of(vectors, rows)),
            z / first.to(x),
            low.expand(len(x)),
            high.expand(len(x)),
            rtol,
            atol,
            max_step=MAX_STEP,
        )
        ode = -divergence - dims * math.log(last / first)
        return -sde.prior_log_prob(u * last.to(x)) + ode + residual + lost

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], steps: int, sampler: str, generator: Generator, like: Tensor) -> Tensor:
        """Samples of ``shape`` (B, ...), of the type and device of ``like``."""
        z = self.sde.sample_prior(shape, generator, like.device, like.dtype)
        z0, _ = SAMPLERS[sampler](self.noise, self.sde, z, steps, generator, self.sde.eps)
        return z0 * self.scale if self.scale != 1 else z0
