"""A short measurement of an untrained model: seconds, arithmetic and memory of the parts of which a run is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from bench.acceleration import LAYOUTS, float32
from bench.averages import Ema
from bench.config import RunConfig
from bench.data import Dataset, dequantise
from bench.likelihood import FAILURES, nelbo_per_image, nll_per_image
from bench.sampling import draw
from bench.step_costs import count_flops, step_costs
from bench.train import build_model
from bench.training_data import Batches
from models.noise import StepRandom

# items on which a part is timed first, and how many times more each next attempt takes
FIRST_ITEMS, GROWTH = 2, 8
# of one attempt of the ODE solver that is to take as few steps as it can
LOOSE = 10.0


@dataclass(frozen=True)
class Part:
    """What one image costs in one part of a run: ``seconds`` and ``flops``."""

    seconds: float
    flops: float

    def __mul__(self, count: float) -> Part:
        return Part(count * self.seconds, count * self.flops)

    def __add__(self, other: Part) -> Part:
        return Part(self.seconds + other.seconds, self.flops + other.flops)


NOTHING = Part(0.0, 0.0)


class Probe:
    """The untrained model of a run on ``device``, timed for about ``seconds`` in all.

    Parts that a model does not have, or at which it fails untrained, cost nothing.
    """

    def __init__(self, run: RunConfig, data: Dataset, device: torch.device, seconds: float):
        self.run, self.data, self.device = run, data, device
        self.seconds = seconds / 6  # three places of the training, three parts of the evaluation
        self.model = build_model(run, data).to(device, memory_format=LAYOUTS[run.train.memory_format])
        self.phases = self.model.phases()
        groups = {name: params for phase in self.phases for name, params in phase.parameters.items() if params}
        self.trained = [p for params in groups.values() for p in params]
        self.optimizers = {
            name: torch.optim.AdamW(params, lr=0.0, weight_decay=0.0, fused=True) for name, params in groups.items()
        }
        self.ema = Ema(self.model, run.train.ema)
        self.batches = Batches(data, run.train, run.seed, device)  # as in training: images lie on the device
        self._points: dict[int, Tensor] = {}

    def points(self, count: int) -> Tensor:
        """``count`` model variables: training images, repeated where they are too few, or points; made once."""
        if count not in self._points:
            items = self.data.train[torch.arange(count) % len(self.data.train)]
            if self.data.levels is not None:
                items = dequantise(items, torch.full(items.shape, 0.5), self.data.levels)
            self._points[count] = items.to(self.device)
        return self._points[count]

    # Training ------------------------------------------------------------------------------------------------------

    def training(self, shares: tuple[float, ...]) -> Part:
        """One optimiser step of the whole batch, mean over places ``shares`` of the run."""
        batch, parts = self.run.train.batch_size, []
        calls = 1 if self.model.refresh is None else 3  # of a count, see _amortised
        self.model.train()
        for share in shares:
            step = self._usual_step(share)
            started = self._now()
            flops = batch * self._amortised(lambda step=step: count_flops(lambda: self._step(1, step)))
            one = (self._now() - started) / calls
            if self._slow(one):  # a large network on a CPU: one image and one place must do
                parts.append(Part(batch * one, flops))
                break
            seconds = self._scaled(lambda n, step=step: self._step(n, step, True), batch, self._amortised)
            parts.append(Part(seconds, flops))
        self.model.eval()
        return Part(fmean(part.seconds for part in parts), fmean(part.flops for part in parts))

    def memory(self, share: float = 0.5) -> int:
        """Bytes of live tensors in a training step of the whole batch, with weights, averages and moments.

        What a step makes beside them is counted for as many images as fit the time, and extrapolated.
        """
        step, full, measured = self._usual_step(share), self.run.train.batch_size, []
        self.model.train()
        started, n = self._now(), min(FIRST_ITEMS, full)
        while not measured or (measured[-1][0] < full and (len(measured) < 2 or self._now() - started < self.seconds)):
            measured.append((n, step_costs(lambda n=n: self._step(n, step)).peak_bytes))
            n = min(2 * n, full)
        self.model.eval()
        return 2 * self.state_bytes() + 2 * self.trained_bytes() + round(extrapolated(measured, full))

    def state_bytes(self) -> int:
        """Of the model's parameters and buffers."""
        return sum(value.numel() * value.element_size() for value in self.model.state_dict().values())

    def trained_bytes(self) -> int:
        """Of the parameters that have gradients and moments."""
        return sum(value.numel() * value.element_size() for value in self.trained)

    def _step(self, n: int, step: int, whole: bool = False) -> None:
        """Losses and gradients of ``n`` images at a training step; ``whole``: and the optimiser's and the averages'."""
        random = StepRandom(self.run.seed, step, n, (0, n), self.device)
        x = self.batches(step, random)
        half = self.run.train.mixed_precision == "bf16"
        for phase in self.phases:
            if not phase.due(step):
                continue
            for p in self.trained:
                p.grad = None
            with float32(self.run.train.tf32):
                with torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext():
                    loss, _ = phase.loss_fn(x, random)
                loss.backward()
            if whole:
                for name in phase.parameters:
                    if name in self.optimizers:
                        self.optimizers[name].step()
        if whole:
            self.ema.update()

    def _usual_step(self, share: float) -> int:
        """The step at a share of the run, or the one after it where the model simulates new paths."""
        step = round(share * (self.run.train.steps - 1))
        return step + 1 if self.model.renews_paths(step) else step

    def _amortised(self, cost: Callable[[], float]) -> float:
        """Mean cost of a step, of which a model that keeps paths simulates new ones in one of every ``refresh``."""
        if self.model.refresh is None:
            return cost()
        cost()  # whatever the half before it left is replaced
        usual = cost()
        self.model.drop_paths()
        return usual + max(0.0, cost() - usual) / self.model.refresh

    # Evaluation ----------------------------------------------------------------------------------------------------

    def ode_evaluation(self) -> Part:
        """One evaluation of the likelihood's ODE for one image, drift and divergence."""
        options = {"rtol": LOOSE, "atol": LOOSE, "probes": self.run.evaluate.probes, "corrected": True}
        if self.run.evaluate.solver != "dopri5":
            options["solver"] = self.run.evaluate.solver

        def solve(n: int) -> float:
            found = nll_per_image(self.model, self.points(n), n, self.run.seed, self.device, **options)
            return max(1.0, float(found["nfe"].mean()))

        return self._part(solve, self.run.evaluate.likelihood_batch_size)

    def bound(self, times: int) -> Part:
        """One estimate of the NELBO of one image, of ``times`` draws of the time."""

        def estimate(n: int) -> None:
            nelbo_per_image(self.model, self.points(n), 1, times, n, self.run.seed, self.device)

        return self._part(estimate, self.run.evaluate.likelihood_batch_size)

    def sampling_step(self) -> Part:
        """One network evaluation for one sample."""
        sampler = self.run.evaluate.samplers[0]["name"] if self.run.evaluate.samplers else self.model.curve_sampler
        fixed = sampler if sampler not in ("ode", "published_ode", "annealed_langevin") else self.model.curve_sampler

        def sample(n: int) -> float:
            return max(1.0, draw(self.model, n, fixed, 2, self.run.seed, n)[1])

        return self._part(sample)

    def evaluations_per_step(self, sampler: str) -> float:
        """Network evaluations of one step of a sampler."""
        try:
            return max(1.0, draw(self.model, 1, sampler, 2, self.run.seed, 1)[1] / 2)
        except (*FAILURES, ValueError):
            return 1.0

    def _part(self, work: Callable[[int], float | None], batch: int | None = None) -> Part:
        """Cost of one image in a ``batch``; ``work`` of n images returns how many parts it did for each, None: one."""
        batch = batch or self.run.evaluate.batch_size
        done = 1.0

        def counted(n: int) -> None:
            nonlocal done
            done = work(n) or 1.0

        try:
            started = self._now()
            flops = count_flops(lambda: counted(1)) / done
            seconds = self._now() - started
            if not self._slow(seconds):
                seconds = self._scaled(counted, batch) / batch
        except FAILURES:
            return NOTHING
        return Part(seconds / done, flops)

    # Timing --------------------------------------------------------------------------------------------------------

    def _slow(self, seconds: float) -> bool:
        """Whether one image already took more than the time of the probe; a GPU's first calls say nothing."""
        return self.device.type == "cpu" and seconds > 6 * self.seconds

    def _scaled(self, work: Callable[[int], object], full: int, repeated: Callable = lambda cost: cost()) -> float:
        """Seconds of ``work(full)``; where that is too slow for the probe or too large, extrapolated from fewer items.

        ``repeated``: mean of a cost that is not the same at each repetition.
        """
        n, spent, measured = min(FIRST_ITEMS, full), 0.0, []
        while True:
            try:
                first = self._timed(work, n)
            except torch.OutOfMemoryError:
                if not measured:
                    raise
                return extrapolated(measured, full)
            # on a GPU the first call also starts libraries
            spent += first if measured or self.device.type == "cpu" else 0.0
            seconds = first
            if spent + first <= self.seconds:  # what is cheap is timed again, without what happens once
                before = self._now()
                seconds = repeated(lambda n=n: self._timed(work, n))
                spent += self._now() - before
            measured.append((n, seconds))
            larger = min(full, GROWTH * n)
            # two sizes tell what a call costs from what an item does
            expected = 2 * extrapolated(measured, larger) if len(measured) > 1 else 0.0
            if n == full or spent + expected > self.seconds:
                return extrapolated(measured, full)
            n = larger

    def _timed(self, work: Callable[[int], object], n: int) -> float:
        started = self._now()
        work(n)
        return self._now() - started

    def _now(self) -> float:
        """A GPU's work is waited for; on a CPU other processes' time is left out."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def extrapolated(measured: Sequence[tuple[int, float]], n: int) -> float:
    """Cost of ``n`` items by a straight line through the last two of (items, cost), or in proportion to one."""
    (last, cost), before = measured[-1], measured[-2] if len(measured) > 1 else (0, 0.0)
    slope = max(0.0, (cost - before[1]) / (last - before[0]))
    return cost + slope * (n - last)
