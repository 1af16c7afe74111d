"""A result that cannot be written is told, before it is computed where its size says so, and the next photo begins."""

import pytest
from PIL import Image

from operators import RestoreError
from restore import restorer
from restore.app import run
from restore.app.choice import MethodChoice
from restore.app.files import find_photos
from restore.app.run import RestoreJob
from restore.images import io
from restore.task import load_task


@pytest.fixture
def job():
    return RestoreJob(restorer.load("embedded"), load_task("sr4"), MethodChoice("ddrm", steps=1))


def make_photos(folder, *sizes, suffix=".png"):
    (folder / "in").mkdir()
    for name, size in zip("ab", sizes, strict=False):
        Image.new("RGB", size, (200, 100, 50)).save(folder / "in" / f"{name}{suffix}")
    return find_photos([folder / "in"], folder / "out")


def test_a_result_too_large_for_its_format_is_told_before_it_is_computed(job, tmp_path, monkeypatch):
    measure = run.measure_photo

    def measure_small(record, *given, **more):
        assert max(record.size) < 100
        return measure(record, *given, **more)

    monkeypatch.setattr(run, "measure_photo", measure_small)
    large, small = job.run(make_photos(tmp_path, (4100, 8), (8, 8), suffix=".webp"))
    assert "WEBP file must have at most 16383 pixels a side, got 16400 x 32" in large.error
    assert small.error is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.json", "b.webp"]


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_the_longest_side_is_the_encoders(tmp_path, image_format):
    longest = io.FORMATS[image_format].longest
    path = tmp_path / f"a{io.FORMATS[image_format].suffixes[0]}"
    io.check_size(path, (1, longest))
    Image.new("L", (longest, 1)).save(path)
    with pytest.raises(RestoreError, match="write a PNG"):
        io.check_size(path, (longest + 1, 1))
    with pytest.raises((OSError, ValueError)):
        Image.new("L", (longest + 1, 1)).save(path)


def test_a_result_that_cannot_be_encoded_does_not_end_the_run(job, tmp_path, monkeypatch):
    encode = io.encode_image

    def refuse(path, *given, **more):
        if path.stem == "a":
            raise RestoreError("no such picture")
        return encode(path, *given, **more)

    monkeypatch.setattr(io, "encode_image", refuse)
    first, second = job.run(make_photos(tmp_path, (8, 8), (8, 8)))
    assert first.error == "no such picture" and second.error is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.json", "b.png"]
