"""What produced a result: code version, packages, hardware, memory and arithmetic.

Nothing that names a person or a machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

SCHEMA = 1
TRAINING_MODULES = ("acceleration", "averages", "data", "likelihood", "optimizers", "toy", "train", "training_data")
PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "torch-fidelity",
    "numpy",
    "scipy",
    "scikit-learn",
    "dvc",
)


def record(device: Any = None) -> dict[str, Any]:
    """The part of `provenance.json` that does not depend on the run; ``device`` is the torch device that was used.

    schema, commit (null outside git), dirty, packages, device, cpu, cores, threads, python, started (UTC, ISO 8601),
    peak_memory_mb of this process so far.
    """
    import torch

    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    commit, dirty = code_version()
    return {
        "schema": SCHEMA,
        "commit": commit,
        "dirty": dirty,
        "packages": package_versions(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_memory_mb": peak_memory_mb(),
    }


@lru_cache(maxsize=1)
def code_version() -> tuple[str | None, bool | None]:
    """(commit, whether tracked code differs from it), (None, None) where the package is not a git checkout.

    Reports and DVC's own records are left out of the comparison: they are what a run changes, not what it ran.
    """
    root = Path(__file__).parents[1]
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!reports", ":!*dvc.lock")
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if not commit:
        return None, None
    changes = _git(root, *status)
    return commit, None if changes is None else bool(changes)


@lru_cache(maxsize=1)
def training_code() -> str:
    """12 hex digits over the code that decides what a training step does, comments and layout left out.

    A checkpoint belongs to the code that wrote it: resuming it under another would give weights that neither made.
    """
    root = Path(__file__).parents[1]
    paths = sorted([*(root / "models").rglob("*.py"), *(root / "bench" / f"{name}.py" for name in TRAINING_MODULES)])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + ast.dump(ast.parse(path.read_text())).encode())
    return digest.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """The processor's name as the operating system gives it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on, which a container limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far in MiB, plus what was allocated on a GPU."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    megabytes = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    if torch.cuda.is_available():
        megabytes += torch.cuda.max_memory_allocated() / 2**20
    return round(megabytes, 1)
