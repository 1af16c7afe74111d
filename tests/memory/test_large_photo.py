"""A photo of 4000 x 3000 on the default settings, its network and its detail the real ones; -s prints the numbers.

The whole takes hours on a CPU, so its time and its seams are measured on cut-outs, its memory on one step.
"""

from __future__ import annotations

import multiprocessing
import types
from time import process_time

import killed
import numpy as np
import pytest
import torch
from PIL import Image

import restore
from restore.app import files
from restore.app.run import RestoreJob
from restore.images.io import read_image
from restore.memory import Planner, measure, trace
from restore.paths import data_dir
from restore.task import load_task

MEMORY = 4e9
TASK = "denoise"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """The shipped photo of 600 x 400, mirrored at its sides until the picture is full: detail everywhere."""
    tile = np.asarray(Image.open(data_dir() / "photos" / "coffee.jpg").convert("RGB"))
    picture = np.pad(tile, ((0, 3000 - tile.shape[0]), (0, 4000 - tile.shape[1]), (0, 0)), mode="symmetric")
    path = tmp_path_factory.mktemp("photo") / "large.png"
    Image.fromarray(picture).save(path, compress_level=1)
    return path


@pytest.fixture(scope="module")
def prior():
    return restore.load("embedded", device="cpu")


def crop_photo(photo, height, width, top=1000, left=1000):
    return read_image(photo).pixels[..., top : top + height, left : left + width]


def restore_photo(prior, x, **options):
    operator = load_task(TASK).build(*x.shape[-2:])
    y = operator(x, torch.Generator().manual_seed(0))
    return prior(y, operator, task=TASK, **options).samples[:, 0]


def test_the_plan_stays_within_4_gb(photo, prior, tmp_path):
    photos = files.find_photos([photo], tmp_path / "out")
    planner = Planner(prior, MEMORY)
    (outcome,) = RestoreJob(prior, load_task(TASK), planner=planner, dry_run=True).run(photos)
    print(outcome.line())
    assert outcome.error is None and outcome.plan.fits and outcome.plan.memory < MEMORY
    assert outcome.plan.size == (3000, 4000) and outcome.plan.windows == 93 * 124
    assert outcome.plan.seconds > 60  # one evaluation of each window; samples by DiffPIR would take hours


@pytest.mark.slow
def test_the_estimate_is_within_half_of_the_time_taken(photo, prior, monkeypatch):
    """Both in processor seconds, in turn, three times: other programs slow both."""
    for module in (measure, trace):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=process_time, thread_time=process_time))
    torch.set_num_threads(1)
    x, ratios = crop_photo(photo, 96, 160), []
    task = load_task(TASK)
    for _ in range(3):
        method = prior.method(task.build(*x.shape[-2:]), task=TASK)
        planned = Planner(prior, MEMORY).plan(task, tuple(x.shape[-2:]), method)
        started = process_time()
        restore_photo(prior, x)
        ratios.append(planned.seconds / (process_time() - started))
    print(f"{planned.windows} windows, estimate / taken: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios)


def measure_steps(x, columns):
    """The mean size of the step from one column to the next, at those columns and at all others."""
    steps = (x[..., 1:] - x[..., :-1]).abs().mean(dim=(0, 1, 2))
    at = torch.zeros(len(steps), dtype=torch.bool)
    at[[column - 1 for column in columns]] = True
    return float(steps[at].mean()), float(steps[~at].mean())


@pytest.mark.slow
def test_no_seams(photo, prior):
    """Of what the restoration changed in the truth, steps at the windows' borders are as large as elsewhere; windows
    side by side, without overlap, show what a seam would be. One place says little: blended steps are 0.8 to 1.2 times
    as large at single ones."""
    places = [(1000, 1000), (0, 0), (100, 200), (200, 300), (50, 340), (260, 100)]
    crops = [crop_photo(photo, 96, 256, *place) for place in places]
    ratios = {}
    for overlap in (0.5, 0.0):
        apart = restore.Restorer(prior.backbone, "embedded", overlap=overlap)
        _, w, _, lefts = apart.prior(96, 256).window_grid(96, 256)
        borders = sorted({border for left in lefts for border in (left, left + w)} - {0, 256})
        steps = [measure_steps(restore_photo(apart, x) - x, borders) for x in crops]
        ratios[overlap] = float(np.mean([at / elsewhere for at, elsewhere in steps]))
    print(f"steps at window borders / elsewhere: {ratios[0.5]:.3f} blended, {ratios[0.0]:.3f} side by side")
    assert ratios[0.5] < 1.04 < ratios[0.0]


@pytest.mark.slow
def test_a_step_stays_within_4_gb_and_the_plan(photo, tmp_path):
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=killed.one_step, args=(photo, tmp_path / "out", TASK, MEMORY, theirs)
    )
    child.start()
    theirs.close()  # so that waiting ends with the child
    planned, (error, whole, more) = ours.recv().plan, ours.recv()
    child.join()
    print(f"{whole / 1e9:.2f} GB, {more / 1e9:.2f} GB of it new, {planned.memory / 1e9:.2f} GB planned")
    assert error is None and whole < MEMORY and more < 1.1 * planned.memory < 2 * more
    assert Image.open(tmp_path / "out" / "large.png").size == (4000, 3000)


def test_six_megapixels_of_noise_take_minutes_not_hours():
    """3000 x 2000 with the prior of photos: four orientations of windows that overlap by a quarter."""
    restorer, task = restore.load("embedded-photo", device="cpu"), load_task(TASK)
    method = restorer.method(task.build(2000, 3000), task=TASK, size=(2000, 3000))
    planned = Planner(restorer, MEMORY).plan(task, (2000, 3000), method)
    assert (planned.evaluations, planned.windows) == (4, 21 * 31)
    assert planned.fits and planned.memory < 2e9
