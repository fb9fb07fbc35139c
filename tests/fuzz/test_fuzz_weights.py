"""Weights and checkpoints: safetensors, files of torch.save, folders of this harness and of diffusers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import harness
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import models
from bench.checkpoint import load_checkpoint, save_checkpoint
from bench.errors import InputError
from bench.features import load_extractor
from bench.importing.pretrained import load_pretrained
from bench.importing.score_sde import check_sigmas, read_checkpoint
from bench.importing.torch_files import read_torch_file
from bench.yaml_files import dump_yaml

TENSORS = {"model": torch.arange(6.0).reshape(2, 3), "step": torch.tensor([1, 2]), "flag": torch.tensor([True])}
OWN = {
    "suite": "fuzzed",
    "variant": "small",
    "dataset": "gaussians",
    "seed": 0,
    "train": {"batch_size": 4, "steps": 1},
    "evaluate": {},
    "model": {
        "name": "indm",
        "sde": {"name": "vp"},
        "flow": {"name": "identity"},
        "score": {"name": "mlp", "width": 8, "depth": 1},
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def safetensors(header: bytes | dict, content: bytes = b"", length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


HOSTILE = [
    safetensors({}),
    safetensors(b"{}", length=2**63),
    safetensors(b"{}", length=2**31),
    safetensors(b" " * 1000),
    safetensors(b"[" * 1000),
    safetensors({"model": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    safetensors({"model": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    safetensors({"model": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4)),
    safetensors({"model": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    save({"model": torch.full((2, 3), float("nan"))}),
    save({"model": torch.zeros(3, 2, dtype=torch.int8)}),
]
HONEST = save(TENSORS)
BYTES = st.sampled_from(HOSTILE) | st.just(HONEST).flatmap(harness.damaged)


@harness.cases(2.0)
@given(content=BYTES, meta=st.none() | st.binary(max_size=60))
def test_checkpoints(content, meta):
    shutil.rmtree("run", ignore_errors=True)
    save_checkpoint(Path("run"), 1, TENSORS, {})
    save_checkpoint(Path("run"), 2, TENSORS, {})
    newest = Path("run/000000002")
    (newest / "state.safetensors").write_bytes(content)
    if meta is not None:
        (newest / "meta.json").write_bytes(meta)

    def resume() -> None:
        found = load_checkpoint(Path("run"))
        assert found is not None and found[1]["step"] == (2 if content == HONEST and meta is None else 1)

    harness.attempt("checkpoints", resume)


@harness.cases(3.0)
@given(content=BYTES | st.binary(max_size=100))
def test_classifiers(content):
    Path("features.safetensors").write_bytes(content)
    harness.attempt("classifiers", lambda: load_extractor("features.safetensors"))


@harness.cases(0.3)
@given(
    record=st.fixed_dictionaries({key: harness.VALUES for key in ("shape", "levels", "classes", "features", "dataset")})
)
@example(record={"shape": [1, 8, 8], "levels": 17, "classes": 10**9, "features": 10**9, "dataset": "x"})
@example(record={"shape": [1, 10**9, 10**9], "levels": 1, "classes": 1, "features": 1, "dataset": ["x"]})
def test_records_of_classifiers(record):
    Path("features.safetensors").write_bytes(save(TENSORS, metadata={"classifier": json.dumps(record)}))
    harness.attempt("classifiers", lambda: load_extractor("features.safetensors"))


def torch_file(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


TORCH = torch_file({"model": {"module.a": torch.zeros(3)}, "ema": {"shadow_params": [torch.zeros(3)]}, "step": 1})


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def cycle() -> dict:
    content: dict = {"model": {}}
    content["model"]["again"] = content
    return content


def with_pickle(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    return zipped({"x/data.pkl": content, "x/version": b"3\n", "x/byteorder": b"little"}, compression)


@harness.cases(3.0)
@given(content=harness.damaged(TORCH) | st.binary(max_size=60).map(with_pickle))
@example(content=TORCH)
@example(content=TORCH.replace(b"PK\6\7\0", b"PK\6\7\1"))  # the second of several zip files
@example(content=torch_file({"model": {"sigmas": torch.zeros(1).expand(10**12)}}))
@example(content=torch_file({"model": {"a": torch.zeros(1, device="meta").expand(10**12)}}))
@example(content=torch_file({"model": {"a": torch.sparse_coo_tensor(size=(10**6, 10**6))}}))
@example(content=torch_file(cycle()))
@example(content=torch_file({"model": 1}, _use_new_zipfile_serialization=False))
@example(content=with_pickle(b"\x80\x02}K\x01" + b"q\0h\0\x86" * 60 + b"K\x01s."))
@example(content=with_pickle(bytes(64 * 2**20), zipfile.ZIP_DEFLATED))
@example(content=with_pickle(b"(" * 100_000 + b"."))
@example(content=with_pickle(pickle.dumps([[[]]], 2)))
def test_torch_files(content):
    Path("file.pth").write_bytes(content)
    harness.attempt("torch files", lambda: read_torch_file(Path("file.pth")))
    harness.attempt("torch files", lambda: read_checkpoint(Path("file.pth")))


def test_noise_levels_of_another_count_are_refused_before_they_are_compared():
    levels = torch.zeros(1).expand(10**9)
    model = {"sde": {"name": "ve", "sigma_min": 0.01, "sigma_max": 50.0}}
    with pytest.raises(InputError, match="sigmas"), harness.limited():
        check_sigmas(Path("file.pth"), {"sigmas": levels[:5]}, model, 1000)


def own_folder(config: dict, weights: bytes | None) -> None:
    shutil.rmtree("own", ignore_errors=True)
    Path("own").mkdir()
    Path("own/config.yaml").write_text(dump_yaml(config))
    if weights is not None:
        Path("own/model.safetensors").write_bytes(weights)


@harness.cases(0.3)
@given(config=harness.mutated(OWN), content=st.none() | BYTES)
@example(config=harness.changed(OWN, ("model", "score", "width"), 999_999), content=None)
@example(config=harness.changed(OWN, ("model", "score", "depth"), 10**9), content=None)
@example(config=harness.changed(OWN, ("dataset",), "folder:/"), content=None)
def test_exported_folders(config, content):
    if content is None:
        built = models.build({**OWN["model"], "shape": [2]})
        content = save({name: value.contiguous() for name, value in built.state_dict().items()})
    try:
        own_folder(config, content)
    except Exception:  # noqa: BLE001 - what cannot be written as YAML cannot be read either
        return
    harness.attempt("--pretrained folders", lambda: load_pretrained(Path("own")))


UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4, 4],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 10, "beta_start": 1e-4, "beta_end": 0.02}


@harness.cases(0.3)
@given(data=st.data())
@example(data={"block_out_channels": [10**6, 10**6]})
@example(data={"layers_per_block": 10**9})
@example(data={"norm_num_groups": 0})
@example(data={"sample_size": 10**12})
@example(data={"auto_map": {"AutoModel": "evil.Model"}, "_class_name": "UNet2DModel"})
def test_folders_of_diffusers(data):
    shutil.rmtree("foreign", ignore_errors=True)
    Path("foreign").mkdir()
    mutate = not isinstance(data, dict)
    unet = data.draw(harness.mutated(UNET)) if mutate else UNET | data
    scheduler = data.draw(harness.mutated(SCHEDULER)) if mutate and data.draw(st.booleans()) else SCHEDULER
    content = data.draw(BYTES) if mutate else HONEST
    Path("foreign/config.json").write_text(json.dumps(unet))
    Path("foreign/scheduler_config.json").write_text(json.dumps(scheduler))
    Path("foreign/diffusion_pytorch_model.safetensors").write_bytes(content)
    harness.attempt("--pretrained folders", lambda: load_pretrained(Path("foreign")))


def test_shards_that_lie_elsewhere_are_not_read():
    folder = Path("foreign")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(UNET))
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    save_file(TENSORS, folder / "diffusion_pytorch_model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="several files"):
        load_pretrained(folder)
