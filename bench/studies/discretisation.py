"""TV(p_r, p_g) <= E_prior + E_est + E_disc, the three terms measured apart on densities of the plane.

p_r is the data's law, p_g that of a sampler of N steps. Between the two stand A, the learned reverse process run finely
from p_T, the data pushed through h and diffused to t = 1, and B, the same from the prior:

    TV(p_r, p_g) <= TV(p_r, A) + TV(A, B) + TV(B, p_g),   TV(A, B) <= TV(p_T, prior),

by the triangle inequality and, A and B being images of p_T and of the prior under one Markov kernel, by data
processing.
The terms are E_est, E_prior and E_disc. All but E_prior are measured on one partition of data space
(:mod:`bench.studies.partition`), where both inequalities hold as well, for they hold between the bin masses; E_prior,
which no sample of this size resolves (1e-5 for VP and 1e-3 for VE on the checkerboard), is integrated in the plane of
latents.

Shares of n points stray from their law: two samples of *one* law differ by ``floor`` on average. Estimates are given
as measured, with no attempt to take this out: it is a positive bias of about ``floor`` of a term that is really zero,
and of less and less of one above it, and it makes the measured bound larger than the true one. A and B share their
draws, so that their shares differ by little more than the laws do and the inequality can be checked on the shares; B
and p_g do not, so that the floor is that of independent samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.studies import Context
from bench.studies.gap_split import undefined
from bench.studies.partition import data_partition, sampling_floor, standard_error, total_variation
from bench.studies.paths import ascending_times, mean_errors, reverse_chain
from models.flows import FlowInverseError
from models.noise import IndexedGenerator, derive_seed, normal
from models.options import Count
from models.sde import LinearSDE

SAMPLER = "euler_maruyama"
COLUMNS = (
    "sampler",
    "steps",
    "samples",
    "bins",
    "tv",
    "prior",
    "estimation",
    "discretisation",
    "bound",
    "floor",
    "se",
    "status",
)
CHUNK = PILOT = 2000  # samples at once, and latents that the backward variances are estimated from
CELLS = 400  # of the quadrature, along each axis


def prior_distance(sde: LinearSDE, z0: Tensor) -> float:
    """TV(p_T, prior) with p_T the mean of N(alpha_1 z_0, sigma_1^2 I) over latents z0 (B, 2), by the midpoint rule.

    The square reaches eight standard deviations of either law; halving the cells changes the result by 1e-4 of itself.
    """
    alpha, sigma = (float(v) for v in sde.marginal(torch.ones((), dtype=torch.float64)))
    centres = alpha * z0.detach().double().cpu()
    half = max(8 * sde.prior_std, float(centres.abs().max()) + 8 * sigma)
    width = 2 * half / CELLS
    axis = torch.arange(CELLS, dtype=torch.float64) * width + (width / 2 - half)

    def along(mean: Tensor, std: float) -> Tensor:
        return torch.exp(-0.5 * ((axis - mean[:, None]) / std).square()) / (std * math.sqrt(2 * math.pi))

    # a mean of products is one matrix product
    diffused = along(centres[:, 0], sigma).T @ along(centres[:, 1], sigma) / len(centres)
    prior = along(torch.zeros(1, dtype=torch.float64), sde.prior_std)[0]
    return float(0.5 * (diffused - torch.outer(prior, prior)).abs().sum() * width**2)


@torch.no_grad()
def measure(
    context: Context, *, steps: list[Count] = [4, 8, 16, 32, 64], samples: Count = 10_000, fine: Count = 128
) -> list[dict[str, Any]]:
    """Rows of discretisation.csv, one for each number of ``steps`` of Euler-Maruyama on a uniform grid of times.

    ``samples`` points of each law; A and B take ``fine`` steps of :func:`bench.studies.paths.reverse_chain`. ``se`` is
    the standard error of ``tv``; that of each of the other two is at most 1 / sqrt(2 samples).
    """
    problem = undefined(context)
    known = None if problem else data_partition(context.data.name)
    if problem or known is None:
        return [{"status": problem or f"not defined: density of {context.data.name} unknown"}]
    partition, truth = known
    model, seed, device = context.model, context.run.seed, context.device
    data = context.data.draw(samples, torch.Generator().manual_seed(derive_seed(seed, "discretisation data")))
    z0 = torch.cat([model.latent(x.to(device)) for x in data.split(CHUNK)])
    if not bool(torch.isfinite(z0).all()):
        return [{"status": "not defined: latents are not all finite"}]

    times = ascending_times(model.sde, fine, float(z0.double().std()))
    pilot = IndexedGenerator(seed, "discretisation errors", torch.arange(min(samples, PILOT), device=device))
    errors = mean_errors(model.noise, model.sde, z0[:PILOT], times, pilot)
    alpha, sigma = (float(v) for v in model.sde.marginal(torch.ones((), dtype=torch.float64)))
    chunks = torch.arange(samples, device=device).split(CHUNK)

    def finely(from_data: bool) -> Tensor:
        """Shares of A or B."""
        points = []
        for index in chunks:
            draws = IndexedGenerator(seed, "discretisation fine", index)
            z = normal((len(index), *z0.shape[1:]), draws, device, z0.dtype)
            z = alpha * z0[index] + sigma * z if from_data else model.sde.prior_std * z
            points.append(model.decode(reverse_chain(model.noise, model.sde, z, times, errors, draws)))
        return partition.masses(torch.cat(points))

    learned, reference = finely(True), finely(False)
    estimation, prior = total_variation(learned, truth), prior_distance(model.sde, z0)
    rows = []
    for count in steps:
        row: dict[str, Any] = {"sampler": SAMPLER, "steps": count, "samples": samples, "bins": partition.bins}
        try:
            points = []
            for index in chunks:
                draws = IndexedGenerator(seed, "discretisation sampler", index)
                points.append(model.sample(len(index), count, SAMPLER, draws))
        except FlowInverseError as error:
            rows.append(row | {"status": f"not defined: {' '.join(str(error).split()).removeprefix('not defined: ')}"})
            continue
        generated = partition.masses(torch.cat(points))
        discretisation = total_variation(reference, generated)
        rows.append(
            row
            | {
                "tv": total_variation(generated, truth),
                "prior": prior,
                "estimation": estimation,
                "discretisation": discretisation,
                "bound": prior + estimation + discretisation,
                "floor": sampling_floor(truth, samples, samples),
                "se": standard_error(generated, truth, samples),
                "status": "ok",
            }
        )
    return rows
