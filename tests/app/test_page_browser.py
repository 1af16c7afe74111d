"""The page in a real Chromium: painting, each task, cancelling, downloading, on a phone and on a desk.

$RESTORE_SCREENSHOTS: a folder that gets a picture of the page at the end of each task.
"""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

import restore
from restore.app.page.work import WORKER
from restore.paths import data_dir

playwright = pytest.importorskip("playwright.sync_api")
PHOTO = data_dir() / "photos" / "astronaut-face-64.png"
SCRATCHED = data_dir() / "photos" / "astronaut-face-64-scratched.png"
MASK = data_dir() / "masks" / "scratches-64.png"
DESK, PHONE = (1280, 900), (390, 844)
WAIT = 200_000  # milliseconds: the machine may be busy


@pytest.fixture(scope="module")
def address():
    from restore.app.page import build_page, launch

    page = build_page(restore.load("embedded"))
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        try:
            chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no Chromium here")
        yield chromium
        chromium.close()


class Visitor:
    """A person at the page."""

    def __init__(self, browser, address, size=DESK):
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
        self.page.set_default_timeout(WAIT)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.locator("#photo input[type=file]").wait_for(state="attached")

    def choose(self, photo=PHOTO):
        self.page.set_input_files("#photo input[type=file]", photo)
        self.page.locator("#stage canvas.photo").wait_for()
        # The first estimate says that the server knows the photo.
        self.page.wait_for_function("document.querySelector('#plan').innerText.trim()")

    def task(self, words):
        self.page.get_by_label(words).check()

    def quickly(self, steps="2"):
        self.page.get_by_role("button", name="How carefully").click()
        self.page.get_by_label("Fast").check()
        self.page.get_by_role("button", name="Advanced").click()
        self.page.get_by_label("Steps").fill(steps)

    @property
    def paint(self):
        return self.page.locator("#stage canvas.paint")

    def drag(self, start, end, over=None):
        """With the mouse, in shares of the photo."""
        over = over or self.paint
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        for k, (x, y) in enumerate((start, end)):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=1 + 8 * k)
            self.page.mouse.down() if k == 0 else self.page.mouse.up()

    def painted(self):
        """The layer of paint, (h, w), True where there is some."""
        values = "Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
        alpha = self.paint.evaluate(f"c => {values}.filter((_, k) => k % 4 == 3)")
        w, h = self.paint.evaluate("c => [c.width, c.height]")
        return np.array(alpha).reshape(h, w) > 127

    def restore(self, button="#go"):
        """Press a button and return the last sentence; a busy browser may never draw those in between."""
        self.page.evaluate("document.querySelector('#status .status').dataset.before = 'true'")
        self.page.click(button)
        self.page.wait_for_function("""() => {
            const said = document.querySelector('#status .status:not([data-before]) [role=status]');
            return said && !/(…|^Done\\.)$/.test(said.innerText) && !document.querySelector('#go').disabled;
        }""")
        return self.page.inner_text("#status .status")

    def download(self):
        self.page.locator("#download").wait_for()
        with self.page.expect_download() as waiting:
            self.page.click("#download")
        return waiting.value

    def picture(self, name):
        if folder := os.environ.get("RESTORE_SCREENSHOTS"):
            self.page.wait_for_timeout(1000)
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def leave(self):
        self.page.close()
        assert not self.errors


@pytest.fixture
def visit(browser, address):
    visitors = []

    def come(size=DESK):
        visitors.append(Visitor(browser, address, size))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.leave()


def test_paint_over_restore_and_download(visit):
    visitor = visit()
    visitor.choose(SCRATCHED)
    visitor.task(TASKS["fill"])
    visitor.quickly()
    visitor.page.locator("#shows").get_by_label("face").check()
    visitor.drag((0.1, 0.5), (0.9, 0.5))
    painted = visitor.painted()
    assert painted[32, 10:54].all() and painted.mean() < 0.2
    assert "done in" in visitor.restore()
    found = visitor.download()
    assert found.suggested_filename == SCRATCHED.name
    change = np.abs(np.asarray(PIL.Image.open(found.path())).astype(float) - np.asarray(PIL.Image.open(SCRATCHED)))
    assert change[painted].mean() > 4 * change[~painted].mean()
    assert visitor.page.locator("#slider img").count() >= 2
    with visitor.page.expect_download() as waiting:
        visitor.page.click('#files a[download$=".json"]')
    assert json.loads(Path(waiting.value.path()).read_text())["settings"]["label"] == "face"
    visitor.picture("painted")


