"""The user study: pictures are paired by their noise, sides are drawn, and the page counts answers in a browser."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from operators import RestoreError
from restore.bench.run import run_benchmark
from restore.report.figures import to_data_uri
from restore.report.study import write_study


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_adm):
    plain = {"sampler": "ddim", "steps": "ddim2"}
    config = {
        "name": "tiny",
        "backbone": str(tiny_adm),
        "out": str(tmp_path_factory.mktemp("study") / "run"),
        "device": "cpu",
        "threads": 1,
        "batch": 6,
        "kind": "generation",
        "tasks": {"one": {"title": "One </script>", "count": 6}, "two": {"title": "Two", "count": 4}},
        "methods": {
            "none": {**plain, "title": "no guidance"},
            "pag": {**plain, "title": "PAG", "guidance": {"pag": {"scale": 3.0, "layers": "m1"}}},
            "few": {**plain, "only": ["two"]},
        },
        "metrics": {"names": ["seconds_per_image"]},
    }
    return run_benchmark(config).folder


def read(page):
    text = page.read_text(encoding="utf-8")
    key = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL).group(1))
    sections = text.split('<section class="question">')[1:]
    sides = [[re.findall(r'src="([^"]+)"', side) for side in s.split("<button")[1:3]] for s in sections]
    return key, sides


def test_pairs_and_sides(run, tmp_path):
    page = write_study([run], ("none", "pag"), tmp_path, images=2, questions=2)
    key, sides = read(page)
    assert key["methods"] == ["no guidance", "PAG"] and page.name == "study.html"
    assert sorted(q["task"] for q in key["questions"]) == ["One </script>"] * 2 + ["Two"] * 2
    seen = set()
    for question, (left, right) in zip(key["questions"], sides, strict=True):
        task = "one" if question["task"] != "Two" else "two"
        shown = {question["left"]: left, 1 - question["left"]: right}
        folders = [run / "results" / task / name for name in ("none", "pag")]
        uris = [{to_data_uri(p): p.stem for p in folder.glob("*.png")} for folder in folders]
        names = [[uris[k][uri] for uri in shown[k]] for k in (0, 1)]
        assert names[0] == names[1] and len(set(names[0])) == 2  # the same noise in the same place
        assert not seen & {(task, name) for name in names[0]}
        seen |= {(task, name) for name in names[0]}
    lefts = [q["left"] for q in key["questions"]]
    assert sorted(lefts) == [0, 0, 1, 1]  # as often left as right
    assert write_study([run], ("none", "pag"), tmp_path, images=2, questions=2).read_bytes() == page.read_bytes()
    assert "results/one" not in page.read_text()  # nothing tells which is which


def test_two_runs_and_what_cannot_be_paired(run, tmp_path, command):
    key, _ = read(write_study([run, run], ("pag", "pag"), tmp_path, images=4))
    assert len(key["questions"]) == 2 and key["methods"] == ["tiny: PAG", "tiny: PAG"]
    for methods, images, message in ((("none", "pga"), 4, "no method pga"), (("none", "pag"), 7, "needs 7 finished")):
        with pytest.raises(RestoreError, match=message):
            write_study([run], methods, tmp_path, images=images)
    code, out, err = command("report", run, "--study", "none,pag", "-o", tmp_path / "page")
    assert code == 0 and (tmp_path / "page" / "study.html").is_file() and "study.html" in out, err
    assert command("report", run, "--study", "none", "-o", tmp_path)[0] == 2
    own = tmp_path / "own" / "study.html"
    own.parent.mkdir()
    own.write_text("<p>mine</p>")
    assert command("report", run, "--study", "none,pag", "-o", own.parent)[0] == 2 and own.read_text() == "<p>mine</p>"
    assert command("report", run, "--study", "none,pag", "-o", own.parent, "--overwrite")[0] == 0
    assert command("report", run, "--study", "none,pag", "-o", own.parent)[0] == 0


def test_runs_of_different_measurements_are_refused(run, tmp_path):
    """Pictures of one name must be of one image and noise; which metrics were computed does not matter."""
    other, manifest = tmp_path / "other", json.loads((run / "run.json").read_text())
    shutil.copytree(run, other)
    manifest["protocol"]["metrics"] = {"psnr": "another one"}
    (other / "run.json").write_text(json.dumps(manifest))
    assert len(read(write_study([run, other], ("none", "pag"), tmp_path, images=2))[0]["questions"]) == 5
    manifest["protocol"]["seed"] = 7
    manifest["protocol"]["tasks"]["one"]["sigma_y"] = 0.1
    (other / "run.json").write_text(json.dumps(manifest))
    message = "same images and measurements.*seed: 0 there, 7 here; tasks.one.sigma_y: nothing there, 0.1 here"
    with pytest.raises(RestoreError, match=message):
        write_study([run, other], ("none", "pag"), tmp_path, images=2)


def test_only_finished_pictures_are_shown(run, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(run, own)
    folder = own / "results" / "one" / "pag"
    (folder / "rows" / "000001.json").unlink()  # interrupted
    (folder / "000002.png").write_bytes((folder / "000003.png").read_bytes())  # changed since
    key, sides = read(write_study([own], ("none", "pag"), tmp_path, images=1))
    left = {to_data_uri(own / "results" / "one" / "none" / f"{n:06d}.png") for n in (0, 3, 4, 5)}
    shown = {sides[i][q["left"]][0] for i, q in enumerate(key["questions"]) if q["task"] != "Two"}
    assert shown == left


@pytest.mark.slow
def test_answers_are_counted(run, tmp_path):
    """Two participants in a real browser, one of whom always prefers PAG and one the left side."""
    browser = pytest.importorskip("playwright.sync_api")
    page = write_study([run], ("none", "pag"), tmp_path, images=2, questions=2)
    key, _ = read(page)
    with browser.sync_playwright() as started:
        try:
            chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except browser.Error as error:
            pytest.skip(f"no browser: {error}")
        tab = chromium.new_page()
        tab.goto(page.as_uri())
        for always_left in (False, True):
            tab.click("#begin")
            for question in key["questions"]:
                side = 0 if always_left or question["left"] == 1 else 1
                tab.locator("section.shown .sides button").nth(side).click()
            assert "Thank you" in tab.locator("section.shown").inner_text()
            table = tab.locator("#tally").inner_text()
            saved = tab.get_attribute("#save", "href")
            tab.click("#next")
        chromium.close()
    # Of each task the first participant gives PAG both, the second as many as stand on the left.
    lefts = {task: [q["left"] for q in key["questions"] if q["task"] == task] for task in ("One </script>", "Two")}
    assert table.splitlines()[0].split("\t") == ["2 participants", "no guidance", "PAG"]
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in table.splitlines()[1:]}
    for task, left in lefts.items():
        pag = 2 + sum(left)
        expected = [f"{n} ({100 * n / 4:.1f} %)" for n in (4 - pag, pag)]
        assert rows[task] == expected
    assert "participants" in saved
