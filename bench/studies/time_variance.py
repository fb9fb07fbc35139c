"""Claim debiased-time: how the proposal of the noise level changes the variance of the bound.

With h the integrand over lambda = log(sigma / alpha) and w_p(t) the weight of proposal p, the one-draw estimate w_p h
has the second moment E_p[w_p^2 h^2] = int w_p(t) E[h^2 | t] d lambda, since p's density is 1 / w_p with respect to d
lambda. So the variances under all proposals are measured from the same draws, spread evenly in lambda. Drawing from
each proposal itself would miss what makes uniform time bad, the rare times near eps with an enormous weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.noise import IndexedGenerator
from models.sde import LinearSDE, Noise, expand
from models.time_sampling import DEBIASED_FLOOR, debiased_share, importance, log_ratio_rate, stratified

CHUNK = 512
PROPOSALS = ("uniform", "debiased", "importance")
# how |n|^2 of the denoising form is handled: by its mean D, or by the draw itself
FORMS = ("", "_paired")
QUANTITIES = tuple(f"log_variance_ratio_uniform_over_{name}{form}" for form in FORMS for name in PROPOSALS[1:])


def weights(sde: LinearSDE, t: Tensor) -> dict[str, Tensor]:
    """For each proposal of :mod:`models.time_sampling` its weight at the times t, float64."""
    t = t.double()
    low, high = sde.log_ratio_range(t)
    rate = log_ratio_rate(sde, t)
    found = {"uniform": (1 - sde.eps) * rate, "importance": (high - low).expand(t.shape)}
    if sde.eps >= DEBIASED_FLOOR:
        return found | {"debiased": found["importance"]}
    floor = log_ratio_rate(sde, torch.full_like(t, DEBIASED_FLOOR))
    return found | {"debiased": 0.5 * debiased_share(sde)[1] * torch.where(t < DEBIASED_FLOOR, rate / floor, 1.0)}


@torch.no_grad()
def variances(noise: Noise, sde: LinearSDE, z0: Tensor, repeats: int, seed: int) -> dict[str, Tensor]:
    """For each form and proposal, named "<proposal><form>", the variance of one draw, nats^2 (B,), of latents z0.

    ``repeats`` draws an image, in both cases of the bound's score part (Song et al. 2021, arXiv 2101.09258, theorem 3):
    w (|noise - n|^2 - D), and, with "_paired", w (|noise - n|^2 - |n|^2).
    """
    source = IndexedGenerator(seed, "identities time", torch.arange(len(z0), device=z0.device))
    u = stratified(len(z0), repeats, source, z0.device, z0.dtype).flatten()
    t, span = importance(sde, u)
    drawn = source.normal((len(z0), repeats, *z0.shape[1:]), z0.device, z0.dtype).flatten(0, 1)
    start = z0.repeat_interleave(repeats, 0)
    squares, crosses = [], []
    for rows in torch.arange(len(u), device=z0.device).split(CHUNK):
        alpha, sigma = (expand(v, start) for v in sde.marginal(t[rows]))
        predicted = noise(alpha * start[rows] + sigma * drawn[rows], t[rows])
        # |a - n|^2 - |n|^2 multiplied out: near eps it is the small difference of two large numbers
        crosses.append((predicted * (predicted - 2 * drawn[rows])).flatten(1).sum(1))
        squares.append(drawn[rows].flatten(1).square().sum(1) - z0[0].numel())
    paired = torch.cat(crosses).double()
    forms = {"": paired + torch.cat(squares).double(), "_paired": paired}
    found = {}
    for form, h in forms.items():
        h = h.view(len(z0), repeats)
        # the even spread makes this the best estimate of the mean that the draws allow
        mean = span.double().view_as(h).mul(h).mean(1)
        for name, weight in weights(sde, t).items():
            second = (span.double() * weight).view_as(h) * h.square()
            found[f"{name}{form}"] = second.mean(1) - mean.square()
    return found


def log_variance_ratios(
    noise: Noise, sde: LinearSDE, z0: Tensor, repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """QUANTITIES -> (log(variance under uniform time / variance under the proposal), its error).

    Variances are averaged over images; the error comes from the spread over images, linearised. Raises ValueError where
    all proposals are the uniform one, as for VE.
    """
    times = torch.linspace(sde.eps, 1.0, 101, dtype=torch.float64)
    uniform, *others = (weights(sde, times)[name] for name in PROPOSALS)
    if all(torch.allclose(uniform, other) for other in others):
        raise ValueError("g^2 / sigma^2 is constant, so that every proposal is uniform time")
    measured = variances(noise, sde, z0, repeats, seed)
    found = {}
    for form in FORMS:
        above = measured[f"uniform{form}"]
        for name in PROPOSALS[1:]:
            below = measured[f"{name}{form}"]
            influence = above / above.mean() - below / below.mean()
            value = float((above.mean() / below.mean()).log())
            found[f"log_variance_ratio_uniform_over_{name}{form}"] = value, float(influence.std() / math.sqrt(len(z0)))
    return found
