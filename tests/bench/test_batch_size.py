"""`batch: auto` in a benchmark: what memory allows, decided once for a run and recorded."""

import pytest
import yaml

from operators import RestoreError
from restore.bench.batch_size import choose_batch
from restore.bench.batches import load_images
from restore.bench.config import load_config
from restore.bench.run import plan_benchmark, read_manifest, run_benchmark
from restore.search.config import load_search

NOISE = {"name": "gaussian", "sigma": 0.05}


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(10, 16, 0))
    return tiny_run | {
        "batch": "auto",
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {"sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}}},
        "methods": {
            "bicubic": {"sampler": "bicubic"},
            "diffpir": {"sampler": "diffpir", "steps": 2, "parameters": {"lam": 1.0, "zeta": 1.0}},
            "dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 0.5}},
        },
    }


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so much memory is free from now on."""
    return lambda n: monkeypatch.setattr("restore.memory.plan.available_memory", lambda device: n)


def choose(config, **changes):
    loaded = load_config(config | changes)
    return choose_batch(loaded, load_images(loaded))


def test_the_method_that_needs_most_decides(config, free):
    only = [{name: config["methods"][name]} for name in config["methods"]]
    found = {}
    for memory in (1e12, 1.28e8, 1e6):
        free(memory)
        found[memory] = [choose(config, methods=methods) for methods in (*only, config["methods"])]
    assert found[1e12] == [10, 8, 8, 8]  # no network; at most eight on a processor
    bicubic, diffpir, dps, together = found[1.28e8]
    assert bicubic == 10 and diffpir == 8 and dps == together == 2
    assert found[1e6] == [10, 1, 1, 1]
    free(1.28e8)
    assert choose(config, methods=only[1], samples=8) < diffpir  # of each image


def test_a_run_that_is_continued_and_grows_keeps_its_batches(config, free, tmp_path):
    free(1e12)
    config["methods"].pop("dps")
    assert [cell.batches for cell in plan_benchmark(config, measure=False)] == [2, 2]
    first = run_benchmark(config, ["data.limit=8"])
    assert first.computed == 2
    assert read_manifest(first.folder)["identity"]["config"]["batch"] == 8
    assert yaml.safe_load((first.folder / "config.yaml").read_text())["batch"] == 8
    free(1e6)
    again = run_benchmark(config, ["data.limit=8"])
    assert (again.computed, again.reused) == (0, 2)
    grown = run_benchmark(config)
    assert (grown.computed, grown.reused) == (2, 2)
    number = run_benchmark(config | {"batch": 8, "out": str(tmp_path / "number")})
    for picture in sorted(number.folder.glob("results/**/*.png")):
        assert picture.read_bytes() == (grown.folder / picture.relative_to(number.folder)).read_bytes()
    with pytest.raises(RestoreError, match="batch: 8 there, 4 here"):
        run_benchmark(config | {"batch": 4})


def test_images_that_cannot_share_a_batch(config, tmp_path, write_images, smooth_images):
    blur = {"name": "motion_blur", "kernel_size": 5, "border": "unknown", "noise": NOISE}
    assert choose(config, tasks={"blur": {"operator": blur, "per_image": True}}) == 1
    write_images(tmp_path / "photos", smooth_images(1, 24, 0), ["wide"])
    assert choose(config) == 1


def test_mistakes(config, tmp_path):
    for wrong in ("many", 2.5, True):
        with pytest.raises(RestoreError, match=f"batch={wrong} must be a whole number of 1 or more, or auto"):
            load_config(config | {"batch": wrong})
    generation = {key: value for key, value in config.items() if key != "data"} | {"kind": "generation"}
    generation |= {"tasks": {"faces": {"count": 4}}, "methods": {"ddim": {"sampler": "ddim", "steps": 2}}}
    with pytest.raises(RestoreError, match="batch=auto must be a whole number of 1 or more for kind=generation"):
        load_config(generation)
    search = {key: config[key] for key in ("name", "backbone", "tasks", "batch")}
    with pytest.raises(RestoreError, match="batch must be a whole number in a search, got auto"):
        load_search(search | {"method": {"sampler": "dps", "steps": 2}, "guidance": {"pag": {"scale": 1.0}}})
