"""Rows of the battery for what likelihoods and samples are made of: processes, densities, flows, units, samplers."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from bench import likelihood
from bench.data import bits_per_dim, make_dataset, quantise
from bench.toy import log_prob_gaussians
from bench.truth import convergence
from bench.truth.densities import DiffusedCheckerboard, DiffusedMixture, eight_gaussians
from bench.truth.estimates import Recorder, controlled_mean, variates
from bench.truth.laws import Impulses, affine_law, recursion, sampler_law
from bench.truth.likelihood_rows import residual_flow
from bench.truth.maps import AffineMap, Warp, autograd_log_det
from bench.truth.problems import DOUBLE, Gaussian, Truth, wasserstein
from bench.truth.process import SDES, Process, process_of
from bench.truth.rows import Case, Row
from models.indm import INDM
from models.integrators import dormand_prince, flow_field, state_scale
from models.noise import IndexedGenerator
from models.score.adapter import noise_function

PROCESSES, DENSITIES, FLOWS = "processes", "densities", "flows"
UNITS, SAMPLERS, ORDERS = "units", "laws of samplers", "orders of convergence"

# Z = int g^2 / sigma^2 dt from eps = 1e-5, 1e-3, 1e-2 on, to the digits of published tables (beta 0.1 to 20, sigma 0.01
# to 50): VP ln(e^B - 1), sub-VP 2 ln(e^B - 1) - B, VE 2 ln(sigma_max / sigma_min) (1 - eps).
NORMALISERS = {
    "vp": {1e-5: 23.864, 1e-3: 19.165, 1e-2: 16.266},
    "subvp": {1e-5: 37.679, 1e-3: 28.281, 1e-2: 22.484},
    "ve": {1e-5: 17.034, 1e-3: 17.017, 1e-2: 16.864},
}
TIGHT = 1e-9
PLANE = Gaussian.with_spectrum([0.3, -0.5], [1.0, 0.2])


def process_rows(sde_name: str) -> list[Row]:
    """The SDE classes against the definitions: f and g give the marginals, Z is their integral, times invert."""
    sde = SDES[sde_name]()
    process, case = process_of(sde), Case(PROCESSES, "definition", sde_name)
    t = torch.tensor([1e-5, 1e-3, 0.01, 0.1, 0.5, 0.9, 1.0], dtype=DOUBLE)
    pairs = {
        "drift f": (sde.drift(t), process.drift(t)),
        "diffusion g": (sde.diffusion(t), process.diffusion(t)),
        "marginal alpha": (sde.marginal(t)[0], process.alpha(t)),
        "marginal sigma": (sde.marginal(t)[1], process.sigma(t)),
        "prior's standard deviation": (torch.tensor(sde.prior_std), torch.tensor(process.prior_std)),
        "time inverts log_ratio": (sde.time(sde.log_ratio(t)), t),
    }
    rows = [case.row(name, _relative_deviation(a, b), floor=1e-8, unit="relative") for name, (a, b) in pairs.items()]
    z = torch.linspace(-3, 3, 6, dtype=DOUBLE).view(3, 2)
    prior = torch.distributions.Normal(torch.zeros(2, dtype=DOUBLE), process.prior_std)
    deviation = (sde.prior_log_prob(z) - prior.log_prob(z).sum(1)).abs().max()
    rows.append(case.row("prior's log density", deviation / 2, floor=TIGHT))

    # alpha and sigma by integrating f and g, from where the definition starts
    alpha_eps, sigma_eps = process.at(process.eps)
    alpha, sigma = process.at(1.0)
    by_drift = alpha_eps * math.exp(float(process.over_time(process.drift)))
    rows.append(case.row("alpha(1) by integrating f", float(by_drift), alpha, floor=TIGHT, unit="alpha"))
    grown = process.over_time(lambda t: (process.diffusion(t) / process.alpha(t)).square())
    by_diffusion = alpha * math.sqrt((sigma_eps / alpha_eps) ** 2 + float(grown))
    rows.append(case.row("sigma(1) by integrating g", by_diffusion / sigma, 1.0, floor=TIGHT, unit="relative"))
    return rows + _normaliser_rows(sde_name, process, case)


def _relative_deviation(values: Tensor, truth: Tensor) -> float:
    """Largest |value / truth - 1|, 0 where both are 0; any other entry that is not finite makes it not finite."""
    both_zero = (values == 0) & (truth == 0)
    return float((values / truth - 1).masked_fill(both_zero, 0.0).abs().max())


def _normaliser_rows(sde_name: str, process: Process, case: Case) -> list[Row]:
    sde, rows = SDES[sde_name](), []
    u = torch.linspace(0.05, 0.95, 5, dtype=DOUBLE)
    for eps, constant in NORMALISERS[sde_name].items():
        times, z = sde.importance_time(u, eps)
        rows.append(case.row(f"Z from {eps:g}, published", z, constant, floor=6e-4, unit="Z"))
        rows.append(case.row(f"Z from {eps:g}, quadrature", z, process.normaliser(eps), floor=1e-8, unit="Z"))
        share = torch.tensor([process.normaliser(float(t)) for t in times], dtype=DOUBLE) / process.normaliser(eps)
        deviation = float((1 - share - u).abs().max())
        rows.append(case.row(f"importance times from {eps:g}", deviation, floor=1e-8, unit="probability"))
    return rows


# Densities ------------------------------------------------------------------------------------------------------------


def _uneven_mixture(sde) -> DiffusedMixture:
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.8], [0.2, -1.2]], dtype=DOUBLE)
    return DiffusedMixture(sde, means, torch.tensor([0.2, 0.5, 0.3]), [0.5, 0.2, 0.3])


MODELS = {"mixture": _uneven_mixture, "8 Gaussians": eight_gaussians, "checkerboard": DiffusedCheckerboard}


def density_rows(sde_name: str) -> list[Row]:
    """Scores against autograd of the log density, and the exact densities carried by the ODE's divergence."""
    rows, sde = [], SDES[sde_name]()
    z = 2.5 * IndexedGenerator(0, "plane", torch.arange(64)).normal((64, 2), dtype=DOUBLE)
    for name, build in MODELS.items():
        case, model = Case(DENSITIES, name, sde_name), build(sde)
        worst = 0.0
        for time in (0.05, 0.3, 1.0):
            t = torch.full((len(z),), time, dtype=DOUBLE)
            leaf = z.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model.log_prob(leaf, t).sum(), leaf)
            error = (model(z, t) - slope).norm(dim=1) / (1 + slope.norm(dim=1))
            worst = max(worst, float(error.abs().max()))
        rows.append(case.row("score, autograd of log density", worst, floor=1e-8, unit="relative"))
        rows.append(case.row("ODE carries log p_t, each point", _carried(sde_name, build), floor=EXACT))
    if sde_name == "vp":
        t = torch.zeros(len(z), dtype=DOUBLE)
        deviation = (eight_gaussians(sde).log_prob(z, t) - log_prob_gaussians(z)).abs().max()
        rows.append(Case(DENSITIES, "8 Gaussians", sde_name).row("log density of the data", deviation, floor=TIGHT))
    return rows + _mixture_rows(sde_name)


