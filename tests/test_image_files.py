"""Image files in every accepted form, and hostile or damaged ones; all are made here."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch
from cifar_files import (
    LABELS,
    official_files,
    python2_batch,
    python3_batch,
    random_images,
    write_official,
    write_tar,
)
from PIL import Image

from bench.cifar import parse_batch
from bench.data import load
from bench.errors import InputError
from bench.image_files import halve


@pytest.mark.parametrize("write", [python2_batch, python3_batch])
@pytest.mark.parametrize("packed", [False, True])
def test_official_cifar10_is_read_in_both_forms(tmp_path, write, packed):
    images = random_images(12)
    files = official_files(images, LABELS, write)
    if packed:
        members = {f"cifar-10-batches-py/{name}": content for name, content in files.items()}
        write_tar(tmp_path / "cifar-10-python.tar.gz", members | {"cifar-10-batches-py/batches.meta": b"x"}, "w:gz")
    else:
        write_official(tmp_path / "cifar-10-batches-py", files)
    data = load("cifar10", tmp_path)
    assert torch.equal(data.train, torch.from_numpy(images[:10])) and torch.equal(
        data.test, torch.from_numpy(images[10:])
    )
    assert data.train_labels.tolist() == LABELS[:10] and data.test_labels.tolist() == LABELS[10:]
    assert data.describe()["levels"] == 256 and data.shape == (3, 32, 32)
    assert data.name == "cifar10-subset"  # twelve images are not CIFAR-10


def test_data_dir_comes_from_the_environment(tmp_path, monkeypatch):
    write_official(tmp_path / "cifar-10-batches-py", official_files(random_images(12), LABELS))
    monkeypatch.setenv("INDM_BENCH_DATA", str(tmp_path))
    assert len(load("cifar10").train) == 10


class Payload:
    """Unpickling this calls ``callable(*arguments)``."""

    def __init__(self, callable, *arguments):
        self.call = (callable, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("packed", [False, True])
def test_malicious_pickles_are_refused_unexecuted(tmp_path, packed):
    mark = tmp_path / "executed"
    files = official_files(random_images(12), LABELS)
    files["data_batch_3"] = pickle.dumps({b"data": Payload(open, str(mark), "w"), b"labels": [0, 0]}, protocol=2)
    if packed:
        write_tar(tmp_path / "cifar-10-python.tar.gz", files, "w:gz")
    else:
        write_official(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(InputError, match=r"data_batch_3: not an official .*io\.open, which no image batch needs"):
        load("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nfromfile\n(S'/etc/hostname'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct.__class__\n.",
        b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        b"c_codecs\nencode\nN}U\x03keyU\x05values\x86b.",  # state set on the stand-in itself
        b"cnumpy\nndarray\nN}U\x03keyU\x05values\x86b.",
        pickle.dumps({b"data": np.array([[object]], dtype=object), b"labels": [0]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [0]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [11]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 100), np.uint8), b"labels": [0]}, protocol=2),
        pickle.dumps({b"labels": [0]}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
        python2_batch(np.zeros((2, 3072), np.uint8), [1, 2])[:-500],
        b"",
        b"\x89PNG",
    ],
)
def test_other_pickles_are_refused_in_one_line(content):
    with pytest.raises(InputError, match="batch: not an official CIFAR-10 batch") as refusal:
        parse_batch(content, "batch")
    assert "\n" not in str(refusal.value)


def test_damaged_or_missing_cifar10_says_what_is_wanted(tmp_path):
    with pytest.raises(InputError, match="cifar-10-batches-py, cifar-10-python.tar.gz, cifar10.npz.*INDM_BENCH_DATA"):
        load("cifar10", tmp_path)
    files = official_files(random_images(12), LABELS)
    archive = tmp_path / "cifar-10-python.tar.gz"
    write_tar(archive, files, "w:gz")
    archive.write_bytes(archive.read_bytes()[:-20_000])
    with pytest.raises(InputError, match="damaged archive"):
        load("cifar10", tmp_path)
    archive.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="damaged archive"):
        load("cifar10", tmp_path)
    del files["test_batch"]
    write_tar(archive, files, "w:gz")
    with pytest.raises(InputError, match="no member test_batch"):
        load("cifar10", tmp_path)
    write_official(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(InputError, match="test_batch: missing"):
        load("cifar10", tmp_path)


def test_npz_is_read_and_bad_ones_are_refused(tmp_path):
    path = tmp_path / "cifar10.npz"
    images = random_images(5, size=16)
    arrays = {"train_images": images[:3].transpose(0, 2, 3, 1), "test_images": images[3:].transpose(0, 2, 3, 1)}
    np.savez(path, **arrays, train_labels=np.array([1, 2, 3], np.uint8), test_labels=np.array([0, 4], np.uint8))
    data = load("cifar10", tmp_path)
    assert torch.equal(data.train, torch.from_numpy(images[:3])) and torch.equal(
        data.test, torch.from_numpy(images[3:])
    )
    assert data.train_labels.tolist() == [1, 2, 3]

    np.savez(path, **arrays, train_labels=np.array([1, 2]))
    with pytest.warns(UserWarning, match=r"train_labels .* not integers \(3,\); labels left out"):
        assert load("cifar10", tmp_path).train_labels is None

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cifar10.npz: not a readable .npz"):
        load("cifar10", tmp_path)
    path.write_bytes(whole[:2000] + b"\0" * 100 + whole[2100:])
    with pytest.raises(InputError, match="cifar10.npz: not a readable .npz"):
        load("cifar10", tmp_path)

    mark = tmp_path / "executed"
    np.savez(path, train_images=np.array([Payload(open, str(mark), "w")], dtype=object), test_images=images)
    with pytest.raises(InputError, match="not a readable .npz file of plain arrays"):
        load("cifar10", tmp_path)
    assert not mark.exists()

    for change, words in (
        ({"test_images": None}, "no array 'test_images'"),
        ({"train_images": arrays["train_images"].astype(np.float32)}, "train_images is float32"),
        ({"train_images": images[:3]}, r"train_images is uint8 \(3, 3, 16, 16\)"),
        ({"test_images": arrays["test_images"][:, :8]}, r"train images are \(3, 16, 16\) but test images \(3, 8, 16\)"),
    ):
        np.savez(path, **{key: value for key, value in (arrays | change).items() if value is not None})
        with pytest.raises(InputError, match=words):
            load("cifar10", tmp_path)


def encode(image: np.ndarray, form: str = "PNG", mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).convert(mode).save(stream, form)
    return stream.getvalue()


def class_files(images: np.ndarray, form: str = "PNG") -> dict[str, bytes]:
    """Six train and two test images in two classes."""
    names = [f"train/{kind}/{i}" for kind in ("cat", "dog") for i in range(3)] + ["test/cat/0", "test/dog/0"]
    suffix = "jpg" if form == "JPEG" else "png"
    return {f"{name}.{suffix}": encode(image, form) for name, image in zip(names, images, strict=True)}


def write_files(folder, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_folder_with_split_and_classes(tmp_path):
    images = random_images(8, size=8)
    write_files(tmp_path / "pets", class_files(images) | {"train/notes.txt": b"no image", "test/.hidden/0.png": b"no"})
    data = load(f"folder:{tmp_path}/pets")
    assert torch.equal(data.train, torch.from_numpy(images[:6])) and torch.equal(
        data.test, torch.from_numpy(images[6:])
    )
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test_labels.tolist() == [0, 1]
    assert data.name == "folder:pets" and str(tmp_path) not in json.dumps(data.describe())


def test_flat_folder_is_split_by_name(tmp_path):
    images = random_images(21, size=4)
    write_files(tmp_path / "flat", {f"{i:02}.png": encode(image) for i, image in enumerate(images)})
    data = load(f"folder:{tmp_path}/flat")
    assert torch.equal(data.test, torch.from_numpy(images[[0, 10, 20]]))
    assert len(data.train) == 18 and data.train_labels is None
    grey = {f"{i}.png": encode(image, mode="L") for i, image in enumerate(images)}
    write_files(tmp_path / "grey", grey)
    found = load(f"folder:{tmp_path}/grey").train
    assert found.shape == (18, 3, 4, 4) and torch.equal(found[:, 0], found[:, 2])


def test_decoded_images_are_cached_by_content(tmp_path, monkeypatch):
    folder = tmp_path / "pets"
    images = random_images(8, size=8)
    write_files(folder, class_files(images))
    first = load(f"folder:{folder}")
    (cache,) = tmp_path.glob("pets.decoded-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("bench.image_files._decode", lambda *_: pytest.fail("decoded again"))
        assert load(f"folder:{folder}").hash == first.hash
    cache.write_bytes(cache.read_bytes()[:100])  # a damaged cache is made again
    assert load(f"folder:{folder}").hash == first.hash
    (folder / "train/cat/0.png").write_bytes(encode(255 - images[0]))
    changed = load(f"folder:{folder}")
    assert changed.hash != first.hash and torch.equal(changed.train[0], torch.from_numpy(255 - images[0]))


def test_a_read_only_place_gets_no_cache(tmp_path):
    write_files(tmp_path / "place/pets", class_files(random_images(8, size=8)))
    (tmp_path / "place").chmod(0o555)
    try:
        assert len(load(f"folder:{tmp_path}/place/pets").train) == 6
        assert not list((tmp_path / "place").glob("*.npz"))
    finally:
        (tmp_path / "place").chmod(0o755)


def test_jpeg_archive_equals_folder_and_16_is_its_block_mean(tmp_path):
    smooth = np.stack([np.kron(image, np.ones((1, 8, 8), np.uint8)) for image in random_images(8, size=4)])
    files = class_files(smooth, "JPEG")
    write_files(tmp_path / "one/cifar10-jpeg", files)
    (tmp_path / "two").mkdir()
    write_tar(tmp_path / "two/cifar10-jpeg.tar.xz", dict(reversed(files.items())), "w:xz")  # order must not matter
    one, two = load("cifar10-jpeg", tmp_path / "one"), load("cifar10-jpeg", tmp_path / "two")
    assert one.hash == two.hash and one.train_labels.tolist() == two.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert one.name == "cifar10-jpeg"
    small = load("cifar10-16", tmp_path / "two")
    assert small.name == "cifar10-16" and small.shape == (3, 16, 16)
    mean = torch.nn.functional.avg_pool2d(two.train.double(), 2)
    assert torch.equal(small.train, (mean + 0.5).floor().to(torch.uint8))
    archive = tmp_path / "two/cifar10-jpeg.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(InputError, match="cifar10-jpeg.tar.xz: damaged archive"):
        load("cifar10-jpeg", tmp_path / "two")


def test_halving_by_hand():
    block = np.array([[[[1, 2, 255, 255], [2, 1, 255, 255]]]], np.uint8)
    assert halve(block).tolist() == [[[[2, 255]]]]
    with pytest.raises(InputError, match="2x3 pixels cannot be halved"):
        halve(np.zeros((1, 1, 2, 3), np.uint8))


PIXELS = encode(random_images(1, size=4)[0])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": PIXELS, "b.png": encode(random_images(1, size=5)[0])}, "b.png is RGB 5x5 but a.png"),
        ({"a.png": PIXELS, "b.png": encode(random_images(1, size=4)[0], mode="L")}, "b.png is L"),
        ({"a.png": encode(random_images(1, size=4)[0], mode="RGBA")}, "a.png: image mode RGBA"),
        ({"a.png": PIXELS[:60]}, "a.png: not a readable PNG or JPEG"),
        ({"a.png": b"GIF89a"}, "a.png: not a readable"),
        ({"a.png": PIXELS}, "1 PNG or JPEG images found"),
        ({"a.txt": b"text"}, "0 PNG or JPEG images found"),
        ({f"train/{i}.png": PIXELS for i in range(3)}, "only train/ has images"),
        ({"train/0.png": PIXELS, "test/1.png": PIXELS, "2.png": PIXELS}, "2.png lies in neither"),
    ],
)
def test_unusable_folders_are_refused_by_name(tmp_path, files, words):
    write_files(tmp_path / "bad", files)
    with pytest.raises(InputError, match=words):
        load(f"folder:{tmp_path}/bad")


def test_absent_folder_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="absent: no such folder of images"):
        load(f"folder:{tmp_path}/absent")
