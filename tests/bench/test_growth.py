"""A run's folder grows: what is computed is kept, and the result is that of the larger run from the start."""

import json
from pathlib import Path

import pytest

from operators import RestoreError
from restore.bench.run import run_benchmark

NOISE = {"name": "gaussian", "sigma": 0.05}
GENERATION = {"kind": "generation", "metrics": {"names": []}}


def read_results(run):
    parts = [path for part in ("results", "truth", "measurements") for path in (Path(run) / part).rglob("*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in parts if path.is_file()}


def without_costs(table):
    """The table, whose seconds differ from run to run."""
    return {task: {name: cell | {"cost": None} for name, cell in cells.items()} for task, cells in table.items()}


@pytest.fixture
def config(tmp_path, tiny_run, smooth_images, write_images):
    write_images(tmp_path / "photos", smooth_images(5, 16, 0))
    return {
        **tiny_run,
        "out": str(tmp_path / "grown"),
        "data": {"folder": str(tmp_path / "photos")},
        "tasks": {
            "sr": {"operator": {"name": "super_resolution", "factor": 4, "noise": NOISE}},
            "noise": {"operator": {"name": "denoising", "noise": NOISE}},
        },
        "methods": {
            "base": {"sampler": "baseline"},
            "dps": {"sampler": "dps", "steps": 2, "parameters": {"zeta": 0.5}},
        },
    }


def test_a_run_grows_by_images_methods_and_tasks(config, tmp_path):
    config["batch"] = 2
    whole = run_benchmark(config | {"out": str(tmp_path / "whole")})
    part = config | {"tasks": {"sr": config["tasks"]["sr"]}, "methods": {"dps": config["methods"]["dps"]}}
    assert run_benchmark(part, ["data.limit=3"]).computed == 2
    grown = run_benchmark(config)
    # 3 batches of 4 cells: the first full one of sr by dps is kept, the second one had but one image.
    assert (grown.computed, grown.reused) == (11, 1)
    assert read_results(config["out"]) == read_results(tmp_path / "whole")
    assert without_costs(grown.table["table"]) == without_costs(whole.table["table"])
    images = json.loads((tmp_path / "grown/run.json").read_text())["protocol"]["images"]
    assert (images["count"], images["last"]) == (5, "00004")
    assert run_benchmark(config).computed == 0


def test_a_run_does_not_shrink_or_change_as_it_grows(config):
    config["methods"] = {"base": config["methods"]["base"]}
    run_benchmark(config, ["data.limit=2"])
    with pytest.raises(RestoreError, match=r"another benchmark \(config\.tasks\.noise\..* there, nothing here"):
        run_benchmark(config | {"tasks": {"sr": config["tasks"]["sr"]}}, ["data.limit=2"])
    with pytest.raises(RestoreError, match=r"another benchmark \(.*images: "):
        run_benchmark(config, ["data.limit=1"])
    with pytest.raises(RestoreError, match=r"\(config\.tasks\.sr\.operator\.factor: 4 there, 2 here\)"):
        run_benchmark(config, ["tasks.sr.operator.factor=2"])
    first = Path(config["data"]["folder"]) / "00000.png"
    first.rename(first.with_name("9.png"))  # the first images are others now
    with pytest.raises(RestoreError, match=r"another benchmark \(.*images: "):
        run_benchmark(config)


def test_more_generated_pictures_keep_the_first(tiny_run, tmp_path):
    config = {**tiny_run, **GENERATION, "batch": 2, "out": str(tmp_path / "grown")}
    config["methods"] = {"ddim": {"sampler": "ddim", "steps": 2}}
    run_benchmark(config | {"tasks": {"faces": {"count": 2}}})
    grown = run_benchmark(config | {"tasks": {"faces": {"count": 4}}})
    assert (grown.computed, grown.reused) == (1, 1)
    run_benchmark(config | {"tasks": {"faces": {"count": 4}}, "out": str(tmp_path / "whole")})
    assert read_results(tmp_path / "grown") == read_results(tmp_path / "whole")
    with pytest.raises(RestoreError, match=r"another benchmark \(config\.tasks\.faces\.count: 4 there, 2 here\)"):
        run_benchmark(config | {"tasks": {"faces": {"count": 2}}})


def test_a_run_grows_by_tasks_with_settings_of_their_own(config):
    base = {"base": {"sampler": "baseline"}}
    dps = {"sampler": "dps", "steps": 2, "parameters": {"zeta": 0.5}}
    sr, noise = ({name: config["tasks"][name]} for name in ("sr", "noise"))
    run_benchmark(config | {"tasks": sr, "methods": base | {"dps": dps | {"only": ["sr"]}}})
    settings = {"per_task": {"noise": {"parameters": {"zeta": 1.0}}}}
    grown = run_benchmark(config | {"methods": base | {"dps": dps | settings}})  # by two cells of 3 batches
    assert (grown.computed, grown.reused) == (6, 6)
    for changed in ({"parameters": {"zeta": 2.0}}, None):
        changed = {"per_task": {"noise": changed}}
        with pytest.raises(RestoreError, match=r"methods\.dps\.per_task\.noise"):
            run_benchmark(config | {"methods": base | {"dps": dps | changed}})
    with pytest.raises(RestoreError, match=r"methods\.dps\.per_task\.sr"):
        changed = {"per_task": settings["per_task"] | {"sr": {"steps": 3}}}
        run_benchmark(config | {"methods": base | {"dps": dps | changed}})
    with pytest.raises(RestoreError, match=r"methods\.dps\.only"):
        run_benchmark(config | {"methods": base | {"dps": dps | settings | {"only": ["sr"]}}})


def test_a_method_grows_by_tasks_that_others_have(config):
    """Its settings for tasks that it has not run on decide no result."""
    methods, dps = {"base": {"sampler": "baseline"}}, config["methods"]["dps"]
    run_benchmark(config | {"methods": methods | {"dps": dps | {"only": ["sr"]}}})
    more = {"only": ["noise", "sr"], "per_task": {"noise": {"steps": 1}}}
    grown = run_benchmark(config | {"methods": methods | {"dps": dps | more}})
    assert (grown.computed, grown.reused) == (3, 9)
    assert run_benchmark(config | {"methods": methods | {"dps": dps | more}}).computed == 0
