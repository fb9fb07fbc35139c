"""Seals: the content hashes of what a stage wrote, published before the one file that says the stage is finished.

``hashes-train.json`` covers config.yaml, learning_curve.csv, weights/* and provenance.json, ``hashes-evaluate.json``
the files of the evaluation and likelihood.json. Whoever reads a result compares it with its seal; a difference names
the file. Results from before there were seals get one, as they are, by ``python -m bench.seals RUNS_FOLDER``.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.errors import InputError
from bench.files import file_hash, json_text, read_hashed_json, read_json, write_bytes_atomic, write_hashed_json

TRAIN, EVALUATE = "hashes-train.json", "hashes-evaluate.json"
# the file whose presence says that the stage is finished; written last
MARKERS = {TRAIN: "provenance.json", EVALUATE: "likelihood.json"}
TRAINED_FILES = ("config.yaml", "learning_curve.csv")
EVALUATED_FILES = ("per_image.npz", "robustness.csv", "samples.png", "trajectory.png")
HASHES = "hashes"  # key of a report's summary.json: file beside it -> sha256


def begin(folder: Path, *seals: str) -> None:
    """Declare the stages unfinished: their markers go first, then their seals."""
    for name in (*(MARKERS[seal] for seal in seals), *seals):
        (folder / name).unlink(missing_ok=True)


def publish(folder: Path, seal: str, files: Iterable[str], record: dict[str, Any]) -> None:
    """Seal ``files`` of ``folder`` and the stage's marker, which holds ``record``; then write the marker.

    A marker thus never stands without its seal, wherever the process is killed.
    """
    marker = json_text(record).encode()
    hashes = {name: file_hash(folder / name) for name in files}
    _write_seal(folder / seal, hashes | {MARKERS[seal]: hashlib.sha256(marker).hexdigest()})
    write_bytes_atomic(folder / MARKERS[seal], marker)


def _write_seal(path: Path, hashes: dict[str, str]) -> None:
    write_hashed_json(path, {"schema": 1, "files": dict(sorted(hashes.items()))})


def evaluated_files(studies: Iterable[str]) -> list[str]:
    """The files of an evaluation with these studies, without its marker."""
    return [*EVALUATED_FILES, *(f"{study}.csv" for study in studies)]


def sealed_hashes(folder: Path, seal: str) -> dict[str, str]:
    """File -> sha256 of a finished stage, empty where it is not finished.

    InputError for a finished stage without a seal; ValueError, which names it, for a seal that is damaged.
    """
    path = folder / seal
    if not (folder / MARKERS[seal]).is_file():
        return {}
    try:
        return _inside(path, read_hashed_json(path)["files"])
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: {MARKERS[seal]} without the content hashes of {seal}; accepted: `python -m bench.seals "
            f"{folder}`, which takes the results as they are, or delete {MARKERS[seal]} and run the stage again"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a seal") from error


def _inside(path: Path, hashes: dict[str, str]) -> dict[str, str]:
    """The hashes, whose files must lie in the folder of ``path``; ValueError for a name that leads elsewhere."""
    for name in hashes:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}: names a file outside its folder, {name!r}")
    return {str(name): str(digest) for name, digest in hashes.items()}


def damage(folder: Path, seal: str, skip: str = "", also: Iterable[str] = ()) -> dict[str, str]:
    """File -> why it is not what the finished stage wrote; nothing where all are, or the stage is not finished.

    ``skip``: files whose names begin so are not read. ``also``: files that must be sealed if they are there. A damaged
    seal vouches for nothing: it is named for every file.
    """
    try:
        hashes = sealed_hashes(folder, seal)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).replace(str(folder / seal), seal)
        return dict.fromkeys((seal, MARKERS[seal], *_usual(seal), *also), reason)
    found = {name: f"{name} is not in {seal}" for name in also if name not in hashes and (folder / name).is_file()}
    for name, digest in hashes.items():
        if skip and name.startswith(skip):
            continue
        if not (folder / name).is_file():
            found[name] = f"{name} missing"
        elif file_hash(folder / name) != digest:
            found[name] = f"{name} differs from its hash in {seal}"
    return found


def _usual(seal: str) -> Sequence[str]:
    return TRAINED_FILES if seal == TRAIN else EVALUATED_FILES


def intact(folder: Path, seal: str) -> bool:
    """Whether a finished stage's files are what it wrote; tells on stderr which is not."""
    found = damage(folder, seal)
    for reason in dict.fromkeys(found.values()):
        print(f"{folder}: {reason}", file=sys.stderr)
    return not found


