"""A model's bounds over a test set: bits/dim in named parts, standard errors, per-image values kept.

Every draw for test image i is a function of (seed, purpose, i): neither batch size nor process count changes a value.
Each quantity stands alone: a model that lacks one, or fails at it, loses that one and keeps the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.batches import FAILURES, SECONDS, Work
from bench.data import Dataset, bits_per_dim, dequantise
from models.base import Model, NotDefined
from models.noise import IndexedGenerator

OFFSET = "dequantisation"
USUAL_NFE = 120  # of the ODE on a trained model, for a progress line
CHECKED = 32  # images of the check of the NLL's tolerance
SOLVERS = {"dopri5": "dormand-prince 5(4)", "adams": "adams 5(4)"}
QUANTITIES = ("nelbo", "nll", "gap", "chain", "discrete")

Parts = dict[str, np.ndarray]


class NotFinite(NotDefined):
    """A quantity that came out as NaN or infinity for some test image."""


def test_points(data: Dataset, count: int | None, seed: int) -> Tensor:
    """The first ``count`` test samples as model variables x: images dequantised by their index, points as they are."""
    images = data.test if count is None else data.test[:count]
    if data.levels is None:
        return images
    source = IndexedGenerator(seed, "dequantise test", torch.arange(len(images)))
    return dequantise(images, source.uniform(images.shape), data.levels)


class Units:
    """From nats an image to the suite's unit: bits/dim for discrete data, nats for continuous data."""

    def __init__(self, data: Dataset):
        self.dims, self.levels = math.prod(data.shape), data.levels
        self.name = "nats" if data.levels is None else "bits/dim"
        self.offset = 0.0 if data.levels is None else bits_per_dim(0.0, self.dims, data.levels)

    def part(self, nats):
        """A difference or a part: scaled, without the offset."""
        return nats if self.levels is None else nats / (self.dims * math.log(2))

    def total(self, nats):
        """A whole likelihood: scaled, with the dequantisation offset."""
        return self.part(nats) + self.offset


def _batched(
    function, x: Tensor, batch_size: int, device, seed: int, purpose: str, work: Work | None, name=""
) -> Parts:
    """Parts of all images; ``name`` tells computations of one purpose apart that differ in their settings."""

    def parts(rows: range) -> Parts:
        index = torch.arange(rows.start, rows.stop)
        found = function(x[index].to(device), IndexedGenerator(seed, purpose, index))
        return {key: value.double().cpu().numpy() for key, value in found.items()}

    quantity = purpose.partition(" ")[0]
    pieces = (work or Work()).batches(f"{purpose}{name}", len(x), batch_size, parts, quantity=quantity)
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0] if key != SECONDS}


def _repeated(function, x: Tensor, repeats: int, batch_size: int, seed: int, purpose: str, device, work) -> list[Parts]:
    return [_batched(function, x, batch_size, device, seed, f"{purpose} {repeat}", work) for repeat in range(repeats)]


def nelbo_per_image(
    model: Model,
    x: Tensor,
    repeats: int,
    times: int,
    batch_size: int,
    seed: int,
    device="cpu",
    work: Work | None = None,
) -> list[Parts]:
    """For each independent repeat the bound's parts, nats (n,)."""
    function = lambda rows, source: model.nelbo_parts(rows, times=times, generator=source)  # noqa: E731
    return _repeated(function, x, repeats, batch_size, seed, "nelbo", device, work)


def chain_per_image(
    model: Model, x: Tensor, repeats: int, batch_size: int, seed: int, device="cpu", work: Work | None = None
) -> list[Parts]:
    """For each of ``repeats`` paths the parts of the bound of the model's own chain, nats (n,)."""
    function = lambda rows, source: model.chain_parts(rows, generator=source)  # noqa: E731
    return _repeated(function, x, repeats, batch_size, seed, "chain", device, work)


def discrete_per_image(
    model: Model,
    images: Tensor,
    levels: int,
    repeats: int,
    batch_size: int,
    seed: int,
    device="cpu",
    work: Work | None = None,
) -> list[Parts]:
    """For each of ``repeats`` paths the parts of the bound on -log P(k) of uint8 images k (n, ...), nats (n,)."""
    function = lambda rows, source: model.discrete_parts(rows, levels, generator=source)  # noqa: E731
    return _repeated(function, images, repeats, batch_size, seed, "discrete", device, work)


def nll_per_image(
    model: Model, x: Tensor, batch_size: int, seed: int, device="cpu", work: Work | None = None, **options: Any
) -> Parts:
    """The ODE likelihood's parts, nats (n,), and nfe (n,)."""
    function = lambda rows, source: model.nll_parts(rows, generator=source, **options)  # noqa: E731
    name = "".join(f" {key}={value}" for key, value in sorted(options.items()))
    return _batched(function, x, batch_size, device, seed, "nll", work, name)


