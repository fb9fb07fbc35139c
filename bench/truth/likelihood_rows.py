"""Rows of the battery for both likelihoods and the training losses: Gaussian latents behind every kind of flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.truth.estimates import Recorder, controlled_mean, variates
from bench.truth.maps import AffineMap, Warp, autograd_log_det
from bench.truth.problems import DOUBLE, Gaussian, Truth
from bench.truth.process import SDES
from bench.truth.rows import BOUND, ODE, Case, Row
from models.flows import ResidualFlow
from models.indm import INDM
from models.noise import StepRandom
from models.sde import LinearSDE

TRAINING = "training losses"

# One axis as narrow as three times VE's sigma_min: there the residual at eps depends on the score, so that two draws
# of noise where one is meant, or a decoder of the wrong width, cost tenths of a nat.
NARROW = Gaussian.with_spectrum([0.3, -0.5, 0.8], [1.0, 0.2, 9e-4])
# Wide against sigma(eps = 1e-3): the decoder's gap is below 1e-6 there, and nothing may depend on eps.
BROAD = Gaussian.with_spectrum([0.3, -0.5, 0.8], [1.0, 0.3, 0.1])

IMAGES = {BOUND: 4000, ODE: 250}
TIMES = {"vp": 16, "subvp": 24, "ve": 16}  # sub-VP's range of log(sigma / alpha) is half as wide again
EXACT = 1e-5  # nats/dim, of what has no noise but the solver's: its tolerances here are 1e-8


@dataclass(frozen=True)
class Setting:
    """A map from latents to data and back, and a known error of the score."""

    flow: Callable[[], nn.Module | None] = lambda: None
    scale: float = 1.0
    error: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = DOUBLE


def residual_flow(shape=(3,), blocks=2, hidden=16, seed=0, share=0.7, **options) -> ResidualFlow:
    """A float64 flow in evaluation mode far from the identity: Jacobians of spectral radius up to 0.98^3 ``share``.

    The signs of a row agree, biases are small, and blocks alternate between +J and -J, which a flow as it is
    initialised (random signs, radius 0.01) never shows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = ResidualFlow(shape, blocks, hidden, **options).double().eval().requires_grad_(False)
    for index, block in enumerate(block for level in flow.levels for block in level):
        first = block.layers[0].weight
        for layer in block.layers:
            layer.weight.abs_().mul_(10)  # beyond the cap, which then decides
            layer.bias.mul_(0.1 / layer.bias.abs().max())
        block.layers[2].weight.mul_((-1.0) ** (index + 1))
        first.mul_(0.98 * share / first.flatten(1).sum(1).view(-1, *[1] * (first.dim() - 1)))
    return flow


def _matrix() -> AffineMap:
    # a negative determinant: the logarithm is of its absolute value
    return AffineMap(torch.tensor([[0.0, 1.5, 0.2], [0.7, 0.3, 0.0], [-0.4, 0.1, 1.2]]), torch.tensor([0.5, -1.0, 0.2]))


SETTINGS = {
    "identity flow": Setting(),
    "affine flow": Setting(_matrix),
    "nonlinear flow": Setting(Warp),
    "residual flow": Setting(residual_flow),
    "scale 2.5": Setting(scale=2.5),
    "wrong score": Setting(error={"scale": 1.1, "shift": 0.2}),
    "float32": Setting(dtype=torch.float32),
}
LATENT = ("identity flow", "wrong score", "float32")  # the others differ from the first in data space alone


