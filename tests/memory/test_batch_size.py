"""batch_size="auto": what fits into the memory there is."""

import json

import numpy as np
import pytest
import torch

import operators
import restore
from operators import RestoreError
from restore.app.choice import MethodChoice
from restore.app.files import find_photos
from restore.app.options import parse_batch_size
from restore.app.run import RestoreJob
from restore.memory import Planner, choose_batch_size
from restore.task import load_task

A = operators.SuperResolution(4, noise=operators.GaussianNoise(0.05))


def problem(n=1):
    generator = torch.Generator().manual_seed(0)
    return A(torch.rand(n, 3, 16, 16, generator=generator) * 2 - 1, generator)


@pytest.mark.parametrize("sampler", ["dps", "diffpir"])
def test_it_falls_with_the_memory(tiny_adm, sampler):
    """Twice the samples need twice the memory beyond what is fixed; a gradient needs more."""
    restorer = restore.load(tiny_adm, device="cpu")
    own = {"zeta": 1.0} if sampler == "dps" else {"lam": 1.0, "zeta": 1.0}
    method = restorer.method(A, sampler=sampler, steps=4, parameters=own)
    chosen = [choose_batch_size(restorer, A, problem(), (16, 16), method, 8, free) for free in (1e12, 3e8, 1.4e8, 1e6)]
    assert chosen[0] == 8 and chosen[-1] == 1 and chosen == sorted(chosen, reverse=True)
    assert choose_batch_size(restorer, A, problem(), (16, 16), method, 5, 1e12) == 5


def test_a_restorer_takes_it(tiny_adm):
    restorer = restore.load(tiny_adm, device="cpu")
    options = {"sampler": "diffpir", "steps": 2, "lam": 1.0, "zeta": 1.0}
    result = restorer(problem(3), A, batch_size="auto", samples=3, **options)
    assert result.protocol["batch_size"] == 8  # of nine samples, on a processor
    assert torch.equal(result.samples, restorer(problem(3), A, batch_size=8, samples=3, **options).samples)
    with pytest.raises(RestoreError, match="batch_size must be at least 1, got 1 and many"):
        restorer(problem(), A, batch_size="many", **options)
    with pytest.raises(RestoreError, match="batch_size must be at least 1, got 1 and auto"):
        restorer.generate(1, batch_size="auto")  # which has no plan
    assert restorer(problem(), A, batch_size=np.int64(1), **options).protocol["batch_size"] == 1


@pytest.mark.parametrize(("memory", "batch"), [(1e12, 3), (1e6, 1)])
def test_the_command_takes_it(tiny_adm, tmp_path, write_images, smooth_images, memory, batch):
    """The plan chooses, and the run keeps to it."""
    (photo,) = find_photos(write_images(tmp_path / "in", smooth_images(1, 16, 0)), tmp_path / "out")
    restorer = restore.load(tiny_adm, device="cpu")
    method = MethodChoice(sampler="diffpir", steps=2, parameters={"lam": 1.0, "zeta": 1.0})
    options = {"samples": 3, "batch_size": "auto", "planner": Planner(restorer, memory), "force": True}
    (outcome,) = RestoreJob(restorer, load_task("denoise"), method, **options).run([photo])
    assert outcome.error is None
    side = json.loads(photo.sidecar.read_text())
    assert side["protocol"]["batch_size"] == side["estimate"]["batch"] == batch
    with pytest.raises(RestoreError, match="batch_size must be a whole number of 1 or more, or auto, got 0"):
        parse_batch_size("0")
