"""The variational framework of Huang, Lim and Courville (2021, arXiv 2106.02808) for linear diffusions.

A function a(z, t) plugged into the reverse of a linear SDE, a = g score, makes a family of generative SDEs. Their
lambda is called ``weight`` here, as lambda = log(sigma / alpha) is taken. Backwards in time

    dz = [f z - (1 - weight / 2) g a] dt + sqrt(1 - weight) g dw,

weight 0 the reverse SDE, 1 the probability-flow ODE, a continuous normalising flow. With an exact score all share their
marginals; with another each is a different model and has a bound of its own. The functions take noise(z, t) =
-sigma score = -sigma a / g, whatever a network is trained to put out. Most of them move y = z / alpha against
r = sigma / alpha, in which f is gone and the weight-1 member reads dy = noise(z, t) dr.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.integrators import hutchinson_probes
from models.noise import Generator, normal
from models.options import choose
from models.sde import LinearSDE, Noise, expand
from models.time_sampling import PROPOSALS, stratified


def ratio_grid(sde: LinearSDE, steps: int, like: Tensor, end: float | None = None) -> tuple[Tensor, Tensor]:
    """(t, r) at steps + 1 nodes from ``end`` (eps by default) up to 1, evenly spaced in log r, in ``like``'s type."""
    low, high = sde.log_ratio_range(torch.zeros((), dtype=torch.float64), end)
    nodes = torch.linspace(float(low), float(high), steps + 1, dtype=torch.float64)
    return sde.time(nodes).clamp(sde.eps if end is None else end, 1.0).to(like), nodes.exp().to(like)


