"""The cases of a GPU: published networks, each way of computing beside a plain float32 eager loop in the same process.

The plain loop is the shortest PyTorch program that does the same: contiguous memory, float32 products with all bits,
AdamW operation by operation; for the likelihood the official method, two forward passes and SciPy's RK45 in t over the
whole batch. The same code runs on a CPU at the size "toy", which rehearses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.acceleration import compile_networks, float32
from bench.performance import goals
from bench.performance.cases import TOLERANCE, Case, Effort
from bench.performance.evaluations import Problem, Solution, solve_rk45
from bench.performance.loop import PlainStep, batch
from bench.performance.sizes import build, run_of, size_named
from bench.performance.timing import clocked, side_by_side
from bench.step_costs import count_flops
from models.base import Model
from models.integrators import likelihood_path
from models.noise import IndexedGenerator

KINDS = ("ddpmpp", "indm-nll")
SAMPLER, SAMPLER_STEPS = "ddim", 20
NLL_IMAGES, SAMPLES = 64, 256
# a training runs ahead of its device: so many steps are timed as one
STEPS = 5


@dataclass(frozen=True)
class Way:
    """How a network is computed; the defaults are the plain way. ``compile``: a backend of torch.compile."""

    bf16: bool = False
    tf32: bool = False
    channels_last: bool = False
    compile: str | None = None

    @property
    def layout(self) -> str:
        """As the configuration names it."""
        return "channels_last" if self.channels_last else "contiguous"

    @contextmanager
    def precision(self, device: str) -> Iterator[None]:
        """A block that computes so."""
        with float32(self.tf32), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            yield


PLAIN = Way()
WAYS = {
    "float32-eager": Way(channels_last=True),
    "float32-compiled": Way(channels_last=True, compile="inductor"),
    "tf32-eager": Way(tf32=True, channels_last=True),
    "tf32-compiled": Way(tf32=True, channels_last=True, compile="inductor"),
    "bf16-eager": Way(bf16=True, tf32=True, channels_last=True),
    "bf16-compiled": Way(bf16=True, tf32=True, channels_last=True, compile="inductor"),
}


def matrix_rate(dtype: torch.dtype, device: str, size: int, tf32: bool = False) -> float:
    """Floating-point operations a second of a square matrix product."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    with float32(tf32):
        timing = side_by_side({"product": lambda: a @ a}, 7, device, warmup=3)["product"]
    return 2 * size**3 / timing.seconds


def rates(device: str) -> dict[str, float]:
    """Measured matrix rates of the device, FLOP/s: bf16, TF32, float32."""
    size = 8192 if device == "cuda" else 256
    return {
        "bf16_rate": matrix_rate(torch.bfloat16, device, size),
        "tf32_rate": matrix_rate(torch.float32, device, size, tf32=True),
        "float32_rate": matrix_rate(torch.float32, device, size),
    }


def peak_gib(device: str) -> float | None:
    """Largest memory held on the GPU since :func:`forget`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def forget(device: str) -> None:
    """Begin counting peak memory anew."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _step(size: str, kind: str, way: Way, device: str, **options: Any) -> Callable[[], Any]:
    config = run_of(kind).train.model_copy(
        update={"mixed_precision": "bf16" if way.bf16 else "no", "memory_format": way.layout}
    )
    model = build(size, kind).to(device)
    step = PlainStep(model, batch(size, size_named(size).batch, device=device), config, **options)
    if way.compile:
        compile_networks(model, way.compile)

    def run() -> None:
        with float32(way.tf32):
            step()

    return run


def several(step: Callable[[], Any]) -> Callable[[], None]:
    """``STEPS`` steps."""

    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def step_case(size: str, kind: str, way: Way, device: str, effort: Effort) -> dict[str, Any]:
    """The optimiser step: images a second, share of the measured matrix rates, memory; beside the plain loop."""
    images = size_named(size).batch
    plain = _step(size, kind, PLAIN, device, fused=False, foreach=False)
    flops = count_flops(plain)
    forget(device)
    plain_seconds = side_by_side({"plain": several(plain)}, effort.rounds, device, warmup=1)["plain"].seconds / STEPS
    plain_peak = peak_gib(device)
    del plain
    forget(device)
    fast = _step(size, kind, way, device)
    seconds = side_by_side({"fast": several(fast)}, effort.rounds, device, warmup=2)["fast"].seconds / STEPS
    measured = rates(device)
    own = "bf16_rate" if way.bf16 else "tf32_rate" if way.tf32 else "float32_rate"
    return {
        "seconds": seconds,
        "images_per_second": images / seconds,
        "plain_seconds": plain_seconds,
        "times_faster": plain_seconds / seconds,
        "goal_times": goals.GPU["step"],
        "flops": flops,
        "utilisation": flops / seconds / measured["bf16_rate"],
        "utilisation_own": flops / seconds / measured[own],
        "goal_utilisation": goals.GPU_UTILISATION,
        "peak_gib": peak_gib(device),
        "plain_peak_gib": plain_peak,
        "rounds": effort.rounds,
        **measured,
    }


