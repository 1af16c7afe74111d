"""Files are never lost: nobody else's is replaced, and "finished before" is said only of the same result."""

import json
import shutil
import sys
from io import BytesIO, TextIOWrapper

import numpy as np
import pytest
from PIL import Image

from operators import RestoreError
from restore.app import cli, files
from restore.paths import data_dir

FACE = data_dir() / "photos" / "astronaut-face-64.png"


@pytest.fixture
def photo(tmp_path):
    """A 16-pixel photo: restored in a moment."""
    Image.open(FACE).resize((16, 16)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def restore(monkeypatch, capsys, photo, tmp_path):
    """restore(*arguments) -> (exit code, stdout, stderr) of a denoising of `photo` into tmp_path/out."""

    def run(*arguments, inputs=(photo,), verb="run", out=tmp_path / "out"):
        steps = [] if verb == "degrade" or "--steps" in arguments else ["--steps", 2]
        command = [verb, *inputs, "--task", "denoise", *steps, *arguments, "-o", out]
        monkeypatch.setattr(sys, "argv", ["restore", *map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err.split("\r")[-1].strip()

    return run


@pytest.mark.parametrize("name", ["a.png", "a.json"])
def test_a_file_of_somebody_elses_is_kept(restore, tmp_path, name):
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / name
    theirs.write_text('{"mine": 1}')
    code, out, err = restore()
    assert code == 2 and name in err and "--overwrite" in err and len(err.splitlines()) == 1
    assert theirs.read_text() == '{"mine": 1}' and list((tmp_path / "out").iterdir()) == [theirs]
    code, _, err = restore("--overwrite")
    assert code == 0 and json.loads((tmp_path / "out" / "a.json").read_text())["finished"], err


def test_a_companion_of_somebody_elses_is_kept(restore, tmp_path):
    assert restore()[0] == 0
    theirs = tmp_path / "out" / "a-mean.png"
    theirs.write_text("mine")
    code, _, err = restore("--samples", 2)
    assert code == 2 and "a-mean.png" in err and theirs.read_text() == "mine"


def test_finished_means_the_same_input_settings_and_a_readable_result(restore, photo, tmp_path):
    result, sidecar = tmp_path / "out" / "a.png", tmp_path / "out" / "a.json"
    assert restore()[0] == 0
    before = result.read_bytes()
    code, out, _ = restore()
    assert code == 0 and "finished before" in out

    for arguments, difference in (
        (["--steps", 3], "steps: 2 there, 3 here"),
        (["--seed", 1], "seed: 0 there, 1 here"),
        (["--pag-scale", 1], "guidance"),
        (["sigma=0.1"], "sigma: 0.05 there, 0.1 here"),
        (["zeta=0.5"], "zeta: 1.0 there, 0.5 here"),
        (["--samples", 2], "samples: 1 there, 2 here"),
    ):
        code, out, err = restore(*arguments)
        assert code == 2 and difference in err and "--overwrite" in err and not out, (arguments, err)
        assert len(err.splitlines()) == 1 and result.read_bytes() == before

    Image.fromarray(np.asarray(Image.open(photo))[::-1]).save(photo)  # another photo of the same name
    code, _, err = restore()
    assert code == 2 and "of another photo" in err and result.read_bytes() == before
    code, _, err = restore("--overwrite")
    assert code == 0 and result.read_bytes() != before

    result.write_bytes(b"")
    code, _, err = restore()
    assert code == 2 and "not readable" in err
    assert restore("--overwrite")[0] == 0
    sidecar.write_text('{"version"')  # a broken side-car is nobody's
    code, _, err = restore()
    assert code == 2 and "a.json does not name it" in err


def test_pictures_of_a_replaced_result_go_with_it(restore, tmp_path):
    """`restore evaluate` would count them; one that was changed since is somebody's work."""
    out = tmp_path / "out"
    assert restore("--samples", 3)[0] == 0
    (out / "a-mean.png").write_bytes((out / "a-spread.png").read_bytes())
    (out / "b.png").write_text("mine")
    assert restore("--overwrite")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["a-mean.png", "a.json", "a.png", "b.png"]
    before = (out / "a.png").read_bytes()  # an input of this run, and a picture of the result that it replaces
    assert restore("--overwrite", inputs=[out / "a.png"], out=out / "a.bmp")[0] == 0
    assert (out / "a.png").read_bytes() == before


def test_what_an_interruption_left_is_made_again(restore, tmp_path):
    assert restore()[0] == 0
    result, sidecar = tmp_path / "out" / "a.png", tmp_path / "out" / "a.json"
    before = result.read_bytes()
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"finished": False}))
    result.write_bytes(before[:100])
    code, out, err = restore()
    assert code == 0 and "finished before" not in out and result.read_bytes() == before, err


