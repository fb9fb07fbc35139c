"""Whether a run's folder already holds what a stage would make."""

from __future__ import annotations

from pathlib import Path

from bench import seals
from bench.files import read_json
from bench.run_config import RunConfig


def is_trained(run: RunConfig) -> bool:
    """Whether the run's folder already holds the finished training of exactly this configuration, undamaged.

    A damaged file is named on stderr. InputError where the training is finished but carries no hashes.
    """
    if _damaged(run.folder, seals.TRAIN):
        return False
    try:
        record = read_json(run.folder / "provenance.json")
        if record["config_hash"] != run.training_hash:
            return False
        weights = record["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not finished
    return seals.sealed_hashes(run.folder, seals.TRAIN).get("weights/model.safetensors") == weights


def _damaged(folder: Path, seal: str) -> bool:
    """Whether a sealed stage's files differ from the seal, which is then told on stderr."""
    return (folder / seal).is_file() and not seals.intact(folder, seal)


def is_evaluated(run: RunConfig) -> bool:
    """Whether the run's folder holds the evaluation of exactly this configuration and these weights, undamaged.

    A damaged file is named on stderr. InputError where the evaluation is finished but carries no hashes.
    """
    if _damaged(run.folder, seals.EVALUATE):
        return False
    try:
        weights = read_json(run.folder / "provenance.json")["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return evaluated_with(run, weights) and bool(seals.sealed_hashes(run.folder, seals.EVALUATE))


def evaluated_with(run: RunConfig, weights_sha256: str) -> bool:
    """Whether the folder holds an evaluation of this configuration and these weights, by its own record."""
    try:
        record = read_json(run.folder / "likelihood.json")
        return record["config_hash"] == run.hash and record["weights_sha256"] == weights_sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or damaged: not done