def total_nats(parts: Parts, residual: bool = True) -> np.ndarray:
    """Sum of the parts; without the residual at eps where ``residual`` is False."""
    skip = {"nfe"} if residual else {"nfe", "reconstruction"}
    return sum(value for name, value in parts.items() if name not in skip)


def _mean_parts(repeats: list[Parts]) -> Parts:
    return {name: np.mean([parts[name] for parts in repeats], axis=0) for name in repeats[0]}


def _checked(parts: Parts) -> Parts:
    """The parts, whose total must be finite for every image: one NaN would spoil every mean."""
    wrong = int((~np.isfinite(total_nats(parts))).sum())
    if wrong:
        raise NotFinite(f"not finite for {wrong} of {len(total_nats(parts))} test samples")
    return parts


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def summary(parts: Parts, units: Units, residual: bool = True, offset: bool = True) -> dict[str, Any]:
    """{"total", "se_images", "parts"} in the suite's unit; the parts sum to the total.

    ``offset`` False: of a probability of discrete images, which no dequantisation has made a density.
    """
    nats = total_nats(parts, residual)
    names = [name for name in parts if name != "nfe" and (residual or name != "reconstruction")]
    named = {name: float(units.part(parts[name].mean())) for name in names}
    if units.levels is not None and offset:
        named[OFFSET] = units.offset
    total = units.total(nats.mean()) if offset else units.part(nats.mean())
    return {"total": float(total), "se_images": float(units.part(_standard_error(nats))), "parts": named}


def bound_kind(model: Model) -> str:
    """What kind of bound the model's NELBO is, as the tables say it."""
    return f"chain of {model.chain_steps} steps" if model.bound_is_chain else "continuous"


class Measurement:
    """The quantities of one trained model on one test set, each tried on its own.

    ``record``: what was measured, in the suite's unit; ``arrays``: per image, nats; ``reasons``: of what was not.
    """

    def __init__(self, model: Model, data: Dataset, settings, seed: int, device="cpu", work: Work | None = None):
        self.model, self.data, self.settings, self.seed, self.device = model, data, settings, seed, device
        self.batch_size, self.work = likelihood_batch(settings), work
        self.units = Units(data)
        self.x = test_points(data, settings.images, seed)
        self.record: dict[str, Any] = dict.fromkeys(QUANTITIES)
        self.reasons: dict[str, str] = {}
        self.arrays: dict[str, np.ndarray] = {"index": np.arange(len(self.x))}
        self.bounds: list[Parts] = []
        for name in QUANTITIES:
            try:
                self.record[name] = getattr(self, f"_{name}")()
            except FAILURES as error:
                self.reasons[name] = " ".join(str(error).split())

    def _how(self) -> tuple[int, int, Any, Work | None]:
        return self.batch_size, self.seed, self.device, self.work

    def _nelbo(self) -> dict[str, Any]:
        settings, units = self.settings, self.units
        options = (settings.nelbo_repeats, settings.nelbo_times, *self._how())
        repeats = nelbo_per_image(self.model, self.x, *options)
        mean = _checked(_mean_parts(repeats))
        self.bounds = repeats
        self.arrays |= {"nelbo": total_nats(mean), "nelbo_uncorrected": total_nats(mean, False)}
        bound: dict[str, Any] = {"repeats": settings.nelbo_repeats, "times": settings.nelbo_times}
        for name, residual in (("corrected", True), ("uncorrected", False)):
            means = np.array([units.total(total_nats(parts, residual).mean()) for parts in repeats])
            bound[name] = summary(mean, units, residual) | {"se_repeats": _standard_error(means)}
        return bound

    def _nll(self) -> dict[str, Any]:
        settings, units = self.settings, self.units
        options = {"rtol": settings.rtol, "atol": settings.atol, "probes": settings.probes}
        if settings.solver != "dopri5":
            options["solver"] = settings.solver
        measure: Callable[..., Parts] = lambda x, **given: _checked(  # noqa: E731
            nll_per_image(self.model, x, *self._how(), **given)
        )
        right = measure(self.x, corrected=True, **options)
        clean = measure(self.x, corrected=False, **options)
        few = min(CHECKED, len(self.x))
        finer = options | {"rtol": settings.rtol / 2, "atol": settings.atol / 2}
        try:
            halved = total_nats(measure(self.x[:few], corrected=True, **finer))
            change = float(units.part((halved - total_nats(right)[:few]).mean()))
        except FAILURES:
            change = None  # the check failed, not the number
        self.arrays |= {"nll": total_nats(right), "nll_uncorrected": total_nats(clean, False)}
        self.arrays["nfe"] = right["nfe"].astype(np.int64)
        return {
            "solver": f"{SOLVERS[settings.solver]}, step control per image",
            "rtol": settings.rtol,
            "atol": settings.atol,
            "probes": settings.probes,
            "nfe_mean": float(right["nfe"].mean()),
            "nfe_max": int(right["nfe"].max()),
            "tolerance_check": {"n": few, "change": change},
            "corrected": summary(right, units),
            "uncorrected": summary(clean, units, False),
        }

    def _gap(self) -> dict[str, Any]:
        """NELBO - NLL, paired by image: both are of the same dequantised test images."""
        lacking = next((name for name in ("nelbo", "nll") if name in self.reasons), None)
        if lacking:
            raise NotDefined(self.reasons[lacking])
        gap = {}
        for name, ending in (("corrected", ""), ("uncorrected", "_uncorrected")):
            difference = self.arrays[f"nelbo{ending}"] - self.arrays[f"nll{ending}"]
            total, error = difference.mean(), _standard_error(difference)
            gap[name] = {"total": float(self.units.part(total)), "se": float(self.units.part(error))}
        return gap

    def _chain(self) -> dict[str, Any]:
        settings = self.settings
        if self.model.bound_is_chain:  # it is not computed twice
            if "nelbo" in self.reasons:
                raise NotDefined(self.reasons["nelbo"])
            repeats = self.bounds
        else:
            repeats = chain_per_image(self.model, self.x, settings.nelbo_repeats, *self._how())
        mean = _checked(_mean_parts(repeats))
        self.arrays["chain"] = total_nats(mean)
        return self._bound(mean, repeats)

    def _discrete(self) -> dict[str, Any]:
        settings, levels = self.settings, self.data.levels
        if levels is None:
            raise NotDefined("not defined for 2-D data")
        images = self.data.test[: len(self.x)]
        repeats = discrete_per_image(self.model, images, levels, settings.nelbo_repeats, *self._how())
        mean = _checked(_mean_parts(repeats))
        self.arrays["discrete"] = total_nats(mean)
        return self._bound(mean, repeats, offset=False)

    def _bound(self, mean: Parts, repeats: list[Parts], offset: bool = True) -> dict[str, Any]:
        means = np.array([self.units.part(total_nats(parts).mean()) for parts in repeats])
        said = {"steps": self.model.chain_steps, "repeats": len(repeats), "se_repeats": _standard_error(means)}
        return summary(mean, self.units, offset=offset) | said


