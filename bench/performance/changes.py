"""Optimisations that can be switched: each with its plain counterpart in turn, and what was predicted of it.

A prediction is arithmetic done before measuring: passes through the network, bytes moved, operations launched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.performance.loop import PlainStep, batch, plain_step
from bench.performance.sizes import build, model_options, size_named
from bench.performance.timing import side_by_side
from models.flows import lipschitz
from models.integrators import flow_field, hutchinson_probes
from models.registry import component
from models.score.layers import Dropout, ResidualBlock

Record = dict[str, Any]


def ratio(title: str, predicted: str, plain: Callable, fast: Callable, rounds: int, **more: Any) -> Record:
    """The two in turn: {"change", "predicted", "plain_seconds", "seconds", "times_faster"}."""
    timings = side_by_side({"plain": plain, "fast": fast}, rounds)
    before, after = timings["plain"].seconds, timings["fast"].seconds
    return {
        "change": title,
        "predicted": predicted,
        "plain_seconds": before,
        "seconds": after,
        "times_faster": before / after,
        "rounds": rounds,
        **more,
    }


def one_pass(effort) -> Record:
    """Drift and divergence from one forward pass, against a pass for each as in the official code."""
    model, x = build("S16", "ddpmpp").eval().requires_grad_(False), batch("S16", 16)
    probes = hutchinson_probes(1, x.shape, torch.Generator().manual_seed(0))
    field, place = flow_field(model.noise, model.sde, probes), torch.zeros(len(x))
    drift = flow_field(model.noise, model.sde)

    def twice() -> None:
        drift(place, x)
        field(place, x)

    predicted = "1.5 times: a product with the Jacobian costs about one pass, so 3 become 2"
    title = "ODE field: drift and divergence from one forward pass (S16 DDPM++)"
    return ratio(title, predicted, twice, lambda: field(place, x), effort.rounds)


class _Bernoulli(Dropout):
    """Dropout whose mask PyTorch draws, one random number an entry."""

    def _kept(self, count: int) -> Tensor:
        return torch.empty(count).bernoulli_(1 - self.p).bool()


def dropout(effort) -> Record:
    """A training step with the networks' own dropout masks, against masks that PyTorch draws."""
    own, plain = plain_step("S16", "ddpmpp"), plain_step("S16", "ddpmpp")
    for module in plain.model.modules():
        if isinstance(module, ResidualBlock):
            module.dropout = _Bernoulli(module.dropout.p).train()
    predicted = "2 to 4 % of a step: a quarter of the random bits for tensors that a step passes through once a block"
    title = "dropout masks from 16 random bits an entry, against PyTorch’s (S16 DDPM++ step)"
    return ratio(title, predicted, plain, own, effort.rounds)


def optimiser(effort) -> Record:
    """AdamW alone on the weights of S32, one fused kernel a tensor against one operation after the other."""
    fused = plain_step("S32", "ddpmpp")
    fused()
    loop = PlainStep(copy.deepcopy(fused.model), fused.x, fused.config, fused=False, foreach=False)
    for own, other in zip(fused.model.parameters(), loop.model.parameters(), strict=True):
        if own.grad is not None:
            other.grad = own.grad.clone()
    predicted = "3 times, 1 to 2 % of the step: five passes over the weights become one, twelve operations a tensor one"
    title = "AdamW fused, against operation by operation (S32 DDPM++, the optimiser alone)"
    return ratio(title, predicted, loop.optimizers["score"].step, fused.optimizers["score"].step, 4 * effort.rounds)


def averages(effort) -> Record:
    """The moving average of all weights in one call, against a loop over tensors."""
    step = plain_step("S32", "ddpmpp")
    pairs = list(zip(step.ema.model.parameters(), step.model.parameters(), strict=True))

    @torch.no_grad()
    def loop() -> None:
        for own, live in pairs:
            own.mul_(0.999).add_(live, alpha=0.001)

    predicted = "2 times, under 0.5 % of the step: two passes over the weights become one"
    title = "moving average by one foreach lerp, against two operations a tensor (S32 DDPM++, the average alone)"
    return ratio(title, predicted, loop, step.ema.update, 4 * effort.rounds)


