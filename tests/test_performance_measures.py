"""The measurements of speed themselves, at toy sizes: what they count is right, and they resume."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench.errors import InputError
from bench.performance import goals, record
from bench.performance.cases import Case, Effort, cpu_cases
from bench.performance.command import run_performance
from bench.performance.evaluations import (
    ADAMS,
    CLOSE,
    MIDDLE,
    OFFICIAL,
    OURS,
    WAYS,
    compare,
    gaussian,
    in_time,
    of_network,
)
from bench.performance.gpu import WAYS as GPU_WAYS
from bench.performance.gpu import Way, accelerated_cases, gpu_cases
from bench.performance.loop import PlainStep, batch, plain_step, trained
from bench.performance.record import Outcome
from bench.performance.sizes import KINDS, SIZES, build, model_options, run_of
from bench.performance.timing import Reference, in_turn, side_by_side
from bench.step_costs import count_flops
from bench.stopping import EXIT_CODE
from models.noise import IndexedGenerator


def parameters(size, kind):
    import models

    with torch.device("meta"):
        model = models.build(model_options(size, kind))
    return [sum(p.numel() for p in part.parameters()) for part in (model.score, model.flow)]


@pytest.mark.parametrize("size, score, flow", [("S16", 1.03e6, 1.54e6), ("S32", 1.75e6, 1.53e6)])
def test_sizes_are_those_of_the_specification(size, score, flow):
    found = parameters(size, "indm-nll")
    assert found[0] == pytest.approx(score, rel=0.005)
    assert found[1] == pytest.approx(flow, rel=0.015)  # the page rounds, and the flow's count depends on the image
    assert parameters("published", "ddpmpp") == [61_804_419, 0]


def test_every_goal_belongs_to_a_case():
    names = {case.name for case in cpu_cases()}
    assert len(names) == len(cpu_cases())
    assert {f"step/{size}/{kind}" for size in goals.STEP for kind in goals.STEP[size]} <= names
    assert {f"nll/{size}/{kind}/{steps}" for size, kind, steps in goals.NLL} <= names
    assert goals.step_goal("S32", "indm-fid-local")["goal_multiple"] == pytest.approx(43 * 0.55)
    assert goals.step_goal("toy", "ddpmpp") == {}
    assert {case.group for case in gpu_cases()} == {"gpu-step", "gpu-nll", "gpu-sampling"}
    assert set(KINDS) and all(way.compile in (None, "inductor") for way in GPU_WAYS.values())


def test_the_reference_is_the_convolution_of_the_page():
    # forward and the weights' gradient: 9 x 64 x 64 multiply-adds a pixel each, and no gradient of the input
    assert count_flops(Reference()) == 2 * 2 * 16 * 32 * 32 * 64 * 64 * 9


def test_rounds_are_medians_taken_in_turn():
    order = []
    timing = in_turn(lambda: order.append("case"), 3, lambda: order.append("c"), warmup=1)
    assert order == ["case", "c"] + ["c", "case", "c"] * 3
    assert timing.record()["rounds"] == 3 and len(timing.reference) == 6
    both = side_by_side({"a": lambda: sum(range(20000)), "b": lambda: sum(range(200000))}, 5)
    assert both["b"].seconds > 3 * both["a"].seconds


def test_a_plain_step_trains():
    step = plain_step("toy", "indm-fid")
    before = [p.clone() for p in step.model.parameters()]
    weights = [p.clone() for p in step.ema.model.parameters()]
    assert math.isfinite(step()) and step.count == 1
    assert sum(not torch.equal(a, b) for a, b in zip(before, step.model.parameters())) > len(before) / 2
    assert any(not torch.equal(a, b) for a, b in zip(weights, step.ema.model.parameters()))
    assert torch.equal(batch("toy", 2, seed=3), batch("toy", 2, seed=3))
    assert not torch.equal(batch("toy", 2, seed=3), batch("toy", 2, seed=4))


def test_a_fused_step_is_the_plain_one():
    steps = [
        PlainStep(build("toy", "ddpmpp"), batch("toy", 2), run_of("ddpmpp").train, fused=fused) for fused in (0, 1)
    ]
    for step in steps:
        torch.manual_seed(0)
        step()
    for one, other in zip(*(step.model.parameters() for step in steps)):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_every_way_to_solve_finds_the_closed_form(kind):
    problem, density = gaussian(kind, count=4, side=2)
    found = compare(problem, 1e-6, density(problem.z, problem.sde.eps), density)
    assert list(found)[0] == OFFICIAL and list(found)[-4:] == [OURS, CLOSE, MIDDLE, ADAMS]
    for way, one in found.items():
        assert one["error_max"] < 5e-5, way
        assert 5 < one["evaluations"] <= one["evaluations_max"] < 500
    wrong = compare(problem, 1e-6, density(problem.z, problem.sde.eps) + 0.1, density, [OURS])
    assert wrong[OURS]["error_max"] == pytest.approx(0.1 / 12, rel=0.01)


def test_the_official_count_of_the_analytic_cases():
    """The specification's 44 (VP) and 116 (VE) evaluations of RK45 at 1e-5, on its own draws of data."""
    for kind, expected in goals.ANALYTIC.items():
        problem, _ = gaussian(kind)
        used = float(WAYS[OFFICIAL](problem, 1e-5).evaluations[0])
        assert used == pytest.approx(expected, abs=8)