def _frozen(size: str, kind: str, way: Way, device: str) -> Model:
    """The untrained network of a way, made so that its output is not nearly zero, in evaluation mode."""
    model = build(size, kind)
    # the last layer begins at 1e-10, with which every likelihood would be that of a field without a network
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.nn.init.xavier_uniform_(model.score.net.head.weight, gain=0.1)
    model = model.to(device, memory_format=torch.channels_last if way.channels_last else torch.contiguous_format)
    if way.compile:
        compile_networks(model, way.compile)
    return model.eval().requires_grad_(False)


def nll_case(size: str, kind: str, way: Way, device: str, effort: Effort) -> dict[str, Any]:
    """The ODE's likelihood of the same latents as the suite solves it, beside the official method at 1e-5.

    ``difference``: how far their log-densities lie apart, nats/dim in the mean.
    """
    count = min(NLL_IMAGES, 8 * size_named(size).batch)
    x = batch(size, count, device=device)
    index = torch.arange(count, device=device)
    plain = _frozen(size, kind, PLAIN, device)
    with torch.no_grad():
        z = plain.latent(x, IndexedGenerator(0, "latent", index))
    probes = torch.ones((1, *z.shape), device=device)
    found: dict[str, Solution] = {}

    def official(problem: Problem) -> None:
        found["plain"] = solve_rk45(problem, TOLERANCE)

    problem = Problem(_twice(plain.noise), plain.sde, z, probes)
    _, plain_wall = clocked(partial(official, problem), device)
    density, dims = plain.sde.prior_log_prob, z[0].numel()
    del plain, problem
    forget(device)
    model, settings = _frozen(size, kind, way, device), run_of(kind).evaluate

    def ours() -> None:
        with way.precision(device):
            tolerances = settings.rtol, settings.atol
            found["ours"] = Solution(*likelihood_path(model.noise, model.sde, z, probes, *tolerances, settings.solver))

    _, first = clocked(ours, device)
    _, wall = clocked(ours, device)
    apart = found["ours"].log_density(density) - found["plain"].log_density(density)
    return {
        "images": count,
        "solver": settings.solver,
        "tolerance": settings.rtol,
        "seconds": wall,
        "first_seconds": first,  # compilation included
        "seconds_per_image": wall / count,
        "evaluations": float(found["ours"].evaluations.double().mean()),
        "plain_seconds": plain_wall,
        "plain_evaluations": float(found["plain"].evaluations.double().mean()),
        "difference": float(apart.abs().mean()) / dims,
        "times_faster": plain_wall / wall,
        "goal_times": goals.GPU["nll"],
        "peak_gib": peak_gib(device),
    }


def _twice(noise: Callable) -> Callable:
    """A predictor evaluated once more for nothing, as where drift and divergence have a forward pass each."""

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            noise(z, t)
        return noise(z, t)

    return predict


def _invert_in_full(model: Model) -> None:
    """Let the flow's inverse multiply with all bits, as it does in every evaluation."""
    inverse = model.flow.inverse

    def in_full(*arguments: Any, **options: Any) -> torch.Tensor:
        with float32(tf32=False):
            return inverse(*arguments, **options)

    model.flow.inverse = in_full


def sampling_case(size: str, kind: str, way: Way, device: str, effort: Effort) -> dict[str, Any]:
    """Samples a second at one number of steps beside the plain way, and how far the same samples lie apart.

    Of the networks: the suites' evaluations sample in float32, whatever the training's precision was.
    """
    count = min(SAMPLES, 128 * size_named(size).batch)
    index, drawn, times = torch.arange(count, device=device), {}, {}
    for name, used in (("plain", PLAIN), ("fast", way)):
        forget(device)
        model = _frozen(size, kind, used, device)
        _invert_in_full(model)

        def draw(model: Model = model, used: Way = used, name: str = name) -> None:
            with used.precision(device):
                source = IndexedGenerator(0, "sample", index)
                drawn[name] = model.sample(count, steps=SAMPLER_STEPS, sampler=SAMPLER, generator=source)

        times[name] = side_by_side({"draw": draw}, min(3, effort.rounds), device)["draw"].seconds
    apart = (drawn["fast"].float() - drawn["plain"]).square().mean().sqrt()
    return {
        "images": count,
        "steps": SAMPLER_STEPS,
        "seconds": times["fast"],
        "images_per_second": count / times["fast"],
        "plain_seconds": times["plain"],
        "times_faster": times["plain"] / times["fast"],
        "goal_times": goals.GPU["sampling"],
        "rms_difference": float(apart / drawn["plain"].std()),
        "peak_gib": peak_gib(device),
    }


def accelerated_cases(size: str, device: str, ways: dict[str, Way]) -> list[Case]:
    """The cases of a device at a size, by the ways given."""
    found = []
    for group, run in (("step", step_case), ("nll", nll_case), ("sampling", sampling_case)):
        for kind in KINDS:
            for name, way in ways.items():
                if group == "nll" and (way.bf16 or way.tf32):
                    continue
                own = partial(run, size, kind, way, device)
                found.append(Case(f"gpu-{group}/{kind}/{name}", f"gpu-{group}", own))
    return found


def gpu_cases() -> list[Case]:
    """All cases of a GPU, at the published size."""
    return accelerated_cases("published", "cuda", WAYS)
