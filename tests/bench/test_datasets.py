from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from operators import RestoreError
from restore.bench import datasets
from restore.bench.batches import make_batches
from restore.images.folder import crop_centre, list_images, read_rgb


def test_ffhq_takes_exactly_the_first_thousand_and_names_what_is_missing(tmp_path, smooth_images, write_images):
    images = smooth_images(4, 256, 0)
    write_images(tmp_path / "00000", images, ["00000", "00001", "00002", "70000"])
    chosen = datasets.load_dataset(tmp_path, name="ffhq-256", limit=3)
    assert chosen.ids == ("00000/00000", "00000/00001", "00000/00002")
    assert chosen.tensor(1).shape == (3, 256, 256)
    assert np.array_equal(chosen.pixels(1), images[1])
    with pytest.raises(RestoreError, match=r"997 of 1000 images are missing.*00003, 00004"):
        datasets.load_dataset(tmp_path, name="ffhq-256")


def test_imagenet_needs_its_list_and_follows_its_order(tmp_path, smooth_images, write_images):
    write_images(tmp_path, smooth_images(3, 300, 0), ["val_3", "val_1", "val_2"])
    with pytest.raises(RestoreError, match="imagenet-256 needs names=FILE"):
        datasets.load_dataset(tmp_path, name="imagenet-256")
    names = tmp_path / "list.txt"
    names.write_text("# name label\nval_2.JPEG 65\nval_1.JPEG 970\n")
    chosen = datasets.load_dataset(tmp_path, name="imagenet-256", names=names)
    assert chosen.ids == ("val_2", "val_1") and chosen.shapes == ((256, 256), (256, 256))
    names.write_text("val_2.JPEG\nval_2.JPEG\n")
    with pytest.raises(RestoreError, match="val_2 twice"):
        datasets.load_dataset(tmp_path, name="imagenet-256", names=names)


def test_resizing_is_antialiased_and_centred():
    stripes = np.zeros((100, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    small = crop_centre(stripes, 25)
    assert small.shape == (25, 25, 3)
    # Without antialiasing, one-pixel stripes would stay black and white.
    assert abs(int(small.mean()) - 127) < 3 and small[5:-5, 5:-5].std() < 12
    ramp = np.repeat(np.arange(300, dtype=np.uint16)[None, :, None] * 255 // 299, 100, 0).astype(np.uint8).repeat(3, 2)
    assert crop_centre(ramp, 100)[:, :, 0].mean() == pytest.approx(127.0, abs=1.0)
    assert crop_centre(ramp, None) is ramp


def test_the_digest_follows_content_order_and_size(tmp_path, smooth_images, write_images):
    paths = write_images(tmp_path, smooth_images(3, 32, 0))
    base = datasets.load_dataset(tmp_path).digest
    assert datasets.load_dataset(tmp_path).digest == base
    assert datasets.load_dataset(tmp_path, size=16).digest != base
    assert datasets.load_dataset(tmp_path, limit=2).digest != base
    assert datasets.load_dataset(tmp_path, names=["00001", "00000", "00002"]).digest != base
    pixels = read_rgb(paths[0]).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(paths[0])
    assert datasets.load_dataset(tmp_path).digest != base


def test_every_corrupt_file_is_named_at_once(tmp_path, smooth_images, write_images):
    paths = write_images(tmp_path, smooth_images(4, 32, 0))
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[3].write_bytes(b"no image")
    with pytest.raises(RestoreError, match=r"2 of 4 files.*00001\.png, 00003\.png"):
        datasets.load_dataset(tmp_path)


def test_hugging_face_image_folder(tmp_path, smooth_images, write_images):
    write_images(tmp_path / "test", smooth_images(3, 32, 0), ["a", "b", "c"])
    rows = [{"file_name": "c.png", "text": "a corgi"}, {"file_name": "a.png", "text": "a boat"}]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    chosen = datasets.load_dataset(tmp_path, split="test")
    assert chosen.ids == ("c", "a")
    write_images(tmp_path / "train" / "cat", smooth_images(2, 32, 1))
    assert datasets.load_dataset(tmp_path, split="train").ids == ("cat/00000", "cat/00001")


def test_folders_that_cannot_be_used(tmp_path, smooth_images, write_images):
    with pytest.raises(RestoreError, match="is not a folder"):
        datasets.load_dataset(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(RestoreError, match="has no image"):
        datasets.load_dataset(tmp_path)
    write_images(tmp_path, smooth_images(1, 32, 0), ["a"])
    (tmp_path / "movie.mp4").write_bytes(b"x")
    assert list_images(tmp_path)[1] == ["movie.mp4"]
    Image.open(tmp_path / "a.png").save(tmp_path / "a.jpg")
    with pytest.raises(RestoreError, match="share the id a"):
        datasets.load_dataset(tmp_path)
    with pytest.raises(RestoreError, match="no data set named 'celeba'"):
        datasets.load_dataset(tmp_path, name="celeba")
    with pytest.raises(RestoreError, match="limit=0"):
        datasets.load_dataset(tmp_path, limit=0)


def test_orientation_sixteen_bits_and_alpha(tmp_path, smooth_images):
    upright = smooth_images(1, 32, 0)[0][:, :20]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(upright, 1).copy()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "turned.png"), upright)
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_rgb(tmp_path / "grey.png")[..., 1].ravel(), np.arange(256))


def test_stretching_is_part_of_the_set_and_of_its_hash(tmp_path, write_images):
    pixels = np.full((8, 8, 3), 100, np.uint8)
    pixels[:4], pixels[4, 4] = 60, 160
    write_images(tmp_path, [pixels], ["a"])
    plain, stretched = (datasets.load_dataset(tmp_path, stretch=stretch) for stretch in (False, True))
    assert np.array_equal(plain.pixels(0), pixels) and plain.digest != stretched.digest
    values = stretched.pixels(0)
    assert values[0, 0, 0] == 0 and values[4, 4, 1] == 255 and values[7, 7, 2] == 102
    assert stretched.tensor(0).min() == -1 and stretched.tensor(0).max() == 1
    assert "stretched" in stretched.describe()["preprocessing"] != plain.describe()["preprocessing"]
    write_images(tmp_path / "flat", [np.full((4, 4, 3), 9, np.uint8)], ["b"])
    assert not datasets.load_dataset(tmp_path / "flat", stretch=True).pixels(0).any()


def test_images_of_one_file_name_are_named(tmp_path):
    for name in ("a__b.png", "a/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    with pytest.raises(RestoreError, match="a/b and a__b would be written to one file"):
        make_batches({"batch": 1, "tasks": {}, "methods": {}}, datasets.load_dataset(tmp_path))
