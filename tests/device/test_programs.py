"""What works around a prior on the pretended accelerator: metrics, benchmarks, searches."""

from __future__ import annotations

import json

import torch
from sim_priors import image

from restore.bench.run import run_benchmark
from restore.metrics import sets, single
from restore.metrics.table import MetricOptions, select_metrics
from restore.search import search_heads

NOISE = {"name": "gaussian", "sigma": 0.05}


def test_single_images(sim, trunks):
    """PSNR, SSIM and LPIPS."""
    truth, result = image(2, 64), 0.9 * image(2, 64)
    for function in (single.psnr, single.ssim):
        values = function(result.to("sim"), truth.to("sim"))
        assert torch.equal(values.cpu(), function(result, truth))
    here, there = (single.LPIPS("alex", trunks, device=device) for device in ("cpu", "sim"))
    assert torch.equal(there(result.to("sim"), truth.to("sim")).cpu(), here(result, truth))


def test_kid(sim, tmp_path, inception_weights, smooth_images, write_images):
    folders = [write_images(tmp_path / name, smooth_images(3, 32, seed)) for seed, name in enumerate(("a", "b"))]
    options, rows = MetricOptions(weights={"inception": inception_weights}, allow_small=True), select_metrics(["kid"])
    here, there = (sets.compute_set_metrics(*folders, rows, options, device=device) for device in ("cpu", "sim"))
    assert here == there and here["kid"] != 0


def test_benchmark(sim, tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(2, 16, 0))
    config = tiny_run | {
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"box": {"per_image": True, "operator": {"name": "inpainting_box", "noise": NOISE}}},
        "methods": {"dps": {"sampler": "dps", "steps": 3, "parameters": {"zeta": 0.5}}},
        "metrics": {"names": ["psnr", "ssim"]},
    }
    runs = {}
    for device in ("cpu", "sim"):
        out = tmp_path / device
        run_benchmark(config | {"out": str(out), "device": device})
        runs[device] = {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*.png"))}
    assert runs["cpu"] and runs["cpu"] == runs["sim"]


def test_search(sim, tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "some", smooth_images(2, 16, 0))
    write_images(tmp_path / "others", smooth_images(2, 16, 1))
    config = tiny_run | {
        "tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}},
        "method": {"sampler": "diffpir", "steps": 3, "parameters": {"lam": 1.0, "zeta": 1.0}},
        "guidance": {"pag": {"scale": 3.0}},
        "objective": "psnr",
        "layers": ["m1"],
        "calibration": {"folder": str(tmp_path / "some")},
        "test": {"folder": str(tmp_path / "others")},
    }
    found = []
    for device in ("cpu", "sim"):
        out = tmp_path / device
        search_heads(config | {"out": str(out), "device": device})
        found.append(json.loads((out / "search.json").read_text()))
    assert found[0]["rounds"] == found[1]["rounds"]
