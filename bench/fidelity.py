"""Image quality through torch-fidelity: Frechet distance, kernel distance (KID), precision and recall.

The mathematics are torch-fidelity's own functions on features; the walk around them is ours, because
``calculate_metrics`` starts worker processes and extracts the reference again at every call. The reference's features
are kept in memory under the hash of its content and the extractor's name, never under a name alone. Precision and
recall of a set too large for a whole matrix of distances are ours too: torch-fidelity finds the reference's radii anew
at every call, here they are kept beside its features.

A distance belongs to its features, its reference set and its number of images: the record carries all three.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from bench import stopping
from bench.data import content_hash
from bench.errors import InputError
from bench.features import digits_extractor
from bench.sharding import on_main, spread, team

METRICS = ("fd", "kid", "precision_recall")
# of the file that torch-fidelity publishes, whose name holds the first eight digits
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIGITS = "digits"
INCEPTION = "inception"
INCEPTION_REGISTERED = "inception-v3-compat"
INCEPTION_VARIABLE = "INDM_BENCH_INCEPTION"  # a path, or "download"
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
_WHOLE_MATRIX = 20_000  # images above which precision and recall work by blocks
_BLOCK = 2**23  # distances in memory at a time
_CACHED_REFERENCES = 4
_NOT_FINITE = "features are not finite"


class ImageTensor(TorchDataset):
    """uint8 (N, C, H, W) as torch-fidelity wants it: one (C, H, W) an item, grey repeated to ``channels``."""

    def __init__(self, images: Tensor, channels: int | None = None) -> None:
        self.images = images if channels is None else images.expand(-1, channels, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class _NotMeasured(Exception):
    """A reason, told in the status, for which no number can be given."""


@dataclass
class _Reference:
    """Features of a reference set (None but in the first process) and what is computed of them once."""

    features: Tensor | None
    statistics: dict[str, np.ndarray]
    radii: dict[int, Tensor] = field(default_factory=dict)  # by number of neighbours


_references: OrderedDict[tuple[str, str], _Reference] = OrderedDict()


def image_quality(
    generated: Tensor,
    reference: Tensor,
    features: str,
    metrics: Sequence[str] = METRICS,
    weights: Path | str | None = None,
    *,
    levels: int = 256,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    kid_subsets: int = KID_SUBSETS,
    seed: int = 2020,
    stoppable: bool = False,
) -> dict[str, Any]:
    """Distances between generated and reference images, uint8 (N, C, H, W) and (M, C, H, W).

    ``features``: ``digits`` (the digits classifier, trained when first needed), the name of another registered
    extractor (``bench.features.load_extractor``), or ``inception`` for the standard FID features. Inception's
    ``weights`` are a path or ``"download"`` (torch-fidelity's published file); None: what INDM_BENCH_INCEPTION says of
    the two, else torch's own cache, if the file is there. Inception wants 256 levels and three channels: other
    ``levels`` are stretched to 0..255 and grey is repeated. ``metrics``: any of ``fd``, ``kid``, ``precision_recall``.
    ``stoppable``: requests to stop (:mod:`bench.stopping`) are heard before each set's features and before each metric.

    Returns ``fd`` (``fid`` with Inception), ``kid``, ``kid_std`` (over subsets of this one sample, not over runs),
    ``kid_subset_size``, ``precision``, ``recall`` (of 3 nearest neighbours), ``n``, ``n_reference``, ``features`` (the
    extractor's full name), ``status``: "ok" or the reason for each value that is None. A Frechet distance is refused
    where either set has fewer images than the features have dimensions. KID subsets have min(1000, n/2, m/2) images.
    Several processes, which all call this with the same images, share the features; the statistics are the first
    one's, and all get the result. Raises InputError for images, metrics, names or weights that cannot be used.
    """
    _check(generated, reference, metrics)
    heed = stopping.check if stoppable else lambda: None
    generated, reference = generated.cpu(), reference.cpu()
    frechet = "fid" if features in (INCEPTION, INCEPTION_REGISTERED) else "fd"
    result: dict[str, Any] = dict.fromkeys((frechet, "kid", "kid_std", "kid_subset_size", "precision", "recall"))
    result |= {"n": len(generated), "n_reference": len(reference), "features": features, "status": "ok"}
    try:
        name, extractor = _extractor(features, weights, torch.device(device))
    except _NotMeasured as reason:
        return result | {"status": f"not measured: {reason}"}
    result["features"] = name
    if min(len(generated), len(reference)) == 0:
        return result | {"status": "not measured: a set of images is empty"}

    def extract(images: Tensor) -> Tensor:
        dataset = ImageTensor(images)
        if frechet == "fid":
            if levels != 256:
                images = (images.float() * (255 / (levels - 1))).round().to(torch.uint8)
            dataset = ImageTensor(images, 3)
        cuda = torch.device(device).type == "cuda"
        found = get_featuresdict_from_dataset(dataset, extractor, batch_size, cuda, save_cpu_ram=True, verbose=False)
        return found[extractor.get_requested_features_list()[0]]

    def extract_together(images: Tensor) -> Tensor | None:
        return _together(extract, images, batch_size)

    heed()
    try:
        real = _reference(f"{name}/{levels}", reference, extract_together)
    except _NotMeasured as reason:
        return result | {"status": f"not measured: {reason}"}
    heed()
    fake = extract_together(generated)
    if not _finite(fake):
        return result | {"status": f"not measured: {_NOT_FINITE}"}

    def statistics() -> dict[str, Any]:
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "fd": lambda: {frechet: _frechet(fake, real)},
            "kid": lambda: _kernel(fake, real.features, kid_subsets, seed),
            "precision_recall": lambda: _precision_recall(fake, real, torch.device(device)),
        }
        found, reasons = {}, []
        for metric in metrics:
            heed()
            try:
                values = measures[metric]()
                if not all(math.isfinite(value) for value in values.values()):
                    raise _NotMeasured("the value is not finite")
                found |= {
                    key: float(value) if isinstance(value, np.floating) else value for key, value in values.items()
                }
            except _NotMeasured as reason:
                reasons.append(f"{frechet if metric == 'fd' else metric} not measured: {reason}")
        return found | {"status": "; ".join(reasons) or "ok"}

    return result | on_main(statistics)


def _together(extract: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor | None:
    """The features of all images, in the first process; the batches are those of one process."""
    size = team().size
    if size == 1:
        return extract(images)
    starts = range(0, len(images), batch_size)

    def own(rank: int) -> dict[str, np.ndarray]:
        # one call for all of a process's batches, of which only the last may be short
        parts = [images[start : start + batch_size] for start in starts[rank::size]]
        if not parts:
            return {}
        features = extract(torch.cat(parts)).split(batch_size)
        return {str(rank + size * i): part.numpy() for i, part in enumerate(features)}

    found: dict[str, np.ndarray] = {}
    for part in spread(size, own, main_only=True):
        found |= part
    return torch.cat([torch.from_numpy(found[str(k)]) for k in range(len(starts))]) if found else None


def _finite(features: Tensor | None) -> bool:
    return on_main(lambda: bool(torch.isfinite(features).all()))


def _check(generated: Tensor, reference: Tensor, metrics: Sequence[str]) -> None:
    for role, images in (("generated", generated), ("reference", reference)):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(
                f"{role}: {images.dtype} {tuple(images.shape)} is not accepted; give uint8 (N, 1 or 3, H, W)"
            )
    if generated.shape[1:] != reference.shape[1:]:
        raise InputError(
            f"generated: shape {tuple(generated.shape[1:])} differs from the reference's {tuple(reference.shape[1:])}"
        )
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"metrics: unknown {metric!r}; accepted: {', '.join(METRICS)}")


def _reference(name: str, images: Tensor, extract: Callable[[Tensor], Tensor | None]) -> _Reference:
    key = (name, content_hash({"reference": images}))
    if key not in _references:
        features = extract(images)
        if not _finite(features):
            raise _NotMeasured(_NOT_FINITE)
        _references[key] = _Reference(features, {} if features is None else fid_features_to_statistics(features))
        while len(_references) > _CACHED_REFERENCES:
            _references.popitem(last=False)
    _references.move_to_end(key)
    return _references[key]


def _frechet(fake: Tensor, real: _Reference) -> float:
    count, dimension = min(len(fake), len(real.features)), fake.shape[1]
    if count < dimension:
        raise _NotMeasured(f"{count} images are fewer than the {dimension} feature dimensions")
    try:
        value = fid_statistics_to_metric(fid_features_to_statistics(fake), real.statistics, verbose=False)
    except np.linalg.LinAlgError as error:
        raise _NotMeasured(f"the covariance has no square root ({error})") from error
    return value[KEY_METRIC_FID]


def _kernel(fake: Tensor, real: Tensor, subsets: int, seed: int) -> dict[str, Any]:
    # half of the smaller set at most: subsets of the whole set would all be the same and their spread nought
    size = min(KID_SUBSET_SIZE, len(fake) // 2, len(real) // 2)
    if size < 2:
        raise _NotMeasured(f"{min(len(fake), len(real))} images are too few; 4 are needed")
    found = kid_features_to_metric(fake, real, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD], "kid_subset_size": size}


def _precision_recall(fake: Tensor, reference: _Reference, device: torch.device) -> dict[str, float]:
    real, k = reference.features, NEIGHBOURS
    count = min(len(fake), len(real))
    if count <= k:
        raise _NotMeasured(f"{count} images are too few for {k} nearest neighbours")
    fake, real = fake.to(device), real.to(device)
    if max(len(fake), len(real)) <= _WHOLE_MATRIX:
        found = prc_features_to_metric(fake, real, prc_neighborhood=k, save_cpu_ram=False, verbose=False)
        return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
    if k not in reference.radii:
        reference.radii[k] = neighbour_radii(real, k).cpu()
    precision, recall = coverage(fake, neighbour_radii(fake, k), real, reference.radii[k].to(device))
    return {"precision": precision, "recall": recall}


def neighbour_radii(points: Tensor, k: int, block: int = _BLOCK) -> Tensor:
    """Distance of each of the points (n, d) to its k-th nearest neighbour among the others, (n,) on their device.

    As torch-fidelity has it: the (k+1)-th smallest distance, the point itself counted. At most ``block`` distances, or
    one point's, are in memory at a time.
    """
    rows = max(block // len(points), 1)
    nearest = [torch.cdist(part, points).topk(k + 1, largest=False).values[:, k] for part in points.split(rows)]
    return torch.cat(nearest)


def coverage(
    fake: Tensor, fake_radii: Tensor, real: Tensor, real_radii: Tensor, block: int = _BLOCK
) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991) of points (n, d), (m, d) with radii (n,), (m,).

    The shares of fake points within the radius of some real one, and of real points within that of some fake one, from
    one pass over the distances, at most ``block`` of them, or one real point's, at a time.
    """
    rows = max(block // len(fake), 1)
    fake_covered, real_covered = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), []
    for part, radii in zip(real.split(rows), real_radii.split(rows), strict=True):
        distances = torch.cdist(part, fake)
        real_covered.append((distances <= fake_radii).any(1))
        fake_covered |= (distances <= radii[:, None]).any(0)
    return fake_covered.cpu().float().mean().item(), torch.cat(real_covered).cpu().float().mean().item()


def _extractor(features: str, weights: Path | str | None, device: torch.device) -> tuple[str, FeatureExtractorBase]:
    """The full name of an extractor, which names its weights, and the extractor itself on ``device``."""
    if features in (INCEPTION, INCEPTION_REGISTERED):
        path = _inception_path(weights)
        status = path.stat()
        return _inception(path, (status.st_mtime_ns, status.st_size), device)
    name = digits_extractor() if features == DIGITS else features
    found = FEATURE_EXTRACTORS_REGISTRY.get(name)
    # torch-fidelity's own extractors would fetch weights from the network without being asked
    if found is None or found.__module__.startswith("torch_fidelity."):
        ours = [key for key, cls in FEATURE_EXTRACTORS_REGISTRY.items() if not cls.__module__.startswith("torch_fidel")]
        raise InputError(f"features: {name!r} is not registered; accepted: {', '.join([DIGITS, INCEPTION, *ours])}")
    return name, _create(name, device)


def _create(registered: str, device: torch.device, **options: Any) -> FeatureExtractorBase:
    layer = FEATURE_EXTRACTORS_REGISTRY[registered].get_default_feature_layer_for_metric("fid")
    return create_feature_extractor(registered, [layer], cuda=device.type == "cuda", verbose=False, **options)


def given_inception(weights: Path | str | None = None) -> Path | Literal["download"] | None:
    """What ``weights``, else INDM_BENCH_INCEPTION, asks for. InputError where it names a file that is not there."""
    given = weights or os.environ.get(INCEPTION_VARIABLE)
    if not given or given == "download":
        return given or None
    path = Path(os.path.expanduser(given))
    if not os.path.isfile(path):  # False, too, of a name that no file can have
        key = "weights" if weights else INCEPTION_VARIABLE
        published = URL_INCEPTION_V3.rsplit("/", 1)[-1]
        raise InputError(f"{key}: no file {given}; accepted: the path of {published}, or download")
    return path


def _inception_path(weights: Path | str | None) -> Path:
    default = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    given = given_inception(weights)
    if isinstance(given, Path):
        return given
    if given and not default.is_file():
        default.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(default), hash_prefix=INCEPTION_SHA256, progress=True)
    if not default.is_file():
        shown = f"~/{default.relative_to(Path.home())}" if default.is_relative_to(Path.home()) else str(default)
        raise _NotMeasured(f"Inception weights not found at {shown}, set {INCEPTION_VARIABLE} to a path or download")
    return default


@lru_cache(maxsize=1)
def _inception(path: Path, stamp: tuple[int, int], device: torch.device) -> tuple[str, FeatureExtractorBase]:
    """Inception with the weights at ``path``, kept until the file (its ``stamp``) changes.

    torch-fidelity unpickles without restriction, so it is given a copy of the tensors alone. InputError for a file that
    bears the published name and is not the published one.
    """
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if INCEPTION_SHA256[:8] in path.name and digest != INCEPTION_SHA256:
        raise InputError(f"{path}: sha256 {digest}: accepted: {INCEPTION_SHA256}, that of the published file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        with tempfile.TemporaryDirectory() as folder:
            torch.save(tensors, Path(folder) / "tensors.pth")
            copy = str(Path(folder) / "tensors.pth")
            extractor = _create(INCEPTION_REGISTERED, device, feature_extractor_weights_path=copy)
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a file of Inception weights ({reason})") from error
    return f"{INCEPTION_REGISTERED}-{digest[:8]}", extractor
