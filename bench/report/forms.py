"""The forms of all tables: what names a row, what is measured in it and what else is said. No rows, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from bench.report.cells import Table

CORRECTIONS = ("corrected", "uncorrected")
PARTS = ("prior", "diffusion", "ode", "reconstruction", "flow", "dequantisation", "other")
SOURCE = ("detail", "source", "trust", "note")


def learning_curve_table() -> Table:
    """NELBO, NLL and sample quality against images seen in training, and what these took of arithmetic and time."""
    metrics = ("nelbo", "nll", "fd", "energy", "flops", "train_seconds")
    return Table("learning_curve", ("dataset", "variant", "images"), metrics, ("units",))


def likelihood_table() -> Table:
    """NELBO, NLL and their gap after and before the residual correction, with reference and published rows."""
    metrics = tuple(f"{name}_{correction}" for correction in CORRECTIONS for name in ("nelbo", "nll", "gap"))
    within = ("nelbo_se_images", "nelbo_se_repeats", "nll_se_images", "gap_se", "nfe", "nll_tolerance_change")
    published = ("published_nelbo", "published_nll", "published_gap", "published_bpd")
    return Table(
        "nll_nelbo_gap",
        ("dataset", "kind", "variant"),
        metrics,
        ("units", "family", "bound", "images", *within, *published, *SOURCE),
    )


def parts_table() -> Table:
    """The named parts that NELBO, NLL and the bound of a chain are sums of."""
    return Table("likelihood_parts", ("dataset", "variant", "bound", "correction"), (*PARTS, "total"), ("units",))


def bounds_table() -> Table:
    """Every bound on the density of the dequantised data, beside the NLL of the ODE."""
    extra = ("units", "family", "bound", "chain_steps", "detail")
    return Table("bounds", ("dataset", "variant"), ("nelbo", "chain", "nll"), extra)


def discrete_table() -> Table:
    """Bounds on the probability of discrete images; empty where a suite has none."""
    extra = ("units", "family", "chain_steps", "detail")
    return Table("discrete_bounds", ("dataset", "variant"), ("discrete",), extra)


def robustness_table() -> Table:
    """Sample quality against the number of steps of every sampler, with published rows."""
    metrics = ("nfe", "fd", "kid", "precision", "recall", "sliced_wasserstein", "energy", "seconds")
    return Table(
        "step_robustness",
        ("dataset", "kind", "variant", "sampler", "steps"),
        metrics,
        ("samples", "published_fid", *SOURCE),
    )


def costs_table() -> Table:
    """Size, images seen, time, arithmetic and memory of training and evaluation."""
    metrics = (
        "parameters_score",
        "parameters_flow",
        "parameters_drift",
        "parameters_total",
        "images_seen",
        "steps",
        "flops_per_step",
        "flops_total",
        "train_seconds",
        "ms_per_step",
        "evaluate_seconds",
        "peak_bytes",
        "peak_memory_mb",
    )
    return Table("costs", ("dataset", "variant"), metrics, ("family", "device", "cpu", "threads"))


TABLES: dict[str, Callable[[], Table]] = {
    "learning_curve": learning_curve_table,
    "nll_nelbo_gap": likelihood_table,
    "bounds": bounds_table,
    "discrete_bounds": discrete_table,
    "likelihood_parts": parts_table,
    "step_robustness": robustness_table,
    "costs": costs_table,
}
