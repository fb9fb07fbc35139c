"""Claim dsm-is-elbo: the likelihood-weighted denoising loss is the ELBO of the plug-in reverse SDE up to a constant.

At given z_0 and t the two integrands over lambda = log(sigma / alpha) are

    |noise(z_t, t) - n|^2 - D    and    |noise(z_t, t)|^2 - 2 sigma div_z noise(z_t, t),    z_t = alpha z_0 + sigma n,

(Huang, Lim and Courville 2021, arXiv 2106.02808, theorem 1 with a = g score, and section 4.2; d lambda = g^2 / (2
sigma^2) dt). They agree in expectation over n, by integration by parts, and not draw by draw. So z_0 and t are held, n
is redrawn, and what is left of the difference after averaging is set against its own sampling error. Near an optimum
the gradient itself is small beside its draws' spread; n is therefore drawn by randomly shifted quasi-Monte Carlo
points, unbiased as independent draws are and far less noisy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.studies.resampling import combine
from models.noise import IndexedGenerator
from models.sde import LinearSDE, Noise, expand
from models.variational import divergence, rademacher_probes

EXACT_DIMS = 4
COMPONENTS = 1_000_000


class Perturbed:
    """Noisy versions of latents z0 (B, ...), each at its own fixed time, the times spread evenly in lambda.

    Each repetition gives every latent ``points`` values of n. Rows of all tensors: B * points.
    """

    def __init__(self, sde: LinearSDE, z0: Tensor, points: int, seed: int, purpose: str):
        self.shape, self.dims = (len(z0), points), z0[0].numel()
        index = torch.arange(len(z0) * points, device=z0.device)
        self.source = IndexedGenerator(seed, f"identities {purpose}", index)
        place = torch.arange(len(z0)).to(z0)
        shift = self.source.uniform((len(index), 1), z0.device, z0.dtype)[:1, 0]
        t, normaliser = sde.importance_time((place / len(z0) + shift) % 1.0)
        self.t, self.z0, self.span = t.repeat_interleave(points), z0.repeat_interleave(points, 0), 0.5 * normaliser
        self.alpha, self.sigma = sde.marginal(self.t)
        # the sequence begins at the origin, which the random shift moves
        lattice = torch.quasirandom.SobolEngine(self.dims).draw(points).to(z0.device, torch.float64)
        self.lattice = lattice.repeat(len(z0), 1).view(len(z0), points, self.dims)

    def integrands(self, noise: Noise, probes: int, create_graph: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At fresh n, (B * points,) each: the denoising and the implicit integrand, 2 sigma div noise, and |n|^2.

        The divergence is exact up to 4 dimensions and by ``probes`` Rademacher probes above.
        """
        like = self.z0
        shift = self.source.uniform((len(like), self.dims), like.device, torch.float64).view_as(self.lattice)[:, :1]
        u = ((self.lattice + shift) % 1.0).clamp(2.0**-26, 1 - 2.0**-26)
        drawn = torch.special.ndtri(u).to(like).view_as(like)
        vectors = None if self.dims <= EXACT_DIMS else rademacher_probes(probes, like, self.source)
        z = (expand(self.alpha, like) * like + expand(self.sigma, like) * drawn).requires_grad_()
        # fused attention has no second derivative, which the gradient of a divergence is
        with sdpa_kernel(SDPBackend.MATH):
            predicted = noise(z, self.t)
        trace = 2 * self.sigma * divergence(predicted, z, vectors, create_graph)
        denoising = (predicted - drawn).flatten(1).square().sum(1)
        return denoising, predicted.flatten(1).square().sum(1) - trace, trace, drawn.flatten(1).square().sum(1)


