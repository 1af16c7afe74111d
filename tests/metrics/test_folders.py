"""Which files of a folder are results: `restore run` and `restore bench` write others beside them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from operators import RestoreError
from restore.app import cli
from restore.bench.run import run_benchmark
from restore.images.folder import list_images
from restore.metrics.evaluate import evaluate
from restore.metrics.table import MetricOptions
from restore.training.dataset import list_files

NOISE = {"name": "gaussian", "sigma": 0.05}


@pytest.fixture
def restored(tmp_path, smooth_images, write_images, monkeypatch):
    """Five photos, degraded and restored with two samples each by the command line."""
    write_images(tmp_path / "truth", smooth_images(5, 64, 0))
    command = ["run", tmp_path / "truth", "--task", "sr4", "--degrade", "--samples", 2, "--sampler", "diffpir"]
    command += ["--steps", 1, "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["restore", *map(str, command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and len(list((tmp_path / "out").glob("*.png"))) == 25
    return tmp_path / "out"


def test_only_results_of_restore_run_are_evaluated(restored, tmp_path, inception_weights):
    options = MetricOptions(weights={"inception": inception_weights}, allow_small=True)
    alone = tmp_path / "alone"
    alone.mkdir()
    for i in range(5):
        shutil.copy(restored / f"0000{i}.png", alone)
    names = ["psnr", "kid", "is"]
    found, expected = (evaluate(f, tmp_path / "truth", metrics=names, options=options) for f in (restored, alone))
    assert found.extra == [] and len(found.per_image) == 5
    assert found.set_values == expected.set_values and found.means == expected.means
    of_sets = evaluate(restored, tmp_path / "truth", metrics=["is"], options=options)
    assert of_sets.expected == 5 and of_sets.set_values["is"] == expected.set_values["is"]

    # A second pass over the folder, as truth or for training, takes no companions either.
    assert list(list_images(restored)[0]) == [f"0000{i}" for i in range(5)]
    assert [path.stem for path in list_files(restored)] == [f"0000{i}" for i in range(5)]
    (restored / "photo-mean.png").write_bytes((alone / "00000.png").read_bytes())  # of another program
    assert "photo-mean" in list_images(restored)[0]
    sidecar = restored / "00001.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"finished": False}))  # killed while it wrote
    assert evaluate(restored, tmp_path / "truth", metrics=["psnr"]).missing == ["00001"]


def test_a_result_of_another_name_is_found_by_its_side_car(restored, tmp_path):
    plain = evaluate(restored, tmp_path / "truth", metrics=["psnr"])
    for path in restored.glob("00002*"):
        path.rename(path.with_name(path.name.replace("00002", "holiday")))
    sidecar = restored / "holiday.json"
    sidecar.write_text(sidecar.read_text().replace("00002", "holiday").replace('"input": "holiday', '"input": "00002'))
    found = evaluate(restored, tmp_path / "truth", metrics=["psnr"])
    assert found.complete and found.extra == [] and found.means == plain.means


def test_two_results_of_one_input_are_refused(tmp_path, smooth_images, write_images, inception_weights):
    """Which of them is compared is not left to the order of a set; one of the input's own name comes first."""
    write_images(tmp_path / "truth", smooth_images(1, 32, 0), ["photo"])
    names = ["first", "second", "third"]
    write_images(tmp_path / "results", smooth_images(3, 32, 1), names)
    for name in names:
        sidecar = {"files": [f"{name}.png"], "input": "photo.png", "finished": True}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(sidecar))
    with pytest.raises(RestoreError, match=r"photo must have one result, got \S*first\.png and \S*second\.png"):
        evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psnr"])
    options = MetricOptions(weights={"inception": inception_weights}, allow_small=True)
    of_sets = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["is"], options=options)
    assert of_sets.expected == 3  # of a set, names do not matter
    shutil.copy(tmp_path / "truth" / "photo.png", tmp_path / "results")
    found = evaluate(tmp_path / "results", tmp_path / "truth", metrics=["psnr"])
    assert found.extra == names and found.per_image == [{"image": "photo", "psnr": float("inf")}]


def test_sets_are_checked_before_images_are_compared(tmp_path, smooth_images, write_images, inception_weights):
    """Comparing image by image takes hours, and its numbers would be lost."""
    write_images(tmp_path / "truth", smooth_images(4, 32, 0))
    shutil.copytree(tmp_path / "truth", tmp_path / "results")
    weights, compared = {"inception": inception_weights}, []
    progress = {"progress": lambda done, total: compared.append(done)}
    few, small = MetricOptions(weights=weights), MetricOptions(weights=weights, allow_small=True)
    folders = tmp_path / "results", tmp_path / "truth"
    with pytest.raises(RestoreError, match=r"at least 1000 images, got 4 \(results\)"):
        evaluate(*folders, metrics=["psnr", "kid"], options=few, **progress)
    full = {"full_reference": tmp_path / "nowhere"}
    with pytest.raises(RestoreError, match="nowhere is not a folder"):
        evaluate(*folders, metrics=["psnr", "kid"], options=small, **full, **progress)
    with pytest.raises(RestoreError, match=r"metrics must include .*full_reference, got psnr"):
        evaluate(*folders, metrics=["psnr"], **full, **progress)
    for folder in folders:
        Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(folder / "zebra.png")
    with pytest.raises(RestoreError, match=r"one size, most have 32 x 32, got zebra\.png"):
        evaluate(*folders, metrics=["psnr", "kid"], options=small, **progress)
    (tmp_path / "results" / "zebra.png").unlink()  # only the truth has another size
    allowed = {"options": small, "allow_incomplete": True}
    with pytest.raises(RestoreError, match=r"one size, most have 32 x 32, got zebra\.png .*reference_size"):
        evaluate(*folders, metrics=["psnr", "kid"], **allowed, **progress)
    assert compared == []


