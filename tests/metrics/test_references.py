"""References of set metrics: folders of several sizes, and the .npz of guided-diffusion's evaluator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from operators import RestoreError
from restore.bench.run import run_benchmark
from restore.metrics import sets
from restore.metrics.evaluate import evaluate
from restore.metrics.references import crop_center, load_reference
from restore.metrics.table import MetricOptions, select_metrics


@pytest.fixture(scope="module")
def archive(tmp_path_factory, smooth_images):
    """Images, and random statistics of other ones, as guided-diffusion publishes them."""
    path = tmp_path_factory.mktemp("npz") / "reference.npz"
    random = np.random.default_rng(0)
    features = random.normal(size=(40, 2048))
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(path, arr_0=smooth_images(6, 64, 1), **statistics, mu_s=np.zeros(3))
    return path


def test_a_crop_keeps_the_middle_and_the_mean():
    """Against the definition on sides that are powers of two: two halvings by a box filter and no interpolation."""
    image = np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8)
    expected = image.reshape(32, 4, 64, 4, 3).mean((1, 3))[:, 16:48]
    assert np.abs(crop_center(image, 32) - expected).max() < 2  # Pillow rounds half up, four times
    for shape in ((33, 47, 3), (200, 31, 3), (10, 12, 3)):
        assert crop_center(np.full(shape, 77, np.uint8), 32).shape == (32, 32, 3)
        assert (crop_center(np.full(shape, 77, np.uint8), 32) == 77).all()


def test_fid_uses_the_statistics_and_the_others_the_images_of_an_npz(archive, tmp_path, smooth_images, write_images):
    arrays = np.load(archive)
    reference = load_reference(archive)
    assert len(reference) == 6 and np.array_equal(reference.read(2, 4), arrays["arr_0"][2:4])
    assert all(np.array_equal(reference.statistics[key], arrays[key]) for key in ("mu", "sigma"))
    # The first 100 of 2048 features: the eigenvalues of all would take most of a minute.
    their_mu, their_sigma = arrays["mu"][:100], arrays["sigma"][:100, :100]
    features = torch.randn(50, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = sets.fid(features, {"mu": their_mu, "sigma": their_sigma})["fid"]
    # The covariance of 50 samples is F^T F; the eigenvalues of F^T F S that are not zero are those of F S F^T.
    mu, sigma = features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)
    f = (features.numpy() - mu) / 49**0.5
    roots = np.sqrt(np.linalg.eigvalsh(f @ their_sigma @ f.T).clip(0))
    by_hand = np.square(mu - their_mu).sum() + np.trace(sigma + their_sigma) - 2 * roots.sum()
    assert ours == pytest.approx(by_hand, rel=1e-3)
    folder = load_reference(tmp_path / "images") if write_images(tmp_path / "images", arrays["arr_0"]) else None
    assert folder.statistics is None and folder.hash() != reference.hash()


def test_set_metrics_of_an_npz_equal_those_of_its_images(
    archive, tmp_path, smooth_images, write_images, inception_weights
):
    results = write_images(tmp_path / "results", smooth_images(5, 64, 0))
    write_images(tmp_path / "images", np.load(archive)["arr_0"])
    options = MetricOptions(weights={"inception": inception_weights}, pr_network="inception", allow_small=True)
    rows = select_metrics(["kid", "pr"])
    of_archive, of_folder = (
        sets.compute_set_metrics(results, load_reference(place), rows, options)
        for place in (archive, tmp_path / "images")
    )
    assert of_archive == pytest.approx(of_folder) and set(of_archive) == {"kid", "kid_std", "precision", "recall"}
    np.savez(tmp_path / "statistics.npz", **{key: np.load(archive)[key] for key in ("mu", "sigma")})
    with pytest.raises(RestoreError, match="arr_0"):
        sets.compute_set_metrics(results, load_reference(tmp_path / "statistics.npz"), rows, options)
    done = evaluate(tmp_path / "results", archive, metrics=["kid"], options=options)
    assert done.set_values["kid"] == pytest.approx(of_archive["kid"]) and done.protocol["reference"]["count"] == 6


def test_references_of_several_sizes_are_found_before_anything_is_sampled(
    tmp_path, tiny_run, inception_weights, smooth_images, write_images
):
    write_images(tmp_path / "coco", smooth_images(5, 64, 1))
    Image.fromarray(smooth_images(1, 96, 2)[0]).crop((0, 0, 96, 80)).save(tmp_path / "coco" / "wide.png")
    config = tiny_run | {"kind": "generation", "tasks": {"t": {"count": 4}}}
    config |= {"methods": {"ddim": {"sampler": "ddim", "steps": 2}}}
    config["metrics"] = {"names": ["kid"], "reference": str(tmp_path / "coco"), "allow_small": True}
    config["metrics"]["weights"] = {"inception": str(inception_weights)}
    with pytest.raises(RestoreError, match=r"wide\.png \(96 x 80\).*reference_size"):
        run_benchmark(config)
    assert not list((tmp_path / "run").rglob("*.png"))
    config["metrics"]["reference_size"] = 16
    run = run_benchmark(config)
    entry = run.protocol["metrics"]["reference"] if hasattr(run, "protocol") else None
    assert entry is None or "centre crop" in entry["resized"]


def test_a_million_references_of_a_manifold_are_refused_before_sampling(
    monkeypatch, tmp_path, smooth_images, write_images
):
    write_images(tmp_path / "reference", smooth_images(5, 64, 1))
    reference, rows = load_reference(tmp_path / "reference"), select_metrics(["pr"])
    options = MetricOptions(allow_small=True)
    sets.check_reference(reference, rows, options, "reference")
    monkeypatch.setattr(sets, "MANIFOLD_IMAGES", 4)
    with pytest.raises(RestoreError, match="at most 4, got 5"):
        sets.check_reference(reference, rows, options, "reference")
    sets.check_reference(reference, select_metrics(["fid"]), options, "reference")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "uint8"),
        ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, "uint8"),
        ({"mu": np.zeros(2048)}, "sigma"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, "2048"),
        ({"x": np.zeros(2)}, "neither"),
        (None, "not a readable"),
    ],
)
def test_other_archives_are_refused(arrays, message, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04 cut off") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(RestoreError, match=message):
        load_reference(path)
    with pytest.raises(RestoreError, match="does not exist"):
        load_reference(tmp_path / "missing.npz")
