"""What works around a prior on the pretended accelerator: metrics, benchmarks, searches, training."""

from __future__ import annotations

import json

import sim_device
import tiny_training
import torch
from sim_priors import held, image

from restore.bench.run import run_benchmark
from restore.metrics import single
from restore.search import search_heads
from restore.training.train import KINDS

NOISE = {"name": "gaussian", "sigma": 0.05}


def test_single_images(sim, hub):
    """PSNR, SSIM and LPIPS."""
    weights = {"alexnet": hub / "checkpoints" / "alexnet-owt-7be5be79.pth"}
    truth, result = image(2, 64), 0.9 * image(2, 64)
    for function in (single.psnr, single.ssim):
        values = function(result.to("sim"), truth.to("sim"))
        assert torch.equal(values.cpu(), function(result, truth))
    here, there = (single.LPIPS("alex", weights, device=device) for device in ("cpu", "sim"))
    assert torch.equal(there(result.to("sim"), truth.to("sim")).cpu(), here(result, truth))


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


def test_training(sim, tmp_path, smooth_images, write_images):
    """Three steps of each kind: the losses and the weights."""
    folders = tmp_path / "images"
    write_images(folders / "faces", smooth_images(12, 32, 0))
    write_images(folders / "photos", smooth_images(4, 40, 1))
    for kind in ("prior-v2", "autoencoder"):
        results = []
        for device in ("cpu", "sim"):
            torch.manual_seed(0)
            made = tiny_training.config(kind, folders, tmp_path / device / kind)
            trained = KINDS[made.kind](made, torch.device(device))
            network = trained.model.to(device)
            optimizer, losses = torch.optim.AdamW(network.parameters(), lr=1e-3), []
            for step in range(3):
                generator = sim_device.make_generator(step) if device == "sim" else torch.Generator().manual_seed(step)
                loss, _, _ = trained.loss(network, step, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(held(loss.detach()))
            results.append((torch.stack(losses), [held(parameter.detach()) for parameter in network.parameters()]))
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
