"""Benchmarks on a tiny network with random weights: bytes, counts and records are checked, not the numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import killed
import pytest
import torch

import operators
import restore
from operators import RestoreError
from restore import disk
from restore.backbones.adm import ADM
from restore.bench.batches import load_images, make_batches
from restore.bench.config import load_config
from restore.bench.run import plan_benchmark, run_benchmark
from restore.images import io
from restore.images.folder import read_rgb
from restore.report.write import write_report
from restore.samplers.noise import measurement_generator

NOISE = {"name": "gaussian", "sigma": 0.05}


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(5, 16, 0))
    return {
        **tiny_run,
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {
            "sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}},
            "box": {"per_image": True, "operator": {"name": "inpainting_box", "noise": NOISE}},
        },
        "methods": {
            "base": {"sampler": "baseline"},
            "dps": {"sampler": "dps", "steps": 4, "parameters": {"zeta": 0.5}},
            "pag": {
                "sampler": "dps",
                "steps": 4,
                "parameters": {"zeta": 0.5},
                "guidance": {"pag": {"layers": ["m1"]}},
                "sweep": {"guidance.pag.scale": [1.0, 2.0]},
            },
        },
    }


def contents(run: Path) -> dict[str, bytes]:
    """Everything a run says about its images; not what it cost."""
    parts = ("results", "truth", "measurements")
    files = [p for part in parts for p in sorted((run / part).rglob("*")) if p.is_file()]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


def test_a_run_writes_every_image_with_its_row(config):
    seen = []
    done = run_benchmark(config, progress=seen.append)
    run = Path(config["out"])
    assert (done.computed, done.reused) == (24, 0) and seen[-1]["done"] == seen[-1]["total"] == 24
    row = json.loads((run / "results/sr/pag_scale=2.0/rows/00003.json").read_text())
    assert row["nfe"] == 8 and set(row) == {"image", "nfe", "psnr", "ssim", "residual_ratio", "sha256", "files"}
    assert set(row["files"]) == {"truth/00003.png", "measurements/sr/00003.png"}
    cell = done.table["table"]["sr"]["pag_scale=2.0"]
    assert cell["missing"] == 0 and cell["means"]["psnr"]["n"] == 5 and cell["cost"]["nfe"] == 8
    masks = [(run / f"measurements/box/0000{i}.png").read_bytes() for i in range(5)]
    assert len(set(masks)) == 5
    assert contents(run)["results/sr/dps/00000.png"] != contents(run)["results/sr/pag_scale=2.0/00000.png"]
    protocol = json.loads((run / "run.json").read_text())["protocol"]
    assert protocol["tasks"]["sr"]["sigma_y"] == 0.05 and len(protocol["images"]["sha256"]) == 64
    assert len(next(iter(protocol["backbone"][config["backbone"]].values()))) == 64
    again = run_benchmark(config)
    assert (again.computed, again.reused) == (0, 24) and again.table == done.table


def test_the_callers_number_of_threads_comes_back(config):
    torch.set_num_threads(2)
    run_benchmark(config)
    assert torch.get_num_threads() == 2


def test_results_do_not_depend_on_the_batch_or_on_other_methods(config):
    run_benchmark(config)
    small = dict(config, out=config["out"] + "-1", batch=1, methods={"dps": config["methods"]["dps"]})
    run_benchmark(small, ["data.names=['00003']"])
    for task in ("sr", "box"):
        rows = [
            json.loads((Path(c["out"]) / f"results/{task}/dps/rows/00003.json").read_text()) for c in (config, small)
        ]
        assert rows[0]["psnr"] == pytest.approx(rows[1]["psnr"], rel=1e-4)


def test_twenty_kills_change_nothing_and_repeat_at_most_a_batch_each(config, tmp_path):
    torch.set_num_threads(1)
    undisturbed = dict(config, out=str(tmp_path / "undisturbed"))
    run_benchmark(undisturbed)
    context, log, kills = multiprocessing.get_context("forkserver"), tmp_path / "log", 0
    context.set_forkserver_preload(["killed", "restore.restorer"])  # or every child would spend seconds on it
    chance = random.Random(0)
    for _ in range(400):
        child = context.Process(target=killed.run, args=(config, log))
        child.start()
        if kills < 20:
            child.join(chance.uniform(0.02, 0.35))
        else:
            child.join(120)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        elif kills >= 20:
            break
        else:
            # It finished before enough kills: take some images away, as if it had been killed earlier.
            rows = sorted((Path(config["out"]) / "results").rglob("rows/*.json"))
            for path in rows[len(rows) // 3 :]:
                path.unlink()
            log.write_text("")
    assert kills == 20 and child.exitcode == 0
    assert contents(Path(config["out"])) == contents(Path(undisturbed["out"]))
    finished = log.read_text().split()
    assert len(finished) == len(set(finished)), "a finished batch was computed again"
    assert not list(Path(config["out"]).rglob("*.tmp"))


def test_another_configuration_is_refused_with_the_difference(config):
    config["methods"] = {"base": {"sampler": "baseline"}}
    run_benchmark(config)
    with pytest.raises(RestoreError, match=r"another benchmark \(config\.seed: 0 there, 1 here\)"):
        run_benchmark(config, ["seed=1"])
    with pytest.raises(RestoreError, match="factor: 4 there, 2 here"):
        run_benchmark(config, ["tasks.sr.operator.factor=2"])
    run_benchmark(config, ["metrics.names=[psnr]", "title=Words"])  # what does not touch the results may change
    photo = Path(config["data"]["folder"]) / "00000.png"
    photo.write_bytes((Path(config["data"]["folder"]) / "00001.png").read_bytes())
    with pytest.raises(RestoreError, match=r"another benchmark \(images: "):
        run_benchmark(config)


def test_run_folders_that_cannot_be_used(config, tmp_path):
    config["methods"] = {"base": {"sampler": "baseline"}}
    run = Path(config["out"])
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(RestoreError, match="not empty and holds no benchmark"):
        run_benchmark(config)
    assert (run / "thesis.txt").read_text() == "mine"
    (run / "thesis.txt").unlink()
    (run / ".run.json.1-ab.tmp").write_text("{")  # of a run that was killed while it wrote its first file
    run_benchmark(config)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(RestoreError, match="another version of restore"):
        run_benchmark(config)
    (run / "run.json").write_text("{")
    with pytest.raises(RestoreError, match="is damaged"):
        run_benchmark(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(RestoreError, match="cannot create the folder"):
        run_benchmark(config, [f"out={tmp_path / 'file' / 'run'}"])


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_later(config, tmp_path, monkeypatch):
    config["methods"] = {"base": {"sampler": "baseline"}}
    run_benchmark(config, [f"out={tmp_path / 'whole'}"])
    written = 0
    write = disk.write_bytes

    def full(path, content):
        nonlocal written
        written += 1
        if written > 17:
            raise RestoreError(f"Cannot write {path}: the disk is full; nothing was changed.")
        write(path, content)

    monkeypatch.setattr(disk, "write_bytes", full)
    with pytest.raises(RestoreError, match="disk is full"):
        run_benchmark(config)
    monkeypatch.setattr(disk, "write_bytes", write)
    assert run_benchmark(config).reused > 0
    assert contents(Path(config["out"])) == contents(tmp_path / "whole")


def test_incomplete_results_are_counted(config):
    config["methods"] = {"base": {"sampler": "baseline"}}
    table = run_benchmark(config).table
    assert table["table"]["sr"]["base"]["missing"] == 0
    from restore.bench import results

    (Path(config["out"]) / "results/sr/base/rows/00002.json").unlink()
    checked = load_config(config)
    cell = results.write_metrics(Path(config["out"]), checked, load_images(checked))["table"]["sr"]["base"]
    assert (cell["missing"], cell["done"], cell["means"]["psnr"]["n"]) == (1, 4, 4)


def test_a_dry_run_computes_nothing_and_counts_everything(config):
    lines = {(line.task, line.method): line for line in plan_benchmark(config)}
    assert not Path(config["out"]).exists() and len(lines) == 8
    pag = lines["sr", "pag_scale=2.0"]
    assert (pag.batches, pag.images, pag.nfe) == (3, 5, 8) and pag.seconds > 0 and pag.peak_memory_mb > 0
    assert lines["sr", "dps"].nfe == 4 and lines["sr", "base"].seconds is None


def test_a_batch_that_does_not_fit_is_computed_in_parts(config, tmp_path, monkeypatch):
    """As results are then, to rounding."""
    config |= {"batch": 4, "methods": {"dps": config["methods"]["dps"]}}
    run_benchmark(config)
    predict, sizes = ADM.predict, []

    def predict_few(self, x_t, *rest):
        sizes.append(len(x_t))
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("no more than two")
        return predict(self, x_t, *rest)

    monkeypatch.setattr(ADM, "predict", predict_few)
    done = run_benchmark(config | {"out": str(tmp_path / "parts")})
    assert done.computed == 4 and sizes.count(4) == 2 and sizes.count(2) == 2 * 2 * 4
    for path in sorted((tmp_path / "parts" / "results").rglob("*.png")):
        whole = Path(config["out"]) / path.relative_to(tmp_path / "parts")
        assert abs(read_rgb(path).astype(int) - read_rgb(whole).astype(int)).max() <= 1


def test_an_interrupted_run_has_the_same_first_images_of_every_method(config):

    checked = load_config(config)
    batches = make_batches(checked, load_images(checked))
    cells = len({(batch.task, batch.method) for batch in batches})
    assert [batch.index for batch in batches] == [0] * cells + [1] * cells + [2] * cells
    config["tasks"]["box"]["backbone"] = config["backbone"] + "/."  # another name: loading in turns would cost more
    checked = load_config(config)
    assert [batch.task for batch in make_batches(checked, load_images(checked))] == ["sr"] * (3 * 4) + ["box"] * (3 * 4)


def test_processor_seconds_do_not_count_waiting(config):
    from restore.bench import worker
    from restore.bench.results import read_cost

    class Slow(worker.Worker):
        def _compute(self, *args):
            time.sleep(0.5)
            return super()._compute(*args)

    checked = load_config(config)
    images = load_images(checked)
    run = Path(config["out"])
    Slow(checked, run, images).run(next(b for b in make_batches(checked, images) if b.method == "dps"))
    cost = read_cost(run, "sr", "dps")
    assert 0 < cost["cpu_seconds_per_image"] <= cost["seconds_per_image"] - 0.2


def test_several_samples_give_spread_and_coverage(config):
    config["methods"] = {"dps": config["methods"]["dps"]}
    table = run_benchmark(config, ["samples=2", "data.limit=2", "metrics.names=[psnr,spread,coverage]"]).table["table"]
    run = Path(config["out"])
    assert (
        table["sr"]["dps"]["means"]["spread"]["mean"] > 0 and 0 <= table["sr"]["dps"]["means"]["coverage"]["mean"] < 1
    )
    assert (run / "results/box/dps/samples/00001-1.png").exists() and (
        run / "results/box/dps/spread/00001.png"
    ).exists()
    first = contents(run)["results/sr/dps/00001.png"]
    run_benchmark(config, [f"out={run}-single", "data.limit=2"])
    # Sample 0 does not depend on how many are drawn (up to rounding between batch sizes).
    single = read_rgb(Path(f"{run}-single") / "results/sr/dps/00001.png").astype(int)
    assert abs(single - read_rgb(run / "results/sr/dps/00001.png").astype(int)).max() <= 1 and len(first) > 0


def test_little_time_is_spent_on_anything_but_sampling(config, smooth_images, write_images, tmp_path):
    """With the network of a real prior the share is far below; here one step takes a few milliseconds."""
    started = time.perf_counter()
    config["methods"] = {"dps": dict(config["methods"]["dps"], steps=100)}
    table = run_benchmark(config, ["data.limit=2", "tasks.box.per_image=false"]).table["table"]
    assert table["sr"]["dps"]["cost"]["overhead"] < 0.1 and time.perf_counter() - started < 60


def test_generation_is_the_restorers_own(config):
    """One seed, one noise: the images of `restore generate`, whatever the batches; counted in network passes."""
    config |= {"kind": "generation", "tasks": {"uncond": {"count": 3}}, "metrics": {"names": ["peak_memory_mb"]}}
    pag = {"pag": {"scale": 1.0, "layers": ["m1"]}}
    config["methods"] = {"ddim": {"sampler": "ddim", "steps": "ddim4", "parameters": {"eta": 0.5}, "guidance": pag}}
    cell = run_benchmark(config, ["seed=5"]).table["table"]["uncond"]["ddim"]
    assert cell["cost"]["nfe"] == 8 and cell["cost"]["iterations_per_second"] > 0
    torch.set_num_threads(1)
    restorer = restore.load(config["backbone"], device="cpu")
    options = {"guidance": restore.PAG(1.0, layers="m1"), "steps": "ddim4", "seed": 5, "ddim_eta": 0.5}
    expected = io.to_uint8(restorer.generate(3, batch_size=2, **options))
    for i in range(3):
        written = read_rgb(Path(config["out"]) / f"results/uncond/ddim/00000{i}.png")
        assert abs(written.astype(int) - expected[i]).max() <= 1 and written.std() > 5


def test_what_a_run_was_computed_with_is_kept(config):
    config["methods"] = {"dps": config["methods"]["dps"]}
    table = run_benchmark(config, ["data.limit=2"]).table["table"]
    (ran,) = table["sr"]["dps"]["cost"]["protocols"]
    assert ran["threads"] == 1 and ran["precision"] == "float32" and ran["torch"] == torch.__version__
    assert len(ran["weights"]) == 12 and "ran_with.0.weights" in write_report([config["out"]]).markdown.read_text()


def test_measurements_are_those_of_the_command_line(config, tmp_path):
    config["methods"] = {"base": {"sampler": "baseline"}}
    run_benchmark(config, ["seed=3"])
    clean = io.read_image(Path(config["data"]["folder"]) / "00001.png").pixels
    operator = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))
    y = io.to_uint8(operator(clean, measurement_generator(3, "00001")))[0]
    assert (read_rgb(Path(config["out"]) / "measurements/sr/00001.png") == y).all()


def test_kernels_of_their_own_share_a_batch(config):
    blur = {"name": "motion_blur", "kernel_size": 7, "noise": NOISE}
    config |= {"tasks": {"motion": {"per_image": True, "operator": blur}}, "methods": {"dps": config["methods"]["dps"]}}
    run_benchmark(config)
    run_benchmark(config, [f"out={config['out']}-1", "batch=1"])
    for i in range(5):
        name = f"motion/dps/rows/0000{i}.json"
        rows = [json.loads((Path(config["out"] + end) / "results" / name).read_text()) for end in ("", "-1")]
        assert rows[0]["psnr"] == pytest.approx(rows[1]["psnr"], rel=1e-3)
        pair = [Path(config["out"] + end) / f"measurements/motion/0000{i}.png" for end in ("", "-1")]
        assert pair[0].read_bytes() == pair[1].read_bytes()
    config["tasks"]["motion"]["operator"] = {"name": "denoising", "noise": NOISE}
    with pytest.raises(RestoreError, match="seed"):
        run_benchmark(config, [f"out={config['out']}-2"])


def test_images_of_different_sizes_are_restored_one_by_one(config, smooth_images, write_images):
    write_images(Path(config["data"]["folder"]), [image[:12] for image in smooth_images(1, 16, 1)], ["tall"])
    config["methods"] = {name: config["methods"][name] for name in ("base", "dps")}
    config["tasks"] = {"sr": config["tasks"]["sr"]}
    with pytest.raises(RestoreError, match="different sizes; give data.size=PIXELS to bring them to one, or batch=1"):
        run_benchmark(config)
    run_benchmark(config, ["batch=1"])
    sizes = {p.stem: read_rgb(p).shape for p in (Path(config["out"]) / "results/sr/dps").glob("*.png")}
    assert sizes == {**{f"0000{i}": (16, 16, 3) for i in range(5)}, "tall": (12, 16, 3)}
    assert "sr" in write_report([config["out"]]).markdown.read_text()
