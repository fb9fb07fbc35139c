"""A training step never makes the host wait for its device.

The step runs on PyTorch's meta device, whose tensors have no values: whatever reads one on the host (`item`, `tolist`,
`bool`, a copy to the CPU, a mask as an index) is an error there. What a meta tensor does not refuse, a copy from the
CPU that waits, is refused by :class:`NoWaiting`. Draws made on the CPU on purpose are allowed: they are of its own
generators, and nothing of the device is in them.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench.train
import models.noise
from bench.config import load_suite
from bench.train import Trainer
from models.noise import StepRandom

META = torch.device("meta")


class MetaGenerator(torch.Generator):
    """A generator that says it is the device's, as StepRandom's is on a GPU."""

    device = property(lambda self: META)


class NoWaiting(TorchDispatchMode):
    """Refuse operations that take a CPU tensor to the device and wait for it: copies, and indices left on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        mixed = len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1
        copied = function is torch.ops.aten.copy_.default and args[2:] == (True,)
        if mixed and not (kwargs.get("non_blocking") or copied):
            raise AssertionError(f"{function} waits for {[(t.device.type, tuple(t.shape)) for t in tensors]}")
        return result


class OnMeta(bench.train.Accelerator):
    """Accelerate as it would be with a device of its own."""

    device = property(lambda self: META)


def slow_adamw(config, groups):
    # fused=True is refused on the meta device; its step is one kernel and reads nothing
    return {name: torch.optim.AdamW(params, lr=1e-3, foreach=True) for name, params in groups.items()}


@pytest.fixture
def meta(monkeypatch, tmp_path):
    """Trainers of this test compute on the meta device."""
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr(bench.train, "Accelerator", OnMeta)
    monkeypatch.setattr(bench.train, "build_optimizers", slow_adamw)
    # autocast does not know the device; here it is off anyway
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    generator = StepRandom.generator

    def on_meta(self, purpose, device=None):
        source = generator(self, purpose, "cpu")
        return source if device == "cpu" else MetaGenerator().manual_seed(source.initial_seed())

    monkeypatch.setattr(models.noise.StepRandom, "generator", on_meta)


def one_step(run):
    trainer = Trainer(run, progress=False)
    trainer.model.train()
    assert {p.device.type for p in trainer.model.parameters()} == {"meta"}
    trainer.train_step()  # what is made once a run may wait
    with NoWaiting():
        terms = trainer.train_step()
    assert {term.device.type for term in terms.values()} == {"meta"}
    return trainer


SMALL = ["train.batch_size=8", "train.steps=10", "train.horizontal_flip=true", "train.curve_samples=0"]
VARIANTS = ["ddpm", "ddpmpp-vp", "ncsnpp-ve", "indm-vp-nll", "indm-vp-fid", "indm-ve"]


@pytest.mark.parametrize(
    ("variant", "dataset"), [("indm-vp-nll", "checkerboard"), *((name, "digits") for name in VARIANTS)]
)
def test_a_step_reads_nothing_from_the_device(variant, dataset, meta):
    one_step(load_suite("smoke", SMALL).runs(variant, 0, dataset)[0])


@pytest.mark.parametrize(
    "flow",
    [
        {"name": "residual_global", "blocks": [1, 1], "hidden": 8},
        {"name": "residual", "blocks": [1, 1], "hidden": 8, "roulette": "poisson", "probes": "gaussian"},
    ],
)
def test_nor_with_the_published_flows(flow, meta):
    run = load_suite("smoke", SMALL).runs("indm-vp-fid", 0, "digits")[0]
    one_step(run.model_copy(update={"model": {**run.model, "flow": flow}}))


def test_reading_a_value_is_found(meta):
    trainer = one_step(load_suite("smoke", SMALL).runs("ddpmpp-vp", 0, "digits")[0])
    loss = trainer.step_module.phase_losses[0]

    def reading(x, random):
        value, terms = loss(x, random)
        return value * float(value > 0), terms

    trainer.step_module.phase_losses[0] = reading
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        trainer.train_step()


def test_a_copy_that_waits_is_found(meta):
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        torch.zeros(3).to(META)
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        torch.zeros(3, device=META)[torch.arange(2)]
    with NoWaiting():
        torch.zeros(3).to(META, non_blocking=True)
