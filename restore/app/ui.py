"""A page in the browser for one photo at a time: `restore ui` (extra `ui`). The work is that of `restore run`."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from operators import RestoreError
from restore.app import run, tasks
from restore.app.files import DEGRADED, find_photos
from restore.app.options import parse_steps
from restore.app.plan import Planner
from restore.images.folder import image_size
from restore.paths import configs_dir

LARGEST_FILE, LARGEST_PHOTO = "64mb", 64_000_000  # of an upload; pixels


def restore_photo(
    restorer: Any,
    photo: str | Path | None,
    task: str,
    folder: str | Path,
    mask: str | Path | None = None,
    degrade: bool = False,
    pag_scale: float | None = None,
    steps: int | str | None = None,
    seed: int = 0,
    **options: Any,
) -> run.Outcome:
    """One photo restored, or only planned, into a folder of the caller's.

    The arguments and options are those of `run.restore_files`; None leaves the preset's value. Raises RestoreError,
    whose sentence names files without the folders they lie in.
    """
    if not photo:
        raise RestoreError("choose a photo first")
    try:
        height, width = image_size(Path(photo))
        if height * width > LARGEST_PHOTO:
            raise RestoreError(
                f"the photo has {width} x {height} pixels, at most {LARGEST_PHOTO / 1e6:.0f} million go here"
            )
        (chosen,) = find_photos([str(photo)], folder, png=True)
        found = tasks.find_task(task, mask=Path(mask) if mask else None)
        guidance = "preset" if pag_scale is None else run.ChangedPAG(pag_scale)
        options |= {"degrade": degrade, "guidance": guidance, "steps": steps, "seed": seed}
        (outcome,) = run.restore_files([chosen], restorer, found, **options)
        if outcome.error is not None:
            raise RestoreError(outcome.error)
    except RestoreError as error:
        sentence = str(error)
        for path in filter(None, (photo, mask, Path(folder) / "x")):
            sentence = sentence.replace(f"{Path(path).parent}/", "")
        raise RestoreError(sentence) from None
    return outcome


def number(text: str, what: str) -> float | None:
    """What a person typed into a field; None where it was left empty. Raises RestoreError for what is no number."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        raise RestoreError(f"{what} must be a number, not {text!r}; leave it empty for the preset's") from None


def offered(degrade: bool = False) -> list[str]:
    """The tasks that work on the page: none that needs a kernel file, nor one that cuts its own hole into a photo that
    is damaged already."""
    names = {path.stem for path in (configs_dir() / "task").glob("*.yaml")} - {"blur"}
    names -= set() if degrade else {"inpaint-box", "inpaint-random"}
    return sorted(names | {"inpaint", "sr2"})


def build(restorer: Any) -> Any:
    """The page as a gradio.Blocks, not yet launched. Raises RestoreError when gradio is not installed."""
    try:
        import gradio as gr
    except ImportError:
        raise RestoreError("the browser page needs gradio; install restore[ui]") from None

    stops: dict[str, threading.Event] = {}  # by the browser's tab

    def asked(photo, task, mask, degrade, scale, steps, seed) -> dict[str, Any]:
        settings = {"photo": photo, "task": task, "mask": mask, "degrade": degrade, "seed": int(seed or 0)}
        return settings | {"pag_scale": number(scale, "PAG scale"), "steps": parse_steps(steps.strip() or None)}

    def estimate(*fields):
        if not fields[0]:
            return ""
        try:
            with TemporaryDirectory(prefix="restore-") as folder:
                return restore_photo(
                    restorer, folder=folder, dry_run=True, planner=Planner(restorer), **asked(*fields)
                ).plan.line()
        except RestoreError as error:
            return str(error)

    def restore(photo, task, mask, degrade, scale, steps, seed, request, progress=gr.Progress()):  # noqa: B008
        stop = stops[request.session_hash] = threading.Event()

        def show(step: dict) -> None:
            if stop.is_set():
                raise RestoreError("cancelled")
            progress((step["step"] + 1, step["steps"]), desc="sampling", unit="steps")

        with TemporaryDirectory(prefix="restore-") as folder:
            try:
                chosen = asked(photo, task, mask, degrade, scale, steps, seed)
                options = {"callback": show, "planner": Planner(restorer)}
                found = restore_photo(restorer, folder=folder, **chosen, **options).photo
            except RestoreError as error:
                raise gr.Error(str(error), print_exception=False) from None
            degraded = found.beside(DEGRADED)
            sidecar = json.loads(found.sidecar.read_text())
            # A generator: what comes after the yield, the end of the folder, waits until the page has the files.
            yield str(found.target), str(degraded) if degraded.exists() else None, sidecar

    def cancel(request) -> None:
        if request.session_hash in stops:
            stops[request.session_hash].set()

    def left(request) -> None:
        cancel(request)
        stops.pop(request.session_hash, None)

    for function in (restore, cancel, left):  # gradio goes by the type, which as text it could not look up
        function.__annotations__["request"] = gr.Request

    with gr.Blocks(title="restore", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# restore\nImages restored with the prior **{restorer.name}**. A photo is taken as damaged as it is, "
            "unless *degrade first* is on: then it is damaged here and compared with the original."
        )
        with gr.Row():
            with gr.Column():
                # The file as it was chosen: alpha, 16 bits and a mask's two values must not be lost.
                untouched = {"type": "filepath", "image_mode": None, "format": "png"}
                photo = gr.Image(label="Photo", **untouched)
                task = gr.Dropdown(offered(), value="sr4", label="Task")
                mask = gr.Image(label="Mask for inpainting: white is known, black is missing", **untouched)
                degrade = gr.Checkbox(label="Degrade first")
                # Text: a number field that nobody touched posts 0, which would switch PAG off.
                scale = gr.Textbox(label="PAG scale s (empty: the preset's, 0: off)")
                steps = gr.Textbox(label="Steps (empty: the preset's)")
                seed = gr.Number(value=0, precision=0, label="Seed")
                plan = gr.Textbox(label="What it will take", interactive=False)
                with gr.Row():
                    button = gr.Button("Restore", variant="primary")
                    stop = gr.Button("Cancel")
            with gr.Column():
                restored = gr.Image(type="filepath", format="png", label="Restored")
                degraded = gr.Image(type="filepath", format="png", label="Degraded")
                protocol = gr.JSON(label="Side-car: protocol and numbers")
        inputs = [photo, task, mask, degrade, scale, steps, seed]
        button.click(restore, inputs, [restored, degraded, protocol], api_name="restore")
        stop.click(cancel, queue=False, api_name="cancel")
        page.unload(left)
        degrade.input(lambda on: gr.update(choices=offered(on)), degrade, task, api_visibility="private")
        changes = [part.change for part in (photo, task, mask, degrade)] + [part.blur for part in (scale, steps)]
        gr.on(changes, estimate, inputs, plan, api_name="estimate", trigger_mode="always_last", show_progress="hidden")
    return page
