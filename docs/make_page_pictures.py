"""Draw the pictures of docs/tutorials/old-photo.md: python docs/make_page_pictures.py [FOLDER]

Walks through the page in a real Chromium (playwright): a scratched photo is painted over and restored, three versions
are made, on a desk and on a phone. Prints the seconds that the tutorial states, measured on this machine.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import restore
from restore.app.page import build_page, launch
from restore.paths import data_dir

FACE, FACE_MASK = "astronaut-face-64-scratched.png", "scratches-64.png"
LARGE, LARGE_MASK = "chelsea-scratched.jpg", "chelsea-scratches.png"
# Name of the picture -> width and height of the window, pixels of the picture for each of its pixels, what it shows.
PICTURES = {
    "old-photo-page": (1280, 860, 1.0, "#head"),
    "old-photo-phone": (390, 844, 1.5, "#download"),
}
WAIT = 600_000  # milliseconds


def restore_in_page(page: Any, address: str, photo: str, mask: str, versions: bool) -> float:
    """Paint over and restore a shipped photo, in three versions too; return the seconds from its upload on."""
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.locator("#photo input[type=file]").wait_for(state="attached")
    started = time.monotonic()
    page.set_input_files("#photo input[type=file]", data_dir() / "photos" / photo)
    page.locator("#stage canvas.photo").wait_for()
    page.get_by_label("Fill in what I paint over").check()
    page.get_by_role("button", name="Or upload a mask").click()
    page.set_input_files("#filling input[type=file]", data_dir() / "masks" / mask)
    page.wait_for_function("document.querySelector('#stage [data-do=clear]').disabled === false")
    page.get_by_role("button", name="Or upload a mask").click()
    page.get_by_role("button", name="How carefully").click()
    page.get_by_label("Fast").check()
    page.get_by_role("button", name="How carefully").click()
    page.click("#go")
    page.locator("#status .status", has_text="done in").wait_for()
    if versions:
        page.locator("#offer").get_by_text("They take").wait_for()
        page.click("#three")
        page.locator("#versions img").first.wait_for()
    page.locator("#go:not([disabled])").wait_for()
    return time.monotonic() - started


def draw_picture(browser: Any, address: str, name: str, folder: Path) -> float:
    """Write folder/NAME.png, in few colours; return the seconds that the three versions took."""
    width, height, scale, top = PICTURES[name]
    context = browser.new_context(
        viewport={"width": width, "height": height}, device_scale_factor=scale, reduced_motion="reduce"
    )
    page = context.new_page()
    seconds = restore_in_page(page, address, FACE, FACE_MASK, versions=True)
    # What is half a window above the named part: the slider, on a phone.
    page.evaluate(
        f"window.scrollTo(0, document.querySelector('{top}').getBoundingClientRect().top + scrollY - {height // 2})"
    )
    page.mouse.move(0, 0)  # nothing is drawn as if it were pointed at
    page.wait_for_timeout(1000)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
    context.close()
    return seconds


def main(folder: Path) -> None:
    page = build_page(restore.load("embedded"))
    _, address, _ = launch(page, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in PICTURES:
            seconds = draw_picture(browser, address, name, folder)
            print(f"{folder / name}.png: three versions of {FACE} {seconds:.0f} s", flush=True)
        seconds = restore_in_page(browser.new_page(), address, LARGE, LARGE_MASK, versions=False)
        print(f"one version of {LARGE} {seconds:.0f} s", flush=True)
        browser.close()
    page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tutorials")