class Prepared:
    """A model, its data and its truth in one setting; log-determinants by autograd on the whole map."""

    def __init__(self, sde: LinearSDE, setting: Setting, count: int, gaussian: Gaussian = NARROW):
        self.gaussian, self.dims, self.dtype = gaussian, gaussian.dims, setting.dtype
        self.truth = Truth(gaussian, sde, **setting.error)
        score = gaussian.score(sde, **setting.error)
        self.model = INDM(sde, score, setting.flow(), shape=(self.dims,), scale=setting.scale).eval()
        self.z = gaussian.draw(count)
        with torch.no_grad():
            x = self.model.decode(self.z)
        self.log_det = autograd_log_det(self.model.latent, x)
        self.x = x.to(setting.dtype)
        self.model.to(setting.dtype)
        self.standard = gaussian.rotated(self.z) / gaussian.values.sqrt()

    def source(self, count: int | None = None, purpose: str = "battery") -> Recorder:
        return Recorder(0, purpose, torch.arange(count or len(self.x)))

    def mean(self, values: Tensor, source: Recorder | None = None) -> tuple[float, float]:
        """(mean, standard error) of ``values`` (n,), nats, as nats/dim."""
        covariates = source and variates(source, self.gaussian.basis, self.standard[: len(values)])
        mean, se = controlled_mean(values.double(), covariates)
        return mean / self.dims, se / self.dims

    def of_data(self, values: Tensor, source: Recorder) -> tuple[float, float]:
        """As :meth:`mean`, with the data's own moments as control variates: the mean over the whole distribution."""
        s = self.standard[: len(values)]
        noise = variates(source, self.gaussian.basis, s)
        mean, se = controlled_mean(values.double(), torch.cat([noise, s, s.square() - 1], 1))
        return mean / self.dims, se / self.dims

    def largest(self, values: Tensor) -> float:
        """Largest absolute value over images, nats/dim."""
        return float(values.abs().max()) / self.dims


def bound_rows(sde_name: str, settings=tuple(SETTINGS)) -> list[Row]:
    """NELBO: its parts and totals, averaged over images, against their expectations image by image."""
    rows = []
    for name in settings:
        p, times = Prepared(SDES[sde_name](), SETTINGS[name], IMAGES[BOUND]), TIMES[sde_name]
        case = Case(BOUND, "narrow Gaussian", sde_name, name)
        source, truth = p.source(), p.truth.nelbo_parts(p.z)
        parts = p.model.nelbo_parts(p.x, times=times, generator=source)
        truth["flow"] = -p.log_det
        exact = 1e-4 if p.dtype == torch.float32 else 1e-9
        rows.append(case.row("NELBO prior, each image", p.largest(parts["prior"] - truth["prior"]), floor=exact))
        rows.append(case.row("NELBO flow, each image", p.largest(parts["flow"] - truth["flow"]), floor=exact))
        groups = {
            "NELBO before correction": ("prior", "diffusion", "flow"),
            "NELBO": ("prior", "diffusion", "flow", "reconstruction"),
        }
        if name in LATENT:
            groups = {"NELBO diffusion": ("diffusion",), "NELBO reconstruction": ("reconstruction",)} | groups
        for label, keys in groups.items():
            rows.append(_averaged(case, label, p, sum(parts[k] for k in keys), sum(truth[k] for k in keys), source))
    return rows


# draws an image, images and eps. Weights of uniform time grow like 1 / t towards eps, too heavy a tail for a small row.
PROPOSAL_ROWS = {"importance": (16, 2000, 1e-5), "debiased": (32, 4000, 1e-5), "uniform": (32, 8000, 1e-2)}


def proposal_rows(sde_name: str, proposals=tuple(PROPOSAL_ROWS)) -> list[Row]:
    """The integral of the bound with times from each proposal, for the exact score, averaged over images."""
    rows = []
    for name in proposals:
        times, images, eps = PROPOSAL_ROWS[name]
        p = Prepared(SDES[sde_name](eps=eps), SETTINGS["identity flow"], images)
        case, source = Case(BOUND, "narrow Gaussian", sde_name, f"eps {eps:g}"), p.source()
        values = p.model.nelbo_parts(p.x, times=times, generator=source, proposal=name)["diffusion"]
        truth = p.truth.nelbo_parts(p.z)["diffusion"]
        rows.append(_averaged(case, f"NELBO diffusion, {name} times", p, values, truth, source))
    return rows


def _averaged(case: Case, label: str, p: Prepared, values: Tensor, truth: Tensor, source: Recorder) -> Row:
    mean, se = p.mean(values.double() - truth, source)
    level = float(truth.mean()) / p.dims
    return case.row(label, level + mean, level, se)


