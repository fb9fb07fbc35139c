"""Image quality: closed forms on pixel features, agreement with torch-fidelity's front door, the digits classifier."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import calculate_precision_recall_full, calculate_precision_recall_part
from torch_fidelity.registry import register_feature_extractor

from bench import evaluate, fidelity, stopping
from bench.batches import Work
from bench.data import load
from bench.errors import InputError
from bench.features import digits_extractor, load_extractor, train_classifier
from bench.fidelity import ImageTensor, image_quality

CALLS: list[int] = []


class Pixels(FeatureExtractorBase):
    """Features are the pixels themselves, so that distances have closed forms."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, input):
        CALLS.append(len(input))
        return (input.flatten(1).float(),)


class Broken(Pixels):
    def forward(self, input):
        return (input.flatten(1).float() / 0,)


register_feature_extractor("test-pixels", Pixels)
register_feature_extractor("test-broken", Broken)


def normal_images(n: int, mean: float, sigma: float, seed: int = 0, shape=(1, 2, 2)) -> torch.Tensor:
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return (mean + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def test_frechet_distance_of_a_shift_is_the_squared_shift():
    x = normal_images(500, 100, 10)
    assert image_quality(x + 7, x, "test-pixels", ["fd"])["fd"] == pytest.approx(4 * 7**2, rel=1e-3)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # |m1 - m2|^2 + sum (s1 - s2)^2; rounding to pixels adds 1/12 to either variance
    found = image_quality(normal_images(20_000, 120, 20), normal_images(20_000, 110, 8, seed=1), "test-pixels", ["fd"])
    spread = (math.sqrt(400 + 1 / 12) - math.sqrt(64 + 1 / 12)) ** 2
    assert found["fd"] == pytest.approx(4 * (10**2 + spread), rel=0.02)
    assert found["status"] == "ok"
    assert (found["n"], found["n_reference"]) == (20_000, 20_000)


def test_precision_and_recall_of_clusters():
    left, right = normal_images(200, 50, 5), normal_images(200, 200, 5, seed=1)
    both = torch.cat([left, right])
    metrics = ["precision_recall"]
    covered_half = image_quality(normal_images(200, 50, 5, seed=2), both, "test-pixels", metrics)
    assert covered_half["precision"] > 0.85
    assert covered_half["recall"] == pytest.approx(0.5, abs=0.08)
    same = image_quality(both, both, "test-pixels", metrics)
    assert (same["precision"], same["recall"]) == (1, 1)
    apart = image_quality(left, right, "test-pixels", metrics)
    assert (apart["precision"], apart["recall"]) == (0, 0)


def test_agrees_with_calculate_metrics():
    x, y = normal_images(300, 120, 20), normal_images(260, 110, 12, seed=1)
    ours = image_quality(x, y, "test-pixels")
    theirs = torch_fidelity.calculate_metrics(
        input1=ImageTensor(x),
        input2=ImageTensor(y),
        feature_extractor="test-pixels",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=130,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # no worker processes
    )
    assert ours["kid_subset_size"] == 130
    for name, key in (
        ("fd", "frechet_inception_distance"),
        ("kid", "kernel_inception_distance_mean"),
        ("kid_std", "kernel_inception_distance_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert ours[name] == pytest.approx(theirs[key], rel=1e-9), name


def test_reference_features_are_computed_once_per_content():
    x, y = normal_images(40, 120, 20, seed=10), normal_images(50, 110, 12, seed=11)
    image_quality(x, y, "test-pixels", ["fd"])
    CALLS.clear()
    first = image_quality(x, y, "test-pixels", ["fd"])["fd"]
    assert sum(CALLS) == 40
    y[0, 0, 0, 0] ^= 1  # one bit of one pixel is another reference
    assert image_quality(x, y, "test-pixels", ["fd"])["fd"] != first
    assert sum(CALLS) == 40 + 40 + 50


@pytest.mark.parametrize("whole_numbers", [True, False])
@pytest.mark.parametrize("block", [1, 9 * 110, 2**24])
def test_precision_and_recall_by_blocks_are_torch_fidelitys(whole_numbers, block):
    generator, k = torch.Generator().manual_seed(3), 3
    real, fake = (torch.randn(n, 30, generator=generator) for n in (110, 70))
    fake = 1.1 * fake
    if whole_numbers:  # their distances are exact, ties and all, in whatever blocks they are computed
        real, fake = real.round(), fake.round()
        fake[:20] = real[:20]
    radii = fidelity.neighbour_radii(real, k, block)
    found = fidelity.coverage(fake, fidelity.neighbour_radii(fake, k, block), real, radii, block)
    assert found == calculate_precision_recall_full(fake, real, k)
    assert found == calculate_precision_recall_part(fake, real, k, batch_size=33)
    assert 0.1 < found[0] < 0.95 and 0.1 < found[1] < 0.95
    if whole_numbers:
        assert torch.equal(radii, torch.cdist(real, real).kthvalue(k + 1).values)


def test_radii_of_a_large_reference_are_found_once(monkeypatch):
    x, y = normal_images(60, 120, 20, seed=12), normal_images(90, 110, 12, seed=13)
    whole = image_quality(x, y, "test-pixels", ["precision_recall"])
    calls, radii = [], fidelity.neighbour_radii
    monkeypatch.setattr(fidelity, "_WHOLE_MATRIX", 80)
    monkeypatch.setattr(fidelity, "neighbour_radii", lambda points, k: calls.append(len(points)) or radii(points, k))
    assert image_quality(x, y, "test-pixels", ["precision_recall"]) == whole
    assert image_quality(x, y, "test-pixels", ["precision_recall"]) == whole
    assert calls == [90, 60, 60]
    y[0, 0, 0, 0] ^= 1
    image_quality(x, y, "test-pixels", ["precision_recall"])
    assert calls == [90, 60, 60, 90, 60]


def test_requests_to_stop_are_heard_before_each_expensive_quantity(monkeypatch):
    x, y = normal_images(40, 120, 20, seed=14), normal_images(50, 110, 12, seed=15)
    heard, check = [], stopping.check
    monkeypatch.setattr(stopping, "check", lambda: heard.append(sum(CALLS)))
    CALLS.clear()
    image_quality(x, y, "test-pixels", stoppable=True)
    assert heard == [0, 50, 90, 90, 90]  # images whose features are known, then the three metrics
    monkeypatch.setattr(stopping, "check", check)
    stopping.request("SIGTERM")
    try:
        with pytest.raises(stopping.Stopped, match="SIGTERM"):
            image_quality(x, y, "test-pixels", stoppable=True)
        assert image_quality(x, y, "test-pixels")["status"] == "ok"
    finally:
        stopping.restore()


def test_a_row_is_stopped_where_its_batches_are(monkeypatch):
    x, y = normal_images(40, 120, 20, seed=16), normal_images(50, 110, 12, seed=17)
    drawn = SimpleNamespace(x=x, finite=torch.ones(40, dtype=torch.bool), nfe=3.0, seconds=0.1)
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_, **__: drawn)
    settings = SimpleNamespace(samples=40, batch_size=20, quality=["fd"], features="test-pixels")
    run, data = SimpleNamespace(evaluate=settings, seed=0), SimpleNamespace(train=y, levels=256)
    work, stoppable = Work(), Work()
    stoppable.stoppable = True
    stopping.request("time is up")
    try:
        assert evaluate._row(None, run, data, work, {"name": "ddim"}, 3)[0]["fd"] > 0
        with pytest.raises(stopping.Stopped, match="time is up"):
            evaluate._row(None, run, data, stoppable, {"name": "ddim"}, 3)
    finally:
        stopping.restore()


def test_too_few_images_are_refused_with_a_status():
    reference = normal_images(100, 120, 20)
    found = image_quality(reference[:3], reference, "test-pixels")
    assert found["fd"] is None and found["kid"] is None and found["precision"] is None
    assert "fd not measured: 3 images are fewer than the 4 feature dimensions" in found["status"]
    assert "kid not measured" in found["status"] and "precision_recall not measured" in found["status"]
    enough = image_quality(reference[:4], reference, "test-pixels")
    assert enough["fd"] is not None and enough["status"] == "ok"
    few_real = image_quality(reference, reference[:3], "test-pixels", ["fd"])
    assert few_real["fd"] is None and "3 images" in few_real["status"]
    assert "empty" in image_quality(reference[:0], reference, "test-pixels")["status"]


def test_features_that_are_not_finite_are_a_status_never_a_number():
    x = normal_images(20, 120, 20)
    found = image_quality(x, x, "test-broken")
    assert found["fd"] is None and found["status"] == "not measured: features are not finite"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": "vgg16"}, "'vgg16' is not registered; accepted: digits, inception"),
        ({"metrics": ["fd", "is"]}, "unknown 'is'; accepted: fd, kid, precision_recall"),
        ({"generated": torch.zeros(4, 1, 2, 2)}, "generated: torch.float32"),
        ({"generated": torch.zeros(4, 1, 4, 4, dtype=torch.uint8)}, "differs from the reference's"),
    ],
)
def test_unusable_input_is_refused(change, words):
    x = normal_images(4, 120, 20)
    with pytest.raises(InputError, match=words):
        image_quality(**({"generated": x, "reference": x, "features": "test-pixels"} | change))