def report_hashes(folder: Path) -> dict[str, str]:
    """File -> sha256 of the tables and pictures of a report's folder, its summary left out."""
    kinds = (".csv", ".json", ".md", ".png")
    paths = [path for path in folder.rglob("*") if path.suffix in kinds and not path.name.startswith(".")]
    return {
        path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(paths) if path.name != "summary.json"
    }


def read_summary(folder: Path, suite: str | None = None) -> dict[str, Any]:
    """``summary.json`` of a report whose files are those it was written with; InputError names one that is not."""
    again = f"accepted: write it by `indm-bench report {suite or folder.name}`"
    try:
        summary = read_hashed_json(folder / "summary.json")
        hashes = _inside(folder / "summary.json", summary[HASHES])
    except FileNotFoundError as error:
        raise InputError(f"{folder / 'summary.json'}: missing, and with it the tables' hashes; {again}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).removeprefix(f"{folder / 'summary.json'}: ")
        said = "it holds no hashes of the tables" if isinstance(error, KeyError) else reason
        raise InputError(f"{folder / 'summary.json'}: {said}; {again}") from error
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != digest:
            said = "differs from its hash in summary.json" if path.is_file() else "missing"
            raise InputError(f"{path}: {said}; {again}")
    return summary


def seal_folder(folder: Path) -> list[str]:
    """Seal the finished stages of one run's folder that have no seal yet; the seals written.

    InputError where its files do not belong together. A stage that has a seal is left alone.
    """
    from bench.studies.names import STUDIES

    made = []
    for seal in (TRAIN, EVALUATE):
        marker = folder / MARKERS[seal]
        if not marker.is_file() or (folder / seal).exists():
            continue
        try:
            record, trained = read_json(marker), read_json(folder / MARKERS[TRAIN])
            weights = folder / "weights" / "model.safetensors"
            digest = file_hash(weights) if (folder / "weights").is_dir() else trained["weights_sha256"]
            if not digest == record["weights_sha256"] == trained["weights_sha256"]:
                raise ValueError(f"{MARKERS[seal]} speaks of other weights")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: {' '.join(str(error).split())}; accepted: run the stage again") from error
        wanted = evaluated_files(STUDIES) if seal == EVALUATE else TRAINED_FILES
        files = [name for name in wanted if (folder / name).is_file()]
        if seal == TRAIN:
            files += [path.relative_to(folder).as_posix() for path in (folder / "weights").glob("*.safetensors")]
        _write_seal(folder / seal, {name: file_hash(folder / name) for name in [*files, MARKERS[seal]]})
        made.append(seal)
    return made


def main(arguments: Sequence[str]) -> int:
    """``python -m bench.seals FOLDER...``: seal every finished run below; 2 where files do not belong together."""
    if not arguments or not all(Path(name).is_dir() for name in arguments):
        print("usage: python -m bench.seals RUNS_FOLDER...; accepted: existing folders", file=sys.stderr)
        return 2
    runs, made, refused = 0, 0, 0
    for root in arguments:
        for path in sorted(Path(root).rglob(MARKERS[TRAIN])):
            runs += 1
            try:
                made += len(seal_folder(path.parent))
            except InputError as error:
                refused += 1
                print(f"indm-bench: {error}", file=sys.stderr)
    print(f"{made} seals written for {runs} runs, {refused} refused")
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
