"""The shares that single images have in a metric of a set."""

from __future__ import annotations

import numpy as np
import pytest

from restore.bench.config import load_config
from restore.bench.run import run_benchmark
from restore.metrics import sets
from restore.metrics.references import load_reference
from restore.search.objective import MethodResults, jackknife_kernel_distance


def test_a_kernel_distance_is_to_the_reference_that_the_benchmark_measured(
    tmp_path, tiny_run, inception_weights, smooth_images
):
    """Of an .npz, brought to the size that is asked for; images of a search's tasks are as they are."""
    place, weights = tmp_path / "reference.npz", {"inception": str(inception_weights)}
    np.savez(place, arr_0=smooth_images(4, 48, 1))
    config = tiny_run | {"kind": "generation", "tasks": {"three": {"count": 3}, "two": {"count": 2}}}
    config |= {"methods": {"ddim": {"sampler": "ddim", "steps": 1}}}
    config["metrics"] = {"names": ["kid"], "reference": str(place), "reference_size": 16, "allow_small": True}
    config["metrics"]["weights"] = weights
    run, config = run_benchmark(config), load_config(config)
    ids = tuple(f"{i:06d}" for i in range(3))
    three, two = (MethodResults(run.folder, config, task, "ddim", ids[:n]) for task, n in (("three", 3), ("two", 2)))

    def extract(images):
        return sets.extract_features(images, "inception", ["2048"], weights=weights)["2048"].double().numpy()

    score = three.score("kid")
    expected = jackknife_kernel_distance(extract(three.files), extract(load_reference(place, 16)), paired=False)
    assert score.shares - score.shares.mean() == pytest.approx(expected - expected.mean())
    assert score.value == pytest.approx(score.shares.mean()) == run.table["table"]["three"]["ddim"]["set_values"]["kid"]
    assert two.score("kid").shares is None and np.isfinite(two.score("kid").value)
