from __future__ import annotations

import json

import pytest
import torch

from operators import RestoreError
from restore.metrics import sets


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
    arguments += [
        "--silent",
        "-i",
        "-f",
        "-k",
        "-r",
        "--kid-subset-size",
        "10",
        "--feature-extractor",
        "inception-v3-compat",
    ]
    arguments += ["--feature-layer-fid", layer]  # of 2048 features, the default, the matrix square root takes long
    arguments += ["--feature-extractor-weights-path", str(inception_weights), "--no-cache", "--save-cpu-ram"]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    printed = json.loads(capsys.readouterr().out)

    options = {"weights": {"inception": inception_weights}, "pr_network": "inception", "allow_small": True}
    options["fid_layer"] = layer
    ours = sets.set_metrics(results, reference, sets.SET_METRICS, cache=tmp_path, **options)
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
    # KID, precision and recall read the same features, as FID does by default: they are kept once.
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if layer == "2048" else 2)
    monkeypatch.setattr(sets, "MINIMUM_IMAGES", 2)
    monkeypatch.setattr("torch_fidelity.utils.create_feature_extractor", None)
    features = sets.extract(
        reference, "inception-v3-compat", ["2048", layer], weights={"inception": inception_weights}, cache=tmp_path
    )
    assert features["2048"].shape == (10, 2048)


def test_the_cache_is_keyed_by_content_and_weights(folders, inception_weights, tmp_path):
    _, results, reference = folders
    options = {"weights": {"inception": inception_weights}, "cache": tmp_path}
    first = sets.extract(reference[:2], "inception-v3-compat", ["64"], **options)
    sets.extract(results[10:12], "inception-v3-compat", ["64"], **options)
    state = torch.load(inception_weights, weights_only=True)
    other = tmp_path / "other.pth"
    torch.save({k: v * 1.1 if v.dim() == 4 else v for k, v in state.items()}, other)
    changed = sets.extract(reference[:2], "inception-v3-compat", ["64"], weights={"inception": other}, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not torch.allclose(first["64"], changed["64"], rtol=1e-2)


def test_small_sets_are_refused_unless_allowed(folders, inception_weights):
    _, results, reference = folders
    with pytest.raises(RestoreError, match=r"FID on 20 images.*allow_small=true"):
        sets.set_metrics(results, reference, ["fid"], weights={"inception": inception_weights})


def test_bad_requests_are_refused_before_any_work(tmp_path, monkeypatch, folders, inception_weights):
    with pytest.raises(RestoreError, match="no set metric fud"):
        sets.check(["fud"])
    with pytest.raises(RestoreError, match="not resnet"):
        sets.check(["pr"], pr_network="resnet")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RestoreError, match=r"weights-inception-2015-12-05-6726825d\.pth \(91 MB\)"):
        sets.check(["fid"])
    with pytest.raises(RestoreError, match="reference folder"):
        sets.set_metrics(folders[1], None, ["fid"], weights={"inception": inception_weights}, allow_small=True)
    assert sets.check([]) == {}
    entry = sets.check(["fid"], weights={"inception": inception_weights})
    assert entry["inception"]["published"] is False and len(entry["inception"]["sha256"]) == 64