def bound_identities(sde_name: str) -> list[Row]:
    """What the bound must be by theory: an entropy and two gaps, a rise for a wrong score, the same at every image."""
    sde = SDES[sde_name]()
    case = Case(BOUND, "narrow Gaussian", sde_name, "identity flow")
    truth = Truth(NARROW, sde)
    expected = float(sum(truth.nelbo_parts(None).values())) / NARROW.dims
    entropy = (NARROW.entropy + truth.prior_kl + truth.decoder_gap) / NARROW.dims
    rows = [case.row("expected NELBO is entropy + KL(p_1, prior) + decoder gap", expected, entropy, floor=1e-10)]

    # noise_hat off by c on every axis: 1/2 int g^2/sigma^2 c^2 dt = c^2 Z / 2 a dimension, and c^2 / 2 at the decoder
    c = 0.2
    right = Prepared(sde, SETTINGS["identity flow"], IMAGES[BOUND])
    wrong = Prepared(sde, Setting(error={"shift": c}), IMAGES[BOUND])
    source = right.source()
    low = right.model.nelbo(right.x, times=TIMES[sde_name], generator=source)
    high = wrong.model.nelbo(wrong.x, times=TIMES[sde_name], generator=wrong.source())
    mean, se = right.of_data(high - low, source)
    rise = 0.5 * c**2 * (truth.process.normaliser() + 1)
    rows.append(case.row("rise of the NELBO for noise off by 0.2", mean, rise, se))

    copies, count = 500, 16
    p = Prepared(sde, SETTINGS["identity flow"], count)
    x, source = p.x.repeat_interleave(copies, 0), p.source(copies * count, "each image")
    values = p.model.nelbo(x, times=4, generator=source).view(count, copies)
    truths = sum(p.truth.nelbo_parts(p.z).values())
    z = (values.mean(1) - truths) / (values.std(1) / math.sqrt(copies))
    rows.append(case.row("NELBO, largest deviation of 16 images", float(z.abs().max()), floor=4.0, unit="se"))
    return rows


def ode_rows(sde_name: str, settings=tuple(SETTINGS)) -> list[Row]:
    """NLL with exact trace and with probes, before and after the correction."""
    rows = []
    for name in settings:
        p = Prepared(SDES[sde_name](), SETTINGS[name], IMAGES[ODE])
        case = Case(ODE, "narrow Gaussian", sde_name, name)
        clean, right = p.truth.nll(p.z, False) - p.log_det, p.truth.nll(p.z, True) - p.log_det
        if p.dtype == torch.float32:  # as the suites measure: their tolerance, one probe
            source = p.source()
            values = p.model.nll(p.x, generator=source, probes=1, rtol=1e-5, atol=1e-5)
            rows.append(_averaged(case, "NLL, 1 probe, tolerance 1e-5", p, values, right, source))
            continue
        # behind a flow the solver sees the same latents: there it need not be this accurate once more
        tolerance, floor = (1e-8, EXACT) if name in LATENT else (1e-6, 10 * EXACT)
        values = p.model.nll(p.x, corrected=False, probes="exact", rtol=tolerance, atol=tolerance)
        label = "NLL before correction, exact trace, each image"
        rows.append(case.row(label, p.largest(values - clean), floor=floor))
        estimates = {"NLL, exact trace": (right, {"probes": "exact"})}
        if name in LATENT:
            estimates |= {
                "NLL before correction, 1 probe": (clean, {"corrected": False, "probes": 1}),
                "NLL before correction, 4 probes": (clean, {"corrected": False, "probes": 4}),
                "NLL, 4 probes": (right, {"probes": 4}),
            }
        for label, (truth, options) in estimates.items():
            source = p.source()
            values = p.model.nll(p.x, generator=source, rtol=1e-6, atol=1e-6, **options)
            rows.append(_averaged(case, label, p, values, truth, source))
    return rows


