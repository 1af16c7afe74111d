"""Folders with their sub-folders: `--recursive`."""

import shutil

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