def test_companions_that_would_overwrite_results_are_found_before_the_start(restore, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "a-mean.png", "a-degraded.png"):
        shutil.copy(photo, folder / name)
    for arguments, name in ((["--samples", 2], "a-mean.png"), (["--degrade"], "a-degraded.png")):
        code, out, err = restore(*arguments, inputs=[folder])
        assert code == 2 and name in err and "both write" in err and not out
        assert not list((tmp_path / "out").iterdir())
    # A companion onto the input itself.
    code, _, err = restore("--samples", 2, "--overwrite", inputs=[folder / "a-mean.png"], out=folder / "a.bmp")
    assert code == 0, err  # a-mean.bmp is another file
    code, _, err = restore("--samples", 2, "--overwrite", inputs=[folder / "a-mean.png"], out=folder / "a.png")
    assert code == 2 and "overwrite the input" in err
    assert restore(inputs=[folder / "a.png", folder / "a-mean.png"])[0] == 0  # no companions, no collision


def test_a_folder_goes_on_after_a_bad_image(restore, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        shutil.copy(photo, folder / name)
    (folder / "b.png").write_bytes(photo.read_bytes()[:300])
    code, out, err = restore(inputs=[folder])
    assert code == 2 and "1 of 3 files" in err and "b.png" in err
    assert (tmp_path / "out" / "a.png").exists() and (tmp_path / "out" / "c.png").exists() and "c.png" in out
    code, out, err = restore(inputs=[folder])  # again: the others are finished, the bad one is named again
    assert code == 2 and out.count("finished before") == 2 and "b.png" in err


def test_cheap_checks_come_before_the_model(restore, photo, tmp_path, monkeypatch):
    from restore import restorer

    def load(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(restorer, "load", load)
    Image.new("RGBA", (8, 8), (9, 9, 9, 9)).save(tmp_path / "alpha.png")
    (tmp_path / "mask.png").write_text("no mask")
    (tmp_path / "file").touch()
    for arguments, options, message in (
        (["--task", "denoisee"], {}, "unknown task"),
        (["zetta=1"], {}, "zeta"),
        (["--layers", ""], {}, "--layers"),
        (["--strength", "3"], {}, "strength"),
        (["--sampler", "ddx"], {}, "unknown sampler"),
        (["--resample", "nearest"], {}, "--solve-at"),
        (["--task", "inpaint", "--mask", tmp_path / "mask.png"], {}, "mask.png"),
        (["--task", "blur", "--kernel", tmp_path / "none.npy"], {}, "none.npy"),
        ([], {"out": tmp_path / "file" / "out"}, "cannot create the folder"),
        ([], {"inputs": [tmp_path / "alpha.png"], "out": tmp_path / "b.jpg"}, "no transparency"),
    ):
        code, _, err = restore(*arguments, **options)
        assert code == 2 and message in err, (arguments, err)


def test_degraded_files_are_compared_to_the_byte(restore, photo, tmp_path):
    degraded = tmp_path / "out" / "a.png"
    assert restore(verb="degrade")[0] == 0
    before = degraded.read_bytes()
    assert restore(verb="degrade")[0] == 0 and degraded.read_bytes() == before
    code, _, err = restore("--seed", 1, verb="degrade")
    assert code == 2 and "another picture" in err and degraded.read_bytes() == before
    assert restore("--seed", 1, "--overwrite", verb="degrade")[0] == 0 and degraded.read_bytes() != before


def test_names_that_differ_in_case_only_collide(tmp_path):
    photos = [files.Photo(tmp_path / name, tmp_path / "out" / name) for name in ("a.png", "A.png")]
    with pytest.raises(RestoreError, match="both write"):
        files.check_outputs(photos, [photo.outputs() for photo in photos])


def test_a_result_that_differs_from_an_input_in_case_only_is_refused(tmp_path):
    photo = files.Photo(tmp_path / "A.PNG", tmp_path / "A.png")
    with pytest.raises(RestoreError, match="overwrite the input"):
        files.check_outputs([photo], [photo.outputs()], overwrite=True)


def test_a_folder_that_holds_its_results_is_continued(restore, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.open(photo).save(folder / name)
    for again in (False, True):
        code, out, err = restore("--png", "--samples", 2, inputs=[folder], out=folder)
        assert code == 0 and out.count("finished before") == 2 * again, err
    assert len(files.expand_inputs([folder / "*.png"])) == 8  # nothing else was meant
    (folder / "b.jpg").unlink()
    names = [path.name for path in files.expand_inputs([folder])]
    assert names == ["a.jpg", "b-mean.png", "b-sample1.png", "b-spread.png", "b.png"]


def test_what_a_killed_process_was_writing_is_removed(restore, photo, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.png", "a.json"):
        (out / f".{name}.123-0a1b2c3d.tmp").write_bytes(b"half")
    (out / ".a.png.tmp").write_bytes(b"mine")
    assert restore()[0] == 0
    assert sorted(path.name for path in out.iterdir()) == [".a.png.tmp", "a.json", "a.png"]


def test_inputs_and_outputs(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("b.png", "a.jpg", "c.GIF", ".hidden.png", "note.txt"):
        (source / name).touch()
    names = [path.name for path in files.expand_inputs([source, source / "*.png"])]
    assert names == ["a.jpg", "b.png", "c.GIF"]  # the pattern adds nothing new
    for wrong in (source / "*.webp", source / "x.png", tmp_path / "[ab]", []):
        with pytest.raises(RestoreError):
            files.expand_inputs([wrong] if wrong else [])
    sources = files.expand_inputs([source])
    assert [photo.source for photo in files.choose_targets(sources, out)] == sources
    assert [photo.target.name for photo in files.choose_targets(sources, out)] == ["a.jpg", "b.png", "c.png"]
    assert [photo.target.name for photo in files.choose_targets(sources, out, png=True)] == ["a.png", "b.png", "c.png"]
    (photo,) = files.choose_targets(sources[:1], out / "r.png")
    assert photo.target == out / "r.png" and list(out.iterdir()) == []
    with pytest.raises(RestoreError, match="a.jpg and .*a.png would both write"):
        files.choose_targets([source / "a.jpg", tmp_path / "a.png"], out)
    with pytest.raises(RestoreError, match="overwrite the input"):
        files.choose_targets(sources, source)
    with pytest.raises(RestoreError, match="3 inputs"):
        files.choose_targets(sources, out / "r.png")
    with pytest.raises(RestoreError, match="cannot create the folder"):
        files.choose_targets(sources, source / "b.png" / "deeper")
    with pytest.raises(RestoreError, match="cannot create the folder|cannot write"):
        files.choose_targets(sources, "/proc/nowhere")


@pytest.mark.parametrize("inputs", [["in"], ["in/*.png"], ["more", "-r"]])
def test_one_standard_output_holds_one_picture(restore, photo, tmp_path, monkeypatch, inputs):
    """Pictures one after the other are no file; how many there are is only known once folders and patterns are read."""
    for name in ("in/a.png", "in/b.png", "more/a.png", "more/deep/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    code, out, err = restore(inputs=inputs, out="-")
    assert code == 2 and "2 inputs cannot go to one standard output" in err and out == ""


def test_a_picture_is_degraded_from_the_standard_input_to_the_standard_output(
    photo, tmp_path, monkeypatch, capfdbinary
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(photo.read_bytes())))
    monkeypatch.setattr(sys, "argv", ["restore", "degrade", "-", "--task", "sr2", "-o", "-"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfdbinary.readouterr()
    assert stop.value.code == 0 and Image.open(BytesIO(out)).size == (8, 8), err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("inputs", [["one"], ["one/*.png"], ["one", "-r"], ["above", "-r"]])
def test_one_picture_of_a_folder_goes_to_the_standard_output(photo, tmp_path, monkeypatch, capfdbinary, inputs):
    for name in ("one/a.png", "above/deep/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(photo, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["restore", "run", *inputs, "--task", "denoise", "--steps", "1", "-o", "-"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfdbinary.readouterr()
    assert stop.value.code == 0 and Image.open(BytesIO(out)).size == (16, 16), err
