"""The one training loop, on Accelerate: phases, EMA, checkpoints, exact resume, learning curve.

The clock is images seen. Data order, time, noise and dropout of step k are functions of (seed, k), so a run that was
killed and started again ends with the same weights, bit for bit.
"""

from __future__ import annotations

import copy
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

import models
from bench import seals, stopping
from bench.acceleration import LAYOUTS, check_compiler, compile_networks, float32, restore_layout
from bench.allocator import keep_freed_memory
from bench.averages import Ema
from bench.checkpoint import (
    RAW_WEIGHTS,
    checkpoint_root,
    exclusive,
    exclusive_results,
    file_hash,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
    save_weights,
    sweep,
)
from bench.config import RunConfig, TrainConfig, check_buildable
from bench.data import Dataset, load
from bench.errors import InputError, RunFailure
from bench.files import write_json
from bench.finished import evaluated_with, is_trained
from bench.optimizers import build_optimizers, learning_rate
from bench.progress import Bar
from bench.provenance import training_code
from bench.sharding import join, on_main, session
from bench.step_costs import StepCosts, step_costs
from bench.training_data import Batches
from models.base import Model
from models.noise import StepRandom, derive_seed
from models.score.dropout import share_of_batch

# steps of a run at which the costs of a step are counted, as shares of it: phases may differ from one to the next
COST_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# several processes learn at most so late that one of them was asked to stop: a launcher waits 30 s before it kills
MEETING_SECONDS = 3.0
# no more than this is lost to what gives no notice
CHECKPOINT_SECONDS = 600.0


class TrainingDiverged(RunFailure):
    """The loss stopped being finite; the message names the step and the terms."""

    shared = True


class _Step(nn.Module):
    """The loss of one phase as a module's forward, so that DDP and autocast hooks fire."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.phase_losses = [phase.loss_fn for phase in model.phases()]

    def forward(self, phase: int, x: Tensor, random: StepRandom):
        return self.phase_losses[phase](x, random)


def curve_steps(config: TrainConfig) -> list[int]:
    """The steps at which the learning curve is measured: log-spaced from 4 % of the run to its end."""
    if config.curve < 2:
        return [config.steps]
    first = max(1, round(config.steps * 0.04))
    ratio = (config.steps / first) ** (1 / (config.curve - 1))
    return sorted({max(1, round(first * ratio**i)) for i in range(config.curve - 1)} | {config.steps})


def steps_to_meeting(steps: int, seconds: float) -> int:
    """After how many further steps the processes ask each other again, where the last ``steps`` took ``seconds``."""
    return max(1, int(MEETING_SECONDS * max(steps, 1) / max(seconds, 1e-9)))


def build_model(run: RunConfig, data: Dataset) -> Model:
    """The run's model with weights drawn from (seed, "init")."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, "init"))
        return models.build({**run.model, "shape": list(data.shape)})


