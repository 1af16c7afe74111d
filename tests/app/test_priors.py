"""The prior of a photo: faces get the prior of faces, and what may be one or not gets the prior of photos."""

import pytest
import torch

import restore
from restore.app.priors import FACES, MARGIN, PriorChooser, measure_face, shows_face
from restore.images import io
from restore.paths import data_dir

PHOTO_FILES = data_dir() / "photos"
SIZE = (64, 64)


@pytest.fixture(scope="module")
def faces():
    return restore.load(FACES)


def read(name, box=(slice(None), slice(None))):
    return io.read_image(PHOTO_FILES / name).pixels[(..., *box)]


@pytest.mark.parametrize(
    "name",
    ["astronaut-face-64.png", "astronaut-face-64-scratched.png", "generated-face-64-1.png", "generated-face-128-1.png"],
)
def test_faces(faces, name):
    assert shows_face(faces, read(name), SIZE)


@pytest.mark.parametrize(
    ("name", "top", "left", "side"),
    [
        ("chelsea-face-64.png", 0, 0, 64),  # a cat
        ("coffee-64.png", 0, 0, 64),
        ("astronaut.jpg", 300, 20, 64),
        ("astronaut.jpg", 0, 380, 128),
        ("chelsea.jpg", 20, 300, 64),
        ("coffee.jpg", 200, 250, 64),
    ],
)
def test_other_pictures(faces, name, top, left, side):
    assert not shows_face(faces, read(name, (slice(top, top + side), slice(left, left + side))), SIZE)


def test_what_may_be_a_face_or_not_is_a_photo(faces):
    """A cat under noise is a little better told as a face, or a little worse: by less than the margin either way."""
    cat = read("chelsea-face-64.png")
    noisy = cat + 0.2 * torch.randn(cat.shape, generator=torch.Generator().manual_seed(3))
    assert abs(measure_face(faces, noisy, SIZE)) < MARGIN and not shows_face(faces, noisy, SIZE)
    choose = PriorChooser({FACES: faces}.__getitem__, only=FACES).choose
    assert choose(noisy, SIZE).label == "photo" and choose(read("astronaut-face-64.png"), SIZE).label == "face"


@pytest.mark.parametrize(("side", "reason"), [(64, "up to 64 pixels"), (96, "larger than 64 pixels")])
def test_the_reason_of_a_prior_that_is_given_by_the_options_is_true(faces, side, reason):
    chooser = PriorChooser(lambda name: faces, FACES)
    chosen = chooser.choose(torch.zeros(1, 3, side, side), (side, side), blind=False)
    assert chosen.reason == f"prior: {FACES}, {reason}"