def sample_member(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    weight: float,
    steps: int,
    generator: Generator = None,
    at: Sequence[int] = (),
    end: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Draws of the member ``weight``: prior draws z (B, ...) -> (z at time ``end``, eps by default; states before it).

    ``steps`` steps evenly spaced in log r, one evaluation each; ``at``: after how many of them a state is kept.

    Exponential integrator: with the predicted clean sample c held over a step from r to s, y - c contracts by
    (s / r)^(2 - weight) and gains variance s^2 (1 - (s / r)^(2 - 2 weight)), exactly; alone, weight 0 is ancestral
    sampling and weight 1 DDIM, of first order. c is extrapolated from the last two predictions to the middle of the
    step (two-step SDE-DPM-Solver++ of Lu et al. 2022, arXiv 2211.01095), which at 32 steps leaves the standard
    deviation of Gaussian data 2 % wrong instead of 16 %.
    """
    times, ratios = ratio_grid(sde, steps, z, end)
    states, before = [], None
    for i in range(steps, 0, -1):
        t = times[i].expand(len(z))
        alpha, sigma = (expand(v, z) for v in sde.marginal(t))
        here = (z - sigma * noise(z, t)) / alpha
        clean = here if before is None else 1.5 * here - 0.5 * before
        before = here
        shrink = ratios[i - 1] / ratios[i]
        y = clean + shrink ** (2 - weight) * (z / alpha - clean)
        if weight < 1:
            spread = ratios[i - 1] * (1 - shrink ** (2 - 2 * weight)).sqrt()
            y = y + spread * normal(z.shape, generator, z.device, z.dtype)
        z = sde.marginal(times[i - 1])[0] * y
        if steps - i + 1 in at:
            states.append(z)
    return z, states


def divergence(output: Tensor, z: Tensor, probes: Tensor | None, create_graph: bool = False) -> Tensor:
    """div output / dz (B,), exact (``probes`` None) or averaged over Rademacher ``probes`` (K, B, ...)."""
    flat = output.flatten(1)
    directions = torch.eye(flat.shape[1]).to(flat) if probes is None else probes.flatten(2)
    total = 0.0
    for vector in directions:
        (product,) = torch.autograd.grad((flat * vector).sum(), z, create_graph=create_graph, retain_graph=True)
        total = total + (product.flatten(1) * vector).sum(1)
    return total if probes is None else total / len(probes)


def negative_elbo(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    weight: float,
    steps: int,
    generator: Generator = None,
    probes: Tensor | None = None,
) -> Tensor:
    """One unbiased draw, but for the grid, of the member's bound on -log p(z) of z at time eps, nats (B,).

    -log pi(Y_1) + int [(1 - weight) / 2 |g score|^2 + div((1 - weight / 2) g^2 score - f)] dt along the member's own
    inference SDE dY = (f - weight / 2 g^2 score) dt + sqrt(1 - weight) g dw, Y = z at eps (theorem 1 and section 4.1 of
    the paper; 2 sigma^2 d log r = g^2 dt). At weight 1 the path is an ODE and the bound the log-density of a continuous
    normalising flow: fourth-order Runge-Kutta; below 1 Heun's method, of second weak order as the noise is additive.
    """
    times, ratios = ratio_grid(sde, steps, z)
    if weight == 1:
        y, integral = _runge_kutta(noise, sde, z, steps, probes)
    else:
        y, integral = _heun(noise, sde, z, weight, steps, generator, probes)
    stretch = z[0].numel() * (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))
    return -sde.prior_log_prob(sde.marginal(times[-1])[0] * y) + integral - stretch


@torch.no_grad()
def hutchinson_elbo(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    times: int = 1,
    generator: Generator = None,
    probes: int | None = 1,
    proposal: str = "importance",
) -> Tensor:
    """An unbiased draw of the bound of weight 0 on -log p(z) of z at time eps, nats (B,), with nothing simulated.

    The paper's estimator: -log pi(z_1) + int [1/2 |a|^2 + div(g a - f z)] dt at ``times`` noise levels an image drawn
    from ``proposal`` (models.time_sampling; theirs is "uniform", whose variance is large: |a|^2 and the divergence
    nearly cancel where the density of times is low). As a = -g noise / sigma, the integrand over lambda is
    |noise|^2 - 2 sigma div noise. ``probes``: Rademacher probes of the divergence, or None for the exact one.
    ValueError for an unknown proposal.
    """
    draw = choose(PROPOSALS, "proposal", proposal)
    uniforms = stratified(len(z), times, generator, z.device, z.dtype)
    start = torch.full((len(z),), sde.eps, dtype=z.dtype, device=z.device)
    total = torch.zeros_like(uniforms[:, 0])

    def perturbed(t: Tensor) -> Tensor:
        mean, variance = (expand(v, z) for v in sde.transition(start, t))
        return mean * z + variance.sqrt() * normal(z.shape, generator, z.device, z.dtype)

    for k in range(times):
        t, share = draw(sde, uniforms[:, k])
        with torch.enable_grad():
            state = perturbed(t).requires_grad_()
            predicted = noise(state, t)
            vectors = None if probes is None else rademacher_probes(probes, z, generator)
            div = divergence(predicted, state, vectors)
        square = predicted.detach().flatten(1).square().sum(1)
        total = total + share * (square - 2 * sde.marginal(t)[1] * div)
    stretch = z[0].numel() * (sde.log_alpha(1.0) - sde.log_alpha(sde.eps))
    return total / times - sde.prior_log_prob(perturbed(torch.ones_like(start))) - stretch


def rademacher_probes(count: int, like: Tensor, generator: Generator) -> Tensor:
    """(count, B, ...) random signs of ``like``'s shape and type."""
    return hutchinson_probes(count, like.shape, generator, like.device, like.dtype)


def _predict(noise: Noise, sde: LinearSDE, y: Tensor, t: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """noise(z, t) and sigma div_z noise (B,), at z = alpha y."""
    alpha, sigma = sde.marginal(t)
    with torch.enable_grad():
        z = (alpha * y).detach().requires_grad_()
        predicted = noise(z, t.expand(len(z)))
        div = divergence(predicted, z, probes)
    return predicted.detach(), sigma * div


def _heun(
    noise: Noise,
    sde: LinearSDE,
    z: Tensor,
    weight: float,
    steps: int,
    generator: Generator,
    probes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y at time 1, the bound's integral) along one path of dy = weight noise dr + sqrt((1 - weight) 2 r) dw."""
    times, ratios = ratio_grid(sde, steps, z)
    y, integral, before = z / sde.marginal(times[0])[0], torch.zeros_like(z.flatten(1)[:, 0]), None
    for i in range(steps + 1):
        predicted, div = _predict(noise, sde, y, times[i], probes)
        here = (1 - weight) * predicted.flatten(1).square().sum(1) - (2 - weight) * div
        if before is not None:
            integral = integral + 0.5 * (before + here) * (ratios[i] / ratios[i - 1]).log()
        before = here
        if i == steps:
            break
        drift = weight * (ratios[i + 1] - ratios[i])
        spread = ((1 - weight) * (ratios[i + 1].square() - ratios[i].square())).sqrt()
        y = y + spread * normal(z.shape, generator, z.device, z.dtype)
        if weight > 0:
            alpha = sde.marginal(times[i + 1])[0]
            ahead = noise(alpha * (y + drift * predicted), times[i + 1].expand(len(z)))
            y = y + 0.5 * drift * (predicted + ahead)
    return y, integral


def _runge_kutta(noise: Noise, sde: LinearSDE, z: Tensor, steps: int, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y at time 1, minus the integral of the divergence) of dy = noise dr, classical scheme in log r."""
    times, ratios = ratio_grid(sde, 2 * steps, z)  # every second node is a midpoint
    step = (ratios[-1] / ratios[0]).log() / steps
    y, integral = z / sde.marginal(times[0])[0], torch.zeros_like(z.flatten(1)[:, 0])
    for i in range(0, 2 * steps, 2):
        total, trace, slope = 0.0, 0.0, None
        for node, offset, share in ((i, 0.0, 1 / 6), (i + 1, 0.5, 1 / 3), (i + 1, 0.5, 1 / 3), (i + 2, 1.0, 1 / 6)):
            place = y if slope is None else y + offset * step * slope
            predicted, div = _predict(noise, sde, place, times[node], probes)
            slope = ratios[node] * predicted
            total, trace = total + share * slope, trace + share * div
        y, integral = y + step * total, integral - step * trace
    return y, integral