class Trainer:
    """One run's training state: model, averages, optimisers, curve and clock."""

    def __init__(self, run: RunConfig, progress: bool = True):
        self.run, self.config, self.progress = run, run.train, progress
        keep_freed_memory()
        # a process trains several runs one after the other; their precisions may differ
        AcceleratorState._reset_state()
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        self.accelerator = Accelerator(
            mixed_precision=self.config.mixed_precision, cpu=not torch.cuda.is_available(), kwargs_handlers=handlers
        )
        self.device = self.accelerator.device
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if processes != int(os.environ.get("WORLD_SIZE", 1)):
            raise RuntimeError(f"{processes} processes joined where WORLD_SIZE is {os.environ['WORLD_SIZE']}")
        size = self.config.batch_size
        if size % processes:
            raise InputError(f"train.batch_size = {size}: must be divisible by the number of processes, {processes}")
        self.rows = (rank * (size // processes), size // processes)
        if self.config.compile:
            check_compiler(run.model["name"], self.device)
        with session():  # what one process cannot do ends all of them
            self.data = load(run.dataset)
            run.check_data(self.data.shape, None if self.data.draw else len(self.data.train), len(self.data.test))
            check_buildable(run.model, self.data.shape)
            check_features(run)
            self.batches = Batches(self.data, self.config, run.seed, self.device)
            model = build_model(run, self.data)
            self.model = model.to(self.device, memory_format=LAYOUTS[self.config.memory_format])
            self.phases = self.model.phases()
            groups = {name: params for phase in self.phases for name, params in phase.parameters.items()}
            self.groups = {name: params for name, params in groups.items() if params}
            self.ema = Ema(self.model, self.config.ema, self.groups, self.config.ema_rates, self.config.raw_groups)
            if self.config.compile:
                compile_networks(self.model)
            self.optimizers = build_optimizers(self.config, self.groups)
        self.step_module = self.accelerator.prepare(_Step(self.model))
        prepared = [self.accelerator.prepare(optimizer) for optimizer in self.optimizers.values()]
        self.prepared = dict(zip(self.optimizers, prepared, strict=True))
        self.folder = checkpoint_root() / run.training_hash
        self.step, self.seconds, self.curve, self.running = 0, 0.0, [], []

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Publish a checkpoint of everything the rest of the run depends on."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= optimizer_tensors(optimizer, f"optimizer.{name}")
        meta = {"seconds": self.seconds, "curve": self.curve, "ema_updates": self.ema.updates, "running": self.running}
        save_checkpoint(
            self.folder, self.step, tensors, meta | {"config_hash": self.run.training_hash, "code": training_code()}
        )

    def resume(self) -> bool:
        """Continue from the newest readable checkpoint of this very configuration and code, if there is one."""
        sweep(self.folder)
        found = load_checkpoint(self.folder, self.device)
        if found is None:
            return False
        tensors, meta = found
        if meta.get("code") != training_code():
            return False
        for prefix, module in (("model.", self.model), ("ema.", self.ema.model)):
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimizer in self.optimizers.items():
            load_optimizer_tensors(optimizer, tensors, f"optimizer.{name}")
            restore_layout(optimizer)
        self.step, self.seconds, self.curve = meta["step"], meta["seconds"], meta["curve"]
        self.ema.updates, self.running = meta["ema_updates"], meta["running"]
        return True

    # Training ------------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Tensor]:
        """All phases of one step; returns the last phase's loss and terms, not yet read from the device."""
        config, result = self.config, {}
        random = StepRandom(derive_seed(self.run.seed, "train"), self.step, config.batch_size, self.rows, self.device)
        x = self.batches(self.step, random)
        # dropout is the only consumer of the global generator; on a CPU each process draws the global batch's masks
        stream = 0 if self.device.type == "cpu" else self.accelerator.process_index
        torch.manual_seed(derive_seed(self.run.seed, "dropout", self.step, stream))
        for index, phase in enumerate(self.phases):
            if not phase.due(self.step):
                continue
            for optimizer in self.prepared.values():
                optimizer.zero_grad(set_to_none=True)
            with share_of_batch(self.rows, config.batch_size):
                loss, terms = self.step_module(index, x, random)
            result |= {f"{phase.name}.{name}": value for name, value in terms.items()}
            result[f"{phase.name}.loss"] = result["loss"] = loss.detach()
            self.accelerator.backward(loss)
            for name in phase.parameters:
                # the norm is wanted without clipping too: it shows a gradient that is not finite
                norm = self.accelerator.clip_grad_norm_(self.groups[name], config.clip or math.inf)
                result[f"{phase.name}.gradient norm of {name}"] = norm
                for group in self.optimizers[name].param_groups:
                    group["lr"] = learning_rate(config, config.learning_rates[name], self.step)
                self.prepared[name].step()
        self.ema.update()
        self.step += 1
        return result

    def check(self, terms: dict[str, Tensor], elapsed: float = 0.0) -> tuple[float, bool, float]:
        """The global batch's loss, whether a process was asked to stop, and the mean of the processes' ``elapsed``.

        Raises TrainingDiverged, before any checkpoint, if a term is not finite.
        """
        # terms are means over rows, of which each process has as many; all processes stop, or none
        loss = terms["loss"]
        told = torch.tensor([float(stopping.requested() is not None), elapsed]).to(loss.device, non_blocking=True)
        values = torch.cat([torch.stack([v.float() for v in terms.values()]), told])
        *values, asked, elapsed = self.accelerator.reduce(values, reduction="mean").tolist()
        if not all(map(math.isfinite, values)):
            shown = ", ".join(f"{name} = {value:.4g}" for name, value in zip(terms, values, strict=True))
            raise TrainingDiverged(f"loss or gradient is not finite at step {self.step}: {shown}")
        return values[list(terms).index("loss")], asked > 0, elapsed

    def measure(self, train_loss: float) -> None:
        """Add a row to the learning curve, measured with the averaged weights."""
        from bench.evaluate import curve_point

        with float32(tf32=False):
            point = curve_point(self.ema.model, self.run, self.data, self.device)
        images = self.step * self.config.batch_size
        row = {"step": self.step, "images": images, "seconds": self.seconds, "train_loss": train_loss}
        self.curve.append(row | point)

    def train(self) -> None:
        """From where the run stands to its last step, or to a checkpoint and Stopped where an end is asked for."""
        config = self.config
        points = {*curve_steps(config), *self.model.milestones(config.steps)}
        # reading the loss costs a synchronisation, which only a GPU notices
        check_every = 1 if self.device.type == "cpu" else 50
        last, meeting, unsaved = self.step, self.step, 0.0
        bar = Bar(
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=not (self.progress and self.accelerator.is_main_process),
            mininterval=0.5,
            desc=f"{self.run.variant}/{self.run.dataset}/{self.run.seed}",
        )
        alone = self.accelerator.num_processes == 1
        self.model.train()
        started = met = time.perf_counter()
        while self.step < config.steps:
            terms = self.train_step()
            boundary = self.step in points or self.step % config.checkpoint_every == 0
            regular = boundary or self.step % check_every == 0
            # one process may stop at any step, several where they meet
            stop = not regular and alone and stopping.requested() is not None
            if regular or stop or self.step >= meeting:
                now = time.perf_counter()
                loss, asked, elapsed = self.check(terms, now - met)
                # from a mean that all processes share: they decide alike
                meeting, unsaved = self.step + steps_to_meeting(self.step - last, elapsed), unsaved + elapsed
                last, met = self.step, now
                stop, boundary = stop or asked, boundary or unsaved > CHECKPOINT_SECONDS
            if regular:
                self.running = [*self.running, loss][-100:]
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if boundary or stop:
                self.seconds += time.perf_counter() - started
                if self.step in points:
                    self.measure(sum(self.running) / len(self.running))
                with session():
                    self.save()
                unsaved, started = 0.0, time.perf_counter()
                met = started
            if stop and self.step < config.steps:
                bar.close()
                raise stopping.Stopped(stopping.requested() or "another process was asked to stop")
        bar.close()


def train(run: RunConfig, progress: bool = True) -> None:
    """Train one run and write config.yaml, weights/, learning_curve.csv and, last, provenance.json.

    Finished work is left as it is. A killed run continues from its last checkpoint. Raises TrainingDiverged (and
    leaves failure.json beside the results) when the loss stops being finite.
    """
    join()
    failure = run.folder / "failure.json"
    with session():
        if on_main(lambda: is_trained(run)):
            failure.unlink(missing_ok=True)  # of another configuration that was tried here
            return
    trainer = Trainer(run, progress)
    main = trainer.accelerator.is_main_process
    with ExitStack() as held:
        with session():
            held.enter_context(exclusive(trainer.folder, main))
            held.enter_context(exclusive_results(run.folder, main))
            if on_main(lambda: is_trained(run)):
                return  # by another command, since this one looked
            trainer.resume()
            step = on_main(lambda: trainer.step)
            if step != trainer.step:
                raise InputError(
                    f"{trainer.folder}: read at step {trainer.step} by one process and at {step} by another; "
                    "accepted: a file system that all processes share"
                )
        _train(trainer, failure)


def _train(trainer: Trainer, failure: Path) -> None:
    run = trainer.run
    try:
        with float32(run.train.tf32):
            trainer.train()
    except TrainingDiverged as error:
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_json(failure, {"status": f"diverged: {error}", "step": trainer.step, "config_hash": run.training_hash})
        raise
    failure.unlink(missing_ok=True)
    cost = costs_of_step(trainer)  # by every process: a loss may gather from the others
    with session():
        on_main(lambda: _write_results(trainer, run.folder, cost))


def check_features(run: RunConfig) -> None:
    """Refuse a run whose learning curve needs a feature classifier that is not there, before its first step."""
    if run.train.curve_samples and run.evaluate.features == "classifier" and not run.features_file.is_file():
        raise InputError(f"{run.features_file}: not found; accepted: run `indm-bench features {run.suite}` first")


def _write_results(trainer: Trainer, folder: Path, cost: StepCosts) -> None:
    import pandas as pd

    from bench.config import dump_config
    from bench.files import write_text_atomic
    from bench.provenance import record

    # from here to the last line the folder holds no finished run, whatever was in it before
    seals.begin(folder, seals.TRAIN)
    write_text_atomic(folder / "config.yaml", dump_config(trainer.run))
    write_text_atomic(folder / "learning_curve.csv", pd.DataFrame(trainer.curve).to_csv(index=False))
    # the weights of the last step too: what a published evaluation paired them with can then be measured
    save_weights(folder / "weights", trainer.model.state_dict(), trainer.run.resolved(), RAW_WEIGHTS)
    save_weights(folder / "weights", trainer.ema.model.state_dict(), trainer.run.resolved())
    costs: dict[str, Any] = {
        "config_hash": trainer.run.training_hash,
        "weights_sha256": file_hash(folder / "weights" / "model.safetensors"),
        "train_seconds": trainer.seconds,
        "parameters": parameter_counts(trainer.model),
        "flops_per_step": cost.flops,
        "peak_bytes": cost.peak_bytes,
        "images_seen": trainer.step * trainer.config.batch_size,
        "steps": trainer.step,
    }
    # an evaluation of these very weights stays: only a damaged file was made again
    if not evaluated_with(trainer.run, costs["weights_sha256"]):
        seals.begin(folder, seals.EVALUATE)
    weights = [f"weights/{name}" for name in (RAW_WEIGHTS, "model.safetensors")]
    seals.publish(folder, seals.TRAIN, [*seals.TRAINED_FILES, *weights], record(trainer.device) | costs)


def parameter_counts(model: Model) -> dict[str, int]:
    """Trainable parameters of each named group, and their total."""
    groups = {name: sum(p.numel() for p in ps) for phase in model.phases() for name, ps in phase.parameters.items()}
    return {"score": 0, "flow": 0} | groups | {"total": sum(groups.values())}


def costs_of_step(trainer: Trainer) -> StepCosts:
    """Mean FLOPs of all processes and largest live memory of one in an optimiser step, counted on a copy of the model.

    Phases that run at some steps only count as often as they ran: the costs are those of steps spread over the run.
    """
    model = copy.deepcopy(trainer.model).train()
    phases, flops, peak = model.phases(), [], 0
    for step in {round(share * (trainer.config.steps - 1)) for share in COST_SHARES}:
        random = StepRandom(0, step, trainer.config.batch_size, trainer.rows, trainer.device)
        x = trainer.batches(0, random)
        due = [phase for phase in phases if phase.due(step)]

        def run(due=due, x=x, random=random) -> None:
            for phase in due:
                phase.loss_fn(x, random)[0].backward()

        cost = step_costs(run)
        flops.append(cost.flops)
        peak = max(peak, cost.peak_bytes)
    return StepCosts(round(sum(flops) / len(flops)) * trainer.accelerator.num_processes, peak)
