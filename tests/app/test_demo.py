"""The demo, with few steps of every sampler."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from operators import RestoreError
from restore.app import demo, files
from restore.app.demo import PARTS, run_demo, select_methods
from restore.paths import data_dir
from restore.restorer import load
from restore.task import load_task


@pytest.mark.parametrize("part", [part for part in PARTS if part.sampler], ids=lambda part: part.backbone)
def test_columns_are_the_parts_sampler_and_the_best_quality(part):
    """The part's own sampler and what quality="best" names, each plain and with PAG; DiffPIR where they are one."""
    restorer, operator = load(part.backbone), load_task("sr4").build(64, 64)
    columns = select_methods(restorer, operator, "sr4", part.sampler)
    best = restorer.method(operator, task="sr4", quality="best").sampler
    best = "diffpir" if best == part.sampler else best
    assert [m.sampler for m in columns.values()] == [part.sampler, part.sampler, best, best]
    assert [m.guidance is None for m in columns.values()] == [True, False, True, False]
    assert [label.endswith("+PAG") for label in columns] == [False, True, False, True]


@pytest.fixture
def parts(monkeypatch):
    """The demo's parts with two of the three small faces, one of the larger ones, and that in place of the photo."""
    fewer = [replace(part, photos=part.photos[: 2 if part.backbone == "embedded" else 1]) for part in PARTS]
    fewer[0] = replace(fewer[0], photos=("astronaut-face-128.png",), cell=256)
    monkeypatch.setattr(demo, "PARTS", fewer)
    return fewer


def test_demo_writes_picture_and_numbers(tmp_path, parts, trunks):
    steps, shown, out = [], [], tmp_path / "out"
    options = {"steps": 1, "weights": {"alexnet": trunks["alexnet"]}, "everything": True}
    assert "Done in" in run_demo(out, **options, callback=steps.append, show=shown.append)
    record = json.loads((out / "demo.json").read_text())
    # Four methods for the faces, the default for the photo.
    assert len(record["table"]) == 5 * (4 + 1) + 2 * 3 and len(record["runs"]) == 4 * (4 + 1) + 3
    backbones = ["embedded-photo"] * 3 + ["embedded"] * 16 + ["embedded-latent"] * 4
    assert [run["backbone"] for run in record["runs"]] == backbones
    assert all(row["LPIPS"] > 0 for row in record["table"])
    assert "LPIPS" in (out / "table.md").read_text().splitlines()[0]
    # One column for input, baseline, each method and truth; one row for a photo and a task.
    for part in parts:
        width, height = Image.open(out / part.picture).size
        photo = Image.open(data_dir() / "photos" / part.photos[0])
        assert width > (7 if part.sampler else 4) * (part.cell + 6)
        rows = len(part.tasks) * len(part.photos)
        assert rows < height / (part.cell * photo.height // photo.width) < 1.3 * rows
    outputs = sorted(out.iterdir())  # a second demo may replace them
    assert sorted(record["files"]) == [path.name for path in outputs]
    files.check_owned(outputs, out / "demo.json", out / "demo.json")
    assert shown == [out / part.picture for part in parts]
    # The bar is full at the end, and never runs backwards.
    shares = [(step["first"] + step["count"] * (step["step"] + 1) / step["steps"]) / step["total"] for step in steps]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert {step["first"] for step in steps} == set(range(len(record["runs"])))


def test_without_everything_the_slow_part_is_left_out(tmp_path, parts):
    """The photo comes first; a picture of an earlier demo of everything stays this demo's own."""
    shown, before = [], b"of everything"
    (tmp_path / "comparison-latent.png").write_bytes(before)
    (tmp_path / "demo.json").write_text(json.dumps({"files": ["comparison-latent.png", "demo.json"]}))
    summary = run_demo(tmp_path, steps=1, show=shown.append)
    assert [path.name for path in shown] == ["comparison-photo.png", "comparison.png"]
    assert "comparison-latent.png" not in summary
    runs = json.loads((tmp_path / "demo.json").read_text())["runs"]
    assert [run["backbone"] for run in runs] == ["embedded-photo"] * 3 + ["embedded"] * 4
    assert (tmp_path / "comparison-latent.png").read_bytes() == before
    files.check_owned([tmp_path / "comparison-latent.png"], tmp_path / "demo.json", tmp_path / "demo.json")


@pytest.mark.parametrize("name", ["table.md", "demo.json", "comparison.png"])
def test_a_file_of_somebody_elses_is_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RestoreError, match=f"{name} exists.*overwrite"):
        run_demo(tmp_path)
    assert (tmp_path / name).read_text() == "mine" and list(tmp_path.iterdir()) == [tmp_path / name]


def test_no_lpips_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert demo._load_lpips(None) is None and demo._load_lpips({}) is None


def test_missing_weights_are_an_error(tmp_path):
    with pytest.raises(RestoreError, match="is missing.*restore models pull alexnet"):
        run_demo(tmp_path / "out", weights={"alexnet": str(tmp_path / "missing.pth")})