def test_only_results_of_a_benchmark_are_evaluated(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos" / "below", smooth_images(3, 16, 0))
    tasks = {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}}
    methods = {"dps": {"sampler": "dps", "steps": 1, "parameters": {"zeta": 0.5}}}
    data = {"folder": str(tmp_path / "photos")}
    done = run_benchmark({**tiny_run, "data": data, "tasks": tasks, "methods": methods, "samples": 3})
    found = evaluate(done.folder / "results/sr/dps", tmp_path / "photos", metrics=["psnr"])
    assert [row["image"] for row in found.per_image] == ["below/00000", "below/00001", "below/00002"]
    expected = done.table["table"]["sr"]["dps"]["means"]["psnr"]["mean"]
    assert found.complete and found.extra == [] and found.means["psnr"].mean == pytest.approx(expected, rel=1e-12)


def test_one_small_image_is_named_and_the_others_are_measured(
    tmp_path, smooth_images, write_images, monkeypatch, capsys
):
    for i, folder in enumerate(("truth", "results")):
        write_images(tmp_path / folder, smooth_images(3, 32, i), ["a", "b", "c"])
        write_images(tmp_path / folder, smooth_images(2, 8, i), ["tiny", "small"])
    folders = tmp_path / "results", tmp_path / "truth"
    found = evaluate(*folders, metrics=["psnr", "ssim"])
    assert set(found.failed) == {"tiny", "small"} and "11 x 11" in found.failed["tiny"]
    assert not found.complete and found.means == {} and [row["image"] for row in found.per_image] == ["a", "b", "c"]
    allowed = evaluate(*folders, metrics=["psnr", "ssim"], allow_incomplete=True)
    assert allowed.means["ssim"].n == 3 and evaluate(*folders, metrics=["psnr"]).means["psnr"].n == 5

    command = ["restore", "evaluate", folders[0], "--reference", folders[1]]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert not stop.value.code and "tiny cannot be measured: SSIM" in said and "small cannot" in said


def test_one_image_has_no_interval(tmp_path, smooth_images, write_images, monkeypatch, capsys):
    for i, folder in enumerate(("truth", "results")):
        write_images(tmp_path / folder, smooth_images(1, 32, i))
    command = [
        "restore",
        "evaluate",
        tmp_path / "results",
        "--reference",
        tmp_path / "truth",
        "-o",
        tmp_path / "out.json",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--metrics", "psnr"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert not stop.value.code and "psnr " in said and "[" not in said and "nan" not in said
    assert "NaN" not in (tmp_path / "out.json").read_text()


def test_a_benchmark_names_all_small_images_before_it_runs(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(2, 16, 0))
    write_images(tmp_path / "photos", smooth_images(2, 8, 1), ["tiny", "small"])
    tasks = {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}}
    config = {**tiny_run, "data": {"folder": str(tmp_path / "photos")}, "tasks": tasks, "batch": 1}
    config["methods"] = {"base": {"sampler": "baseline"}}
    with pytest.raises(RestoreError, match=r"2 of 4 images .*small \(SSIM.*tiny \(SSIM"):
        run_benchmark(config)
    assert not Path(config["out"]).exists()


def test_a_benchmark_refuses_images_of_several_sizes_before_it_runs(
    tmp_path, tiny_run, smooth_images, write_images, inception_weights
):
    """Sets are of one size, and solve_at distorts what is no square: both would only be found out after sampling."""
    write_images(tmp_path / "photos", smooth_images(2, 32, 0))
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "photos" / "wide.png")
    task = {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}
    config = {**tiny_run, "data": {"folder": str(tmp_path / "photos")}, "tasks": {"sr": task}, "batch": 1}
    config["methods"] = {"base": {"sampler": "baseline"}}
    of_sets = {"names": ["kid"], "allow_small": True, "weights": {"inception": str(inception_weights)}}
    with pytest.raises(RestoreError, match=r"one size for kid, got 40 x 24, 32 x 32; give data\.size"):
        run_benchmark(config | {"metrics": of_sets})
    with pytest.raises(RestoreError, match=r"square for tasks\.sr\.solve_at=64, got wide of 40 x 24; give data\.size"):
        run_benchmark(config, ["tasks.sr.solve_at=64"])
    assert not Path(config["out"]).exists()
    assert run_benchmark(config, ["tasks.sr.solve_at=64", "data.size=24"]).computed == 3


def test_a_set_of_several_sizes_names_the_odd_ones(tmp_path, smooth_images, write_images, inception_weights):
    write_images(tmp_path / "truth", smooth_images(18, 32, 0))
    shutil.copytree(tmp_path / "truth", tmp_path / "results")
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(tmp_path / "results" / "zebra.png")  # in a batch of its own
    options = MetricOptions(weights={"inception": inception_weights}, allow_small=True)
    with pytest.raises(RestoreError, match=r"one size, most have 32 x 32, got zebra.png \(40 x 24\)"):
        evaluate(tmp_path / "results", tmp_path / "truth", metrics=["is"], options=options, batch_size=18)
