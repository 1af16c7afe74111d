from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.ndimage import gaussian_filter

from operators import RestoreError
from restore.images.folder import read_rgb
from restore.metrics import sets
from restore.metrics.table import MetricOptions, check_metrics, load_lpips, select_metrics


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smooth_images, write_images):
    root = tmp_path_factory.mktemp("sets")
    results = write_images(root / "results", smooth_images(20, 64, 0))
    others = smooth_images(10, 64, 1)
    others[:4] = smooth_images(20, 64, 0)[:4]
    others[7:] //= 3
    reference = write_images(root / "reference", others)
    return root, results, reference


@pytest.mark.parametrize("layer", ["192", pytest.param("2048", marks=pytest.mark.slow)])
def test_set_metrics_equal_the_command_line_of_torch_fidelity(
    layer, folders, inception_weights, tmp_path, monkeypatch, capsys
):
    from torch_fidelity import fidelity as command

    root, results, reference = folders
    arguments = ["fidelity", "--input1", str(root / "results"), "--input2", str(root / "reference"), "--cpu", "--json"]
    arguments += "--silent -i -f -k -r --kid-subset-size 10 --feature-extractor inception-v3-compat".split()
    arguments += ["--feature-layer-fid", layer]  # of 2048 features, the default, the matrix square root takes long
    arguments += ["--feature-extractor-weights-path", str(inception_weights), "--no-cache", "--save-cpu-ram"]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    printed = json.loads(capsys.readouterr().out)

    options = MetricOptions(
        weights={"inception": inception_weights}, pr_network="inception", fid_layer=layer, allow_small=True
    )
    ours = sets.compute_set_metrics(
        results, reference, select_metrics(["fid", "kid", "is", "pr"]), options, cache=tmp_path
    )
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "is": "inception_score_mean",
        "is_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    for name, theirs in names.items():
        assert ours[name] == pytest.approx(printed[theirs], rel=1e-5, abs=1e-12), name
    # None of them at a value that a wrong computation would give as well.
    assert ours["fid"] > 1e-3 and ours["is"] > 1.005 and ours["is_std"] > 0
    assert 0 < ours["precision"] <= 1 and 0 < ours["recall"] <= 1 and ours["precision"] != ours["recall"]

    # The cached reference gives the same numbers without the reference being read again.
    # One pass through the network serves all of them, so one file holds their features.
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(sets, "MINIMUM_IMAGES", 2)
    monkeypatch.setattr("torch_fidelity.utils.create_feature_extractor", None)
    features = sets.extract_features(
        reference, "inception", ["2048", layer], weights={"inception": inception_weights}, cache=tmp_path
    )
    assert features["2048"].shape == (10, 2048)


