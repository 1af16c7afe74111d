"""A page in the browser for one photo at a time: `restore ui` (extra `ui`). The work is that of `restore run`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore.app import run, tasks
from restore.app.files import DEGRADED, find_photos
from restore.app.options import parse_steps
from restore.paths import configs_dir


def restore_photo(
    restorer: Any,
    photo: str | Path | None,
    task: str,
    mask: str | Path | None = None,
    degrade: bool = False,
    pag_scale: float | None = None,
    steps: int | str | None = None,
    seed: int = 0,
    callback: Any = None,
) -> tuple[Path, Path | None, dict[str, Any]]:
    """(restored file, degraded file or None, side-car) of one photo, in a temporary folder of its own.

    The arguments are those of `run.restore_files`; None leaves the preset's value. Raises RestoreError.
    """
    if not photo:
        raise RestoreError("choose a photo first")
    folder = Path(tempfile.mkdtemp(prefix="restore-"))
    (chosen,) = find_photos([str(photo)], folder, png=True)
    found = tasks.find_task(task, mask=Path(mask) if mask else None)
    guidance = "preset" if pag_scale is None else run.ChangedPAG(pag_scale)
    options = {"degrade": degrade, "guidance": guidance, "steps": steps, "seed": seed, "callback": callback}
    (outcome,) = run.restore_files([chosen], restorer, found, **options)
    if outcome.error is not None:
        raise RestoreError(outcome.error)
    degraded = chosen.beside(DEGRADED)
    return chosen.target, degraded if degraded.exists() else None, json.loads(chosen.sidecar.read_text())


def number(text: str, what: str) -> float | None:
    """What a person typed into a field; None where it was left empty. Raises RestoreError for what is no number."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        raise RestoreError(f"{what} must be a number, not {text!r}; leave it empty for the preset's") from None


def offered() -> list[str]:
    """What the page offers: the tasks that need no kernel file, and sr2."""
    names = {path.stem for path in (configs_dir() / "task").glob("*.yaml")} - {"blur"}
    return sorted(names | {"inpaint", "sr2"})


def build(restorer: Any) -> Any:
    """The page as a gradio.Blocks, not yet launched. Raises RestoreError when gradio is not installed."""
    try:
        import gradio as gr
    except ImportError:
        raise RestoreError("the browser page needs gradio; install restore[ui]") from None

    def restore(photo, task, mask, degrade, scale, steps, seed, progress=gr.Progress()):  # noqa: B008
        def show(step: dict) -> None:
            progress((step["step"] + 1, step["steps"]), desc="sampling", unit="steps")

        try:
            settings = {"pag_scale": number(scale, "PAG scale"), "steps": parse_steps(steps.strip() or None)}
            settings["seed"] = int(seed or 0)
            restored, degraded, sidecar = restore_photo(restorer, photo, task, mask, degrade, callback=show, **settings)
        except RestoreError as error:
            raise gr.Error(str(error)) from None
        return str(restored), None if degraded is None else str(degraded), sidecar

    with gr.Blocks(title="restore", analytics_enabled=False) as page:
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
                button = gr.Button("Restore", variant="primary")
            with gr.Column():
                restored = gr.Image(type="filepath", format="png", label="Restored")
                degraded = gr.Image(type="filepath", format="png", label="Degraded")
                protocol = gr.JSON(label="Side-car: protocol and numbers")
        inputs = [photo, task, mask, degrade, scale, steps, seed]
        button.click(restore, inputs, [restored, degraded, protocol], api_name="restore")
    return page