EXACT = 1e-5


def _carried(sde_name: str, build) -> float:
    """Largest |log p_1(z_1) + log|dz_1/dz| - log p_t(z_t)| per dimension along the exact score's ODE."""
    start = {"vp": 0.05, "subvp": 0.1, "ve": 0.4}[sde_name]
    sde = SDES[sde_name](eps=start)
    model = build(sde)
    z = IndexedGenerator(0, "carried", torch.arange(16)).normal((16, 2), dtype=DOUBLE)
    ends = torch.tensor([start, 1.0], dtype=DOUBLE)
    (first, last), _ = state_scale(sde, ends)
    low, high = sde.log_ratio_range(ends)
    field = flow_field(noise_function(model, sde), sde, "exact")
    u, log_det, _ = dormand_prince(lambda rows: field, z / first, low.expand(16), high.expand(16), 1e-7, 1e-7)
    after = model.log_prob(u * last, torch.ones(16, dtype=DOUBLE)) + log_det + 2 * (last / first).log()
    return float((after - model.log_prob(z, torch.full((16,), start, dtype=DOUBLE))).abs().max()) / 2


def _mixture_rows(sde_name: str) -> list[Row]:
    """Bound and likelihood of the ring with its exact score: the data's entropy and KL(p_1, prior), paired by point."""
    sde, count = SDES[sde_name](), 8000
    score = eight_gaussians(sde)
    model, case = INDM(sde, score, shape=(2,)), Case(DENSITIES, "8 Gaussians", sde_name, "identity flow")
    which = torch.arange(count) % len(score.means)
    noise = IndexedGenerator(0, "ring", torch.arange(count)).normal((count, 2), dtype=DOUBLE)
    x = score.means[which] + score.stds[which, None] * noise
    # in axes along and across the radius all points of the ring are alike, and the control variates fit them all
    along = score.means[which] / score.means[which].norm(dim=1, keepdim=True)
    axes = torch.stack([along, along.flip(1) * torch.tensor([-1.0, 1.0])], 2)
    own, gap, rows = torch.einsum("bi,bij->bj", noise, axes), _prior_gap(sde, score), []
    for label, few in (("NELBO - entropy", count), ("NLL - entropy", 500)):
        source = Recorder(0, "ring estimate", torch.arange(few))
        if label.startswith("NELBO"):
            values = model.nelbo(x[:few], times=16, generator=source)
        else:
            values = model.nll(x[:few], generator=source, probes="exact")
        data = own[:few]
        covariates = torch.cat([variates(source, axes[:few], data, cross=True), data, data.square() - 1], 1)
        mean, se = controlled_mean(values + log_prob_gaussians(x[:few]), covariates)
        rows.append(case.row(label, mean / 2, gap / 2, se / 2))
    return rows


