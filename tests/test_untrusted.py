"""Files from elsewhere are data: no code of ours can execute them, and a malicious pickle is refused everywhere."""

from __future__ import annotations

import ast
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from importing_files import Trap
from synthetic_runs import write_run
from untrusted_files import OWN, ROOT, SOURCES, put, saved

from bench.checkpoint import load_checkpoint
from bench.cifar import parse_batch
from bench.claims.readings import per_image
from bench.config import load_suite, read_run
from bench.data import load
from bench.errors import InputError
from bench.features import load_extractor
from bench.fidelity import image_quality
from bench.files import read_json
from bench.importing.pretrained import import_checkpoint, load_pretrained
from bench.report.load import load_runs, read_csv
from bench.report.references import load_published
from bench.yaml_files import read_yaml

# --- what the code may not contain


def calls_to_avoid(text: str) -> list[str]:
    """Calls in Python code that execute what they read, reach out of a folder, or fetch without a hash."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += sorted(
                names & {"cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "requests"}
            )
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        wanted = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}.get(name)
        if wanted and given.get(wanted[0]) != wanted[1]:
            found.append(f"{name} without {'='.join(wanted)}")
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"):
            found.append(name)
        if name in ("pickle.Unpickler", "YAML") and given.get("typ") != "'safe'":
            found.append(name)
        if name.endswith((".extract", ".extractall")):
            found.append(last)
        if last in ("unpack_archive", "urlopen", "urlretrieve", "hf_hub_download"):
            found.append(last)
        if last in ("load_state_dict_from_url", "download_url_to_file") and "hash_prefix" not in given:
            found.append(f"{last} without hash_prefix")
        if last == "from_pretrained" and given.get("local_files_only") != "True":
            found.append("from_pretrained without local_files_only=True")
        if given.get("shell") not in (None, "False"):
            found.append("shell")
        if last == "Environment" and given.get("autoescape") != "True":
            found.append("Environment without autoescape=True")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "pickle.loads(b)",
        "pickle.Unpickler(s).load()",
        "import yaml",
        "YAML(typ='unsafe')",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "torch.hub.download_url_to_file(url, p)",
        "UNet2DModel.from_pretrained(folder)",
        "Environment(loader=x)",
    ],
)
def test_the_search_finds_what_it_is_for(text):
    assert calls_to_avoid(text)


def test_the_code_executes_nothing_that_it_reads():
    found = {
        path.relative_to(ROOT).as_posix(): calls for path in SOURCES if (calls := calls_to_avoid(path.read_text()))
    }
    assert not found
    assert calls_to_avoid("model.eval()\nYAML(typ='safe', pure=True)\nnp.load(s, allow_pickle=False)") == []
    templates = list((ROOT / "bench" / "report").glob("*.j2"))
    assert templates and not any("|safe" in path.read_text().replace(" ", "") for path in templates)


# --- a pickle that leaves a file behind, offered wherever a file is read


class Offer:
    """Every form in which the pickle may stand in a file."""

    def __init__(self, mark: Path):
        trap = Trap(mark)
        self.raw = pickle.dumps({"data": trap, b"data": trap, "model": trap})
        self.protocol2 = pickle.dumps({b"data": trap, b"labels": [0]}, protocol=2)
        self.torch = saved({"model": {"a": trap}, "ema": {"shadow_params": [trap]}, "step": 0, "optimizer": {}})
        self.legacy = saved({"model": trap}, _use_new_zipfile_serialization=False)
        self.npy = io.BytesIO()
        np.save(self.npy, np.array([trap], dtype=object), allow_pickle=True)
        stream = io.BytesIO()
        objects = np.array([trap], dtype=object)
        np.savez(
            stream, train_images=objects, test_images=objects, nll=objects, nelbo=objects, train=objects, test=objects
        )
        self.npz = stream.getvalue()
        self.tag = f"x: !!python/object/apply:builtins.open ['{mark}', w]\n".encode()
        self.tar = tarred({"data_batch_1": self.protocol2, "train/a.png": self.raw, "x.pkl": self.raw})

    def all(self) -> list[bytes]:
        packed = [zipped({"data.pkl": self.raw}), zipped({"a/data.pkl": self.raw, "a/version": b"3"})]
        forms = [self.raw, self.protocol2, self.torch, self.legacy, self.npy.getvalue(), self.npz, self.tag, self.tar]
        return [*forms, *packed]


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


UNET = {"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}
OFFICIAL = "vp/cifar10_ddpmpp_continuous"


def own_weights(root: Path, content: bytes):
    put(root / "own" / "config.yaml", OWN.encode())
    put(root / "own" / "model.safetensors", content)
    return load_pretrained(root / "own")


def imported_weights(root: Path, content: bytes):
    model = {"kind": "score_sde", "config": OFFICIAL, "weights": "ema", "shape": [3, 32, 32], "space": "data"}
    put(root / "in" / "config.yaml", json.dumps(model | {"condition": "label", "model": {"name": "ddpm"}}).encode())
    put(root / "in" / "weights" / "model.safetensors", content)
    put(root / "in" / "provenance.json", content)
    return load_pretrained(root / "in")


def diffusers_weights(suffix: str):
    def read(root: Path, content: bytes):
        folder = root / f"unet{suffix}"
        put(folder / "config.json", json.dumps(UNET).encode())
        put(folder / "scheduler_config.json", b"{}")
        put(folder / f"diffusion_pytorch_model{suffix}", content)
        return load_pretrained(folder)

    return read


def checkpoint(root: Path, content: bytes):
    for name in ("state.safetensors", "meta.json"):
        put(root / "run" / "000000001" / name, content)
    found = load_checkpoint(root / "run")
    assert found is None
    raise InputError("passed over")


def per_image_file(root: Path, content: bytes):
    folder = root / "runs" / "digits" / "ddpmpp-vp" / "0"
    write_run(folder, "digits", "digits", "ddpmpp-vp", 0, False)
    put(folder / "per_image.npz", content)
    (run,) = load_runs("digits", root / "runs")
    run.problems.clear()
    said = per_image(run, "nll")
    assert isinstance(said, str)
    raise InputError(said)


def cached_images(root: Path, content: bytes):
    from PIL import Image

    for k in range(2):
        (root / "shots").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (k, 0, 0)).save(root / "shots" / f"{k}.png")
    honest = load(f"folder:{root / 'shots'}").hash
    (cache,) = root.glob("shots.decoded-*.npz")
    put(cache, content)
    assert load(f"folder:{root / 'shots'}").hash == honest
    raise InputError("made again")


def batches(root: Path, content: bytes):
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        put(root / "cifar-10-batches-py" / name, content)
    return load("cifar10", root)


def a_suite(root: Path, content: bytes):
    put(root / "experiments" / "bad.yaml", content)
    return load_suite("bad")


PLACES = {
    "weights of an exported run": own_weights,
    "weights of an imported checkpoint": imported_weights,
    "weights of diffusers, .bin": diffusers_weights(".bin"),
    "weights of diffusers, .safetensors": diffusers_weights(".safetensors"),
    "import-checkpoint FILE": lambda root, c: import_checkpoint(put(root / "c.pth", c), root / "out", OFFICIAL),
    "import-checkpoint --flow": lambda root, c: import_checkpoint(
        put(root / "c.pth", c), root / "out", "vp/CIFAR10/indm_nll", "indm", flow=put(root / "f.pth", c)
    ),
    "training checkpoint": checkpoint,
    "features classifier": lambda root, c: load_extractor(put(root / "features.safetensors", c)),
    "Inception weights": lambda root, c: image_quality(
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "inception",
        weights=put(root / "inception.pth", c),
    ),
    "CIFAR-10 batch": lambda root, c: parse_batch(c, "batch"),
    "CIFAR-10 folder": batches,
    "CIFAR-10 archive": lambda root, c: (put(root / "cifar-10-python.tar.gz", c), load("cifar10", root)),
    "CIFAR-10 .npz": lambda root, c: (put(root / "cifar10.npz", c), load("cifar10", root)),
    "archive of images": lambda root, c: (put(root / "cifar10-jpeg.tar.xz", c), load("cifar10-jpeg", root)),
    "folder of images": lambda root, c: (put(root / "images" / "a.png", c), load(f"folder:{root / 'images'}")),
    "decoded images": cached_images,
    "per_image.npz": per_image_file,
    "suite": a_suite,
    "run's config.yaml": lambda root, c: (put(root / "config.yaml", c), read_run(root)),
    "reference.csv": lambda root, c: (load_published(put(root / "reference.csv", c)), read_csv(root / "reference.csv")),
    "JSON": lambda root, c: read_json(put(root / "likelihood.json", c)),
    "YAML": lambda root, c: read_yaml(put(root / "any.yaml", c)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore")
def test_a_malicious_pickle_is_refused_unexecuted(place, tmp_path, monkeypatch, capsys):
    mark = tmp_path / "executed"
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate(Offer(mark).all()):
        root = tmp_path / str(number)
        root.mkdir()
        monkeypatch.chdir(root)
        try:
            PLACES[place](root, content)
        except (InputError, ValueError) as error:  # ValueError: files that the report reads, which names the reason
            assert str(error)
        else:
            # text that a CSV reader takes for a table without rows, say, is no pickle any more
            assert place in ("reference.csv",), (place, number)
        assert not mark.exists(), (place, number)


def test_the_pickle_of_these_tests_does_execute(tmp_path):
    pickle.loads(Offer(tmp_path / "executed").raw)
    assert (tmp_path / "executed").exists()
