"""Whether a run's folder already holds what a stage would make."""

from __future__ import annotations

from bench.checkpoint import file_hash
from bench.files import read_json
from bench.run_config import RunConfig


def is_trained(run: RunConfig) -> bool:
    """Whether the run's folder already holds the finished training of exactly this configuration."""
    weights = run.folder / "weights" / "model.safetensors"
    try:
        record = read_json(run.folder / "provenance.json")
        return record["config_hash"] == run.training_hash and record["weights_sha256"] == file_hash(weights)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or damaged: not finished


def is_evaluated(run: RunConfig) -> bool:
    """Whether the run's folder holds the evaluation of exactly this configuration and these weights."""
    try:
        record, trained = (read_json(run.folder / name) for name in ("likelihood.json", "provenance.json"))
        return record["config_hash"] == run.hash and record["weights_sha256"] == trained["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or damaged: not done
