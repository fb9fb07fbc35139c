"""The training loop: resuming, averaging, schedules, divergence; a run killed at any moment ends as an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny_run

from bench.averages import Ema
from bench.checkpoint import exclusive, load_checkpoint, published
from bench.config import load_suite
from bench.data import load
from bench.errors import InputError
from bench.train import Batches, Trainer, TrainingDiverged, curve_steps, is_trained, learning_rate, train
from models.noise import StepRandom


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path


def weights_hash(run):
    return sha256((run.folder / "weights" / "model.safetensors").read_bytes()).hexdigest()


def curve(run):
    """The learning curve without its wall-clock column."""
    import pandas as pd

    return pd.read_csv(run.folder / "learning_curve.csv").drop(columns="seconds")


@pytest.mark.parametrize("variant", ["indm-vp-nll", "indm-vp-fid"])
def test_an_interrupted_run_resumes_bit_for_bit(variant, folders, monkeypatch):
    run = tiny_run(variant)
    train(run, progress=False)
    expected, expected_curve = weights_hash(run), curve(run)

    monkeypatch.setenv("INDM_BENCH_RUNS", str(folders / "again"))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(folders / "again-checkpoints"))
    broken = Trainer(run, progress=False)
    whole_step = broken.train_step

    def stop_midway():
        if broken.step == 37:
            raise KeyboardInterrupt
        return whole_step()

    broken.train_step = stop_midway
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = Trainer(run, progress=False)
    assert resumed.resume() and resumed.step == 30
    train(run, progress=False)
    assert weights_hash(run) == expected
    assert curve(run).equals(expected_curve)


def test_kill_9_then_the_same_command_ends_with_the_same_hash(folders):
    """Real processes, really killed, at several moments of one training."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tiny_runs import tiny_run\n"
        "from bench.train import train\n"
        "train(tiny_run(extra=['train.steps=400', 'train.checkpoint_every=20']), progress=False)\n"
    )
    here = str(Path(__file__).parent)

    def start(runs):
        environment = os.environ | {
            "INDM_BENCH_RUNS": str(folders / runs),
            "INDM_BENCH_CHECKPOINTS": str(folders / f"{runs}-checkpoints"),
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        return subprocess.Popen([sys.executable, "-c", script, here], env=environment, cwd=Path(here).parent)

    run = tiny_run(extra=["train.steps=400", "train.checkpoint_every=20"])
    assert start("whole").wait(240) == 0
    checkpoints = folders / "killed-checkpoints" / run.training_hash
    seen, kills = 0, 0
    for wanted in (40, 200):
        process = start("killed")
        deadline = time.time() + 200
        while time.time() < deadline and process.poll() is None:
            newest = published(checkpoints)
            if newest and int(newest[-1].name) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait(60)
        seen = max(seen, wanted)
    assert start("killed").wait(240) == 0
    assert kills >= 1
    names = [
        f"{kind}/{run.folder.relative_to(folders / 'runs')}/weights/model.safetensors" for kind in ("whole", "killed")
    ]
    first, second = (sha256((folders / name).read_bytes()).hexdigest() for name in names)
    assert first == second


def test_finished_work_is_left_alone():
    run = tiny_run()
    train(run, progress=False)
    stamp = (run.folder / "provenance.json").stat().st_mtime_ns
    train(run, progress=False)
    assert (run.folder / "provenance.json").stat().st_mtime_ns == stamp


def test_a_damaged_checkpoint_falls_back_to_the_one_before():
    run = tiny_run()
    trainer = Trainer(run, progress=False)
    for _ in range(20):
        trainer.train_step()
        if trainer.step % 10 == 0:
            trainer.save()
    newest = published(trainer.folder)[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    tensors, meta = load_checkpoint(trainer.folder)
    assert meta["step"] == 10 and tensors


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(monkeypatch):
    run = tiny_run()
    trainer = Trainer(run, progress=False)
    loss = trainer.step_module.phase_losses[0]

    def poisoned(x, random):
        value, terms = loss(x, random)
        return (value * float("nan"), terms) if random.step == 34 else (value, terms)

    trainer.step_module.phase_losses[0] = poisoned
    with pytest.raises(TrainingDiverged, match=r"step 35: .*joint.score = .*joint.flow = "):
        trainer.train()
    tensors, meta = load_checkpoint(trainer.folder)
    assert meta["step"] == 30
    assert all(torch.isfinite(v).all() for v in tensors.values())


def test_divergence_leaves_a_record(monkeypatch):
    run = tiny_run(extra=["train.learning_rates.score=1.0e+30", "train.clip=null", "train.schedule=constant"])
    with pytest.raises(TrainingDiverged):
        train(run, progress=False)
    assert "diverged" in json.loads((run.folder / "failure.json").read_text())["status"]
    assert not (run.folder / "provenance.json").exists()


def test_ema_is_the_stated_average_and_is_what_is_saved():
    run = tiny_run("ddpmpp-vp")
    trainer = Trainer(run, progress=False)
    name, live = next(iter(trainer.model.named_parameters()))
    expected = live.detach().double().clone()
    for n in range(1, 16):
        trainer.train_step()
        decay = min(run.train.ema, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * live.detach().double()
    averaged = dict(trainer.ema.model.named_parameters())[name]
    assert torch.allclose(averaged.double(), expected, atol=1e-6)
    assert not torch.allclose(averaged, live)
    train(run, progress=False)
    from bench.evaluate import load_model

    final = Trainer(run, progress=False)
    final.resume()
    saved = load_model(run).state_dict()
    assert all(torch.equal(saved[k], v) for k, v in final.ema.model.state_dict().items())
    assert any(not torch.equal(saved[k], v) for k, v in final.model.state_dict().items())


def test_ema_copies_buffers():
    net = torch.nn.BatchNorm1d(3)
    ema = Ema(net, 0.9)
    net(torch.randn(8, 3) + 5)
    ema.update()
    assert torch.equal(ema.model.running_mean, net.running_mean)


def test_batches_are_a_function_of_seed_and_step():
    run = load_suite("digits").runs("ddpmpp-vp", 0)[0]
    data = load("digits")
    first, second = (Batches(data, run.train, 0, torch.device("cpu")) for _ in range(2))
    size = run.train.batch_size
    for _ in range(3):
        first._rows(0)
    assert torch.equal(first._rows(40 * size), second._rows(40 * size))
    epoch = torch.cat([second._rows(k * 100)[:100] for k in range(15)])
    assert sorted(epoch.tolist()) == list(range(1500))  # each image once an epoch
    whole = first(7, StepRandom(0, 7, size))
    halves = [second(7, StepRandom(0, 7, size, rows)) for rows in ((0, size // 2), (size // 2, size // 2))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, first(8, StepRandom(0, 8, size)))


def test_learning_rate_and_curve_points():
    run = tiny_run(extra=["train.schedule=cosine"])
    config = run.train
    rates = [learning_rate(config, 1.0, k) for k in range(config.steps)]
    assert rates[0] == pytest.approx(1 / config.warmup, rel=0.01)
    assert max(rates) == pytest.approx(1.0, rel=0.05)
    assert rates[-1] < 0.01
    points = curve_steps(config)
    assert points[-1] == config.steps and points == sorted(set(points)) and len(points) == config.curve


def test_learning_curve_counts_images_and_falls():
    run = tiny_run(
        "ddpmpp-vp", extra=["train.steps=300", "train.learning_rates.score=5.0e-3", "train.curve_images=256"]
    )
    train(run, progress=False)
    rows = curve(run)
    assert (rows["images"] == rows["step"] * run.train.batch_size).all()
    assert np.isfinite(rows[["train_loss", "nelbo_nats", "nll_nats"]].to_numpy()).all()
    assert rows["nelbo_nats"].iloc[-1] < rows["nelbo_nats"].iloc[0]


def test_provenance_counts_the_parameters():
    run = tiny_run()
    train(run, progress=False)
    record = json.loads((run.folder / "provenance.json").read_text())
    model = Trainer(run, progress=False).model
    assert record["parameters"]["flow"] == sum(p.numel() for p in model.flow.parameters())
    assert record["parameters"]["score"] == sum(p.numel() for p in model.score.parameters() if p.requires_grad)
    assert record["images_seen"] == 60 * 32
    assert record["flops_per_step"] > 0


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    """A finite loss can have an infinite gradient: the weights it would give must never reach a checkpoint."""
    run = tiny_run()
    trainer = Trainer(run, progress=False)
    loss = trainer.step_module.phase_losses[0]
    weight = next(trainer.model.flow.parameters())

    def poisoned(x, random):
        value, terms = loss(x, random)
        # sqrt(0) is 0 with an infinite slope
        return (value + (0 * weight.sum()).sqrt(), terms) if random.step == 34 else (value, terms)

    trainer.step_module.phase_losses[0] = poisoned
    with pytest.raises(TrainingDiverged, match="gradient norm of flow = nan"):
        trainer.train()
    tensors, meta = load_checkpoint(trainer.folder)
    assert meta["step"] == 30
    assert all(torch.isfinite(v).all() for v in tensors.values())


def test_results_that_do_not_belong_together_are_not_finished():
    """Weights of another run, or half a record, beside a good one: the run is trained again, not believed."""
    run = tiny_run()
    train(run, progress=False)
    expected = weights_hash(run)
    weights = run.folder / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert not is_trained(run)
    train(run, progress=False)
    assert is_trained(run) and weights_hash(run) == expected
    record = run.folder / "provenance.json"
    record.write_text(record.read_text()[:100])
    assert not is_trained(run)


def test_a_second_process_on_the_same_run_is_refused():
    run = tiny_run()
    trainer = Trainer(run, progress=False)
    with exclusive(trainer.folder), pytest.raises(InputError, match="another process is training this run"):
        train(run, progress=False)
    train(run, progress=False)
    assert is_trained(run)


def test_a_failure_of_another_configuration_does_not_condemn_a_finished_run():
    run = tiny_run()
    train(run, progress=False)
    broken = tiny_run(extra=["train.learning_rates.score=1.0e+30", "train.clip=null", "train.schedule=constant"])
    with pytest.raises(TrainingDiverged):
        train(broken, progress=False)
    assert (run.folder / "failure.json").exists()
    train(run, progress=False)
    assert not (run.folder / "failure.json").exists()
