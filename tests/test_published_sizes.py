"""Parameter counts of the published configurations, from the suites as they are run. Built on the meta device: free.

Expected numbers: the official code (github.com/byeonghu-na/INDM at 0ef0626), counted there. Its residual blocks each
hold two numbers more than ours, the parameters of a roulette that are stored and never trained.
"""

import pytest
import torch
from torch import nn

import models
from bench.config import load_suite
from models.flows import GlobalLatentFlow

SHAPES = {"cifar10": (3, 32, 32), "celeba64": (3, 64, 64)}
DDPMPP, DDPMPP_DEEP = 61_804_419, 106_632_579
NCSNPP, NCSNPP_DEEP = 62_758_915, 107_587_075  # with the 128 frozen frequencies of the Fourier embedding
FROZEN = 128
FLOW = {"cifar10": 13_164_376, "celeba64": 19_804_936}
BLOCKS = 32
UNTRAINED = 2 * BLOCKS
LATENT = 714_536 + 16_640 + 734_720  # encoder, its head and the prior
LOCAL = 11_698_480 - 1_064_960  # the residual blocks of CIFAR-10 without their maps of h

CASES = [
    ("cifar10", "ddpmpp-vp", DDPMPP, 0),
    ("cifar10", "ddpmpp-vp-fid", DDPMPP, 0),
    ("cifar10", "indm-vp-nll", DDPMPP, FLOW["cifar10"]),
    ("cifar10", "indm-vp-fid", DDPMPP, FLOW["cifar10"]),
    ("cifar10", "ncsnpp-ve", NCSNPP, 0),
    ("cifar10", "indm-ve", NCSNPP, FLOW["cifar10"]),
    ("cifar10", "ddpmpp-vp-deep", DDPMPP_DEEP, 0),
    ("cifar10", "ddpmpp-vp-fid-deep", DDPMPP_DEEP, 0),
    ("cifar10", "indm-vp-nll-deep", DDPMPP_DEEP, FLOW["cifar10"]),
    ("cifar10", "indm-vp-fid-deep", DDPMPP_DEEP, FLOW["cifar10"]),
    ("cifar10", "ncsnpp-ve-deep", NCSNPP_DEEP, 0),
    ("cifar10", "indm-ve-deep", NCSNPP_DEEP, FLOW["cifar10"]),
    ("cifar10", "indm-vp-nll-local", DDPMPP, LOCAL),
    ("celeba64", "ddpmpp-vp", DDPMPP, 0),
    ("celeba64", "indm-vp-nll", DDPMPP, FLOW["celeba64"]),
    ("celeba64", "indm-vp-fid", DDPMPP, FLOW["celeba64"]),
    ("celeba64", "ncsnpp-ve", NCSNPP, 0),
    ("celeba64", "indm-ve", NCSNPP, FLOW["celeba64"]),
]
TOTALS = {
    ("cifar10", "indm-vp-nll"): 74_968_795,
    ("cifar10", "indm-vp-fid"): 74_968_795,
    ("cifar10", "indm-ve"): 75_923_291,
    ("cifar10", "indm-vp-nll-deep"): 119_796_955,
    ("celeba64", "indm-vp-nll"): 81_609_355,
    ("celeba64", "indm-ve"): 82_563_851,
}


