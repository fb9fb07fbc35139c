"""Errors planted on purpose: the part of the battery that watches over each must go out of bounds, and only then."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from mutated_checks import check_holm, check_path_densities
from safetensors.torch import load_file
from tiny_runs import tiny_run

from bench import averages, likelihood, statistics, train
from bench.studies import paths
from bench.truth import component_rows, likelihood_rows
from bench.truth.averages import average_rows, weighted_average
from bench.truth.rows import BOUND, Case
from models import integrators, time_sampling
from models.indm import INDM
from models.noise import normal
from models.samplers import SAMPLERS
from models.sde import VESDE, LinearSDE, SubVPSDE


def wrap(monkeypatch, owner, name, change):
    """Replace ``owner.name`` by a function that passes its result and arguments through ``change``."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs), *args))


def residual_without_entropy(monkeypatch):
    wrap(monkeypatch, INDM, "_truncate", lambda result, self, z0, *_: (result[0], result[1] + 0.5 * z0[0].numel()))


def residual_of_two_draws(monkeypatch):
    """As the published code evaluates it: the score at one draw of noise, the decoder asked for another."""

    def truncate(self, z0, generator):
        t = torch.full((len(z0),), self.sde.eps, dtype=z0.dtype)
        z_eps = self.perturb(z0, t, normal(z0.shape, generator, z0.device, z0.dtype))
        other, dims = normal(z0.shape, generator, z0.device, z0.dtype), z0[0].numel()
        square = (other - self.noise(z_eps, t)).square().sum(1)
        return z_eps, 0.5 * (square - dims) - dims * self.sde.log_alpha(self.sde.eps)

    monkeypatch.setattr(INDM, "_truncate", truncate)


def residual_dropped(monkeypatch):
    wrap(monkeypatch, INDM, "_truncate", lambda result, *_: (result[0], torch.zeros_like(result[1])))


def prior_a_tenth_too_wide(monkeypatch):
    def change(_, sde, *__):
        sde.prior_std = 1.1 * sde.sigma_max

    wrap(monkeypatch, VESDE, "__init__", change)


def probes_summed(monkeypatch):
    wrap(monkeypatch, integrators, "probed_trace", lambda trace, output, leaf, probes: trace * len(probes))


def log_determinant_flipped(monkeypatch):
    wrap(monkeypatch, INDM, "encode", lambda result, *_: (result[0], -result[1]))


def scale_log_determinant_dropped(monkeypatch):
    def change(result, self, x, *_):
        return result[0], result[1] + x[0].numel() * torch.tensor(self.scale).log().to(x)

    wrap(monkeypatch, INDM, "encode", change)


def offset_missing(monkeypatch):
    def change(value, nats, dims, levels, *_):
        return value - torch.tensor(levels / 2, dtype=torch.float64).log2().item()

    wrap(monkeypatch, likelihood, "bits_per_dim", change)


def offset_of_the_unit_interval(monkeypatch):
    monkeypatch.setattr(likelihood, "bits_per_dim", lambda *args: component_rows.bits_per_dim(*args, data_range=1.0))


def normaliser_five_percent_off(monkeypatch):
    wrap(monkeypatch, LinearSDE, "importance_time", lambda result, *_: (result[0], 1.05 * result[1]))


def normaliser_of_debiased_times_five_percent_off(monkeypatch):
    wrap(monkeypatch, time_sampling, "debiased_share", lambda result, *_: (result[0], 1.05 * result[1]))


def drift_integral_dropped(monkeypatch):
    monkeypatch.setattr(LinearSDE, "log_alpha", lambda self, t: 0.0)


def subvp_with_the_diffusion_of_vp(monkeypatch):
    monkeypatch.setattr(SubVPSDE, "diffusion", lambda self, t: self.beta(t).sqrt())


def one_drift_not_a_number(monkeypatch):
    wrap(monkeypatch, SubVPSDE, "drift", lambda result, *_: result.where(result < result.max(), torch.nan))


def corrector_step_one_percent_short(monkeypatch):
    original = SAMPLERS["predictor_corrector"]
    monkeypatch.setitem(
        SAMPLERS, "predictor_corrector", lambda *args, snr=0.16, **options: original(*args, snr=0.995 * snr, **options)
    )


def average_not_applied(monkeypatch):
    @torch.no_grad()
    def update(self):
        self.updates += 1
        for owns, lives in [*self._averaged.values(), *(([own], [live]) for own, live in self._copied)]:
            torch._foreach_copy_(owns, lives)

    monkeypatch.setattr(averages.Ema, "update", update)


def average_without_warm_up(monkeypatch):
    @torch.no_grad()
    def update(self):
        for decay, (owns, lives) in self._averaged.items():
            torch._foreach_lerp_(owns, lives, 1 - decay)
        for own, live in self._copied:
            own.copy_(live)

    monkeypatch.setattr(averages.Ema, "update", update)


def bound(sde, setting="identity flow"):
    return lambda: likelihood_rows.bound_rows(sde, (setting,))


def ode(sde, setting="identity flow"):
    return lambda: likelihood_rows.ode_rows(sde, (setting,))


CHECKS = {
    "bound of vp": bound("vp"),
    "bound of ve": bound("ve"),
    "bound behind a nonlinear flow": bound("vp", "nonlinear flow"),
    "bound behind a scale": bound("vp", "scale 2.5"),
    "likelihood of ve": ode("ve"),
    "training losses": lambda: likelihood_rows.training_rows("ve", ("scale 2.5",)),
    "process of sub-VP": lambda: component_rows.process_rows("subvp"),
    "units": lambda: component_rows.offset_rows(200),
    "laws of samplers": lambda: component_rows.sampler_rows("ve"),
    "averages": average_rows,
    "proposals of vp": lambda: likelihood_rows.proposal_rows("vp", ("debiased",)),
}

