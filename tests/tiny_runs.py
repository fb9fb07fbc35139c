"""A run of seconds, for the tests that train one."""

from bench.config import load_suite

TINY = [
    "train.steps=60",
    "train.batch_size=32",
    "train.curve=3",
    "train.curve_images=16",
    "train.curve_samples=0",
    "train.checkpoint_every=10",
    "model.score.width=16",
    "model.score.depth=1",
    "train.warmup=5",
]
FLOW = ["model.flow.blocks=1", "model.flow.hidden=8"]


def tiny_run(variant="indm-vp-nll", seed=0, extra=()):
    """The configuration of a training of 60 steps on the checkerboard; ``extra``: settings key=value."""
    flow = FLOW if variant.startswith("indm") else []
    return load_suite("toy2d", [*TINY, *flow, *extra]).runs(variant, seed, "checkerboard")[0]
