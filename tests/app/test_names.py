"""Names that a file system allows are restored or refused one by one; what a folder passes over is said."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from operators import RestoreError
from restore import disk
from restore.app import cli, files
from restore.images.folder import filter_images, list_images

LATIN = os.fsdecode(b"caf\xe9.png")
COMMON = ["--task", "denoise", "sigma=0.1", "--label", "photo", "--steps", "1", "--sampler", "diffpir"]


def save(path, kind="PNG"):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16), (90, 120, 150)).save(path, kind)
    return path


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(verb, *arguments) -> (exit code, stdout, stderr), in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def test_a_name_that_is_no_utf8_is_restored_like_any_other(command, tmp_path):
    try:
        save(tmp_path / "in" / LATIN)
    except OSError:
        pytest.skip("this file system allows only UTF-8")
    save(tmp_path / "in" / "good.png")
    code, out, err = command("run", "in", *COMMON, "-q", "-o", "out")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LATIN, LATIN[:-3] + "json", "good.png", "good.json"}
    sidecar = json.loads((tmp_path / "out" / (LATIN[:-3] + "json")).read_bytes().decode("utf-8"))
    assert sidecar["input"] == LATIN and sidecar["finished"]
    code, out, err = command("run", "in", *COMMON, "-o", "out")
    assert code == 0 and out.count("finished before") == 2 and "caf\\udce9.png" in out
    for verb, *options in (("degrade", "--task", "denoise", "-o", "degraded"), ("look",)):
        save(tmp_path / "large" / LATIN).write_bytes(_large())
        code, out, err = command(verb, "large", *options)
        assert code == 0 and "caf\\udce9.png" in out, err
    with pytest.raises(RestoreError, match=r"caf\\xe9.png.*UTF-8"):
        list_images(tmp_path / "in")


def _large():
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save("large.png")
    return Path("large.png").read_bytes()


def test_a_name_without_room_for_its_companions_is_refused_alone(command, tmp_path):
    name, wide = "l" * 250 + ".png", "ü" * 124 + ".png"  # 254 and 252 bytes
    for each in (name, wide, "good.png"):
        save(tmp_path / "in" / each)
    code, out, err = command("run", "in", *COMMON, "--samples", "2", "-o", "out")
    assert code == 2 and "2 of 3 files failed" in err and "255 bytes, got 262" in err and "out/good.png" in out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "good-mean.png",
        "good-sample1.png",
        "good-spread.png",
        "good.png",
    ]
    code, out, err = command("run", f"in/{name}", *COMMON, "--samples", "2", "-o", "out")
    assert code == 2 and len(err.splitlines()) == 1 and "255 bytes" in err
    code, out, err = command("run", f"in/{wide}", *COMMON, "-q", "-o", "out")
    assert code == 0 and (tmp_path / "out" / wide).exists(), err
    code, out, err = command("run", "x" * 5000, *COMMON, "-o", "out")
    assert code == 2 and "must be an image" in err


def test_temporary_names_are_cut_by_bytes(tmp_path):
    path = tmp_path / ("語" * 80 + ".json")  # 245 bytes
    disk.write_json(path, {"a": 1})
    assert disk.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_json_keeps_the_bytes_of_a_name(tmp_path):
    disk.write_json(tmp_path / "a.json", {"name": LATIN, "word": "Größe"})
    content = (tmp_path / "a.json").read_bytes()
    assert json.loads(content.decode("utf-8"))["name"] == LATIN and "Größe".encode() in content


def test_every_picture_of_a_folder_is_restored_and_the_rest_is_named(command, tmp_path):
    for name, kind in (
        ("a.jpg", "JPEG"),
        ("b.jfif", "JPEG"),
        ("c.jpe", "JPEG"),
        ("d.jp2", "JPEG2000"),
        ("e.tga", "TGA"),
        ("f.mpo", "JPEG"),
        ("g", "PNG"),
        ("h.data", "WEBP"),
    ):
        save(tmp_path / "mix" / name, kind)
    (tmp_path / "mix" / "letter.docx").write_bytes(b"PK\3\4 no picture")
    (tmp_path / "mix" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(64))
    (tmp_path / "mix" / "notes.txt").write_text("may lie beside pictures")
    save(tmp_path / "mix" / "below" / "i.png")
    code, out, err = command("degrade", "mix", "--task", "denoise", "-o", "out")
    names = ["a.jpg", "b.jfif", "c.jpe", "d.png", "e.png", "f.jpg", "g.png", "h.webp"]
    assert code == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names[:3]:
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == "JPEG"
    line = err.strip().splitlines()[-1]
    assert "clip.mp4, letter.docx (2; no picture" in line and "below (1; sub-folders: give --recursive)" in line
    assert "notes.txt" not in line
    code, out, err = command("degrade", "mix", "--task", "denoise", "-o", "out2", "--recursive")
    assert code == 0 and (tmp_path / "out2" / "below" / "i.png").exists() and "sub-folders" not in err
    assert "clip.mp4, letter.docx" in err
    code, out, err = command("degrade", "mix/b.jfif", "--task", "denoise", "-o", "single")
    assert code == 0 and [path.name for path in (tmp_path / "single").iterdir()] == ["b.jfif"] and "passed" not in err


def test_a_cameras_raw_file_is_no_picture_of_a_folder(tmp_path):
    save(tmp_path / "a.jpg", "JPEG")
    tags = {254: 1, 271: "NIKON"}  # as NEF, PEF and ARW: the first page is a thumbnail
    Image.new("RGB", (16, 16)).save(tmp_path / "a.nef", "TIFF", tiffinfo=tags)
    assert [path.name for path in filter_images(tmp_path.iterdir())] == ["a.jpg"]
    assert "a.nef" in files.explain_passed_over([tmp_path], None)


def test_what_a_format_does_not_keep_is_said(command, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "a.tif")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.jpg", exif=exif, dpi=(300, 300))
    code, out, err = command("run", "a.tif", *COMMON, "-q", "-o", "a.jpg")
    assert code == 0 and json.loads(Path("a.json").read_text())["not_kept"] == ["16 bits"], err
    code, out, err = command("degrade", "b.jpg", "--task", "denoise", "-o", "b.bmp")
    assert code == 0 and out.splitlines()[-1].endswith("b.bmp  not kept: EXIF")
    code, out, err = command("degrade", "b.jpg", "--task", "denoise", "-o", "b.png")
    assert code == 0 and "not kept" not in out


def test_a_folder_goes_on_after_a_photo_that_look_cannot_read(command, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    save(tmp_path / "in" / "b.png").write_bytes(_large())
    code, out, err = command("look", "in")
    assert code == 2 and "a.png" in err and "b.png  64 x 64" in out


def test_transparency_is_refused_before_the_photo_is_restored(command, tmp_path):
    Image.new("RGBA", (16, 16), (9, 9, 9, 9)).save(tmp_path / "a.bmp")
    save(tmp_path / "in" / "b.png")
    Image.new("RGBA", (16, 16), (9, 9, 9, 9)).save(tmp_path / "in" / "a.jpg", "PNG")  # a PNG file by another name
    code, out, err = command("run", "in", *COMMON, "-o", "out")
    assert code == 2 and "1 of 2 files failed: " in err and "no transparency" in err
    assert not (tmp_path / "out" / "a.json").exists() and (tmp_path / "out" / "b.png").exists()
