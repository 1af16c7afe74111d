from __future__ import annotations

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

from operators import RestoreError
from restore.app import cli
from restore.bench import protocol
from restore.metrics import sets, table
from restore.metrics.evaluate import evaluate
from restore.metrics.single import psnr, ssim
from restore.metrics.statistics import FEW, bootstrap_mean


@pytest.fixture
def pair(tmp_path, smooth_images, write_images):
    truth = smooth_images(6, 32, 0)
    noise = np.random.default_rng(0).normal(0, 12, truth.shape)
    results = (truth + noise).round().clip(0, 255).astype(np.uint8)
    write_images(tmp_path / "truth", truth)
    write_images(tmp_path / "results", results)
    return truth, results


def test_means_and_rows_of_a_complete_folder(pair, tmp_path):
    truth, results = pair
    found = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psnr", "ssim"])
    assert found.complete and found.expected == 6 and len(found.per_image) == 6
    pair = [torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1 for pixels in (results, truth)]
    values = psnr(*pair).tolist()
    assert found.means["psnr"].mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.means["psnr"].low < np.mean(values) < found.means["psnr"].high
    expected = {"image": "00002", "psnr": pytest.approx(values[2]), "ssim": pytest.approx(float(ssim(*pair)[2]))}
    assert found.per_image[2] == expected
    assert found.protocol["reference"]["count"] == 6
    exact = evaluate(tmp_path / "truth", tmp_path / "truth", metrics=["psnr"])
    assert exact.means["psnr"].mean == math.inf
    assert json.loads(json.dumps(exact.to_dict(), allow_nan=False))["means"]["psnr"]["mean"] is None


def test_incomplete_results_are_never_averaged_silently(pair, tmp_path, smooth_images, write_images):
    (tmp_path / "results" / "00001.png").unlink()
    write_images(tmp_path / "results", smooth_images(1, 48, 3), ["00004"])
    write_images(tmp_path / "results", smooth_images(1, 32, 3), ["stranger"])
    found = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psnr"])
    assert (found.missing, found.mismatched, found.extra) == (["00001"], ["00004"], ["stranger"])
    assert not found.complete and found.means == {} and len(found.per_image) == 4
    allowed = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psnr"], allow_incomplete=True)
    assert allowed.means["psnr"].n == 4 and not allowed.complete


def test_folders_without_a_common_name_and_unknown_metrics(pair, tmp_path, smooth_images, write_images):
    write_images(tmp_path / "others", smooth_images(2, 32, 5), ["x", "y"])
    with pytest.raises(RestoreError, match="compared one by one"):
        evaluate(tmp_path / "others", tmp_path / "truth", metrics=["psnr"])
    with pytest.raises(RestoreError, match="unknown metric 'psrn'; did you mean 'psnr'"):
        evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psrn"])


def test_a_full_reference_is_named_apart(pair, tmp_path, inception_weights, monkeypatch, smooth_images, write_images):
    write_images(tmp_path / "full", smooth_images(9, 32, 7))
    extracted = []

    def extract(paths, network, layers, **options):  # files or a ReferenceSet
        extracted.append((len(paths), options["cache"] is not None))
        generator = torch.Generator().manual_seed(len(extracted))
        return {layer: torch.randn(len(paths), 5, generator=generator) for layer in layers}

    # The numbers themselves are compared with torch-fidelity in test_sets; here only which sets meet.
    monkeypatch.setattr(sets, "extract_features", extract)
    row = dataclasses.replace(table.METRICS["fid"], function=lambda a, b: {"fid": 100 * len(a) + len(b)})
    monkeypatch.setitem(table.METRICS, "fid", row)
    row = dataclasses.replace(table.METRICS["is"], function=lambda a, b, **_: {"is": len(a), "is_std": b is None})
    monkeypatch.setitem(table.METRICS, "is", row)
    options = table.MetricOptions(weights={"inception": inception_weights}, allow_small=True)
    full = {"full_reference": tmp_path / "full", "options": options}
    found = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["fid", "is"], **full)
    assert extracted == [(6, False), (6, True), (9, True)]
    assert found.set_values == {"fid": 606.0, "is": 6.0, "is_std": 1.0, "full_fid": 609.0}
    assert found.protocol["full_reference"]["count"] == 9 and "too few" in found.notes[-1]


@pytest.mark.parametrize("n, least", [(2, 0.93), (3, 0.93), (5, 0.93), (7, 0.93), (12, 0.93), (29, 0.93), (60, 0.92)])
def test_intervals_have_their_coverage(n, least):
    rng = np.random.default_rng(n)
    trials = 1000 if n < FEW else 400
    hits = [(e := bootstrap_mean(rng.normal(3, 2, n))).low <= 3 <= e.high for _ in range(trials)]
    assert least < np.mean(hits) < 0.98