def _prior_gap(sde, score: DiffusedMixture) -> float:
    """KL(p_1 || prior) in the plane, nats, by the trapezoidal rule on a grid whose rim both densities do not reach."""
    reach = 12 * sde.prior_std
    axis = torch.linspace(-reach, reach, 401, dtype=DOUBLE)
    z = torch.cartesian_prod(axis, axis)
    log_p = score.log_prob(z, torch.ones(len(z), dtype=DOUBLE))
    prior = -0.5 * z.square().sum(1) / sde.prior_std**2 - math.log(2 * math.pi * sde.prior_std**2)
    return float((log_p.exp() * (log_p - prior)).sum() * (axis[1] - axis[0]) ** 2)


# Flows ----------------------------------------------------------------------------------------------------------------


def flow_rows() -> list[Row]:
    """Inverses and log-determinants against autograd, of the maps of this package and of the residual flow."""
    rows: list[Row] = []
    maps = {
        "affine map": (AffineMap(torch.tensor([[0.0, 1.5], [0.7, 0.3]]), 0.5), (2,)),
        "warp": (Warp(), (3,)),
        "residual flow, 2-D": (residual_flow((2,), 3, log_det="exact"), (2,)),
        "residual flow, 9-D": (residual_flow((9,), 2, log_det="exact"), (9,)),
        "residual flow, image": (residual_flow((1, 4, 4), (2, 1), 8, log_det="exact"), (1, 4, 4)),
    }
    for name, (flow, shape) in maps.items():
        case, dims = Case(FLOWS, name), math.prod(shape)
        x = IndexedGenerator(0, "flow", torch.arange(32)).uniform((32, *shape), dtype=DOUBLE) * 2 - 1
        with torch.no_grad():
            z, log_det = flow(x)
        truth = autograd_log_det(lambda x, flow=flow: flow(x)[0], x)
        deviation = float((log_det - truth).abs().max()) / dims
        rows.append(case.row("log-determinant, each point", deviation, floor=TIGHT))
        rows.append(case.row("inverse, round trip", (flow.inverse(z) - x).abs().max(), floor=1e-8, unit="x"))
        if name.startswith("residual"):
            rows.append(_series_row(case, flow, x, truth))
    return rows


def _series_row(case: Case, flow, x: Tensor, truth: Tensor) -> Row:
    """The stochastic series with its roulette, in evaluation mode, averaged over draws and points."""
    flow.log_det, copies, dims = "series", 100, x[0].numel()
    source = IndexedGenerator(0, "series", torch.arange(copies * len(x)))
    values = flow(x.repeat_interleave(copies, 0), source)[1]
    flow.log_det = "exact"
    mean, se = controlled_mean((values - truth.repeat_interleave(copies)) / dims)
    level = float(truth.mean()) / dims
    return case.row("log-determinant by the series", level + mean, level, se)


# Units ----------------------------------------------------------------------------------------------------------------


def unit_rows() -> list[Row]:
    """From nats to bits/dim: offsets, a uniform and a known discrete law, and the harness's own road on images."""
    return offset_rows() + harness_rows()


PIXELS = (1, 2, 2)  # the shape of the battery's images


