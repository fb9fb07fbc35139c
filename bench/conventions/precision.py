"""The convention of writing sigma = sqrt(1 - exp(-B)) in float32, where B is about 1e-6 at eps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.conventions.case import Case, Row, dot, residuals
from models.base import NotDefined
from models.indm import INDM
from models.noise import IndexedGenerator, normal, uniform
from models.sde import VPSDE


class Float32VP(VPSDE):
    """VP with the standard deviation and the importance-sampled time in float32, as written, whatever t's dtype.

    sigma = sqrt(1 - exp(-B)), 2 lambda = log(1 - exp(-B)) + B, B = log(1 + exp(2 lambda)): each loses at eps what
    -expm1, expm1 and log1p keep.
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integrated = self.integrated_beta(t.float())
        return torch.exp(-0.5 * integrated).to(t), (1 - torch.exp(-integrated)).sqrt().to(t)

    def log_ratio(self, t: Tensor) -> Tensor:
        integrated = self.integrated_beta(t.float())
        return 0.5 * ((1 - torch.exp(-integrated)).log() + integrated).to(t)

    def time(self, log_ratio: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        integrated = (1 + torch.exp(2 * log_ratio.float())).log()
        root = (self.beta_min**2 + 2 * slope * integrated).sqrt()
        return ((root - self.beta_min) / slope).to(log_ratio)


def in_float32(model: INDM) -> INDM:
    """The same model with the SDE computed by :class:`Float32VP`; raises NotDefined for another SDE than VP."""
    if type(model.sde) is not VPSDE:
        raise NotDefined("only VP has this cancellation in the official code")
    sde = Float32VP(model.sde.beta_min, model.sde.beta_max, model.sde.eps)
    score = copy.deepcopy(model.score)
    score.sde = sde  # a network's preconditioning and an exact score read sigma too
    return INDM(sde, score, model.flow, model.setting, model.shape, model.scale)


@torch.no_grad()
def near_eps(case: Case) -> Iterator[Row]:
    """The likelihood-weighted score loss and the bound with the SDE in float32.

    The loss is an integral over lambda whose integrand is known at eps, and float32 starts it too late: to first order
    the difference is -(Z - Z32) / 2 E|noise(z_eps) - n|^2. The bound's residual starts at the same sigma, so that it
    holds what the loss misses.
    """
    right, official = case.model, in_float32(case.model)
    dims = math.prod(right.shape)
    ends = torch.tensor([right.sde.eps, 1.0], dtype=torch.float64)
    (low, high), (low32, high32) = (sde.log_ratio(ends).tolist() for sde in (right.sde, official.sde))
    if not math.isfinite(low32):
        raise NotDefined(f"1 - exp(-B) is zero in float32 at eps = {right.sde.eps:g}")
    missing = (high - low) - (high32 - low32)
    drift, drift32 = (m.sde.log_alpha(1.0) - m.sde.log_alpha(m.sde.eps) for m in (right, official))

    def losses(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        z0 = right.latent(x)
        # the common range on the same nodes and noise, so that only the difference is left of it
        one = score_loss(right, z0, (low32, high), case.times, case.source("score loss", rows))
        two = score_loss(official, z0, (low32, high32), case.times, case.source("score loss", rows))
        one = one + score_loss(right, z0, (low, low32), 1, case.source("missing", rows))
        rest = [
            m.sde.prior_cross_entropy(z0).double() + residuals(m, z0, case.source("eps", rows), case.draws)[0]
            for m in (right, official)
        ]
        return one, two, rest[1] - rest[0]

    one, two, rest = case.per_image(losses)
    # E|noise - n|^2 = D + 2 (residual + D log alpha), and the residual is known from draws of its own
    error = dims + 2 * (case.residual_pair[0] + dims * right.sde.log_alpha(right.sde.eps))
    yield case.likelihood_row("score loss", one, two, -missing * error, part=True)
    # the bound's constants: Z / 2 as much as the loss has, and the drift's divergence
    change = (two - one) + dims * missing - dims * (drift32 - drift) + rest
    yield case.likelihood_row("NELBO", case.right_nelbo, case.right_nelbo + change)


def score_loss(model: INDM, z0: Tensor, ends: tuple[float, float], times: int, source: IndexedGenerator) -> Tensor:
    """Integral of E|noise(z_t) - n|^2 over lambda between ``ends``, nats (B,): Z/2 times the importance-sampled mean.

    One node in each of ``times`` strata; (alpha / s)^4 (|n|^2 - D), s^2 = alpha^2 + sigma^2, of known mean nought, is
    taken off as ``INDM.nelbo_parts`` does.
    """
    low, high = ends
    shift = uniform((len(z0), 1), source, z0.device, torch.float64)
    total = torch.zeros(len(z0), dtype=torch.float64, device=z0.device)
    for k in range(times):
        t = model.sde.time(low + (k + shift[:, 0]) / times * (high - low)).clamp(model.sde.eps, 1.0).to(z0)
        alpha, sigma = (v.double() for v in model.sde.marginal(t))
        noise = normal(z0.shape, source, z0.device, z0.dtype)
        error = model.noise(model.perturb(z0, t, noise), t) - noise
        weight = (alpha.square() / (alpha.square() + sigma.square())).square()
        total = total + dot(error, error) - weight * (dot(noise, noise) - z0[0].numel())
    return (high - low) / times * total
