"""The distribution as users install it: its name, its files, and a restoration from outside of a checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Python of a virtual environment with this wheel; the dependencies are those of the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # all that an installer does with a wheel without data files
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def run(python, folder, *arguments, code="from restore.app.cli import main; main()"):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_and_their_files_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert wheel.name.startswith("restore_diffusion-") and len(folders) == 3
    assert {"restore", "operators"} < folders and any(folder.endswith(".dist-info") for folder in folders)
    assert "restore/_configs/task/sr4.yaml" in names and "restore/_data/embedded/config.json" in names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "restore = restore.app.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_the_installed_command_restores(environment, tmp_path):
    places = run(environment, tmp_path, code="import restore, operators; print(restore.__file__, operators.__file__)")
    assert all(str(environment.parents[1]) in path for path in places.split())
    assert "--out" in run(environment, tmp_path, "demo", "--help")
    assert run(environment, tmp_path, "--version").startswith("restore 0.")
    photo = ROOT / "data" / "photos" / "astronaut-face-64.png"
    run(
        environment, tmp_path, "run", photo, "--task", "sr4", "--degrade", "--steps", 2, "--sampler", "dps", "-o", "out"
    )
    assert (tmp_path / "out" / photo.name).is_file()


def test_no_message_installs_a_strangers_package():
    """`restore` and `operators` on PyPI are other people's: every instruction names this distribution."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "restore").rglob("*.py")]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert "restore[" not in text.replace("restore-diffusion[", ""), path
        assert "install restore" not in text.replace("install restore-diffusion", ""), path
