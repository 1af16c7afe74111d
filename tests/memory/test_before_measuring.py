"""A plan costs nothing of a large photo's size: it is made before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import operators
import restore
from restore.app.choice import MethodChoice
from restore.app.files import find_photos
from restore.app.run import RestoreJob
from restore.images.resampling import Resampling
from restore.memory import Planner
from restore.task import load_task, measure_photo


@pytest.fixture
def largest(monkeypatch):
    """The largest image that the operator sees, in pixels."""
    seen, A = [0], operators.SuperResolution.A

    def spy(self, x):
        seen[0] = max(seen[0], x.shape[-2] * x.shape[-1])
        return A(self, x)

    monkeypatch.setattr(operators.SuperResolution, "A", spy)
    return seen


@pytest.mark.parametrize("degrade", [False, True])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_photo_that_is_only_planned_or_does_not_fit_is_not_measured(tmp_path, largest, degrade, dry_run):
    Image.new("RGB", (300, 200), (90, 120, 40)).save(tmp_path / "photo.png")
    restorer = restore.load("embedded", device="cpu")
    planner = Planner(restorer, None if dry_run else 1e6)
    choice = MethodChoice("dpir", steps=2)
    job = RestoreJob(restorer, load_task("sr4"), choice, degrade=degrade, planner=planner, dry_run=dry_run)
    (outcome,) = job.run(find_photos([str(tmp_path / "photo.png")], tmp_path / "out"))
    assert largest[0] <= 96 * 96  # of the rehearsal
    if dry_run:
        assert outcome.plan.size == ((200, 300) if degrade else (800, 1200))
    else:
        assert "of memory" in outcome.error and not (tmp_path / "out" / "photo.png").exists()


@pytest.mark.parametrize("resampling", [None, Resampling(192, "bicubic")])
@pytest.mark.parametrize("degrade", [False, True])
def test_the_planned_operator_is_that_of_the_measurement(tmp_path, degrade, resampling):
    from restore.images import io
    from restore.task import build_for_photo

    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save(tmp_path / "photo.png")
    task, path = load_task("sr2"), Path(tmp_path / "photo.png")
    record = io.read_image(path)
    operator = build_for_photo(record, task, degrade=degrade, resampling=resampling)
    measured = measure_photo(path, task, image_id="a", degrade=degrade, resampling=resampling)
    assert repr(operator) == repr(measured.operator)
    side = 192 if resampling else 48 if degrade else 96
    assert operators.image_shape(measured.operator, measured.y)[-2:] == (side, side)
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert torch.equal(operator.A(x), measured.operator.A(x))