def test_the_equation_in_time_by_hand():
    model = trained("toy", "ddpmpp", 2).double()
    problem = of_network(model, batch("toy", 2).double())
    # f z + g^2 noise / (2 sigma), once by hand
    t = torch.full((2,), 0.3, dtype=torch.float64)
    drift, _ = in_time(problem, torch.arange(2))(t, problem.z)
    sde = model.sde
    share = (sde.diffusion(t) ** 2 / (2 * sde.marginal(t)[1])).view(-1, 1, 1, 1)
    by_hand = sde.drift(t).view(-1, 1, 1, 1) * problem.z + share * problem.noise(problem.z, t)
    assert torch.allclose(drift, by_hand)


@pytest.mark.parametrize("group", ["step", "sampling"])
def test_the_measurements_of_a_gpu_rehearsed(group, monkeypatch):
    monkeypatch.setattr("bench.performance.gpu.SAMPLES", 2)
    cases = accelerated_cases("toy", "cpu", {"bf16": Way(bf16=True, channels_last=True)})
    case = next(case for case in cases if case.name == f"gpu-{group}/ddpmpp/bf16")
    result = case.run(Effort(rounds=1))
    assert result["times_faster"] == pytest.approx(result["plain_seconds"] / result["seconds"])
    assert result["images_per_second"] > 0 and result["peak_gib"] is None
    if group == "step":
        assert result["flops"] > 1e6
        assert result["utilisation"] == pytest.approx(result["flops"] / result["seconds"] / result["bf16_rate"])
    else:
        assert 0 < result["rms_difference"] < 0.1


def test_likelihoods_of_a_gpu_rehearsed(monkeypatch):
    monkeypatch.setattr("bench.performance.gpu.NLL_IMAGES", 2)
    monkeypatch.setattr("bench.performance.gpu.TOLERANCE", 1e-4)
    result = next(c for c in accelerated_cases("toy", "cpu", {"eager": Way()}) if "nll/ddpmpp" in c.name).run(Effort())
    assert result["images"] == 2 and result["evaluations"] > 6 and result["plain_evaluations"] > 6
    assert (result["solver"], result["tolerance"]) == ("adams", 6e-4)  # the suite's
    assert 0 < result["difference"] < 0.01
    assert not any("bf16" in case.name for case in gpu_cases() if case.group == "gpu-nll")


