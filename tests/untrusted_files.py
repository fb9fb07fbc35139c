"""Files from elsewhere, for the tests of what is read from them."""

from __future__ import annotations

import io
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("bench", "models") for path in (ROOT / folder).rglob("*.py"))
OWN = """suite: s
variant: v
dataset: gaussians
seed: 0
train: {batch_size: 4, steps: 1}
evaluate: {}
model: {name: indm, sde: {name: vp}, flow: {name: identity}, score: {name: mlp, width: 8, depth: 1}}
"""


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def saved(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()
