"""The settings in a side-car, by which a finished photo is recognised, are those of the first release.

A change here makes every result on users' disks "another result": name it in CHANGELOG.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from restore import disk
from restore.app import cli, files
from restore.paths import data_dir

CASES = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_settings_are_those_of_the_record(name, tmp_path, monkeypatch):
    """A result with the recorded settings is finished, so that nothing is computed."""
    places, asked = {"PHOTOS": str(data_dir() / "photos"), "DATA": str(data_dir())}, []
    first, *others = [
        places.get(word.split("/")[0], word.split("/")[0]) + word[len(word.split("/")[0]) :]
        for word in CASES[name]["arguments"]
    ]
    result = tmp_path / "out" / Path(first).name
    result.parent.mkdir()
    shutil.copy(first, result)
    hashes = {"sha256": disk.hash_file(Path(first)), "written": {result.name: disk.hash_file(result)}}
    sidecar, settings = result.with_suffix(".json"), CASES[name]["settings"]
    facts = {"finished": True, "files": [result.name, sidecar.name], "settings": settings} | hashes
    sidecar.write_text(json.dumps(facts), encoding="utf-8")

    def look(photo, expected, *options):
        asked.append(json.loads(json.dumps(expected["settings"])))
        return is_finished(photo, expected, *options)

    is_finished = files.is_finished
    monkeypatch.setattr(files, "is_finished", look)
    monkeypatch.setattr(sys, "argv", ["restore", "run", first, *others, "-o", str(result.parent), "-q"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and asked == [settings]
    assert disk.hash_file(result) == hashes["sha256"] and len(list(result.parent.iterdir())) == 2
