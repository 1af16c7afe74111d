"""Folders with their sub-folders: `--recursive`."""

import os
import shutil

import pytest

from restore.paths import data_dir

FACE = data_dir() / "photos" / "astronaut-face-64.png"


def test_folders_with_their_sub_folders(command, tmp_path):
    for name in ("in/a.png", "in/deep/a.png", "in/deep/er/b.png", "in/.hidden/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FACE, tmp_path / name)
    out = tmp_path / "in" / "out"  # not taken for an input the second time
    for _ in range(2):
        code, said, err = command("degrade", tmp_path / "in", "--task", "denoise", "-r", "-o", out)
        assert code == 0, err
        names = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
        assert names == {"a.png", "deep/a.png", "deep/er/b.png"} and len(said.splitlines()) == 3


def test_sub_folders_with_an_output_above_them_and_a_second_output(command, tmp_path, monkeypatch):
    """An output folder that holds the inputs skips nothing; results of a first run are no inputs of a second."""
    for name in ("in/a.png", "in/deep/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FACE, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    options = ["--task", "sr2", "--steps", "1", "--sampler", "ddrm", "-r", "-q"]
    code, _, err = command("run", "in", *options, "-o", ".")
    assert code == 0 and (tmp_path / "a.png").is_file() and (tmp_path / "deep" / "b.png").is_file(), err
    for out in ("in/first", "in/second"):
        code, _, err = command("run", "in", *options, "-o", out)
        assert code == 0, err
        found = {path.relative_to(tmp_path / out).as_posix() for path in (tmp_path / out).rglob("*.png")}
        assert found == {"a.png", "deep/b.png"}


def test_every_photo_once(command, tmp_path):
    """Named beside its folder, and in a folder that links to itself; a link of another name is a photo of its own."""
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        shutil.copy(FACE, folder / name)
    (folder / "c.png").symlink_to("a.png")
    (folder / "self").symlink_to(".")
    inputs = [folder, folder / "a.png", folder / "deep" / "b.png"]
    for arguments in ([*inputs, "-r"], [folder, folder / "self" / "a.png", folder / "deep"]):
        code, said, err = command("degrade", *arguments, "--task", "denoise", "-o", out)
        assert code == 0 and len(said.splitlines()) == 3, err
        assert sorted(path.name for path in out.rglob("*.png")) == ["a.png", "b.png", "c.png"]
        assert not (out / "self").exists()
        shutil.rmtree(out)


@pytest.fixture
def lost(tmp_path, monkeypatch):
    """A sub-folder of a folder of photos that this user may not read; nor may the administrator here."""
    folder, listdir, access = tmp_path / "in" / "lost+found", os.listdir, os.access
    folder.mkdir(parents=True)
    for name in ("in/a.png", "in/lost+found/b.png"):
        shutil.copy(FACE, tmp_path / name)

    def refuse(path="."):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "access", lambda path, *mode: str(path) != str(folder) and access(path, *mode))
    return folder


@pytest.mark.parametrize("options", [[], ["-r"]])
def test_a_sub_folder_that_cannot_be_read_is_passed_over(command, tmp_path, lost, options):
    code, said, err = command("degrade", lost.parent, "--task", "denoise", *options, "-o", tmp_path / "out")
    assert code == 0 and len(said.splitlines()) == 1 and (tmp_path / "out" / "a.png").is_file(), err
    assert ("lost+found (1; sub-folders that cannot be read)" in err) == bool(options)


@pytest.mark.parametrize("options", [[], ["-r"]])
def test_a_named_folder_that_cannot_be_read_is_one_sentence(command, tmp_path, lost, options):
    code, _, err = command("degrade", lost, "--task", "denoise", *options, "-o", tmp_path / "out")
    assert code == 2 and err.strip() == f"restore: cannot read the folder {lost}: permission denied"