# --- Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights of an untrained Inception network, in the format of the published file."""
    module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_takes_grey_images_and_names_its_weights(inception_file):
    x = normal_images(4, 8, 3, shape=(1, 8, 8)).clamp(max=16)
    found = image_quality(x, x, "inception", ["fd", "kid"], weights=inception_file, levels=17)
    assert found["features"].startswith("inception-v3-compat-") and len(found["features"]) == 28
    assert found["fid"] is None and found["status"] == (
        "fid not measured: 4 images are fewer than the 2048 feature dimensions"
    )
    assert "fd" not in found
    assert math.isfinite(found["kid"])


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """No weights in torch's cache, and none named; the requests for downloads."""
    asked = []
    monkeypatch.delenv("INDM_BENCH_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **options: asked.append((url, options)))
    return asked


def test_absent_inception_weights_are_a_status_that_says_how_to_give_them(empty_hub):
    x = normal_images(4, 120, 20)
    found = image_quality(x, x, "inception")
    assert found["fid"] is None and found["kid"] is None
    assert found["status"].startswith("not measured: Inception weights not found at ")
    assert found["status"].endswith("-6726825d.pth, set INDM_BENCH_INCEPTION to a path or download")


def test_inception_weights_are_those_of_the_environment(empty_hub, inception_file, tmp_path, monkeypatch):
    x = normal_images(2, 120, 20)
    monkeypatch.setenv("INDM_BENCH_INCEPTION", str(inception_file))
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert image_quality(x, x, "inception", [])["features"] == f"inception-v3-compat-{digest[:8]}"
    monkeypatch.setenv("INDM_BENCH_INCEPTION", str(tmp_path / "absent.pth"))
    with pytest.raises(InputError, match="INDM_BENCH_INCEPTION: no file .*absent.pth; accepted: the path of wei"):
        image_quality(x, x, "inception")
    with pytest.raises(InputError, match="weights: no file other.pth"):
        image_quality(x, x, "inception", weights="other.pth")


def test_a_file_that_bears_the_published_hash_must_have_it(inception_file, tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(inception_file.read_bytes())
    x = normal_images(4, 120, 20)
    with pytest.raises(InputError, match="sha256 .*accepted: 6726825d"):
        image_quality(x, x, "inception", weights=path)


def test_nothing_is_downloaded_unasked(empty_hub, monkeypatch):
    x = normal_images(4, 120, 20)
    assert "not found" in image_quality(x, x, "inception")["status"]
    assert not empty_hub
    image_quality(x, x, "inception", weights="download")
    monkeypatch.setenv("INDM_BENCH_INCEPTION", "download")
    image_quality(x, x, "inception")
    assert len(empty_hub) == 2
    for url, options in empty_hub:
        assert url.startswith("https://") and options["hash_prefix"].startswith("6726825d")


def test_weights_that_execute_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save(Payload(), tmp_path / "bad.pth")
    x = normal_images(4, 120, 20)
    with pytest.raises(InputError, match="not a file of Inception weights"):
        image_quality(x, x, "inception", weights=tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


# --- the digits classifier


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    return digits_extractor(folder), folder / "digits-classifier.safetensors"


def test_classifier_reads_digits(digits, classifier):
    accuracy = train_classifier(digits, classifier[1])
    assert accuracy > 0.95
    cls = load_extractor(classifier[1])
    assert cls.accuracy == accuracy and cls.feature_dim == 32
    assert cls.extractor_name == classifier[0]
    assert load_extractor(classifier[1]) is cls


def test_frechet_distance_tells_digits_from_noise(digits, classifier):
    noise = torch.randint(0, 17, (297, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    real = image_quality(digits.test, digits.train, classifier[0])
    fake = image_quality(noise, digits.train, classifier[0])
    assert real["status"] == fake["status"] == "ok"
    assert real["features"] == classifier[0]
    assert 30 * real["fd"] < fake["fd"]
    assert abs(real["kid"]) < 3 * real["kid_std"] and fake["kid"] > 10 * fake["kid_std"]
    assert real["precision"] > 0.8 and real["recall"] > 0.8 and fake["precision"] < 0.1


def test_classifier_is_deterministic_and_kept(digits, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train_classifier(digits, one, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's stream is untouched
    torch.manual_seed(6)
    train_classifier(digits, two, epochs=1)
    assert one.read_bytes() == two.read_bytes()
    before = one.stat().st_mtime_ns
    train_classifier(digits, one, epochs=1)
    assert one.stat().st_mtime_ns == before
    train_classifier(digits, one, epochs=1, seed=1)  # another recipe is another file
    assert one.read_bytes() != two.read_bytes()
    assert load_extractor(one).extractor_name != load_extractor(two).extractor_name


def test_damaged_classifiers_are_refused_and_made_again(digits, tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="c.safetensors: not a classifier"):
        load_extractor(path)
    with pytest.raises(InputError, match="absent"):
        load_extractor(tmp_path / "absent.safetensors")
    train_classifier(digits, path, epochs=1)
    load_extractor(path)
    with pytest.raises(InputError, match="labelled images"):
        train_classifier(load("gaussians"), path)


def test_images_of_another_size_are_refused_by_the_classifier(classifier):
    x = normal_images(40, 8, 3, shape=(1, 4, 4))
    with pytest.raises(InputError, match=r"shape \(1, 4, 4\) does not fit"):
        image_quality(x, x, classifier[0])


def test_digits_is_a_name_for_the_trained_classifier(digits, classifier, monkeypatch):
    monkeypatch.setattr(fidelity, "digits_extractor", lambda: classifier[0])
    assert image_quality(digits.test, digits.train, "digits", ["fd"])["features"] == classifier[0]
