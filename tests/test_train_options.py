"""Options of training that change no expectation: averages by group, raw weights, layout, bfloat16, compilation."""

import pytest
import torch

import bench.acceleration
from bench.acceleration import check_compiler, compile_networks, float32
from bench.config import load_suite
from bench.errors import InputError
from bench.evaluate import load_model, protocol
from bench.train import Trainer, steps_to_meeting, train
from models.noise import StepRandom

CPU = torch.device("cpu")
SMALL = ["train.batch_size=16", "train.steps=6", "train.curve=1", "train.curve_images=2", "train.curve_samples=0"]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path / "checkpoints"))


def run_of(variant="indm-vp-nll", dataset="digits", *settings):
    return load_suite("smoke", [*SMALL, *settings]).runs(variant, 0, dataset)[0]


def steps(run, count=3):
    """A trainer after some steps, and the loss of each."""
    trainer = Trainer(run, progress=False)
    trainer.model.train()
    return trainer, [float(trainer.train_step()["loss"]) for _ in range(count)]


def test_each_group_has_the_decay_it_asks_for():
    run = run_of("indm-vp-nll", "checkerboard", "train.ema=0.5", "train.ema_rates={flow: 0.15}")
    trainer = Trainer(run, progress=False)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    live = {group: next(p for p in parameters if p.numel() > 1) for group, parameters in trainer.groups.items()}
    expected = {group: p.detach().double().clone() for group, p in live.items()}
    for n in range(1, 7):
        trainer.train_step()
        for group, rate in (("score", 0.5), ("flow", 0.15)):
            decay = min(rate, (1 + n) / (10 + n))
            expected[group] = decay * expected[group] + (1 - decay) * live[group].detach().double()
    averaged = dict(trainer.ema.model.named_parameters())
    for group, value in expected.items():
        torch.testing.assert_close(averaged[names[id(live[group])]].double(), value, rtol=0, atol=1e-6)
        assert not torch.equal(averaged[names[id(live[group])]], live[group])


def test_raw_groups_are_saved_and_measured_as_the_last_step_left_them():
    run = run_of("indm-vp-nll", "checkerboard", "train.raw_groups=[flow]")
    train(run, progress=False)
    trainer = Trainer(run, progress=False)
    assert trainer.resume()
    saved, live, score = load_model(run), trainer.model, trainer.ema.model.score.state_dict()
    assert all(torch.equal(value, live.flow.state_dict()[k]) for k, value in saved.flow.state_dict().items())
    assert all(torch.equal(value, score[k]) for k, value in saved.score.state_dict().items())
    assert any(not torch.equal(value, live.score.state_dict()[k]) for k, value in score.items())
    assert protocol(run, saved)["weights"] == "ema, raw flow"
    assert protocol(run_of("indm-vp-nll", "checkerboard"), saved)["weights"] == "ema"


@pytest.mark.parametrize("variant", ["indm-vp-nll", "ncsnpp-ve"])
def test_channels_last_changes_rounding_alone(variant):
    _, losses = steps(run_of(variant))
    other, same = steps(run_of(variant, "digits", "train.memory_format=channels_last"))
    kernels = [p for p in other.model.parameters() if p.ndim == 4 and min(p.shape[1], p.shape[2]) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert same == pytest.approx(losses, rel=1e-4)


def test_channels_last_resumes_bit_for_bit():
    run = run_of("indm-vp-nll", "digits", "train.memory_format=channels_last")
    whole, _ = steps(run, 4)
    first, _ = steps(run, 2)
    first.save()
    resumed = Trainer(run, progress=False)
    assert resumed.resume()
    for optimizer in resumed.optimizers.values():
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].stride() == parameter.stride()
    resumed.model.train()
    for _ in range(2):
        resumed.train_step()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize("variant", ["indm-vp-nll", "indm-vp-fid", "indm-ve", "indm-vp-glow"])
def test_bfloat16_computes_the_same_loss(variant):
    """Over several steps' draws, so that no term is near zero; networks do run in bfloat16, losses do not."""
    exact, rounded = (Trainer(run_of(variant, "digits", f"train.mixed_precision={p}"), False) for p in ("no", "bf16"))
    seen = set()
    net = rounded.model.score.net
    net.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    totals = []
    for trainer in (exact, rounded):
        trainer.model.train()
        total = dict.fromkeys(("loss", "flow"), 0.0)
        for step in range(4):
            random = StepRandom(5, step, 16)
            for index, phase in enumerate(trainer.phases):
                torch.manual_seed(0)  # of dropout
                loss, terms = trainer.step_module(index, trainer.batches(step, random), random)
                assert loss.dtype == torch.float32 and {v.dtype for v in terms.values()} == {torch.float32}
                total["loss"] += float(loss.detach())
                total["flow"] += float(terms.get("flow", 0.0))
        totals.append(total)
    assert seen == {torch.bfloat16}
    assert totals[1]["loss"] == pytest.approx(totals[0]["loss"], rel=0.02)
    # the log-determinant alone, nats/dim: of weights near their start it is small
    assert totals[1]["flow"] == pytest.approx(totals[0]["flow"], rel=0.02, abs=2e-3)


