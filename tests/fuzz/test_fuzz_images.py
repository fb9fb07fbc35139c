"""Data files: CIFAR-10 batches, .npz, folders and archives of images, with bombs among them."""

from __future__ import annotations

import io
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import harness
import numpy as np
import pytest
from cifar_files import LABELS, official_files, python2_batch, python3_batch, random_images, write_tar
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from bench import image_files, untrusted
from bench.cifar import parse_batch
from bench.data import load
from bench.errors import InputError

IMAGES = random_images(12)
BATCH = python2_batch(IMAGES[:2].reshape(2, -1), [1, 2])
BATCH3 = python3_batch(IMAGES[:2].reshape(2, -1), [1, 2])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_limit(monkeypatch):
    """Bombs of megabytes instead of gigabytes: the tests have to write them."""
    monkeypatch.setattr(untrusted, "UNPACKED", 8 * 2**20)


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB" if mode in ("I;16", "LA", "PA") else mode).save(stream, form, **options)
    return stream.getvalue()


def special(mode: str) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000) if mode == "I;16" else None
    if mode == "LA":
        image = Image.new("LA", (8, 8), (7, 9))
    if mode == "P+":
        image = Image.new("P", (8, 8), 3)
        image.info["transparency"] = 3
    image.save(stream, "PNG", **({"transparency": 3} if mode == "P+" else {}))
    return stream.getvalue()


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (k, k, k)) for k in range(3)]
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG that states its size and holds one row's worth of data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


CONTENTS = {
    "png": picture(),
    "jpeg": picture(form="JPEG"),
    "grey": picture("L"),
    "palette": picture("P"),
    "bits": picture("1"),
    "rgba": picture("RGBA"),
    "cmyk": picture("CMYK", form="JPEG"),
    "16 bit": special("I;16"),
    "grey alpha": special("LA"),
    "transparent palette": special("P+"),
    "animated": animation(),
    "other size": picture(size=(9, 8)),
    "one pixel": picture(size=(1, 1)),
    "gif": picture("P", form="GIF"),
    "bmp": picture(form="BMP"),
    "huge": huge_png(2**31 - 1, 2**31 - 1),
    "large": huge_png(12000, 12000),
    "empty": b"",
    "html": b"<html><script>alert(1)</script>",
    "pickle": pickle.dumps({"a": 1}),
}
FLAT = ["a.png", "b.jpg", "c.jpeg", "d.png", "e.png", "new\nline.png", "-rf.png", "ü.png", "%s.png", "<b>.png"]
SPLIT = ["train/a/x.png", "test/a/y.png", "train/b/z.JPG", "test/b/n.png", "train/m.png", "test/test/w.png"]
OTHER = [".hidden.png", "deep/a/b/c/d.png", "x.txt"]
NAMES = st.sampled_from(FLAT + SPLIT + OTHER)


@st.composite
def file(draw: st.DrawFn) -> bytes:
    content = CONTENTS[draw(st.sampled_from(["png"] * 12 + ["jpeg"] * 3 + sorted(CONTENTS)))]
    return draw(harness.damaged(content)) if draw(st.integers(0, 6)) == 0 else content


def layout(names: list[str]) -> st.SearchStrategy[dict[str, bytes]]:
    """Files by name, often all of one kind, which a folder has to be."""
    alike = st.dictionaries(st.sampled_from(names), st.just(CONTENTS["png"]), min_size=2, max_size=6)
    return alike | st.dictionaries(st.sampled_from(names), file(), max_size=6)


@harness.cases(2.0)
@given(files=st.sampled_from([FLAT, SPLIT, FLAT + SPLIT + OTHER]).flatmap(layout))
@example(files={"a.png": CONTENTS["huge"], "b.png": CONTENTS["png"]})
@example(files={"a.png": CONTENTS["large"], "b.png": CONTENTS["large"]})
@example(files={"a.png": CONTENTS["animated"], "b.png": CONTENTS["animated"]})
def test_image_folders(files):
    shutil.rmtree("images", ignore_errors=True)
    for name, content in files.items():
        path = Path("images") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Path("images").mkdir(exist_ok=True)
    harness.attempt("image folders", lambda: load("folder:images"))


