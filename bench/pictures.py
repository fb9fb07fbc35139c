"""Small pictures of samples and of the forward process, for the eye; no number is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data import Dataset, quantise
from bench.files import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIDE = 8
ZOOM = 4
GAP = 1  # pixels between images
GAP_SHADE = 64


def _grid(images: Tensor, levels: int, columns: int) -> np.ndarray:
    """uint8 (n, C, H, W) with values below ``levels`` -> one (rows (H + gap), columns (W + gap), 3) picture."""
    n, channels, height, width = images.shape
    rows = n // columns
    grey = images[: rows * columns].float().mul(255 / (levels - 1)).byte()
    # a dim line between tiles: small images that touch are read as one
    tiles = F.pad(grey, (0, GAP, 0, GAP), value=GAP_SHADE).reshape(rows, columns, channels, height + GAP, width + GAP)
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (height + GAP), columns * (width + GAP), channels).numpy()
    return np.repeat(picture, 3, axis=2) if channels == 1 else picture


def _save_image(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    zoom = max(1, ZOOM if picture.shape[0] < 400 else 1)
    with atomic_path(path) as temporary:
        Image.fromarray(picture.repeat(zoom, 0).repeat(zoom, 1)).save(temporary, optimize=True)


def _message(path: Path, text: str) -> None:
    figure, axis = plt.subplots(figsize=(3, 1))
    axis.axis("off")
    axis.text(0.5, 0.5, text, ha="center", va="center")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def _limits(data: Dataset) -> tuple[float, float]:
    reach = float(data.test.abs().max()) * 1.15
    return -reach, reach


def _histogram(axis, points: Tensor, data: Dataset, title: str) -> None:
    low, high = _limits(data)
    counts, _, _ = np.histogram2d(*points.T.double().numpy(), bins=100, range=[[low, high]] * 2)
    axis.imshow(counts.T, origin="lower", cmap="magma", extent=(low, high, low, high))
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


@plt.style.context("default")  # a report drawn before in this process has set a theme
def draw_samples(path: Path, x: Tensor | None, data: Dataset) -> None:
    """A grid of samples (images), or a histogram of samples beside one of the data (points)."""
    if x is None:
        return _message(path, "no finite samples")
    if data.levels is not None:
        return _save_image(path, _grid(quantise(x[: SIDE * SIDE], data.levels), data.levels, min(SIDE, len(x))))
    figure, axes = plt.subplots(1, 2, figsize=(4, 2.2), layout="constrained")
    _histogram(axes[0], x, data, "model")
    _histogram(axes[1], data.test[: len(x)], data, "data")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)
    return None


@plt.style.context("default")
def draw_trajectory(path: Path, states: Tensor | None, times: Sequence[float], data: Dataset) -> None:
    """The forward process seen in data space: one column (points) or one column of images a time."""
    if states is None:
        return _message(path, "trajectory: the flow's inverse did not converge")
    if data.levels is not None:
        clipped = quantise(states.transpose(0, 1).flatten(0, 1).clamp(-1, 1 - 1e-6), data.levels)
        return _save_image(path, _grid(clipped, data.levels, len(times)))
    figure, axes = plt.subplots(1, len(times), figsize=(1.3 * len(times), 1.6), layout="constrained")
    for axis, state, time in zip(axes, torch.unbind(states), times, strict=True):
        _histogram(axis, state, data, f"t = {time:g}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)
    return None