def eps_rows(sde_name: str) -> list[Row]:
    """Neither total depends on the truncation, and the two agree, for the exact score, averaged over the data."""
    rows, totals = [], {}
    for eps in (1e-5, 1e-3):
        p = Prepared(SDES[sde_name](eps=eps), SETTINGS["identity flow"], IMAGES[BOUND], BROAD)
        truth = (p.gaussian.entropy + p.truth.prior_kl + p.truth.decoder_gap) / p.dims
        source, few = p.source(), p.x[:500]
        bound = p.model.nelbo(p.x, times=TIMES[sde_name], generator=source)
        totals["NELBO", eps] = p.of_data(bound, source)
        source = p.source(len(few))
        values = p.model.nll(few, generator=source, probes="exact", rtol=1e-6, atol=1e-6)
        totals["NLL", eps] = p.of_data(values, source)
        for group, label in ((BOUND, "NELBO"), (ODE, "NLL")):
            case = Case(group, "broad Gaussian", sde_name, f"eps {eps:g}")
            rows.append(case.row(f"{label}, mean over the data", totals[label, eps][0], truth, totals[label, eps][1]))
        (a, se_a), (b, se_b) = totals["NELBO", eps], totals["NLL", eps]
        case = Case(ODE, "broad Gaussian", sde_name, f"eps {eps:g}")
        rows.append(case.row("NELBO - NLL, exact score", a - b, 0.0, math.hypot(se_a, se_b)))
    for group, label in ((BOUND, "NELBO"), (ODE, "NLL")):
        (a, se_a), (b, se_b) = totals[label, 1e-3], totals[label, 1e-5]
        case = Case(group, "broad Gaussian", sde_name, "eps 1e-3 - 1e-5")
        rows.append(case.row(f"{label}, change with eps", a - b, 0.0, math.hypot(se_a, se_b)))
    return rows


class _Steps(StepRandom):
    """A training step's randomness, kept: ``times`` (B,), uniforms in [0, 1), and ``noise`` (B, D)."""

    def normal(self, purpose: str, shape, dtype=None) -> Tensor:
        self.noise = super().normal(purpose, shape, dtype)
        return self.noise

    def uniform(self, purpose: str, shape=(), dtype=None) -> Tensor:
        self.times = super().uniform(purpose, shape, dtype)
        return self.times

    def stratified(self, purpose: str, dtype=None) -> Tensor:
        self.times = super().stratified(purpose, dtype)
        return self.times

    def variates(self, p: Prepared, bins: int = 10) -> Tensor:
        """Batch means (P,) of n_i, n_i^2 - 1 and n_i d_i, in each bin of time: all of mean zero."""
        n = self.noise @ p.gaussian.basis
        powers = torch.cat([n, n.square() - 1, n * p.standard], 1)
        inside = torch.nn.functional.one_hot((self.times * bins).long(), bins).to(powers)
        return (inside.T @ powers).flatten() / len(n)


def training_rows(sde_name: str, settings=("nonlinear flow",)) -> list[Row]:
    """The two losses of training, averaged over steps, against their expectations on the same batch."""
    rows, repeats = [], 600
    for name in settings:
        p = Prepared(SDES[sde_name](), SETTINGS[name], 500)
        case = Case(TRAINING, "narrow Gaussian", sde_name, name)
        parts = p.truth.nelbo_parts(p.z)
        truths = {
            "bound loss": (parts["prior"] + p.truth.score_term(p.z) - p.log_det).mean() / p.dims,
            "variance-weighted loss": p.truth.uniform_term(p.z).mean() / p.dims,
        }
        losses = {"bound loss": p.model.bound_loss, "variance-weighted loss": p.model.variance_weighted_loss}
        for label, loss in losses.items():
            values, covariates = [], []
            for step in range(repeats):
                random = _Steps(0, step, len(p.x))
                with torch.no_grad():
                    values.append(loss(p.x, random)[0])
                covariates.append(random.variates(p))
            mean, se = controlled_mean(torch.stack(values), torch.stack(covariates))
            rows.append(case.row(label, mean, truths[label], se, unit="loss/dim"))
    return rows