def size(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize(("suite", "variant", "score", "flow"), CASES, ids=lambda value: str(value))
def test_every_published_variant_has_the_published_number_of_parameters(suite, variant, score, flow):
    (run,) = load_suite(suite).runs(variant)
    with torch.device("meta"):
        model = models.build({**run.model, "shape": SHAPES[suite]})
    frozen = FROZEN if score in (NCSNPP, NCSNPP_DEEP) else 0
    assert size(model.score) == score and size(model.score, trainable=True) == score - frozen
    untrained = UNTRAINED if flow else 0
    assert size(model.flow) == size(model.flow, trainable=True) == flow - untrained
    assert size(model) == TOTALS.get((suite, variant), score + flow) - untrained


def test_every_variant_of_these_suites_is_listed():
    for suite in SHAPES:
        assert sorted(load_suite(suite).variants) == sorted(name for at, name, *_ in CASES if at == suite)


@pytest.mark.parametrize(("suite", "squeeze", "channels"), [("cifar10", False, (3, 12)), ("celeba64", True, (12, 48))])
def test_parts_of_the_flow(suite, squeeze, channels):
    with torch.device("meta"):
        flow = GlobalLatentFlow(SHAPES[suite], squeeze_first=squeeze)
    hidden, extra = 512, 4_320 if squeeze else 0
    assert (size(flow.encoder), size(flow.head), size(flow.prior)) == (714_536 + extra, 16_640, 734_720)
    assert size(flow.residual.conditions) == 1_064_960
    for level, maps, width in zip(flow.residual.levels, flow.residual.conditions, channels, strict=True):
        assert len(level) == BLOCKS / 2
        for block, condition in zip(level, maps, strict=True):
            # the published formula, 18 C H + H^2 + 67 H + C + 2, less the two untrained numbers
            assert size(block) + size(condition) == 18 * width * hidden + hidden**2 + 67 * hidden + width
    published = {"cifar10": 11_698_480, "celeba64": 18_334_720}[suite]
    assert size(flow.residual) == published - UNTRAINED
    assert size(flow) == published - UNTRAINED + LATENT + extra == FLOW[suite] - UNTRAINED


@pytest.mark.parametrize(("side", "out", "millions"), [(16, 32, 1.54), (32, 8, 1.53)])
def test_flow_at_the_sizes_of_the_speed_comparison(side, out, millions):
    """Two blocks a level of width 64; 16 x 16 images have a quarter of the pixels and four times the top channels."""
    with torch.device("meta"):
        flow = GlobalLatentFlow((3, side, side), (2, 2), 64, encoder_out=out)
    assert round(size(flow) / 1e6, 2) == millions


def test_training_settings_are_the_published_ones():
    for suite in SHAPES:
        for run in load_suite(suite).runs():
            train = run.train
            assert (train.batch_size, train.weight_decay, train.clip, train.warmup) == (128, 0.01, 1.0, 0)
            assert train.betas == (0.9, 0.99) and train.schedule == "constant" and train.horizontal_flip
            assert (train.learning_rates["score"], train.learning_rates["flow"]) == (2e-4, 1e-3)
            assert train.ema == (0.999 if run.model["sde"]["name"] == "ve" else 0.9999)
            assert (run.evaluate.nelbo_repeats, run.evaluate.samples, run.evaluate.probes) == (3, 50_000, 1)
            # VP: the multistep solver, at the tolerance whose error is below the published solver's at 1e-5
            solver, tolerance = ("dopri5", 1e-5) if run.model["sde"]["name"] == "ve" else ("adams", 6e-4)
            assert (run.evaluate.solver, run.evaluate.rtol, run.evaluate.atol) == (solver, tolerance, tolerance)
            assert run.model["sde"]["eps"] == 1e-5
            first, indm = run.evaluate.samplers[0], run.variant.startswith("indm")
            if run.model["sde"]["name"] == "ve":  # the published ranges, for data in [0, 1], doubled for [-1, 1]
                published = (0.01, 50.0 if suite == "cifar10" else 90.0)
                assert (run.model["sde"]["sigma_min"], run.model["sde"]["sigma_max"]) == tuple(2 * s for s in published)
                assert (first["name"], first["steps"], first["convention"]) == ("published_pc", [1000], "official")
                assert first["snr"] == (0.16 if suite == "cifar10" else 0.15)
                assert first["late_denoising"] == first["data_mean"] == (indm and suite == "cifar10")
            else:
                warm = indm and run.model["setting"] == "fid" and suite == "cifar10"
                assert (first["name"], first["temperature"]) == ("published_ode", 1.05 if warm else 1.0)
                assert (first["rtol"], first["atol"], first["data_mean"]) == (1e-5, 1e-5, False)
