"""Feature extractors for image quality: a small classifier of the data themselves, registered with torch-fidelity.

Inception features mean little for 8x8 digits. A Frechet distance there is taken between the penultimate features of a
classifier, and its name carries the data set and the hash of the weights: distances under two names are never
comparable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from bench.checkpoint import checkpoint_root
from bench.data import Dataset, load
from bench.errors import InputError
from bench.files import write_bytes_atomic
from bench.untrusted import check_parameters

FEATURE_LAYER = "penultimate"
_METADATA_KEY = "classifier"
_FORMAT = 1  # raise it when the network or its training changes: older files are then trained again


class Classifier(nn.Module):
    """Three convolutions and two linear layers; ``features`` are the activations before the last one.

    Input uint8 (B, C, H, W) with values below ``levels``; features float32 (B, features), logits (B, classes).
    """

    def __init__(self, shape: tuple[int, ...], levels: int, classes: int, features: int) -> None:
        super().__init__()
        self.scale = 2.0 / (levels - 1)
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d((max(shape[1] // 2, 1), max(shape[2] // 2, 1))),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 16, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations, float32 (B, features)."""
        return self.body(images.to(self.head.weight.dtype) * self.scale - 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, classes)."""
        return self.head(self.features(images))


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread and a private random stream: the weights depend neither on the caller nor on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def train_classifier(
    dataset: Dataset, path: Path | str, seed: int = 0, epochs: int = 12, features: int = 32, batch_size: int = 50
) -> float:
    """Train a classifier on ``dataset.train``, save it to ``path``, and return its accuracy on ``dataset.test``.

    A file made by the same recipe from the same data is kept and its accuracy returned. Deterministic on one machine:
    CPU, one thread, AdamW with a one-cycle learning rate. Raises InputError when the data are not labelled images.
    """
    if dataset.train_labels is None or dataset.test_labels is None or dataset.levels is None or len(dataset.shape) != 3:
        raise InputError(
            f"dataset {dataset.name}: a classifier needs labelled images (digits, cifar10 with its labels)"
        )
    path = Path(path)
    classes = int(dataset.train_labels.max()) + 1
    recipe = {
        "format": _FORMAT,
        "dataset": dataset.name,
        "dataset_hash": dataset.hash,
        "shape": list(dataset.shape),
        "levels": dataset.levels,
        "classes": classes,
        "features": features,
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
    }
    existing = _metadata(path)
    if existing is not None and {key: existing.get(key) for key in recipe} == recipe:
        return existing["accuracy"]
    with _single_thread():
        torch.manual_seed(seed)
        network = Classifier(dataset.shape, dataset.levels, classes, features)
        _fit(network, dataset.train, dataset.train_labels, seed, epochs, batch_size)
        with torch.no_grad():
            guesses = torch.cat([network(part).argmax(1) for part in dataset.test.split(1000)])
    accuracy = float((guesses == dataset.test_labels).double().mean())
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    # one key: safetensors writes several in random order, and the file's hash would change from run to run
    record = json.dumps(recipe | {"accuracy": accuracy}, sort_keys=True)
    write_bytes_atomic(path, save(tensors, metadata={_METADATA_KEY: record}))
    return accuracy


def _fit(network: Classifier, images: Tensor, labels: Tensor, seed: int, epochs: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            optimiser.zero_grad()
            F.cross_entropy(network(images[index]), labels[index], label_smoothing=0.05).backward()
            optimiser.step()
            schedule.step()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        record = json.loads((file.metadata() or {})[_METADATA_KEY])
        return record, {name: file.get_tensor(name) for name in sorted(file.keys())}


def _metadata(path: Path) -> dict[str, Any] | None:
    """The record of a readable classifier file, else None."""
    try:
        return _read(path)[0]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def load_extractor(path: Path | str) -> type[FeatureExtractorBase]:
    """Register the classifier saved at ``path`` as a torch-fidelity extractor and return its class.

    ``cls.extractor_name`` is ``<dataset>-classifier-<first 8 hex digits of the weights' sha256>``, the name to give to
    ``bench.fidelity.image_quality``. Loading the same weights twice gives the same class. Raises InputError for a file
    that is missing, damaged, or not such a classifier.
    """
    path = Path(path)
    try:
        metadata, state = _read(path)
        digest = hashlib.sha256()
        for name, value in state.items():
            digest.update(f"{name}:{tuple(value.shape)};".encode() + value.numpy().tobytes())
        sizes = (tuple(metadata["shape"]), metadata["levels"], metadata["classes"], metadata["features"])
        with torch.device("meta"):
            check_parameters(Classifier(*sizes), path.stat().st_size)  # before it takes memory
        network = Classifier(*sizes)
        network.load_state_dict(state)
        label = metadata.get("dataset", "images").replace("/", "-").replace(":", "-")
        float(metadata["accuracy"])
    except (
        OSError,
        SafetensorError,
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        AttributeError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a classifier saved by train_classifier ({reason})") from error
    name = f"{label}-classifier-{digest.hexdigest()[:8]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, _extractor_class(name, network, metadata))
    return FEATURE_EXTRACTORS_REGISTRY[name]


@lru_cache(maxsize=8)
def digits_extractor(folder: Path | None = None) -> str:
    """Registered name of the digits classifier, trained first if ``folder`` (by the checkpoints) lacks it."""
    path = (folder or checkpoint_root() / "features") / "digits-classifier.safetensors"
    train_classifier(load("digits"), path)
    return load_extractor(path).extractor_name


def _extractor_class(name: str, network: Classifier, metadata: dict[str, Any]) -> type[FeatureExtractorBase]:
    class ClassifierFeatures(FeatureExtractorBase):
        """Penultimate features of one classifier: uint8 (B, C, H, W) to a tuple of one float32 (B, features)."""

        extractor_name = name
        feature_dim = metadata["features"]
        levels = metadata["levels"]
        shape = tuple(metadata["shape"])
        accuracy = metadata["accuracy"]

        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.network = Classifier(self.shape, self.levels, metadata["classes"], self.feature_dim)
            self.network.load_state_dict(network.state_dict())

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (FEATURE_LAYER,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return FEATURE_LAYER

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            if input.shape[1:] != self.shape:
                raise InputError(f"images: shape {tuple(input.shape[1:])} does not fit {name}, made for {self.shape}")
            return (self.network.features(input),)

    return ClassifierFeatures
