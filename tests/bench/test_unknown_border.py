"""Blurs that degrade as the world does: a larger picture is blurred, a part of it seen, and only that part compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import operators
from operators import RestoreError
from restore.bench.run import run_benchmark
from restore.images import io
from restore.images.folder import read_rgb
from restore.metrics.single import psnr
from restore.report.tables import read_run
from restore.report.write import build_picture_grid, write_report
from restore.samplers.noise import measurement_generator
from restore.search.objective import MethodResults

NOISE = {"name": "gaussian", "sigma": 0.05}
BLUR = {"name": "gaussian_blur", "kernel_size": 5, "std": 0.4, "border": "unknown", "noise": NOISE}


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(2, 20, 0))
    return {
        **tiny_run,
        "data": {"folder": str(tmp_path / "photos")},
        "samples": 2,
        "tasks": {
            "sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}},
            "blur": {"operator": BLUR},
        },
        "methods": {
            "wiener": {"sampler": "wiener"},
            "diffpir": {"sampler": "diffpir", "steps": 2, "parameters": {"lam": 1.0}},
        },
    }


def test_only_what_is_seen_is_compared(config):
    done = run_benchmark(config)
    run, photos = Path(config["out"]), Path(config["data"]["folder"])
    margin = operators.GaussianBlur(5, 0.4, border="unknown").margin[0]
    assert margin == 2
    for i in range(2):
        name = f"0000{i}.png"
        clean = io.read_image(photos / name).pixels
        # The whole picture is blurred with another border: its inside does not depend on that.
        blurred = operators.GaussianBlur(5, 0.4).A(clean)[..., 2:-2, 2:-2]
        noisy = operators.GaussianNoise(0.05)(blurred, measurement_generator(0, f"0000{i}"))
        assert (read_rgb(run / "measurements/blur" / name) == io.to_uint8(noisy)[0]).all()
        seen = io.to_uint8(clean)[0][2:-2, 2:-2]
        assert (read_rgb(run / "truth/blur" / name) == seen).all()
        assert (read_rgb(run / "truth" / name) == io.to_uint8(clean)[0]).all()
        for method in ("wiener", "diffpir"):
            result = read_rgb(run / "results/blur" / method / name)
            row = json.loads((run / f"results/blur/{method}/rows/0000{i}.json").read_text())
            assert result.shape == (16, 16, 3) and {f"truth/blur/{name}", f"measurements/blur/{name}"} <= set(
                row["files"]
            )
            error = (result.astype(float) - seen).reshape(-1)
            assert row["psnr"] == pytest.approx(10 * torch.tensor(255**2 / (error**2).mean()).log10().item(), abs=1e-4)
            assert float(psnr(io.to_tensor(result), io.to_tensor(seen))) == pytest.approx(row["psnr"], abs=1e-4)
            assert 0 < row["residual_ratio"] < 30
        assert row["coverage"] >= 0 and read_rgb(run / f"results/blur/diffpir/samples/0000{i}-1.png").shape == (
            16,
            16,
            3,
        )
    assert not (run / "truth/sr").exists()
    protocol = json.loads((run / "run.json").read_text())["protocol"]["tasks"]
    assert protocol["blur"]["margin"] == [2, 2] and "margin" not in protocol["sr"]
    assert run_benchmark(config).table == done.table


def test_a_lost_truth_is_made_again_and_read_everywhere(config):
    run_benchmark(config)
    run = Path(config["out"])
    (run / "truth/blur/00001.png").unlink()
    assert run_benchmark(config).computed == 2  # the batch of image 1, of both methods
    assert read_rgb(run / "truth/blur/00001.png").shape == (16, 16, 3)
    results = MethodResults(run, config, "blur", "diffpir", ("00000", "00001"))
    assert results.truth == [run / f"truth/blur/0000{i}.png" for i in range(2)]
    assert MethodResults(run, config, "sr", "diffpir", ("00000",)).truth == [run / "truth/00000.png"]
    grid = build_picture_grid(read_run(run), "blur")
    column = grid["columns"].index("truth")
    assert [files[column] for _, files in grid["rows"]] == [run / f"truth/blur/0000{i}.png" for i in range(2)]
    assert "blur" in write_report([run]).markdown.read_text()


def test_the_residual_is_of_the_whole_picture(config):
    """What lies beyond the border explains what is seen: cutting it off first would change the residual."""
    config["methods"] = {"wiener": config["methods"]["wiener"]}
    run_benchmark(config, ["batch=1"])
    row = json.loads((Path(config["out"]) / "results/blur/wiener/rows/00000.json").read_text())
    from restore.bench.baselines import wiener

    operator = operators.build_operator(BLUR)
    y = operator(io.read_image(Path(config["data"]["folder"]) / "00000.png").pixels, measurement_generator(0, "00000"))
    expected = (y - operator.A(wiener(y, operator))).norm() / (0.05 * y.numel() ** 0.5)
    assert row["residual_ratio"] == pytest.approx(float(expected), rel=1e-3)


def test_what_cannot_be_measured_is_refused_before_the_run(config):
    config["tasks"]["blur"]["solve_at"] = 32
    with pytest.raises(RestoreError, match=r"tasks.blur: .*border.*solve_at"):
        run_benchmark(config)
    del config["tasks"]["blur"]["solve_at"]
    config["tasks"]["blur"] |= {"per_image": True, "operator": {**BLUR, "name": "motion_blur", "kernel_size": 7}}
    del config["tasks"]["blur"]["operator"]["std"]
    with pytest.raises(RestoreError, match=r"tasks.blur: .*border.*per_image.*batch=1"):
        run_benchmark(config)
    run_benchmark(config, ["batch=1"])
    for i in range(2):  # kernels of their own have margins of their own
        parts = ("truth/blur", "measurements/blur", "results/blur/diffpir")
        (shape,) = {read_rgb(Path(config["out"]) / part / f"0000{i}.png").shape for part in parts}
        assert 14 <= min(shape[:2]) < 20
