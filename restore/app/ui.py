"""A page in the browser for one photo at a time: `restore ui` (extra `ui`). The work is that of `restore run`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore.app import run
from restore.paths import configs_dir


def restore_photo(
    restorer: Any,
    photo: str | Path | None,
    task: str,
    mask: str | Path | None = None,
    degrade: bool = False,
    pag_scale: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    callback: Any = None,
) -> tuple[Path, Path | None, dict[str, Any]]:
    """(restored file, degraded file or None, side-car) of one photo, in a temporary folder of its own.

    The arguments are those of `run.restore_files`; None leaves the preset's value. Raises RestoreError.
    """
    if not photo:
        raise RestoreError("choose a photo first")
    folder = Path(tempfile.mkdtemp(prefix="restore-"))
    (job,) = run.plan([str(photo)], folder, png=True)
    config = run.task_config(task, {}, mask=Path(mask) if mask else None)
    options = {"degrade": degrade, "pag_scale": pag_scale, "steps": steps, "seed": seed, "callback": callback}
    for _ in run.restore_files([job], restorer, config, **options):
        pass
    degraded = job.beside(run.DEGRADED)
    return job.target, degraded if degraded.exists() else None, json.loads(job.sidecar.read_text())


def tasks() -> list[str]:
    """What the page offers: the tasks that need no kernel file, and sr2."""
    names = {path.stem for path in (configs_dir() / "task").glob("*.yaml")} - {"blur"}
    return sorted(names | {"inpaint", "sr2"})


def build(restorer: Any) -> Any:
    """The page as a gradio.Blocks, not yet launched. Raises RestoreError when gradio is not installed."""
    try:
        import gradio as gr
    except ImportError:
        raise RestoreError("the browser page needs gradio; install restore[ui]") from None

    def run(photo, task, mask, degrade, scale, steps, seed, progress=gr.Progress()):  # noqa: B008
        def show(step: dict) -> None:
            progress((step["step"] + 1, step["steps"]), desc="sampling", unit="steps")

        settings = {"pag_scale": scale, "steps": int(steps) if steps else None, "seed": int(seed or 0)}
        try:
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
                task = gr.Dropdown(tasks(), value="sr4", label="Task")
                mask = gr.Image(label="Mask for inpainting: white is known, black is missing", **untouched)
                degrade = gr.Checkbox(label="Degrade first")
                scale = gr.Number(value=None, label="PAG scale s (empty: the preset's, 0: off)")
                steps = gr.Number(value=None, precision=0, label="Steps (empty: the preset's)")
                seed = gr.Number(value=0, precision=0, label="Seed")
                button = gr.Button("Restore", variant="primary")
            with gr.Column():
                restored = gr.Image(type="filepath", format="png", label="Restored")
                degraded = gr.Image(type="filepath", format="png", label="Degraded")
                protocol = gr.JSON(label="Side-car: protocol and numbers")
        inputs = [photo, task, mask, degrade, scale, steps, seed]
        button.click(run, inputs, [restored, degraded, protocol], api_name="restore")
    return page