@harness.cases(2.0)
@given(data=st.data())
def test_archives_of_images(data):
    draw = data.draw
    names = draw(st.lists(NAMES, max_size=5, unique=True))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            content = draw(file())
            member = tarfile.TarInfo(draw(st.sampled_from([name, f"../{name}", f"/{name}", f"./{name}"])))
            member.type = draw(
                st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE])
            )
            member.linkname = "/etc/passwd"
            member.size = len(content) if member.type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))
    content = stream.getvalue()
    content = draw(harness.damaged(content)) if draw(st.booleans()) else content
    packed = lzma.compress(content)
    packed = draw(harness.damaged(packed)) if draw(st.booleans()) else packed
    Path("cifar10-jpeg.tar.xz").write_bytes(packed)
    harness.attempt("image archives", lambda: load("cifar10-jpeg", "."))
    assert not Path("images").exists() and {path.suffix for path in Path(".").iterdir()} <= {".xz", ".npz"}
    for path in Path(".").glob("*.npz"):
        path.unlink()


KINDS = st.sampled_from(["u1", "<u2", "<i8", "<f4", "O", "S3", "U2", "?", "c8", "M8[s]", "V4", "u1,u1"])


@st.composite
def array(draw: st.DrawFn) -> np.ndarray:
    shape = draw(
        st.sampled_from([(4, 8, 8, 3), (4, 8, 8, 3), (4, 8, 8, 3), (4,), (), (0, 8, 8, 3), (4, 8, 8), (4, 8, 8, 2)])
    )
    kind = np.dtype(draw(st.just("u1") | KINDS))
    return np.full(shape, {"a": 1}, dtype=object) if kind.hasobject else np.zeros(shape, dtype=kind)


@harness.cases(3.0)
@given(data=st.data())
def test_npz(data):
    draw = data.draw
    keys = ["train_images", "test_images", "train_labels", "test_labels", "../escape", "arr_0"]
    arrays = draw(st.dictionaries(st.sampled_from(keys), array(), max_size=4))
    if draw(st.integers(0, 2)):
        arrays |= {"train_images": np.zeros((4, 8, 8, 3), np.uint8), "test_images": np.ones((4, 8, 8, 3), np.uint8)}
    stream = io.BytesIO()
    draw(st.sampled_from([np.savez, np.savez_compressed]))(stream, **arrays)
    content = stream.getvalue()
    Path("cifar10.npz").write_bytes(draw(harness.damaged(content)) if draw(st.booleans()) else content)
    harness.attempt(".npz files", lambda: load("cifar10", "."))


def npz_member(header: bytes, content: bytes = b"", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name in ("train_images", "test_images"):
            padded = header + b" " * (-(len(header) + 11) % 64) + b"\n"
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(padded)) + padded + content)
    return stream.getvalue()


def test_npz_bombs(small_limit):
    for shape in (
        "(1000000000000, 8, 8, 3)",
        f"({10**30}, 8, 8, 3)",
        "(-1, 8, 8, 3)",
        "(20000, 64, 64, 3)",
        "(" * 500,
    ):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        Path("cifar10.npz").write_bytes(npz_member(header))
        assert harness.attempt(".npz files", lambda: load("cifar10", ".")) == harness.REFUSED, shape
    # 20 MB of zeros in 20 KB
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (6000, 32, 32, 3), }"
    with zipfile.ZipFile("cifar10.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_images.npy", "w") as member:
            member.write(b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header + b"\n")
            for _ in range(20):
                member.write(bytes(2**20))
    with pytest.raises(InputError, match="unpacks to"), harness.limited():
        load("cifar10", ".")
    harness.count(".npz files", harness.REFUSED)