def test_a_measurement_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    ran = []

    def run(name, effort):
        ran.append(name)
        if name == "b" and ran.count("b") == 1:
            raise RuntimeError("no luck")
        return {"seconds": 1.0}

    cases = [Case(name, "group", lambda effort, name=name: run(name, effort)) for name in ("a", "b", "c")]
    monkeypatch.setattr(record, "cases_of", lambda device: cases)
    monkeypatch.setattr(record, "in_own_process", lambda *given: _here(record, *given[:3]))
    assert record.measure(tmp_path) == Outcome(["b"], [])
    assert record.measure(tmp_path) == Outcome([], []) and ran == ["a", "b", "c", "b"]
    assert record.measure(tmp_path, again=True, only=["c"]) == Outcome([], []) and ran[-1] == "c"
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert set(found["cases"]) == {"a", "b", "c"}
    assert found["cases"]["b"]["seconds"] == 1.0 and "problem" not in found["cases"]["b"]
    provenance = found["cases"]["a"]["provenance"]
    assert {"commit", "code", "cpu", "threads", "packages", "started"} <= set(provenance)
    assert record.measure(tmp_path, again=True, limit_seconds=1e-9) == Outcome([], ["a", "b", "c"]) and len(ran) == 5
    assert "the same command continues" in capsys.readouterr().out
    with pytest.raises(InputError, match="--only d"):
        record.measure(tmp_path, only=["d"])


def _here(module, device, name, quick):
    try:
        return module.measured(device, name, quick)
    except RuntimeError as error:
        return {"problem": str(error)}


class Clock:
    """Cases that take ``seconds`` by name on a clock of their own; one of None seconds fails after 10."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.ran = 0.0, seconds, []
        cases = [Case(name, "group", None) for name in seconds]
        monkeypatch.setattr(record, "cases_of", lambda device: cases)
        monkeypatch.setattr(record, "in_own_process", self.run)
        monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: self.now))

    def run(self, device, name, quick, patience):
        self.ran.append(name)
        taken = self.seconds[name]
        self.now += min(taken or 10, patience)
        return {"problem": "no luck"} if taken is None else {"seconds": 1.0} if taken <= patience else None


def test_what_the_limit_leaves_is_told_by_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.performance_page.write_performance", lambda out: None)
    clock = Clock(monkeypatch, {"bad": None, "a": 60, "b": 60, "c": 110})

    def command():
        clock.ran.clear()
        return run_performance(tmp_path, "cpu", limit_seconds=100)

    # the limit of 100 s and a quarter: c is ended 15 s after it began, and begun anew
    assert command() == EXIT_CODE and clock.ran == ["bad", "a", "b"] and clock.now == 125
    assert "b" not in record.load_record(tmp_path / "cpu.json")["cases"]
    # whole this time; what failed before comes last, and is not waited for
    assert command() == EXIT_CODE and clock.ran == ["b", "c"] and clock.now == 250
    assert command() == 1 and clock.ran == ["c"]
    clock.seconds["bad"] = 5
    assert command() == 0 and clock.ran == ["bad"]
    assert command() == 0 and clock.ran == []


def test_a_case_longer_than_the_whole_limit_fails(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, {"long": 200, "short": 1})
    assert record.measure(tmp_path, limit_seconds=100) == Outcome(["long"], ["short"])
    assert record.load_record(tmp_path / "cpu.json")["cases"]["long"] == {"problem": "not finished after 125 s"}
    assert record.measure(tmp_path, limit_seconds=100) == Outcome(["long"], []) and clock.ran == [
        "long",
        "short",
        "long",
    ]
    assert record.measure(tmp_path) == Outcome([], [])  # without a limit it has the time of any case
    clock.seconds["long"] = 2000
    assert record.measure(tmp_path, again=True, only=["long"]).failed == ["long"]


def test_a_case_that_takes_too_long_is_ended():
    assert record.in_own_process("cpu", "step/S32/indm-fid", False, 0.05) is None


def test_a_case_runs_in_a_process_of_its_own(monkeypatch):
    name = "analytic/vp"
    found = record.in_own_process("cpu", name, True)
    assert found["group"] == "analytic" and found["ways"][OURS]["evaluations"] > 0
    assert record.in_own_process("cpu", "none", True)["problem"].startswith("StopIteration")


def test_sizes_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="size = 'S8': accepted: S16"):
        model_options("S8", "ddpmpp")
    with pytest.raises(InputError, match="kind = 'x': accepted: ddpmpp"):
        model_options("S16", "x")
    assert SIZES["S32"].shape == (3, 32, 32)
    index = torch.arange(2)
    model = build("toy", "indm-ve").eval()
    assert model.sample(2, steps=2, sampler="ddim", generator=IndexedGenerator(0, "s", index)).shape == (2, 3, 8, 8)
