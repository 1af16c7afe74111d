"""The page for programs: what gradio_client calls, each input by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from operators import RestoreError
from restore.app.page import work
from restore.app.page.handlers import Handlers, show_errors
from restore.app.page.request import BLURS, FACTORS, MOST_SAMPLES, PLAIN, parse_request
from restore.app.page.store import make_work_folder
from restore.method import QUALITIES


def add_endpoints(handlers: Handlers) -> None:
    """Add /restore, /estimate and /cancel to the page that is being built."""
    priors = handlers.priors

    # gradio's clients take defaults from the components, but None only from a signature.
    def restore(
        session: gr.Request,
        photo: str | None,
        prior: str,
        mask: str | None = None,
        progress: Any = gr.Progress(),  # noqa: B008
        **values: Any,
    ) -> Iterator[Any]:
        stop = handlers.visits.begin(session.session_hash).stop
        with make_work_folder() as folder, show_errors(photo, mask):
            request = parse_request(**values, trajectory=True)
            selected = priors.select(prior, "restore", request)
            for item in work.restore([photo] if photo else [], selected, request, folder, stop, mask=mask):
                if isinstance(item, work.Step):
                    progress(item.share or 0.0, desc=item.sentence)
                elif item.error is not None:
                    raise RestoreError(item.error)
                else:
                    yield [str(path) for path in item.files], item.sidecar

    def estimate(photo: str | None, prior: str, mask: str | None = None, **values: Any) -> str:
        with make_work_folder() as folder, show_errors(photo, mask):
            request = parse_request(**values)
            if not photo:
                raise RestoreError("choose a photo first")
            selected = priors.select(prior, "estimate", request)
            return work.estimate(photo, selected, request, folder, mask=mask).plan.format()

    def cancel(session: gr.Request) -> None:
        handlers.cancel(session)

    with gr.Column(visible=False):
        inputs = {
            "photo": gr.File(label="photo", type="filepath"),
            "prior": gr.Textbox(priors.default, label="prior: a name, or chosen for the photo"),
            "task": gr.Textbox("auto", label=f"task: {', '.join(PLAIN)}"),
            "factor": gr.Number(2, label=f"factor of enlarge: {', '.join(map(str, FACTORS))}", precision=0),
            "blur": gr.Textbox("focus", label=f"blur of sharpen: {', '.join(BLURS)}"),
            "std": gr.Textbox("", label="std of the blur focus, in pixels; empty: estimated"),
            "path": gr.Textbox("", label="path of the blur motion: JSON [[x, y], ...] in pixels"),
            "sigma": gr.Textbox("", label="sigma: noise on [-1, 1]; empty: estimated"),
            "sensitivity": gr.Number(0.5, label="sensitivity of the search for damage, 0 to 1"),
            "quality": gr.Textbox("balanced", label=f"quality: {', '.join(QUALITIES)}"),
            "samples": gr.Number(1, label="samples", precision=0, minimum=1, maximum=MOST_SAMPLES),
            "steps": gr.Textbox("", label="steps; empty: the preset's"),
            "seed": gr.Number(0, label="seed", precision=0, minimum=0),
            "pag_scale": gr.Textbox("", label="pag_scale; empty: the preset's, 0: off"),
            "mask": gr.File(label="mask of fill: white known, black missing; none: proposed", type="filepath"),
            "label": gr.Textbox("", label="label: what it shows, a class of the prior by name; empty: none"),
        }
        outputs = [gr.File(label="files: the result first", file_count="multiple"), gr.JSON(label="side-car")]
        line = gr.Textbox(label="memory and time")
        common = {"inputs_kwargs": inputs}
        gr.Button("restore").click(restore, outputs=outputs, api_name="restore", concurrency_id="restore", **common)
        gr.Button("estimate").click(estimate, outputs=line, api_name="estimate", **common)
        gr.Button("cancel").click(cancel, queue=False, api_name="cancel")
