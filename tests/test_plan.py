"""What `indm-bench plan` says, against counts of its own: arithmetic, memory, files on disk, sums over runs."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import plan, plan_probe
from bench.checkpoint import KEEP, published
from bench.config import load_suite
from bench.data import load
from bench.errors import InputError
from bench.plan import Cost, Row, makespan, measure, stage_seconds, totals
from bench.plan_probe import Probe, extrapolated
from bench.step_costs import step_costs
from bench.train import Trainer, train

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHORT = ["train.steps=6", "train.checkpoint_every=2", "train.curve=1", "train.curve_images=4", "train.curve_samples=0"]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.0)  # the smallest sizes alone
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path / "checkpoints"))


def smoke(variant, dataset, *settings):
    return load_suite("smoke", settings).runs(variant, 0, dataset)[0]


@pytest.mark.parametrize("variant", ["ddpmpp-vp", "indm-vp-fid", "ncsn", "ddpm", "diffflow", "sbp-dsb", "indm-vp-glow"])
def test_every_kind_of_model_can_be_planned(variant):
    cost = measure(smoke(variant, "checkerboard"))
    assert cost.images == 100 * 256
    assert 0 < cost.train < 1e5 and 0 < cost.evaluate < 1e5 and cost.flops > 0 and cost.memory > cost.weights / 2 > 0


def test_arithmetic_of_a_step_is_that_of_the_whole_batch():
    run = smoke("ddpmpp-vp", "checkerboard")
    probe = Probe(run, load("checkerboard"), CPU, 0.0)
    counted = FlopCounterMode(display=False)
    trainer = Trainer(run, progress=False)
    with counted:
        trainer.train_step()
    # a Gaussian matrix product more or less has no weight here
    assert probe.training((0.0,)).flops == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_memory_is_that_of_a_step_of_the_whole_batch():
    run = smoke("ddpmpp-vp", "digits")
    probe = Probe(run, load("digits"), CPU, 0.0)
    whole = step_costs(lambda: probe._step(run.train.batch_size, 10)).peak_bytes
    state = 2 * probe.state_bytes() + 2 * probe.trained_bytes()
    assert probe.memory() - state == pytest.approx(whole, rel=0.15)


def test_disk_is_what_a_run_leaves():
    run = smoke("indm-vp-nll", "digits", *SHORT)
    cost = measure(run)
    train(run, progress=False)
    weights = sum(path.stat().st_size for path in (run.folder / "weights").iterdir())
    assert weights == pytest.approx(cost.weights, rel=0.2)  # and headers, which small networks feel
    kept = published(Trainer(run, progress=False).folder)
    assert len(kept) == KEEP
    states = sum((path / "state.safetensors").stat().st_size for path in kept)
    assert states == pytest.approx(cost.checkpoints, rel=0.2)


def test_a_cost_grows_along_the_straight_line_through_the_last_two():
    assert extrapolated([(2, 3.0)], 8) == 12.0
    assert extrapolated([(2, 5.0), (16, 19.0)], 30) == 33.0
    assert extrapolated([(2, 5.0), (16, 4.0)], 256) == 4.0  # a call's fixed cost, and noise


def test_work_that_is_too_slow_is_timed_on_few_items(monkeypatch):
    """A clock that the work itself moves: 2 s a call and 0.5 s an item."""
    probe, now, sizes = Probe.__new__(Probe), [0.0], []
    monkeypatch.setattr(plan_probe.Probe, "_now", lambda self: now[0])
    probe.device = CPU

    def work(n):
        sizes.append(n)
        now[0] += 2 + 0.5 * n

    for seconds, largest in ((1e-3, 2), (60.0, 16), (1e4, 100)):
        probe.seconds = seconds
        sizes.clear()
        found = probe._scaled(work, 100)
        assert max(sizes) == largest
        assert found == pytest.approx(52 if largest > 2 else 150)  # two sizes tell the call's part from the items'


def test_a_timed_step_takes_its_batch_as_training_does(monkeypatch):
    """No image is gathered, dequantised or sent anew by the probe itself."""
    run = smoke("ddpmpp-vp", "digits")
    probe, seen = Probe(run, load("digits"), CPU, 0.0), []
    monkeypatch.setattr(plan_probe, "dequantise", None)
    for phase in probe.phases:
        original = phase.loss_fn
        wrapped = lambda x, random, original=original: (seen.append(x), original(x, random))[1]  # noqa: E731
        object.__setattr__(phase, "loss_fn", wrapped)
    size = run.train.batch_size
    probe._step(size, 3)
    wanted = probe.batches(3, plan_probe.StepRandom(run.seed, 3, size, (0, size), CPU))
    assert len(wanted) == size and torch.equal(seen[0], wanted)
    monkeypatch.undo()
    assert probe.points(5) is probe.points(5)


def row(variant, dataset, seeds, seconds):
    cost = Cost(1000, seconds, seconds, 1e12, 10**6, 2 * 10**6, 3 * 10**6, 10**5, 4 * 10**6)
    return Row(variant, dataset, seeds, cost)


def test_totals_are_sums_over_seeds_and_stages_hold_a_variant_whole():
    rows = [row("a", "x", 3, 10), row("a", "y", 3, 5), row("b", "x", 1, 40), row("b", "y", 1, 20)]
    assert stage_seconds(rows) == [90, 120]
    first, disk, memory = totals(rows, "a device", 1)
    assert "8,000 images" in first and "0.008 PFLOP" in first and "3 min 30 s (0.06 hours) on a device" in first
    kept = 8 * (2.0 + 3.0 + 0.1) + 4 * plan.REPORT_BYTES / 1e6
    assert f"disk: {kept:.3g} MB = weights 16 MB, checkpoints 24 MB" in disk
    assert memory.startswith("memory: 1 MB")
    assert "1 min 45 s" in totals(rows, "two", 2)[0]


def test_the_last_device_ends_when_the_longest_stages_go_first():
    assert makespan([3, 3, 2, 2, 2], 2) == 7
    assert makespan([5, 1, 1, 1], 2) == 5
    assert makespan([4, 1], 8) == 4


def test_a_data_set_that_is_not_here_is_planned_for_by_its_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_DATA", str(tmp_path))
    data, tests, found = plan.data_for(load_suite("cifar10").runs("ddpmpp-vp", 0)[0])
    assert not found and tests == 10_000 and data.shape == (3, 32, 32) and math.prod(data.train.shape) > 0


def test_an_image_folder_that_is_not_here_is_planned_for_by_what_its_suite_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = load_suite("celeba64")
    run = suite.runs("ddpmpp-vp", 0)[0]
    with pytest.raises(InputError, match="celeba64"):
        plan.data_for(run)
    data, tests, found = plan.data_for(run, suite.folder)
    assert not found and tests == 19_962 and data.shape == (3, 64, 64)
    assert data.levels == 256 and data.test.unique().numel() == 256


def test_what_a_suite_says_of_its_folder_is_no_setting(tmp_path, monkeypatch):
    text = (ROOT / "experiments" / "celeba64.yaml").read_text()
    (tmp_path / "experiments").mkdir()
    path = tmp_path / "experiments" / "celeba64.yaml"
    monkeypatch.chdir(tmp_path)

    def hashes(said):
        path.write_text(text.replace("  folder: {shape: [3, 64, 64], test: 19962}\n", said))
        return [(run.hash, run.training_hash) for run in load_suite("celeba64").runs()]

    assert hashes("") == hashes("  folder: {shape: [1, 8, 8], test: 2}\n") and len(hashes("")) == 5
    for said, problem in (
        ("{shape: [64, 64], test: 1}", r"folder\.shape"),
        ("{shape: [3, 64, 0], test: 1}", r"folder\.shape"),
        ("{shape: [3, 64, 64], test: 0}", r"folder\.test = 0"),
        ("{shape: [3, 64, 64]}", r"folder\.test: missing"),
        ("{shape: [3, 64, 64], test: 1, train: 1}", r"folder\.train: unknown key"),
    ):
        with pytest.raises(InputError, match=problem):
            hashes(f"  folder: {said}\n")
    text = text.replace('"folder:data/celeba64": {}', "cifar10: {}")
    with pytest.raises(InputError, match="folder: only of a suite whose data set is folder:<path>"):
        hashes("  folder: {shape: [3, 64, 64], test: 1}\n")