TASKS = {
    "fill": "Fill in what I paint over",
    "enlarge": "Enlarge",
    "sharpen": "Sharpen a blurred photo",
    "motion": "Sharpen a blurred photo",
    "denoise": "Remove noise",
    "colour": "Add colour",
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("task", TASKS)
def test_each_task(visit, task, size, tmp_path):
    photo = tmp_path / "old.png"
    picture = PIL.Image.open(PHOTO)
    array = np.asarray(picture).astype(float)
    if task == "sharpen":
        from scipy.ndimage import gaussian_filter

        array = gaussian_filter(array, (1.2, 1.2, 0))
    if task == "motion":
        array = np.mean([np.roll(array, k, 1) for k in range(-3, 4)], 0)
    if task == "denoise":
        array += np.random.default_rng(0).normal(0, 20, array.shape)
    if task == "colour":
        array[...] = array.mean(2, keepdims=True)
    PIL.Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(photo)
    visitor = visit(size)
    visitor.choose(SCRATCHED if task == "fill" else photo)
    visitor.task(TASKS[task])
    page = visitor.page
    if task == "fill":
        page.get_by_role("button", name="Or upload a mask").click()
        page.set_input_files("#filling input[type=file]", MASK)
        page.wait_for_function("document.querySelector('#stage [data-do=clear]').disabled === false")
        assert np.array_equal(visitor.painted(), np.asarray(PIL.Image.open(MASK)) == 0)
    if task == "enlarge":
        page.get_by_label("×2", exact=True).check()
    if task == "sharpen":
        page.get_by_role("button", name="Estimate").click()
        page.wait_for_function("Math.abs(document.querySelector('#std input[type=number]').value - 1.5) > 0.05")
    if task == "motion":
        page.get_by_label("The camera moved").check()
        page.locator("#path canvas").wait_for()
        visitor.drag((0.35, 0.5), (0.65, 0.5), page.locator("#path canvas"))
    if task == "denoise":
        sigma = page.locator("#noise input[type=number]")
        assert 0.1 < float(sigma.input_value()) < 0.25  # 20 of 255 is 0.157
    visitor.quickly(steps="10" if os.environ.get("RESTORE_SCREENSHOTS") else "2")
    assert "done in" in visitor.restore()
    page.locator("#offer").get_by_text("They take").wait_for()
    said = visitor.restore("#three")
    assert "done in" in said, said
    for part in ("#slider", "#versions", "#guessed", "#files"):
        page.locator(part).wait_for()
    found = visitor.download()
    side = 128 if task == "enlarge" else 64
    assert PIL.Image.open(found.path()).size == (side, side)
    assert page.locator("#files a[download]").count() == 6
    visitor.picture(f"{task}-{size[0]}")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.mouse.wheel(0, 10_000)
    page.wait_for_timeout(500)
    note = page.locator("#honest" if size == DESK else "#honest-short").bounding_box()
    assert 0 <= note["y"] < size[1] and note["height"] < 0.05 * size[1]  # at the end of the page it is still there


@pytest.mark.slow
def test_cancel(visit):
    visitor = visit()
    visitor.choose()
    visitor.task("Remove noise")
    visitor.quickly(steps="1000")
    visitor.page.click("#go")
    visitor.page.locator("#forming img").wait_for()
    visitor.page.click("#cancel")
    visitor.page.get_by_text("Cancelled.").wait_for()
    visitor.page.get_by_label("Steps").fill("2")
    assert "done in" in visitor.restore()
    # Who leaves stops it too.
    leaving = visit()
    leaving.choose()
    leaving.task("Remove noise")
    leaving.quickly(steps="1000")
    leaving.page.click("#go")
    leaving.page.locator("#forming img").wait_for()
    leaving.page.goto("about:blank")
    for _ in range(200):
        if not [thread for thread in threading.enumerate() if thread.name == WORKER]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("it computes on for nobody")


@pytest.mark.slow
def test_turn_crop_undo_and_propose(visit, tmp_path):
    picture = PIL.Image.open(PHOTO).resize((192, 192), PIL.Image.Resampling.BICUBIC)
    hair = PIL.Image.new("L", picture.size)
    PIL.ImageDraw.Draw(hair).line((40, 0, 70, 143), fill=255, width=2)
    picture.paste((250, 250, 245), mask=hair)
    part = (20, 40, 84, 104)
    picture.crop(part).save(tmp_path / "hair.png")
    visitor = visit()
    visitor.choose(tmp_path / "hair.png")
    visitor.task(TASKS["fill"])
    page, state = visitor.page, "c => [c.width, c.height]"
    page.get_by_role("button", name="Propose scratches").click()
    page.wait_for_function("document.querySelector('#stage [data-do=clear]').disabled === false")
    proposed = visitor.painted()
    truth = np.asarray(hair.crop(part)) > 0
    assert (proposed & truth).sum() > 0.4 * truth.sum() and proposed.mean() < 0.2
    page.get_by_role("button", name="Turn right").click()
    assert np.array_equal(visitor.painted(), np.rot90(proposed, -1))
    page.get_by_role("button", name="Erase").click()
    visitor.drag((0.0, 0.5), (1.0, 0.5))
    assert visitor.painted().sum() < proposed.sum()
    page.get_by_role("button", name="Crop").click()
    visitor.drag((0.25, 0.0), (0.75, 1.0))
    assert visitor.paint.evaluate(state) == [32, 64]
    page.get_by_role("button", name="Undo").click()
    assert visitor.paint.evaluate(state) == [64, 64]
    page.get_by_role("button", name="Crop").click()
    visitor.drag((0.1, 0.25), (0.9, 0.75))
    size = visitor.paint.evaluate(state)
    assert size[0] < 60 and size[1] < 40
    visitor.quickly()
    assert "done in" in visitor.restore()
    assert list(PIL.Image.open(visitor.download().path()).size) == size


@pytest.mark.slow
def test_several_photos_and_a_broken_one(visit, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    visitor = visit()
    visitor.choose()
    visitor.task("Remove noise")
    visitor.page.get_by_role("button", name="More photos").click()
    visitor.page.set_input_files("#more input[type=file]", [SCRATCHED, broken])
    visitor.page.get_by_role("button", name="Restore 3 photos").wait_for()
    visitor.quickly()
    visitor.page.get_by_label("PAG scale").fill("1")
    said = visitor.restore()
    assert "2 of 3 photos done" in said and "broken.png" in said and "/" not in said
    which, shown = visitor.page.locator("#which"), "document.querySelector('#slider img').src"
    assert which.locator("input").count() == 2 and which.get_by_label(SCRATCHED.name).is_checked()
    before = visitor.page.evaluate(shown)
    which.get_by_label(PHOTO.name).check()
    visitor.page.wait_for_function(f"{shown} !== {json.dumps(before)}")
    names = visitor.page.locator("#files a[download]").evaluate_all("found => found.map(a => a.download)")
    assert {PHOTO.name, SCRATCHED.name, f"{PHOTO.stem}.json", f"{PHOTO.stem}-guidance.png"} <= set(names)
    visitor.page.get_by_role("button", name="For experts").click()
    visitor.page.locator("#guidance img").wait_for()


@pytest.mark.slow
def test_by_keyboard_and_for_screen_readers(visit, tmp_path):
    visitor = visit()
    page = visitor.page
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.set_input_files("#photo input[type=file]", broken)
    page.get_by_text("is not a readable image").first.wait_for()
    page.wait_for_timeout(500)
    assert page.locator("#photo [data-testid=upload-text]").is_visible() and page.locator("#photo img").count() == 0
    visitor = visit()
    page = visitor.page
    visitor.choose()
    visitor.task(TASKS["fill"])
    visitor.paint.wait_for()
    visitor.paint.focus()
    page.keyboard.press("Space")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    painted = visitor.painted()
    assert painted[32, 33:44].all()
    reached = set()
    page.evaluate("document.body.focus()")
    for _ in range(80):
        page.keyboard.press("Tab")
        now = page.evaluate(
            "document.activeElement.closest('[id]')?.id + '|' + (document.activeElement.dataset.do || '')"
        )
        reached |= set(now.split("|"))
    assert {"go", "left", "crop", "erase"} <= reached, reached
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, canvas[tabindex]')]
        .filter(e => e.offsetParent && !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.title
                && !(e.labels && [...e.labels].some(l => l.innerText.trim())) && !e.getAttribute('aria-labelledby'))
        .map(e => e.outerHTML.slice(0, 200))""")
    assert not nameless