MUTATIONS = [
    (residual_without_entropy, "bound of vp", "NELBO reconstruction"),
    (residual_of_two_draws, "bound of ve", "NELBO reconstruction"),
    (residual_dropped, "likelihood of ve", "NLL, exact trace"),
    (prior_a_tenth_too_wide, "bound of ve", "NELBO prior, each image"),
    (prior_a_tenth_too_wide, "likelihood of ve", "NLL before correction, exact trace, each image"),
    (probes_summed, "likelihood of ve", "NLL before correction, 4 probes"),
    (log_determinant_flipped, "bound behind a nonlinear flow", "NELBO"),
    (scale_log_determinant_dropped, "bound behind a scale", "NELBO"),
    (offset_missing, "units", "uniform law is log2(levels)"),
    (offset_of_the_unit_interval, "units", "a known law of pixels"),
    (normaliser_five_percent_off, "training losses", "bound loss"),
    (normaliser_five_percent_off, "process of sub-VP", "Z from 1e-05, published"),
    (normaliser_of_debiased_times_five_percent_off, "proposals of vp", "NELBO diffusion, debiased times"),
    (drift_integral_dropped, "bound of vp", "NELBO diffusion"),
    (subvp_with_the_diffusion_of_vp, "process of sub-VP", "diffusion g"),
    (one_drift_not_a_number, "process of sub-VP", "drift f"),
    (corrector_step_one_percent_short, "laws of samplers", "law at 16 steps, recursion"),
    (average_not_applied, "averages", "exponential average"),
    (average_without_warm_up, "averages", "exponential average"),
]


@cache
def unmutated(check):
    return tuple(CHECKS[check]())


@pytest.fixture(scope="module", autouse=True)
def sound():
    """All checks before any mutation, so that a failure below is the mutation's."""
    return {check: unmutated(check) for check in CHECKS}


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_mutation_all_rows_are_within_bounds(check):
    assert unmutated(check) and [row for row in unmutated(check) if not row.ok] == []


@pytest.mark.parametrize(
    ("mutate", "check", "estimator"), [pytest.param(*case, id=f"{case[0].__name__}, {case[1]}") for case in MUTATIONS]
)
def test_a_mutation_is_caught(mutate, check, estimator, monkeypatch):
    mutate(monkeypatch)
    rows = [row for row in CHECKS[check]() if not row.ok]
    assert estimator in {row.estimator for row in rows}


def test_a_likelihood_with_a_loose_bound_is_no_check():
    case = Case(BOUND, "problem", "vp")
    assert case.row("tight", 1.0, 1.0, se=3e-3).ok and not case.row("loose", 1.0, 1.0, se=4e-3).ok
    assert case.row("other unit", 1.0, 1.0, floor=4.0, unit="se").ok


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function that trains a tiny run and gives its saved weights and the live weights of every step."""
    monkeypatch.setenv("INDM_BENCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("INDM_BENCH_CHECKPOINTS", str(tmp_path / "checkpoints"))

    def run_it():
        run, history = tiny_run("ddpmpp-vp", extra=["train.steps=25", "train.curve=1"]), []
        step = train.Trainer.train_step

        def recorded(self):
            if not history:
                history.append({k: v.detach().clone() for k, v in self.model.named_parameters()})
            terms = step(self)
            history.append({k: v.detach().clone() for k, v in self.model.named_parameters()})
            return terms

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "train_step", recorded)
            train.train(run, progress=False)
        return load_file(run.folder / "weights" / "model.safetensors"), history, run.train.ema

    return run_it


def deviation(weights, history, decay):
    """Largest difference of the saved weights from the average over the run, as a share of the largest weight."""
    return max(
        float((weights[name].double() - weighted_average([step[name] for step in history], decay)).abs().max())
        / float(history[-1][name].abs().max())
        for name in history[0]
    )


def test_saved_weights_are_the_average_over_the_run(trained):
    assert deviation(*trained()) < 1e-5


def test_saving_the_live_weights_instead_is_caught(trained, monkeypatch):
    average_not_applied(monkeypatch)
    assert deviation(*trained()) > 1e-3


# Checks that are tests of their own: they pass, and fail with the mutation -------------------------------------------


def backward_variance_of_the_posterior_alone(monkeypatch):
    """R = 1: what is uncertain about z_0 is left out of the backward kernel."""
    original = paths._log_ratio_of_kernels
    monkeypatch.setattr(paths, "_log_ratio_of_kernels", lambda error, xi, step, _: original(error, xi, step, 0.0))


def joint_noise_in_equal_parts(monkeypatch):
    """The coarse grid's noise still standard normal, but not that of its path."""
    monkeypatch.setattr(paths, "_joint", lambda first, second, *_: (first + second) / 2**0.5)


def holm_without_step_down(monkeypatch):
    """Bonferroni's correction: every p times the size of the family."""
    monkeypatch.setattr(statistics, "holm", lambda values: [min(1.0, len(values) * p) for p in values])


def path_densities():
    check_path_densities("vp")


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (backward_variance_of_the_posterior_alone, path_densities),
        (joint_noise_in_equal_parts, path_densities),
        (holm_without_step_down, check_holm),
    ],
)
def test_a_mutation_fails_the_test_of_its_part(mutate, check, monkeypatch):
    check()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
