"""The density of the generative SDE itself, by importance sampling over paths: what separates NELBO from NLL in 2-D.

NELBO bounds -log p_SDE; the tabulated NLL is -log p_ODE, another process. With p_SDE known, NELBO - NLL splits into
NELBO + log p_SDE, the *variational part*, at least 0, and log p_ODE - log p_SDE, the *SDE-to-ODE part*, of either sign.

log p_SDE(x) is log mean w over paths of the forward diffusion from h(x) plus log|det dh/dx|, w the ratio of the two
path densities (:func:`bench.studies.paths.log_weights`; Huang, Lim, Courville 2021, arXiv 2106.02808, read the NELBO as
the mean of log w). The decoder at eps is that of the NELBO, so the two are about the same variable.

-log p_ODE is the tabulated NLL, corrected at eps, with the mean of many draws of its residual in place of one.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bench.likelihood import Units
from bench.studies import Context
from bench.studies.paths import ascending_times, log_weights, mean_errors, residual
from models.noise import IndexedGenerator
from models.options import Count

COLUMNS = ("image", "steps", "paths", "nelbo", "sde", "sde_se", "ode", "ess", "status")
RESIDUAL_DRAWS = 64
CHUNK = 2000  # paths at once: a small network is fastest while its activations stay in a processor's cache


def path_density(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(mean log w, log p, its standard error, effective sample size) of log weights (B, K), each (B,), nats.

    log p is log mean w less its bias by the jackknife (Efron and Stein 1981), which is of order 1/K^2 then and never
    below log mean w; with one path there is no correction and no error (None). The effective sample size is
    (sum w)^2 / sum w^2 (Kong 1992).
    """
    paths = log_w.shape[1]
    total = log_w.logsumexp(1)
    share = (log_w - total[:, None]).exp()
    ess = 1 / share.square().sum(1)
    if paths == 1:
        return log_w[:, 0], total, None, ess
    # the sum without path k is total + log(1 - share); a share that rounds to 1 would leave nothing
    rest = total[:, None] + torch.log1p(-share.clamp_max(1 - 2.0**-52)) - math.log(paths - 1)
    estimate = paths * (total - math.log(paths)) - (paths - 1) * rest.mean(1)
    spread = (rest - rest.mean(1, keepdim=True)).square().sum(1)
    return log_w.mean(1), estimate, ((paths - 1) / paths * spread).sqrt(), ess


def undefined(context: Context) -> str | None:
    """Why a latent diffusion in the plane is not what this run is; None where it is."""
    model, data = context.model, context.data
    if data.levels is not None or math.prod(data.shape) != 2:
        return f"not defined: {data.name} is not continuous data in the plane"
    lacking = [name for name in ("sde", "noise", "encode", "latent", "decode") if not hasattr(model, name)]
    if lacking:
        return f"not defined: the model has no linear diffusion of latents ({', '.join(lacking)} missing)"
    return None


def ode_nll(context: Context, x: Tensor, z0: Tensor, log_det: Tensor) -> Tensor:
    """-log p_ODE with the exact divergence and the suite's tolerances, nats, float64 (B,) on the CPU.

    In expectation over the noise at eps the corrected NLL of likelihood.json. Raises IntegrationError.
    """
    settings, index = context.run.evaluate, torch.arange(len(x), device=x.device)
    options = {"rtol": settings.rtol, "atol": settings.atol, "probes": "exact", "corrected": True}
    source = IndexedGenerator(context.run.seed, "gap_split ode", index)
    parts = context.model.nll_parts(x, generator=source, **options)
    source = IndexedGenerator(context.run.seed, "gap_split residual", index)
    rest = residual(context.model.noise, context.model.sde, z0, RESIDUAL_DRAWS, source)
    return (parts["prior"].double() + parts["ode"].double() + rest - log_det.double()).cpu()


@torch.no_grad()
def measure(
    context: Context,
    *,
    images: Count = 200,
    paths: Annotated[int, Field(ge=2)] = 32,
    steps: Annotated[int, Field(ge=2, multiple_of=2)] = 128,
) -> list[dict[str, Any]]:
    """Rows of gap_split.csv for the first ``images`` test points, in nats, on grids of ``steps`` / 2 and ``steps``.

    ``nelbo`` = -mean log w is the chain's own bound, ``sde`` = -log p_SDE with its error over paths ``sde_se``, ``ode``
    = -log p_ODE, the same on both grids; all include the residual at eps and the flow. The two grids share their paths,
    so that their difference is the discretisation. The error of a chain is c / steps to first order (its kernels' local
    error is quadratic in the step) with one c for both, so that 2 v(steps) - v(steps / 2) is the limit of a fine grid.
    Raises IntegrationError where the ODE fails.
    """
    problem = undefined(context)
    if problem:
        return [{"status": problem}]
    model, units = context.model, Units(context.data)
    x = context.points(images)
    seed, device, count = context.run.seed, x.device, len(x)
    source = IndexedGenerator(seed, "gap_split flow", torch.arange(count, device=device))
    z0, log_det = model.encode(x, source)
    times = ascending_times(model.sde, steps, float(z0.double().std()))
    pilot = IndexedGenerator(seed, "gap_split errors", torch.arange(count, device=device))
    errors = mean_errors(model.noise, model.sde, z0, times, pilot)
    pieces: list[tuple[Tensor, Tensor]] = []
    for index in torch.arange(count * paths, device=device).split(CHUNK):
        draws = IndexedGenerator(seed, "gap_split paths", index)
        pieces.append(log_weights(model.noise, model.sde, z0[index // paths], times, errors, draws))
    ode = units.total(ode_nll(context, x, z0, log_det)).tolist()
    rows = []
    for grid, part in ((steps // 2, 1), (steps, 0)):
        log_w = torch.cat([piece[part] for piece in pieces]).view(count, paths) + log_det.double()[:, None]
        bound, density, error, ess = (v.tolist() for v in path_density(log_w))
        for i in range(count):
            values = {"nelbo": units.total(-bound[i]), "sde": units.total(-density[i]), "sde_se": units.part(error[i])}
            values |= {"ode": ode[i], "ess": ess[i]}
            status = "ok"
            if not all(map(math.isfinite, values.values())):
                values, status = dict.fromkeys(values), "not defined: a density is not finite"
            rows.append({"image": i, "steps": grid, "paths": paths, **values, "status": status})
    return rows