def test_the_cache_is_keyed_by_content_and_weights(folders, inception_weights, tmp_path):
    _, results, reference = folders
    options = {"weights": {"inception": inception_weights}, "cache": tmp_path}
    first = sets.extract_features(reference[:2], "inception", ["64"], **options)
    sets.extract_features(results[10:12], "inception", ["64"], **options)
    state = torch.load(inception_weights, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save({k: v * 1.1 if v.dim() == 4 else v for k, v in state.items()}, other)
    changed = sets.extract_features(reference[:2], "inception", ["64"], weights={"inception": other}, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not torch.allclose(first["64"], changed["64"], rtol=1e-2)


def test_small_sets_are_refused_unless_allowed(folders, inception_weights):
    _, results, reference = folders
    with pytest.raises(RestoreError, match=r"got 20 \(results\).*allow_small=true"):
        sets.compute_set_metrics(
            results, reference, select_metrics(["fid"]), MetricOptions(weights={"inception": inception_weights})
        )


def test_bad_requests_are_refused_before_any_work(tmp_path, monkeypatch, folders, inception_weights):
    with pytest.raises(RestoreError, match="unknown metric 'fud'; did you mean 'fid'"):
        select_metrics(["fud"])
    with pytest.raises(RestoreError, match="no network 'resnet'"):
        check_metrics(select_metrics(["pr"]), MetricOptions(pr_network="resnet"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        RestoreError,
        match=r"weights-inception-2015-12-05-6726825d\.pth is missing.*91 MB.*restore models pull inception",
    ):
        check_metrics(select_metrics(["fid"]), MetricOptions())
    options = MetricOptions(weights={"inception": inception_weights}, allow_small=True)
    with pytest.raises(RestoreError, match="reference folder"):
        sets.compute_set_metrics(folders[1], None, select_metrics(["fid"]), options)
    assert check_metrics({}, MetricOptions()) == {}
    entry = check_metrics(select_metrics(["fid"]), options)["weights"]["inception"]
    assert entry["published"] is False and len(entry["sha256"]) == 64


@pytest.fixture(scope="module")
def vgg16_features(tmp_path_factory):
    """torchvision's layout (`features.N.*`), random weights that keep the signal's size, as safetensors."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(5)
    network = make_layers(cfgs["D"], batch_norm=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("vgg") / "vgg16-features.safetensors"
    safetensors.torch.save_file({f"features.{k}": v for k, v in network.state_dict().items()}, path)
    return path, network.eval()


def test_kid_vgg16_is_the_unbiased_mmd_of_averaged_features(folders, vgg16_features):
    """By hand: the same convolutions, the mean over places, the cubic kernel, all pairs but an image with itself."""
    _, results, reference = folders
    path, network = vgg16_features
    options = MetricOptions(weights={"vgg16": path}, allow_small=True)
    values = sets.compute_set_metrics(results[:10], reference, select_metrics(["kid_vgg16"]), options)

    def features(paths):
        x = torch.stack([torch.from_numpy(read_rgb(p).copy()) for p in paths]).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            return network[:30]((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)).mean(dim=(2, 3)).double()

    a, b = features(results[:10]), features(reference)
    n, kernel = 10, lambda u, v: (u @ v.T / 512 + 1) ** 3
    within = sum((k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
    assert values["kid_vgg16"] == pytest.approx(float(within - 2 * kernel(a, b).mean()), rel=1e-4)
    assert values["kid_vgg16"] > 0 and values["kid_vgg16_std"] == pytest.approx(0, abs=1e-6)


def test_kid_vgg16_sees_a_blur_with_the_real_network(tmp_path, write_images):
    path = Path(os.environ.get("RESTORE_TEST_WEIGHTS", "/nowhere")) / "vgg16-features.safetensors"
    if not path.is_file():
        pytest.skip("set RESTORE_TEST_WEIGHTS to a folder with vgg16-features.safetensors")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, 64, 64, 3)).astype(np.uint8)
    sharp, other = write_images(tmp_path / "a", images[:12]), write_images(tmp_path / "b", images[12:])
    blurred = write_images(tmp_path / "c", np.stack([gaussian_filter(i, (2, 2, 0)) for i in images[12:]]))
    options = MetricOptions(weights={"vgg16": path}, allow_small=True)
    same, worse = (
        sets.compute_set_metrics(s, sharp, select_metrics(["kid_vgg16"]), options)["kid_vgg16"]
        for s in (other, blurred)
    )
    assert worse > 20 * abs(same)


def test_files_of_weights_that_are_incomplete_are_named(tmp_path, vgg16_features, folders):
    state = safetensors.torch.load_file(vgg16_features[0])
    del state["features.28.weight"]
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    options = MetricOptions(weights={"vgg16": tmp_path / "half.safetensors"}, allow_small=True, lpips_net="vgg")
    with pytest.raises(RestoreError, match=r"complete VGG-16, but .features\.28\.weight"):
        sets.compute_set_metrics(folders[1], folders[2], select_metrics(["kid_vgg16"]), options)
    with pytest.raises(RestoreError, match=r"features\.28\.weight' is missing"):
        load_lpips(options)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(RestoreError, match="not a readable checkpoint"):
        check_metrics(select_metrics(["kid_vgg16"]), MetricOptions(weights={"vgg16": tmp_path / "broken.safetensors"}))


def test_splits_of_the_inception_score():
    """As torch-fidelity's function with the number of splits; a split of 5,000, as ADM's, is no ten of 500."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(100, 1008, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    one = float((p * (p / p.mean(0)).log()).sum(1).mean().exp())
    for size, splits in ((None, 10), (10, 10), (100, 1), (5000, 1), (30, 4)):
        expected = isc_features_to_metric(logits, splits=splits)["inception_score_mean"]
        assert sets.inception_score(logits, split_size=size)["is"] == expected
        if splits == 1:
            assert abs(expected - one) < 1e-9 * one
    assert sets.inception_score(logits)["is"] < 0.9 * one  # grows with the images of a split


def test_the_split_size_is_measured_with_and_in_the_protocol(folders, inception_weights):
    results, values = folders[1][:6], {}
    for size in (None, 6, 3):
        options = MetricOptions(weights={"inception": inception_weights}, allow_small=True, is_split_size=size)
        rows = select_metrics(["is"])
        values[size] = sets.compute_set_metrics(results, None, rows, options)["is"]
        assert check_metrics(rows, options)["is"].endswith(f"split_size {size or 'ten splits'}")
    assert values[6] > values[3] > values[None]
    with pytest.raises(RestoreError, match="is_split_size"):
        check_metrics(rows, MetricOptions(weights={"inception": inception_weights}, is_split_size=0))
