"""Likelihoods of a linear diffusion behind an invertible flow: the bound, the ODE likelihood, the members between.

Song et al. 2021 (arXiv 2101.09258) for the diffusion, Kim et al. 2022 (arXiv 2205.13699) for the flow before it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from models.base import Model
from models.integrators import ProbeKind, Reference, Solver, likelihood_path, resolve_probes
from models.noise import Generator, normal
from models.options import choose
from models.sde import LinearSDE, Noise
from models.time_sampling import DRAWS, PROPOSALS
from models.variational import negative_elbo


def squares(values: Tensor) -> Tensor:
    """Sums of squares (B,) of values (B, ...)."""
    return values.flatten(1).square().sum(1)


class LatentLikelihood(Model):
    """Likelihoods of a flow :meth:`encode` before the linear diffusion ``sde``, whose noise :attr:`noise` predicts."""

    sde: LinearSDE

    @property
    @abstractmethod
    def noise(self) -> Noise:
        """noise(z, t), the noise predicted in latents z (B, *shape) at times t (B,)."""

    @abstractmethod
    def encode(self, x: Tensor, generator: Generator = None) -> tuple[Tensor, Tensor]:
        """(z_0 (B, *shape), log|det dz_0/dx| in nats (B,)) of data x (B, *shape)."""

    @abstractmethod
    def perturb(self, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t (B, *shape) of latents z0 at times t (B,), by the given noise of z0's shape."""

    @torch.no_grad()
    def nelbo_parts(
        self,
        x: Tensor,
        times: int = 1,
        generator: Generator = None,
        proposal: Literal["importance", "uniform", "debiased"] = "importance",
        draws: Literal["stratified", "independent"] = "stratified",
        control_variate: bool = True,
    ) -> dict[str, Tensor]:
        """Parts of the bound, nats (B,): prior, diffusion, reconstruction (the residual at eps), flow.

        ``times`` noise levels an image, from ``proposal`` (models.time_sampling), an image's spread evenly with one
        random shift or independent. ``control_variate``: subtract w (|noise|^2 - D), whose mean is known to be zero
        at every noise level, with w what N(0, I) latents would make optimal. No option changes the expectation; the
        defaults have the lowest variance for their cost (reports/estimators). ValueError for an unknown option.
        """
        draw = choose(DRAWS, "draws", draws)
        z0, log_det = self.encode(x, generator)
        dims = x[0].numel()
        low, high = self.sde.log_ratio_range(x)
        integral = high - low  # = Z / 2
        uniforms = draw(len(x), times, generator, x.device, x.dtype)
        total = x.new_zeros(len(x))
        for k in range(times):
            noise = normal(x.shape, generator, x.device, x.dtype)
            ratio, error, control = self.integrand(z0, uniforms[:, k], noise, proposal)
            if control_variate:
                error = error - control
            # the integrand's constant, -D, leaves draws uniform in lambda (ratio = 1) as they are
            total += ratio * error - (ratio - 1) * dims
        drift = self.sde.log_alpha(1.0) - self.sde.log_alpha(self.sde.eps)
        _, residual = self._truncate(z0, generator)
        return {
            "prior": self.sde.prior_cross_entropy(z0),
            "diffusion": integral * (total / times - dims) - dims * drift,
            "reconstruction": residual,
            "flow": -log_det,
        }

    def integrand(
        self, z0: Tensor, u: Tensor, noise: Tensor, proposal: str = "importance"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(ratio, error, control), each (B,), of one draw of the diffusion integral at latents z0 (B, *shape).

        The time is ``proposal``'s at uniforms ``u`` (B,) and ratio its weight over lambda(1) - lambda(eps), so that
        the mean of ratio (error - D) is the mean of |noise_hat - noise|^2 - D over lambda; nats, before that span.
        ``control`` has mean zero over ``noise``. ValueError for an unknown proposal.
        """
        t, weight = choose(PROPOSALS, "proposal", proposal)(self.sde, u)
        low, high = self.sde.log_ratio_range(u)
        alpha, sigma = self.sde.marginal(t)
        error = squares(self.noise(self.perturb(z0, t, noise), t) - noise)
        share = (alpha.square() / (alpha.square() + sigma.square())).square()
        return weight / (high - low), error, share * (squares(noise) - z0[0].numel())

    def _truncate(self, z0: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(z_eps, residual (B,) nats): -log p(z_0) <= -log p(z_eps) + residual in expectation, one and the same draw.

        With the decoder N((z + sigma^2 score) / alpha, sigma^2 / alpha^2) at eps (Song et al. 2021, arXiv 2101.09258):
        1/2 (|n - n_hat|^2 - D) - D log alpha. Here 1/2 (|n|^2 - D), whose mean is zero, is left out: n_hat is small
        at eps, so that this was nearly all of the residual's variance, sqrt(D / 2) nats an image.
        """
        t = torch.full((len(z0),), self.sde.eps, dtype=z0.dtype, device=z0.device)
        noise = normal(z0.shape, generator, z0.device, z0.dtype)
        z_eps = self.perturb(z0, t, noise)
        predicted = self.noise(z_eps, t)
        residual = (predicted * (0.5 * predicted - noise)).flatten(1).sum(1)
        return z_eps, residual - z0[0].numel() * self.sde.log_alpha(self.sde.eps)

    @torch.no_grad()
    def nll_parts(
        self,
        x: Tensor,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        probes: int | Literal["exact"] = 1,
        corrected: bool = True,
        generator: Generator = None,
        probe_kind: ProbeKind = "rademacher",
        solver: Solver = "dopri5",
        reference: Reference | None = None,
        fixed_shape: bool | None = None,
    ) -> dict[str, Tensor]:
        """Parts of the ODE's negative log-likelihood, nats (B,): prior, ode, reconstruction, flow; and nfe (B,).

        ``corrected``: start at z_eps and add the residual ("after correction"); otherwise start at the clean z_0 at
        time eps, as score_sde does ("before correction"). ``probes``: Hutchinson probes of ``probe_kind`` a
        trajectory, or "exact". ``solver``, its ``reference`` and ``fixed_shape``: models.integrators.likelihood_path,
        models.adaptive.integrate.
        """
        z0, log_det = self.encode(x, generator)
        vectors = resolve_probes(probes, x, generator, probe_kind)
        start, residual = self._truncate(z0, generator) if corrected else (z0, torch.zeros_like(log_det))
        z, log_det_path, nfe = likelihood_path(
            self.noise, self.sde, start, vectors, rtol, atol, solver, reference, fixed_shape
        )
        return {
            "prior": -self.sde.prior_log_prob(z),
            "ode": -log_det_path,
            "reconstruction": residual,
            "flow": -log_det,
            "nfe": nfe,
        }

    @torch.no_grad()
    def member_parts(
        self,
        x: Tensor,
        weight: float,
        steps: int = 200,
        generator: Generator = None,
        probes: int | Literal["exact"] = "exact",
    ) -> dict[str, Tensor]:
        """Parts of the bound of one member of the plug-in family, nats (B,): diffusion, reconstruction, flow.

        models.variational.negative_elbo, prior included, behind the flow: weight 0 is the reverse SDE, 1 the ODE, whose
        "bound" is its likelihood, that of :meth:`nll_parts`. ``probes``: as there.
        """
        z0, log_det = self.encode(x, generator)
        # there None is the exact divergence
        vectors = None if probes == "exact" else resolve_probes(probes, z0, generator)
        z_eps, residual = self._truncate(z0, generator)
        bound = negative_elbo(self.noise, self.sde, z_eps, weight, steps, generator, vectors)
        return {"diffusion": bound, "reconstruction": residual, "flow": -log_det}
