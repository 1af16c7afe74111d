"""The settings in a side-car, by which a finished photo is recognised, are those of the first release.

A change here makes every result on users' disks "another result": name it in CHANGELOG.
"""

import json
import sys
from pathlib import Path

import pytest

from restore.app import cli
from restore.paths import data_dir

CASES = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_settings_are_those_of_the_record(name, tmp_path, monkeypatch):
    places = {"PHOTOS": str(data_dir() / "photos"), "DATA": str(data_dir())}
    arguments = [
        places.get(word.split("/")[0], word.split("/")[0]) + word[len(word.split("/")[0]) :]
        for word in CASES[name]["arguments"]
    ]
    monkeypatch.setattr(sys, "argv", ["restore", "run", *arguments, "-o", str(tmp_path / "out"), "-q"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    (sidecar,) = (tmp_path / "out").glob("*.json")
    assert json.loads(sidecar.read_text(encoding="utf-8"))["settings"] == CASES[name]["settings"]
