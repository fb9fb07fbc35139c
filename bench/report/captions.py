"""What a table must say about itself: data set, scale, sizes, units, protocol, and that they are not the paper's."""

from __future__ import annotations

from bench.report.display import SAMPLERS, label, plain
from bench.report.forms import TABLES
from bench.report.grid import Grid, common, stated
from bench.report.load import Run, finite

# data of the paper's tables; a reduced training budget is still said
PAPER_DATA = ("cifar10", "celeba64")
PAPER_SCALE = ("cifar10", "celeba64")


def captions(suite: str, grid: Grid) -> dict[str, dict[str, str]]:
    """Table -> data set (or "published") -> caption."""
    made: dict[str, dict[str, str]] = {name: {} for name in TABLES}
    for dataset in grid.datasets:
        runs = grid.of(dataset)
        first = next((run for run in runs if run.likelihood and not run.diverged), None)
        scale = f"{data_words(dataset, first)} {scale_words(suite, dataset, runs)}"
        spread = (
            "Each number is the mean over seeds ± half its 95 % t interval; no ± where all seeds agree or there is one."
        )
        made["learning_curve"][dataset] = " ".join((scale, _curve(runs), spread))
        words = (scale, _likelihood(runs), spread, not_run_words(grid))
        made["nll_nelbo_gap"][dataset] = " ".join(filter(None, words))
        made["bounds"][dataset] = " ".join((scale, _bounds(runs), spread))
        made["discrete_bounds"][dataset] = " ".join((scale, DISCRETE, spread))
        made["likelihood_parts"][dataset] = " ".join((scale, _parts(first), spread))
        made["step_robustness"][dataset] = " ".join((scale, _quality(runs), spread))
        made["costs"][dataset] = " ".join((scale, _costs(), spread))
    elsewhere = (
        "Published values on CIFAR-10, each as its source states it and with how far the reading can be trusted. "
        "The data set and the scale of this suite are not the paper's: these numbers are here for orientation, and "
        "no difference between them and the rows above means anything."
    )
    if suite in PAPER_SCALE:
        elsewhere = "Published values, each as its source states it and with how far the reading can be trusted."
    made["nll_nelbo_gap"]["published"] = elsewhere
    made["step_robustness"]["published"] = elsewhere
    return made


def data_words(dataset: str, run: Run | None) -> str:
    """The data set, its sizes and the beginning of its content hash."""
    data = (run.likelihood or {}).get("data") if run else None
    if not isinstance(data, dict):
        return f"Data set {dataset} (no evaluated run says which content it had)."
    sizes = data.get("shape") or []
    if data.get("levels"):
        kind = f"images of shape {'×'.join(map(str, sizes))}, {data['levels']} levels"
    else:
        kind = f"points in {' × '.join(map(str, sizes))} dimensions"
    train = f"{data['train']:,} training" if data.get("train") else "endless training"
    content = f"content sha256 {str(data.get('hash'))[:12]}"
    return f"Data set {data.get('name', dataset)}: {train} and {data.get('test', 0):,} test {kind}, {content}."


def scale_words(suite: str, dataset: str, runs: list[Run]) -> str:
    """How far data and training budget are from the paper's."""
    found = (finite((run.provenance or {}).get("images_seen")) for run in runs)
    seen = sorted({int(count) for count in found if count})
    budget = f"{seen[0]:,}" + (f" to {seen[-1]:,}" if len(seen) > 1 else "") if seen else "an unknown number of"
    what = "points" if any((run.likelihood or {}).get("units") == "nats" for run in runs) else "images"
    if suite in PAPER_SCALE:
        return f"Trained on {budget} {what}."
    if dataset in (*PAPER_DATA, "cifar10-subset"):
        return f"Trained on {budget} {what}: the data are the paper's, or a part of them; the scale is not."
    return f"Trained on {budget} {what}: neither the data set nor the scale is the paper's."


CHAINS = "Where it is of a chain, a repeat is over as many paths as take about that number of steps, at least one. "


def not_run_words(grid: Grid) -> str:
    """Which variants of the suite's longer reproduction have no run at all; empty where there is none."""
    if not grid.not_run:
        return ""
    return f"Not run: {', '.join(map(label, grid.not_run))}; `make repro-all` runs them."


DISCRETE = (
    "In bits/dim of the grey levels themselves, which no noise has dequantised: a bound on −log P(k) of a discrete "
    "image k, for a model whose last step is a law of grey levels. Not comparable with any other table: those hold "
    "densities of dequantised images, whose bits/dim include the offset and the cost of the noise."
)


def _bounds(runs: list[Run]) -> str:
    return (
        f"All in {stated(runs, 'units') or 'one unit'}, of the density of the same (for images: dequantised) test "
        "samples, residual included. NELBO: the bound that the model is trained or usually evaluated with; its kind "
        "stands beside it. Bound of the chain: of the model's own discrete chain, a true bound at its number of steps. "
        "Where the NELBO is of the chain, the two are one number. NLL: of the probability-flow ODE."
    )