def offset_rows(count: int = 1500) -> list[Row]:
    """The offset of dequantisation, and what discrete laws of known entropy score with it."""
    rows, bits, shape = [], "bits/dim", PIXELS
    case = Case(UNITS, "offset")
    for label, levels, width, truth in (
        ("256 levels on [-1, 1]", 256, 2.0, 7.0),
        ("256 levels on [0, 1]", 256, 1.0, 8.0),
        ("17 levels on [-1, 1]", 17, 2.0, 3.0874628412503395),
    ):
        rows.append(case.row(label, bits_per_dim(0.0, 12, levels, data_range=width), truth, floor=1e-12, unit=bits))

    dims = math.prod(shape)
    for levels in (2, 17, 256):
        uniform = IndexedGenerator(0, f"pixels {levels}", torch.arange(count)).uniform((count, *shape))
        data = make_dataset(
            f"uniform {levels}", levels, (uniform * levels).to(torch.uint8), _pixels(levels, shape, count)
        )
        case = Case(UNITS, "discrete law", setting=f"{levels} levels")
        # the uniform law on [-1, 1]^D has density 2^-D
        total = likelihood.Units(data).total(dims * math.log(2.0))
        rows.append(case.row("uniform law is log2(levels)", total, math.log2(levels), floor=TIGHT, unit=bits))

        # any law of pixels: dequantised, its density is P(k) (levels / 2)^D, and its bits/dim those of P
        logits = torch.arange(levels, dtype=DOUBLE).sin()
        log_p = torch.log_softmax(logits, 0)
        x = likelihood.test_points(data, None, 0)
        density = log_p[quantise(x, levels).long()].flatten(1).sum(1) + dims * math.log(levels / 2)
        found = likelihood.Units(data).total(float(-density.mean()))
        truth = -float(log_p[data.test.long()].mean()) / math.log(2)
        rows.append(case.row("a known law of pixels", found, truth, floor=TIGHT, unit=bits))
    return rows


def _pixels(levels: int, shape, count: int) -> Tensor:
    draw = IndexedGenerator(1, f"test pixels {levels}", torch.arange(count)).uniform((count, *shape))
    return (draw.square() * levels).to(torch.uint8)


def harness_rows(count: int = 1500) -> list[Row]:
    """bench.likelihood on 17-level images under a Gaussian model: parts, batches, units and offset together."""
    rows, levels, shape, dims = [], 17, PIXELS, math.prod(PIXELS)
    pixels = _pixels(levels, shape, count)
    data = make_dataset("battery images", levels, pixels, pixels)
    gaussian = Gaussian.with_spectrum([-0.3] * dims, [0.5, 0.3, 0.4, 0.2])
    x = likelihood.test_points(data, None, 0).double()
    offset = math.log2(levels / 2)
    for sde_name in SDES:
        sde = SDES[sde_name]()
        model, truth = INDM(sde, gaussian.score(sde), shape=shape), Truth(gaussian, sde)
        case, units = Case(UNITS, "images", sde_name, "17 levels"), likelihood.Units(data)
        z, bit = x.flatten(1), dims * math.log(2)
        clean = likelihood.nll_per_image(model, x[:300], 200, 0, corrected=False, probes="exact", rtol=1e-7, atol=1e-7)
        record = likelihood.summary(clean, units, residual=False)
        total = float(truth.nll(z[:300], False).mean()) / bit + offset
        rows.append(case.row("NLL of the harness", record["total"], total, floor=EXACT, unit="bits/dim"))
        parts = sum(record["parts"].values())
        rows.append(case.row("its parts sum to the total", parts, record["total"], floor=TIGHT, unit="bits/dim"))
        parts = likelihood.nelbo_per_image(model, x, 1, 12, 500, 0)[0]
        # the harness's own draws, had again in one batch, carry the control variates
        source = Recorder(0, "nelbo 0", torch.arange(count))
        model.nelbo_parts(x, times=12, generator=source)
        standard = gaussian.rotated(z) / gaussian.values.sqrt()
        expected = sum(truth.nelbo_parts(z).values())
        values = torch.from_numpy(likelihood.total_nats(parts)) - expected
        mean, se = controlled_mean(values, variates(source, gaussian.basis, standard))
        total = likelihood.summary(parts, units)["total"] + (mean - float(values.mean())) / bit
        level = float(expected.mean()) / bit + offset
        rows.append(case.row("NELBO of the harness", total, level, se / bit, unit="bits/dim"))
    return rows


# Samplers -------------------------------------------------------------------------------------------------------------

