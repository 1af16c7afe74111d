"""`restore generate` into a folder that has samples: finished ones stay, others are not lost."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("out", ["-", "sample.png", "sample.jpg"])
def test_what_means_a_picture_is_no_folder_for_samples(command, tmp_path, out):
    code, _, err = command("generate", "-n", 1, "-o", out)
    assert code == 2 and err.strip() == f"restore: --out must be a folder for the samples, got {out}"
    assert not list(tmp_path.iterdir())


def test_finished_samples_stay_and_more_are_added(command, tmp_path):
    arguments = ["generate", "--steps", 1, "--batch-size", 2, "-o", "samples"]
    code, out, err = command(*arguments, "-n", 1)
    assert code == 0 and out.split() == ["samples/sample-0000.png"], err
    first = tmp_path / "samples" / "sample-0000.png"
    before = first.read_bytes(), first.stat().st_mtime_ns
    code, out, err = command(*arguments, "-n", 3)
    assert code == 0 and "sample-0000.png  (finished before)" in out.splitlines()[0], err
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert len(out.splitlines()) == 3 and len(list(first.parent.glob("*.png"))) == 3

    # What an interrupted run left, and what is missing, is made again.
    second, third = (first.with_name(f"sample-000{i}.png") for i in (1, 2))
    kept = second.read_bytes(), third.read_bytes()
    second.unlink()
    sidecar = json.loads(third.with_suffix(".json").read_text())
    third.with_suffix(".json").write_text(json.dumps(sidecar | {"finished": False}))
    third.write_bytes(b"")
    code, out, err = command(*arguments, "-n", 3)
    assert code == 0 and out.count("finished before") == 1, err
    assert (second.read_bytes(), third.read_bytes()) == kept


@pytest.mark.parametrize(
    "other, difference", [(("--seed", 1), "seed"), (("--pag-scale", 1), "guidance"), (("--steps", 2), "steps")]
)
def test_samples_with_other_settings_are_not_replaced(command, tmp_path, other, difference):
    arguments = ["generate", "-n", 1, "--steps", 1, "-o", "samples"]
    assert command(*arguments)[0] == 0
    sample = tmp_path / "samples" / "sample-0000.png"
    before = sample.read_bytes()
    code, out, err = command(*arguments, *other)
    assert code == 2 and len(err.splitlines()) == 1 and "is another result" in err and difference in err, err
    assert sample.read_bytes() == before
    code, _, err = command(*arguments, *other, "--overwrite")
    assert code == 0 and sample.read_bytes() != before, err