def layout(effort) -> Record:
    """A step at S32 as networks for wide images run on a CPU: memory channels_last, constants in the weights."""
    own, plain = plain_step("S32", "ddpmpp"), plain_step("S32", "ddpmpp")
    for module in plain.model.modules():
        if hasattr(module, "wide"):
            module.wide = False
    predicted = "none on a CPU: oneDNN blocks its operands either way; on a GPU the tensor cores’ own layout"
    title = "memory channels_last and constant factors in the weights, on a CPU (S32 DDPM++ step)"
    return ratio(title, predicted, plain, own, max(3, effort.rounds // 2))


def _flow(kind: str = "indm-nll-local", size: str = "S16", **options: Any) -> nn.Module:
    model = model_options(size, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return component("flow", model["flow"] | options, shape=list(size_named(size).shape))


def _training_pass(flow: nn.Module, x: Tensor) -> Callable[[], None]:
    source = torch.Generator().manual_seed(0)

    def step() -> None:
        flow.zero_grad()
        z, log_det = flow(x, generator=source)
        (z.square().sum() - log_det.sum()).backward()

    return step


def terms(effort) -> Record:
    """The flow's log-determinant with 2 fixed terms before the roulette, against the official evaluation's 20."""
    x = batch("S16", 16)
    few, many = _flow(terms_train=2).train(), _flow(terms_train=20).train()
    predicted = "2.7 times: products a block fall from 22.5 to 4.5 beside about 6 passes for value and gradient"
    title = "log-determinant by 2 fixed terms and a roulette, against 20 (S16 flow, forward and backward)"
    note = "The sum stops where its terms fall below rounding: on an untrained flow after a few"
    return ratio(title, predicted, _training_pass(many, x), _training_pass(few, x), effort.rounds, note=note)


def narrow(effort) -> Record:
    """Convolutions from many channels to 3 or 12 as matrix products, against the library's."""
    flow, x = _flow(size="S32").train(), batch("S32", 16)
    step, chosen = _training_pass(flow, x), lipschitz.is_narrow

    def plain() -> None:
        lipschitz.is_narrow = lambda *_: False
        try:
            step()
        finally:
            lipschitz.is_narrow = chosen

    predicted = "1.2 times: a tenth of the flow's arithmetic, at a fifth of the speed, becomes as fast as the rest"
    title = "narrow convolutions as matrix products on a CPU (S32 flow, forward and backward)"
    return ratio(title, predicted, plain, step, max(3, effort.rounds // 2))


def latent_only(effort) -> Record:
    """The FID setting's score step needs z alone: no log-determinant, no random numbers."""
    flow, x = _flow().train().requires_grad_(False), batch("S16", 16)
    source = torch.Generator().manual_seed(0)
    predicted = "5 times: one pass instead of one pass and 4.5 products"
    title = "latents without a log-determinant in the FID setting's score step (S16 flow)"
    return ratio(title, predicted, lambda: flow(x, generator=source), lambda: flow.latent(x), effort.rounds)


def exact(effort) -> Record:
    """On 8x8 grey images the log-determinant exactly, against the series: time and standard deviation."""
    shape = (1, 8, 8)
    flow = {**model_options("S16", "indm-nll-local")["flow"], "hidden": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {kind: component("flow", flow | {"log_det": kind}, shape=list(shape)) for kind in ("series", "exact")}
    made["exact"].load_state_dict(made["series"].state_dict())
    x = F.avg_pool2d(batch("S16", 16)[:, :1], 2)
    flows = {name: flow.eval().requires_grad_(False) for name, flow in made.items()}
    source = torch.Generator().manual_seed(0)
    draws = torch.stack([flows["series"](x, generator=source)[1] for _ in range(16)])
    predicted = "a third as fast as 20 terms (64 columns and a factorisation against 22.5 products), without variance"
    title = "exact log-determinant in evaluation up to 256 dimensions (8x8 flow, against the series with 20 terms)"
    series, whole = (lambda name=name: flows[name](x, generator=source) for name in ("series", "exact"))
    return ratio(title, predicted, series, whole, effort.rounds, sd_plain=float(draws.std(0).mean()), sd=0.0)


def signs(effort) -> Record:
    """Probes of random signs against Gaussian ones: the standard deviation of the flow's log-determinant."""
    x, repeats = batch("S16", 4), 8 * effort.rounds
    sds = {}
    for kind in ("gaussian", "rademacher"):
        flow, source = _flow(probes=kind).eval().requires_grad_(False), torch.Generator().manual_seed(0)
        draws = torch.stack([flow(x, generator=source)[1] for _ in range(repeats)])
        sds[kind] = float(draws.std(0).mean())
    return {
        "change": "random signs as probes, against Gaussian ones (S16 flow, standard deviation of the log-determinant)",
        "predicted": "variance smaller by the share of the diagonal in the Jacobian's squares: little for convolutions",
        "sd_plain": sds["gaussian"],
        "sd": sds["rademacher"],
        "times_faster": (sds["gaussian"] / sds["rademacher"]) ** 2,
        "rounds": repeats,
    }


def draws_for_equal_error(effort) -> Record:
    """The bound's control variate: variance of the diffusion part a draw, with and without it."""
    model, x = build("S16", "ddpmpp").eval().requires_grad_(False), batch("S16", 4)
    found = {}
    for used in (False, True):
        source = torch.Generator().manual_seed(0)
        totals = [
            model.nelbo_parts(x, times=1, generator=source, control_variate=used)["diffusion"]
            for _ in range(8 * effort.rounds)
        ]
        found[used] = float(torch.stack(totals).var(0).mean())
    dims = math.prod(x.shape[1:])
    return {
        "change": "control variate in the bound (S16 DDPM++, untrained; variance of one draw)",
        "predicted": "none where the network is untrained, much where latents are near N(0, I): it costs nothing",
        "note": "An untrained network leaves the noise’s own square in the error, of which the control takes a part",
        "sd_plain": math.sqrt(found[False]) / dims,
        "sd": math.sqrt(found[True]) / dims,
        "times_faster": found[False] / found[True],
        "rounds": 8 * effort.rounds,
    }


CHANGES: dict[str, Callable[[Any], Record]] = {
    "one-pass": one_pass,
    "dropout": dropout,
    "fused-adamw": optimiser,
    "foreach-ema": averages,
    "channels-last": layout,
    "series-terms": terms,
    "narrow-convolutions": narrow,
    "latent-only": latent_only,
    "exact-log-det": exact,
    "rademacher": signs,
    "control-variate": draws_for_equal_error,
}