def test_bfloat16_leaves_weights_and_everything_measured_in_float32():
    run = run_of("indm-vp-nll", "digits", "train.mixed_precision=bf16")
    trainer, losses = steps(run, 2)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    tensors = [*trainer.model.state_dict().values(), *trainer.ema.model.state_dict().values()]
    tensors += [value for o in trainer.optimizers.values() for state in o.state.values() for value in state.values()]
    assert {value.dtype for value in tensors if value.is_floating_point()} == {torch.float32}
    model, x = trainer.ema.model, trainer.batches(0, StepRandom(0, 0, 16))[:4]
    z, log_det = model.encode(x)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=1e-4)
    double = torch.float64
    exact = model.to(double).encode(x.to(double))
    torch.testing.assert_close(z.double(), exact[0], rtol=0, atol=1e-5)  # bfloat16 would be off by 1e-2


def test_tf32_is_on_in_training_only_and_put_back(monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, seen = (matmul.allow_tf32, cudnn.allow_tf32), {}
    run = run_of("ddpmpp-vp", "checkerboard", "train.tf32=true", "train.steps=2")
    step, measure = Trainer.train_step, bench.evaluate.curve_point

    def noted(name, function):
        def call(*args):
            seen[name] = (matmul.allow_tf32, cudnn.allow_tf32)
            return function(*args)

        return call

    monkeypatch.setattr(Trainer, "train_step", noted("step", step))
    monkeypatch.setattr(bench.evaluate, "curve_point", noted("curve", measure))
    train(run, progress=False)
    assert seen == {"step": (True, True), "curve": (False, False)}
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    with float32(tf32=False):
        assert not matmul.allow_tf32 and not cudnn.allow_tf32


@pytest.mark.parametrize(("variant", "dataset"), [("ddpmpp-vp", "digits"), ("indm-vp-nll", "checkerboard")])
def test_networks_compile_as_one_graph(variant, dataset):
    """Traced whole, weights and results unchanged."""
    trainer = Trainer(run_of(variant, dataset), progress=False)
    names = set(trainer.model.state_dict())
    x, random = trainer.batches(0, StepRandom(0, 0, 16)), StepRandom(0, 0, 16)

    def gradients():
        torch.manual_seed(0)
        trainer.model.zero_grad()
        loss = trainer.phases[0].loss_fn(x, random)[0]
        loss.backward()
        return [loss.detach()] + [p.grad for p in trainer.model.parameters() if p.grad is not None]

    expected = [value.clone() for value in gradients()]
    networks = compile_networks(trainer.model, backend="eager")
    assert networks == [trainer.model.score.net]
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)
    assert set(trainer.model.state_dict()) == names


def test_compiled_training_differs_by_rounding_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    plain, expected = steps(run_of("indm-vp-nll", "checkerboard"))
    asked = run_of("indm-vp-nll", "checkerboard", "train.compile=true")
    try:
        check_compiler("indm", CPU)
    except InputError:  # a machine without a C++ compiler refuses, and computes nothing
        with pytest.raises(InputError, match="train.compile = true: no C\\+\\+ compiler found"):
            steps(asked)
        return
    trainer, losses = steps(asked)
    assert losses == pytest.approx(expected, rel=1e-4)
    for own, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


def test_a_network_that_breaks_its_graph_is_refused():
    class Breaking(torch.nn.Module):
        time_input = "log_ratio"

        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    network = Breaking()
    compile_networks(network, backend="eager")
    with pytest.raises(Exception, match="graph_break"):
        network(torch.ones(2))


def test_compilation_that_cannot_work_is_refused_before_any_compute(monkeypatch):
    with pytest.raises(InputError, match="train.compile = true: not with model.name = sbp; accepted: with indm"):
        check_compiler("sbp", CPU)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/such/compiler",))
    monkeypatch.setattr(bench.train, "load", lambda name: pytest.fail("data were read"))
    with pytest.raises(InputError, match="train.compile = true: no C\\+\\+ compiler found"):
        Trainer(run_of("ddpmpp-vp", "digits", "train.compile=true"), progress=False)


def test_long_steps_are_saved_by_the_clock(monkeypatch):
    """Between checkpoints by count no more than a span of time passes; what is computed does not change."""
    run, saved = run_of("ddpmpp-vp", "checkerboard", "train.checkpoint_every=1000"), []
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: (saved.append(self.step), save(self)))
    plain = Trainer(run, progress=False)
    plain.train()
    assert saved == [6]
    monkeypatch.setattr(bench.train, "CHECKPOINT_SECONDS", 0.0)
    clocked = Trainer(run, progress=False)
    clocked.train()
    assert saved[1:] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(plain.model.parameters(), clocked.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_processes_meet_within_seconds_whatever_a_step_takes():
    assert [steps_to_meeting(*given) for given in ((10, 5.0), (10, 60.0), (0, 1.0), (50, 0.5))] == [6, 1, 3, 300]