def _likelihood(runs: list[Run]) -> str:
    record = {}
    for run in runs:
        # a run without one of the two says nothing of how it was measured
        known = {} if run.diverged else run.likelihood or {}
        record |= {name: value for name, value in known.items() if value is not None and name not in record}
    if not record:
        return "No run was evaluated."
    nelbo, nll, protocol = (record.get(name) or {} for name in ("nelbo", "nll", "protocol"))
    probes = nll.get("probes")
    trace = "exact divergence" if probes == "exact" else f"{probes} Hutchinson probe{'' if probes == 1 else 's'}"
    eps = f", truncation eps = {plain(protocol['eps'])}" if isinstance(protocol.get("eps"), int | float) else ""
    discrete = protocol.get("dequantiser") and record.get("units") != "nats"
    dequantiser = f", {protocol['dequantiser']} dequantisation" if discrete else ""
    weights = f", {str(protocol['weights']).upper()} weights" if protocol.get("weights") else ""
    tolerances = f"rtol {plain(nll.get('rtol'))}, atol {plain(nll.get('atol'))}"
    kinds = {str(kind) for run in runs if (kind := ((run.likelihood or {}).get("protocol") or {}).get("bound"))}
    chains = CHAINS if kinds - {"continuous"} else ""
    bound = f"{nelbo.get('repeats')} repeats of {nelbo.get('times')} time draws a sample"
    ode = f"{nll.get('solver')}, {tolerances}, {trace}"
    return (
        f"In {record.get('units')}, over the same n = {record.get('n')} test samples for every row"
        f"{eps}{dequantiser}{weights}. NELBO bounds the generative SDE: "
        f"{bound if nelbo else 'not defined here'}. {chains}NLL is of the probability-flow ODE: "
        f"{ode if nll else 'not defined here'}. Gap = NELBO − NLL; the two belong to different processes, so it may be "
        "negative. Corrected numbers include the residual term at eps, uncorrected ones leave it out."
    )


def _parts(run: Run | None) -> str:
    units = (run.likelihood or {}).get("units") if run else None
    return (
        f"The named parts of each bound{f', in {units}' if units else ''}; they sum to the total. The ODE part belongs "
        "to the NLL, the diffusion part to the NELBO and to the bound of a chain; uncorrected bounds have no "
        "reconstruction part. Other: parts that only one model names."
    )


def _curve(runs: list[Run]) -> str:
    settings = [run.config.get("train") or {} for run in runs if run.config]
    images = common(setting.get("curve_images") for setting in settings)
    samples = common(setting.get("curve_samples") for setting in settings)
    steps = common(setting.get("curve_steps") for setting in settings)
    text = f"Measured with the averaged weights on {images or 'a fixed number of'} test samples"
    text += f"; sample quality on {samples} samples of {steps} steps" if samples else ""
    samplers = stated(runs, "protocol", "curve_sampler") if samples else None
    names = ", ".join(SAMPLERS.get(name, name) for name in samplers.split("; ")) if samplers else ""
    compute = (
        "To be read against images seen, or against what these took: FLOPs are those of a step times the steps, "
        "training seconds leave out the measurement of the curve."
    )
    return f"{text}{f' ({names})' if names else ''}. {compute}"


def _quality(runs: list[Run]) -> str:
    counts = sorted({count for run in runs for line in run.robustness if (count := finite(line.get("n"))) is not None})
    n = " or ".join(str(int(count)) for count in counts) or "an unknown number of"
    features = common((run.config.get("evaluate") or {}).get("features") for run in runs)
    reference = common(((run.likelihood or {}).get("protocol") or {}).get("reference") for run in runs)
    against = f"the {reference}{'ing' if reference == 'train' else ''} set" if reference else "the data"
    if any(line.get("energy") or line.get("sliced_wasserstein") for run in runs for line in run.robustness):
        what = f"Energy distance and sliced Wasserstein distance to {against}"
    else:
        network = f"features of {features}" if features else "features"
        what = f"Fréchet distance (FD) and KID of {network} to {against}, not comparable with a published FID"
    words = f"{what}, n = {n} samples a cell. NFE counts network evaluations a sample."
    exploding = any(((run.config.get("model") or {}).get("sde") or {}).get("name") == "ve" for run in runs)
    if exploding and any(line.get("sampler") == "euler_maruyama" for run in runs for line in run.robustness):
        # d sigma^2 = 2 ln(sigma_max / sigma_min) sigma^2 dt: one explicit step must not remove more than is there
        words += (
            " Euler–Maruyama on a variance-exploding process overshoots, whatever the model, when it has fewer steps "
            "than about 2 ln(sigma_max / sigma_min), 15 to 17 here: such cells show the sampler's limit."
        )
    return words


def _costs() -> str:
    return (
        "FLOPs are of matrix products and convolutions, a multiply-add counted as two; those of training are those of "
        "a step times the steps. The peak of a step is of the tensors that it holds at once beyond weights and data. "
        "Training seconds leave out the measurement of the learning curve; ms a step are training seconds over steps. "
        "Seconds and megabytes hold for the device named in the row only."
    )