def gradient_difference(
    noise: Noise,
    weights: list[nn.Parameter],
    sde: LinearSDE,
    z0: Tensor,
    points: int,
    draws: int,
    seed: int,
    probes: int = 1,
) -> tuple[float, float] | None:
    """|E[g_1 - g_2]|^2 / |E g|^2 of the two integrands' gradients by the ``weights``, and its standard error.

    From ``draws`` independent repetitions of ``points`` noises for each latent of z0 (B, ...). Of more than a million
    weights an even selection is compared. None where the gradient itself is lost in the noise.
    """
    perturbed = Perturbed(sde, z0, points, seed, "gradients")
    differences, gradients = [], []
    for _ in range(draws):
        denoising, implicit, _, _ = perturbed.integrands(noise, probes, create_graph=True)
        first, second = _flat(denoising.mean(), weights), _flat(implicit.mean(), weights)
        differences.append(first - second)
        gradients.append(0.5 * (first + second))
    return relative_square(torch.stack(differences), torch.stack(gradients))


def bound_difference(
    noise: Noise, sde: LinearSDE, z0: Tensor, points: int, draws: int, seed: int, probes: int = 1
) -> tuple[float, float]:
    """Mean of the bound's ELBO form minus its denoising form, nats an image, and its standard error.

    Over noise alone: the latents z0 (B, ...) and their times are held, and the expectation is 0 for each of them.
    """
    perturbed = Perturbed(sde, z0, points, seed, "bounds")
    gaps = []
    for _ in range(draws):
        with torch.enable_grad():
            denoising, implicit, trace, square = perturbed.integrands(noise, probes, create_graph=False)
        numbers = torch.stack([implicit - denoising, trace / perturbed.dims, square - perturbed.dims]).detach().double()
        gaps.append(numbers.view(3, *perturbed.shape).mean(2))
    gap, trace, excess = torch.stack(gaps, 1)
    gap = float(perturbed.span) * without_norm(gap + perturbed.dims, excess, trace).mean(1)
    return float(gap.mean()), float(gap.std() / math.sqrt(draws))


def without_norm(gap: Tensor, excess: Tensor, trace: Tensor) -> Tensor:
    """``gap`` (K, B) less the share of the ``excess`` |n|^2 - D in it, whose mean is known to be 0.

    To first order the prediction repeats trace / 2 of the noise n, and the difference of the integrands then holds
    (trace - 1) (|n|^2 - D). The trace of each draw is taken from the other draws, so that nothing is biased.
    """
    others = (trace.sum(0) - trace) / (len(trace) - 1)
    return gap - (others - 1) * excess


def _flat(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    parts = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(w) if p is None else p).flatten() for p, w in zip(parts, weights, strict=True)])
    return flat[:: max(1, -(-len(flat) // COMPONENTS))].double()


def relative_square(differences: Tensor, gradients: Tensor) -> tuple[float, float] | None:
    """(|E d|^2 / |E g|^2, standard error) from K independent draws d_k, g_k (K, P).

    |E d|^2 is estimated by the mean of d_k . d_l over k != l, unbiased: its expectation is 0 when E d = 0, however
    noisy the draws. Error by the jackknife over draws, too large by up to a root of two where E d = 0. None where
    |E g|^2 is within three of its own errors of 0.
    """
    products = [rows @ rows.T for rows in (differences, gradients)]
    size = combine(_off_diagonal(products[1]), torch.stack(_leave_one_out(products[1])))
    if size.value <= 3 * size.se:
        return None
    below, above = (torch.stack(_leave_one_out(p)) for p in products[::-1])
    ratio = combine(_off_diagonal(products[0]) / _off_diagonal(products[1]), above / below)
    return ratio.value, ratio.se


def _off_diagonal(gram: Tensor) -> float:
    count = len(gram)
    return float(gram.sum() - gram.trace()) / (count * (count - 1))


def _leave_one_out(gram: Tensor) -> list[Tensor]:
    count, total = len(gram), gram.sum() - gram.trace()
    return list((total - 2 * (gram.sum(1) - gram.diagonal())) / ((count - 1) * (count - 2)))