@harness.cases(6.0)
@given(content=st.sampled_from([BATCH, BATCH3]).flatmap(harness.damaged))
@example(content=b"\x80\x02K\x01r\xff\xff\xff\x7f.")  # a memo of 2**31 entries
@example(content=b"\x80\x02K\x01" + b"".join(b"q%c0q%ch%c\x86" % (k, k, k) for k in range(1, 60)) + b".")
@example(content=b"\x80\x02}K\x01" + b"q\0h\0\x86" * 60 + b"K\x01s.")  # a key that takes 2**60 steps to hash
@example(content=b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.")
@example(content=b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.")  # bytes of 2**63
@example(content=b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.")  # a frame of 2**63
@example(content=b"L" + b"9" * 200_000 + b"L\n.")
@example(content=b"(" * 100_000 + b".")
@example(content=b"]" + b"]a" * 0 + b"]" * 100_000 + b"a" * 99_999 + b".")
@example(content=BATCH.replace(b"numpy\ndtype", b"os\nsystem"))
def test_official_batches(content):
    harness.attempt("CIFAR-10 batches", lambda: parse_batch(content, "batch"))


@harness.cases(1.0)
@given(data=st.data())
def test_official_archives(data):
    draw = data.draw
    write_tar(Path("plain.tar"), official_files(IMAGES, LABELS), "w")
    content = draw(harness.damaged(Path("plain.tar").read_bytes()))
    packed = zlib.compress(content, 1, wbits=31)
    packed = draw(harness.damaged(packed)) if draw(st.booleans()) else packed
    Path("cifar-10-python.tar.gz").write_bytes(packed)
    harness.attempt("CIFAR-10 archives", lambda: load("cifar10", "."))


def bomb(path: Path, opened, kind: bytes, size: int = 10 * 2**30, written: int = 20 * 2**20) -> None:
    """An archive with one member of this kind that states ``size`` bytes and gives ``written`` zeros."""
    member = tarfile.TarInfo("train/x.png")
    member.size, member.type = size, kind
    with opened(path, "wb") as stream:
        stream.write(member.tobuf(tarfile.GNU_FORMAT))
        for _ in range(written // 2**20):
            stream.write(bytes(2**20))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_archive_bombs(kind, small_limit):
    bomb(Path("cifar10-jpeg.tar.xz"), lambda path, mode: lzma.open(path, mode, preset=0), kind)
    with pytest.raises(InputError, match="accepted"), harness.limited():
        load("cifar10-jpeg", ".")
    harness.count("image archives", harness.REFUSED)


def test_an_xz_stream_that_asks_for_gigabytes():
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    packed = bytearray(lzma.compress(bytes(10), filters=filters))
    place = packed.index(0x21, 12) + 2  # the filter's properties: one byte for the size of its dictionary
    packed[place] = 40  # 4 GiB
    end = 12 + (packed[12] + 1) * 4
    packed[end - 4 : end] = struct.pack("<I", zlib.crc32(packed[12 : end - 4]))
    Path("cifar10-jpeg.tar.xz").write_bytes(packed)
    with pytest.raises(InputError, match="(?i)memory"):
        load("cifar10-jpeg", ".")
    harness.count("image archives", harness.REFUSED)


def test_many_small_files_that_decode_to_gigabytes(small_limit):
    flat = io.BytesIO()
    Image.new("RGB", (800, 800)).save(flat, "PNG")
    Path("images").mkdir()
    for k in range(100):
        (Path("images") / f"{k}.png").write_bytes(flat.getvalue())
    with pytest.raises(InputError, match="unpack"), harness.limited():
        load("folder:images")
    with open("images/0.png", "wb") as stream:
        stream.truncate(20 * 2**30)  # sparse: 20 GiB that take no room
    with pytest.raises(InputError, match="larger than"), harness.limited():
        load("folder:images")
    harness.count("image folders", harness.REFUSED)
    harness.count("image folders", harness.REFUSED)


def test_names_and_links(tmp_path):
    """Names that are not text, loops of links, devices and pipes; the folder named as `.` and by names too long."""
    shots = tmp_path / "shots"
    shots.mkdir()
    for k in range(3):
        (shots / f"{k}.png").write_bytes(CONTENTS["png"])
    (shots / os.fsdecode(b"\xff\xfe.png")).write_bytes(CONTENTS["png"])
    os.mkfifo(shots / "pipe.png")
    (shots / "zero.png").symlink_to("/dev/zero")
    (shots / "gone.png").symlink_to("nowhere.png")
    (shots / "loop").symlink_to(shots)
    with harness.limited():
        assert len(load("folder:shots").train) + len(load("folder:shots").test) == 4
        os.chdir(shots)
        assert load("folder:.").name == "folder:shots"
    for name in ("x" * 5000, "~nobody-of-this-name", "\0", "../" * 2000, "loop/" * 50):
        harness.attempt("image folders", lambda: load(f"folder:{name}"))


def test_a_cache_that_another_wrote_is_checked(tmp_path):
    for k in range(3):
        (tmp_path / "shots").mkdir(exist_ok=True)
        (tmp_path / "shots" / f"{k}.png").write_bytes(CONTENTS["png"])
    honest = load("folder:shots").hash
    (cache,) = tmp_path.glob("shots.decoded-*.npz")
    for train in (
        np.zeros((2, 3, 8, 8), np.float32),
        np.array([{"a": 1}]),
        np.zeros((2, 5, 8, 8), np.uint8),
        np.zeros(3),
    ):
        np.savez(cache, train=train, test=np.zeros((1, 3, 8, 8), np.uint8))
        assert load("folder:shots").hash == honest
    np.savez(cache, wrong=np.zeros(3))
    assert image_files.read_folder(Path("shots")).train.shape == (2, 3, 8, 8)