LAWS = (
    ("euler_maruyama", {}),
    ("euler_maruyama", {"grid": "log_ratio"}),
    ("predictor_corrector", {}),
    ("predictor_corrector", {"grid": "log_ratio", "corrector_steps": 2, "snr": 0.1}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0, "grid": "log_ratio"}),
    ("heun", {}),
)


def sampler_rows(sde_name: str) -> list[Row]:
    """Exact laws of the samplers as written, for a wrong affine score, against recursions and the continuous law."""
    sde, end, rows = SDES[sde_name](), 1e-3, []
    wrong = {"scale": 1.1, "shift": 0.2}
    truth, model = Truth(PLANE, sde, **wrong), INDM(sde, PLANE.score(sde, **wrong), shape=(2,))
    for sampler, options in LAWS:
        setting = ", ".join([sampler, *(f"{key} {value}" for key, value in options.items())])
        case = Case(SAMPLERS, "Gaussian, wrong score", sde_name, setting)
        for steps in (1, 4, 16, 64):
            law = sampler_law(model, steps, sampler, end=end, **options)
            expected = recursion(truth, sampler, steps, end, **options)
            size = max(1.0, float(expected[1].diagonal().max().sqrt()))
            distance = wasserstein(law, expected) / size
            rows.append(case.row(f"law at {steps} steps, recursion", distance, floor=1e-9, unit="W2"))
    case = Case(SAMPLERS, "Gaussian, wrong score", sde_name, "ode")
    law = sampler_law(model, 0, "ode", end=end, rtol=1e-8, atol=1e-8)
    distance = wasserstein(law, truth.ode_law(end))
    rows.append(case.row("law, closed form", distance, floor=1e-6, unit="W2"))

    # behind a flow and a scale, the same law mapped
    flow = AffineMap(torch.tensor([[0.0, 1.5], [0.7, 0.3]], dtype=DOUBLE), torch.tensor([0.5, -1.0]))
    behind = INDM(sde, PLANE.score(sde, **wrong), flow, shape=(2,), scale=2.5)
    mean, covariance = truth.ode_law(end)
    inverse = 2.5 * torch.linalg.inv(flow.matrix)
    mean, covariance = inverse @ (mean - flow.shift), inverse @ covariance @ inverse.T
    found = sampler_law(behind, 0, "ode", end=end, rtol=1e-8, atol=1e-8)
    case = Case(SAMPLERS, "Gaussian, wrong score", sde_name, "ode, affine flow, scale 2.5")
    deviation = max(float((found[0] - mean).abs().max()), float((found[1] - covariance).abs().max()))
    rows.append(case.row("moments, closed form", deviation, floor=1e-5, unit="moment"))

    # the forward process in data space: at each time the marginal that the truth gives
    times, point = (0.0, 0.1, 0.5, 1.0), torch.tensor([[0.7, -0.2]], dtype=DOUBLE)
    count = 1 + 2 * len(times)
    path = model.trajectory(point.expand(count, -1), times, Impulses(count))
    deviation = 0.0
    for time, outputs in zip(times, path, strict=True):
        mean, covariance = affine_law(outputs)
        alpha, sigma = truth.process.at(time)
        # the path starts at the point itself, without the noise that VE's marginal has at time 0
        variance = sigma**2 - (alpha * truth.process.at(0.0)[1]) ** 2
        deviation = max(deviation, float((mean - alpha * point[0]).abs().max()))
        spread = (covariance - variance * torch.eye(2, dtype=DOUBLE)).abs().max()
        deviation = max(deviation, float(spread) / max(1.0, variance))
    case = Case(SAMPLERS, "one point", sde_name, "trajectory")
    rows.append(case.row("moments of z_t at 4 times", deviation, floor=TIGHT, unit="moment"))
    return rows


@cache
def orders(sde_name: str) -> tuple[convergence.OrderRow, ...]:
    """All order rows of one SDE, computed once a process."""
    return (*convergence.sampler_orders(sde_name), *convergence.integrator_orders(sde_name))


def order_rows(sde_name: str) -> list[Row]:
    """The order of the finest refinement of each method."""
    finest = {(row.method, row.grid): row for row in orders(sde_name)}
    return [
        Case(ORDERS, "line, wrong score", sde_name, row.grid).row(
            row.method,
            row.order,
            row.expected,
            floor=convergence.TOLERANCE * (2 if row.method.startswith("dormand") else 1),
            unit="order",
        )
        for row in finest.values()
    ]


__all__ = ["density_rows", "flow_rows", "order_rows", "orders", "process_rows", "sampler_rows", "unit_rows"]