def test_intervals_of_few_values():
    assert bootstrap_mean([1.0, 2.0, 4.0]) == bootstrap_mean([1.0, 2.0, 4.0])
    found = bootstrap_mean([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(
        4.302652729749464 / math.sqrt(3), rel=1e-12
    )  # t(0.975, 2)
    assert math.isnan(bootstrap_mean([1.0]).low) and bootstrap_mean([]).n == 0
    assert (bootstrap_mean([1.0, math.inf]).low, bootstrap_mean([2.0, 2.0]).low) == (1.0, 2.0)


def test_protocols_that_differ_say_how():
    def block(**changes):
        base = {"images": {"count": 3, "sha256": "a"}, "backbone": {"name": "x"}, "seed": 0, "samples": 1,
                "tasks": {"sr": {"operator": "super_resolution", "sigma_y": 0.05}}, "methods": {"dps": {"steps": 250}},
                "metrics": {"lpips": "alex"}, "precision": "float32", "device": "cpu", "versions": {}}  # fmt: skip
        return base | changes

    assert protocol.find_differences(block(), block()) == {}
    other = block(tasks={"sr": {"operator": "super_resolution", "sigma_y": 0.1}}, methods={"dps": {"steps": 1000}})
    assert protocol.find_differences(block(), other) == {
        "tasks.sr.sigma_y": (0.05, 0.1),
        "methods.dps.steps": (250, 1000),
    }
    assert protocol.find_conflicts(block(), other) == {"tasks.sr.sigma_y": (0.05, 0.1)}
    assert protocol.find_conflicts(block(), block(methods={"psld": {"steps": 1000}}, tasks={"blur": {}})) == {}
    moved = block(device="cuda")
    assert protocol.find_differences(block(), moved) == {}
    assert protocol.find_differences(block(), moved, circumstances=True) == {"device": ("cpu", "cuda")}
    text = protocol.format_differences(protocol.find_differences(block(), other))
    assert text == "tasks.sr.sigma_y: 0.05 there, 0.1 here; methods.dps.steps: 250 there, 1000 here"


def test_the_command_takes_files_of_weights(pair, tmp_path, inception_weights, trunks, monkeypatch, capsys):
    """`restore evaluate` gives the numbers of the function, with networks from where the user keeps them."""
    alexnet = tmp_path / "my-alexnet.pth"
    alexnet.symlink_to(trunks["alexnet"])

    def run(*options):
        command = ["restore", "evaluate", tmp_path / "results", "--reference", tmp_path / "truth", *options]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    names = ["psnr", "lpips", "kid"]
    options = ["--metrics", ",".join(names), "--allow-small", "--device", "cpu", "-o", tmp_path / "out.json"]
    files = ["--weights", f"inception={inception_weights}", "--weights", f"alexnet={alexnet}"]
    code, text = run(*options, *files)
    assert code == 0, text.err
    weights = table.MetricOptions(weights={"inception": inception_weights, "alexnet": alexnet}, allow_small=True)
    expected = evaluate(tmp_path / "results", tmp_path / "truth", metrics=names, options=weights)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["means"]["lpips"]["mean"] == pytest.approx(expected.means["lpips"].mean, rel=1e-6)
    assert f"kid {expected.set_values['kid']:.4f}" in text.out and "6 of 6 images compared" in text.out
    for wrong in (["--weights", "alexnet"], ["--weights", "resnet=x.pth"]):
        code, text = run(*options, *wrong)
        assert code == 2 and "weights must be NAME=FILE" in text.err


def mean_absolute_error(result, truth):
    """Mean absolute difference on [-1, 1]."""
    return (result - truth).abs().mean(dim=(1, 2, 3))


def scalar(result, truth):
    return (result - truth).mean()


mean_absolute_error.better = -1


def test_a_metric_from_outside(pair, tmp_path, monkeypatch, capsys):
    """`module:function`, from Python and the command line; test_run.py has it in YAML."""
    monkeypatch.setitem(sys.modules, "my_metrics", sys.modules[__name__])
    truth, results = pair
    name = "my_metrics:mean_absolute_error"
    found = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psnr", name], batch_size=4)
    by_hand = np.abs(results.astype(float) - truth).mean() / 127.5
    assert found.means[name].mean == pytest.approx(by_hand, rel=1e-5) and found.means[name].n == 6
    assert found.protocol["metrics"][name] == "Mean absolute difference on [-1, 1]."
    assert (table.find_metric(name).label, table.find_metric(name).better) == ("mean_absolute_error", -1)
    command = ["restore", "evaluate", tmp_path / "results", "--reference", tmp_path / "truth", "--metrics", name]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and f"{name} {by_hand:.4f}" in capsys.readouterr().out
    with pytest.raises(RestoreError, match=r"must return \(B,\) values, got \(\) for 6 images"):
        evaluate(tmp_path / "results", tmp_path / "truth", metrics=["my_metrics:scalar"])
    with pytest.raises(RestoreError, match="cannot be imported"):
        evaluate(tmp_path / "results", tmp_path / "truth", metrics=["my_metrics:nothing"])
    with pytest.raises(RestoreError, match="coverage is measured by `restore bench`"):
        evaluate(tmp_path / "results", tmp_path / "truth", metrics=["coverage"])
