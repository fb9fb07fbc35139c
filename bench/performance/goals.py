"""What the specification (spec/speed.md) measured of the official code, and what it asks of this one.

Its multiples of c were taken on a machine where c was 0.08 s. A multiple does not travel well: where the reference
convolution runs nearer to the processor's peak than the rest of a network, every multiple grows. So each case is also
held against its arithmetic (FLOPs in units of c's, a floor) and against the official code on the same machine.
"""

from __future__ import annotations

from typing import Any

# official optimiser step in c, by size and kind; the official INDM's flow has a global latent
STEP = {
    "S16": {"ddpmpp": 4.2, "indm-nll": 7.7, "indm-fid": 11.6, "ncsnpp": 3.7, "indm-ve": 6.2},
    "S32": {"ddpmpp": 13.0, "indm-nll": 27.0, "indm-fid": 43.0, "ncsnpp": 18.0, "indm-ve": 30.0},
}
# share of those that is asked for
STEP_SHARE = {"ddpmpp": 0.8, "ncsnpp": 0.8, "indm-nll": 0.55, "indm-fid": 0.55, "indm-ve": 0.55}
# official NLL: c an evaluation, and evaluations, by size, kind and training steps; (batch, c an evaluation, NFE)
NLL = {
    ("S16", "ddpmpp", 10): (16, 4.4, 362),
    ("S16", "ddpmpp", 300): (4, 1.4, 686),
    ("S16", "indm-nll", 250): (4, 1.4, 704),
    ("S32", "ddpmpp", 10): (4, 3.8, 410),
    ("S32", "indm-nll", 10): (4, 4.2, 410),
}
NLL_SHARE, NLL_EVALUATIONS_SHARE = 0.6, 0.5
# evaluations of RK45 on the analytic scores
ANALYTIC = {"vp": 44, "ve": 116}
# times faster than a plain float32 eager loop on a GPU
GPU = {"step": 3.0, "nll": 5.0, "sampling": 3.0}
GPU_UTILISATION = 0.40
# share of a bare loop's step that the harness may add
HARNESS = 0.03


def base_kind(kind: str) -> str:
    """The kind that a goal is stated for: a flow without a global latent answers to the same."""
    return kind.removesuffix("-local")


def step_goal(size: str, kind: str) -> dict[str, Any]:
    """{"official_multiple", "share", "goal_multiple"} of an optimiser step; empty where the page has none."""
    official = STEP.get(size, {}).get(base_kind(kind))
    if official is None:
        return {}
    share = STEP_SHARE[base_kind(kind)]
    return {"official_multiple": official, "share": share, "goal_multiple": official * share}


def nll_goal(size: str, kind: str, steps: int) -> dict[str, Any]:
    """Goals of the ODE's likelihood; empty where the page has none."""
    if (size, kind, steps) not in NLL:
        return {}
    _, multiple, evaluations = NLL[size, kind, steps]
    return {
        "official_multiple": multiple,
        "official_evaluations": evaluations,
        "goal_multiple": multiple * NLL_SHARE,
        "goal_evaluations": evaluations * NLL_EVALUATIONS_SHARE,
    }