def likelihood_batch(settings) -> int:
    """Images of a batch whose likelihood is computed: an EvaluateConfig's own number, else that of its samples."""
    return settings.likelihood_batch_size or settings.batch_size


def expected_costs(model: Model, settings, images: int) -> dict[str, tuple[int, float]]:
    """Quantity -> (images, rough number of network evaluations of each), for a progress line."""
    steps = model.chain_steps or 0
    if model.bound_is_chain:
        return {"nelbo": (images * settings.nelbo_repeats, steps)}
    products = model.dims if settings.probes == "exact" else settings.probes
    costs = {"nelbo": (images * settings.nelbo_repeats, settings.nelbo_times)}
    # a product with the Jacobian costs about two evaluations
    costs["nll"] = (2 * images + min(CHECKED, images), USUAL_NFE * (1 + 2 * products))
    return costs | {name: (images * settings.nelbo_repeats, steps) for name in ("chain", "discrete") if steps}


def measure(
    model: Model, data: Dataset, settings, seed: int, device="cpu", work: Work | None = None
) -> tuple[dict[str, Any], Parts]:
    """The record of ``likelihood.json`` (without its header) and the arrays of ``per_image.npz``, nats.

    ``settings``: an EvaluateConfig. "nelbo", "nll", "gap" and "chain" are of the density of the dequantised test
    images, all of the same ones; "discrete" bounds the probability of the images themselves (bits/dim without the
    offset of dequantisation) and compares with none of them. A quantity that could not be measured is null, and
    "reasons" says why; "status" is "ok" unless none could be. ``work`` says how the batches are done; several processes
    share them, and all get the result.
    """
    measured = Measurement(model, data, settings, seed, device, work)
    units, x, reasons = measured.units, measured.x, measured.reasons
    truth = None
    if data.log_prob is not None:
        exact = -data.log_prob(x).double().numpy()
        truth = {"nll": float(exact.mean()), "se_images": _standard_error(exact)}
    failed = all(measured.record[name] is None for name in QUANTITIES)
    said = "; ".join(dict.fromkeys(reasons[name] for name in ("nelbo", "nll") if name in reasons))
    record = {
        "status": said if failed else "ok",
        "units": units.name,
        "dims": units.dims,
        "levels": units.levels,
        "data": data.describe(),
        "n": len(x),
        "family": model.family,
        "reasons": reasons,
        "truth": truth,
    }
    return record | measured.record, measured.arrays
