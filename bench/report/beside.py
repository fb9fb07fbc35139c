"""This suite's numbers beside the published ones of the same model, each with how far its reading can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.cells import Row
from bench.report.display import ABSENT, cell_text, plain
from bench.report.references import Published

# our variant -> the published model of the same construction, on the paper's data
COUNTERPARTS = {
    "ddpmpp-vp": ("DDPM++ cont. (VP)", "CIFAR-10"),
    "ddpmpp-subvp": ("DDPM++ cont. (sub-VP)", "CIFAR-10"),
    "ncsnpp-ve": ("NCSN++ cont. (VE)", "CIFAR-10"),
    "indm-vp-nll": ("INDM (NLL)", "CIFAR-10"),
    "indm-vp-fid": ("INDM (FID)", "CIFAR-10"),
    "indm-ve": ("INDM (VE, FID)", "CelebA 64x64"),
    "ddpm": ("DDPM", "CIFAR-10"),
    "ncsn": ("NCSN", "CIFAR-10"),
    "diffflow": ("DiffFlow", "CIFAR-10"),
}
QUANTITIES = {"NELBO": ("nelbo_bpd",), "NLL": ("nll_bpd",), "bits/dim, bound not stated": ("bpd",), "FID": ("fid",)}


def beside_the_paper(
    rows: Mapping[str, Sequence[Row]], published: Sequence[Published], summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One entry a variant and image data set: our numbers, and the counterpart's by quantity with detail and trust."""
    entries = []
    for row in rows["nll_nelbo_gap"]:
        variant, dataset = row.keys["variant"], row.keys["dataset"]
        if row.kind != "run" or summary["units"].get(dataset) != "bits/dim" or variant not in COUNTERPARTS:
            continue
        model, data = COUNTERPARTS[variant]
        cited = [number for number in published if (number.model, number.dataset) == (model, data)]
        # a sweep over steps is a table of its own
        cited = [number for number in cited if "sweep" not in number.note]
        entries.append(
            {
                "variant": variant,
                "dataset": dataset,
                "nelbo": cell_text(row.cells.get("nelbo_corrected")),
                "nll": cell_text(row.cells.get("nll_corrected")),
                "quality": _distance(rows["step_robustness"], variant, dataset),
                "model": model,
                "data": data,
                "published": {
                    name: [
                        {"value": plain(number.value), "detail": number.detail, "trust": number.trust}
                        for number in cited
                        if number.metric in metrics
                    ]
                    for name, metrics in QUANTITIES.items()
                },
                "source": "; ".join(dict.fromkeys(number.source for number in cited)) or ABSENT,
            }
        )
    return entries


def _distance(rows: Sequence[Row], variant: str, dataset: str) -> str:
    """FD of the first sampler at its largest number of steps: fixed beforehand, not the best of a choice."""
    own = [
        row for row in rows if (row.keys["variant"], row.keys["dataset"]) == (variant, dataset) and row.kind == "run"
    ]
    own = [row for row in own if row.keys["sampler"] == own[0].keys["sampler"]]
    last = max(own, key=lambda row: int(row.keys["steps"] or 0), default=None)
    cell = last.cells.get("fd") if last else None
    if last is None or cell is None:
        return ABSENT
    text = cell_text(cell)
    steps = "adaptive" if str(last.keys["steps"]) == "0" else f"{last.keys['steps']} steps"
    return f"{text} ({last.keys['sampler']}, {steps})" if cell.summary else text
