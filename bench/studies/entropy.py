"""Differential entropies, and how far a law is from its best-fitting Gaussian; nats, (n, D) samples in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# above so many dimensions nearest neighbours are too far away to tell a density
NEIGHBOUR_DIMS = 3


def covariance(x: Tensor) -> Tensor:
    """The unbiased covariance (D, D) of x (n, D)."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def gaussian_entropy(x: Tensor) -> float:
    """Entropy of N(m, S), the Gaussian of the sample's moments: (log det S + D log(2 pi e)) / 2.

    Biased by about -D (D + 1) / (4 n) for finite n; -inf where S is singular.
    """
    return 0.5 * float(torch.logdet(covariance(x))) + 0.5 * x.shape[1] * math.log(2 * math.pi * math.e)


def neighbour_entropy(x: Tensor, neighbours: int = 4) -> tuple[float, float]:
    """(entropy, standard error) of the law of x by Kozachenko and Leonenko's estimator (1987; Kraskov et al. 2004,

    arXiv cond-mat/0305641, eq. 20): psi(n) - psi(k) + log V_D + D E log r_k, with r_k the distance to the k-th
    neighbour. Consistent for every density; for few dimensions only. Raises ValueError where points repeat.
    """
    from scipy.spatial import cKDTree

    points = x.cpu().numpy()
    radius = torch.from_numpy(cKDTree(points).query(points, k=neighbours + 1)[0][:, -1])
    if not bool((radius > 0).all()):
        raise ValueError("points repeat, so that their law has no density")
    n, dims = x.shape
    ball = 0.5 * dims * math.log(math.pi) - math.lgamma(0.5 * dims + 1)
    terms = dims * radius.log() + ball
    digamma = torch.digamma(torch.tensor([float(n), float(neighbours)], dtype=torch.float64))
    return float(terms.mean() + digamma[0] - digamma[1]), float(terms.std() / math.sqrt(n))


def smoothed_negentropy(centres: Tensor, sigma: float, noise: Tensor, chunk: int = 512) -> Tensor:
    """log q(z) - log N(z; m, S) (n,) at z = centres + sigma noise, q the mixture of N(centre_i, sigma^2 I).

    Its mean is the divergence of q from the Gaussian of q's own moments. With the noise far wider than the centres, as
    at the end of a diffusion, q differs from the law of fresh centres far less than from that Gaussian, and the two
    densities share nearly all of their fluctuation; an estimate by neighbours would drown in it.
    """
    n, dims = centres.shape
    z = centres + sigma * noise
    square = centres.square().sum(1)
    pieces = []
    for rows in z.split(chunk):
        # |z|^2 is common to all centres and is added afterwards
        exponent = (rows @ centres.T - 0.5 * square) / sigma**2
        pieces.append(torch.logsumexp(exponent, 1) - 0.5 * rows.square().sum(1) / sigma**2)
    log_mixture = torch.cat(pieces) - math.log(n) - 0.5 * dims * math.log(2 * math.pi * sigma**2)
    centred = centres - centres.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / n)
    spread = values.clamp_min(0) + sigma**2
    along = (z - centres.mean(0)) @ vectors
    log_gaussian = -0.5 * ((along.square() / spread).sum(1) + spread.log().sum() + dims * math.log(2 * math.pi))
    return log_mixture - log_gaussian


def divergence_from_isotropic(mean: Tensor, eigenvalues: Tensor, std: float) -> float:
    """KL(N(mean, S) || N(0, std^2 I)) from the eigenvalues of S."""
    excess = eigenvalues / std**2 - 1
    # log1p keeps what is left when S is the prior's covariance but for rounding
    return 0.5 * float((excess - torch.log1p(excess)).sum() + mean.square().sum() / std**2)
