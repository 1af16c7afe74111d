"""The page for programs: what gradio_client calls, each thing by its name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from operators import RestoreError
from operators.naming import check_known
from restore.app.options import parse_steps
from restore.app.page import work
from restore.app.page.clicks import Clicks, sentences
from restore.app.page.tasks import BLURS, FACTORS, PLAIN, Wish, drawn, number
from restore.method import QUALITIES

MOST = 16  # samples of one photo


def endpoints(clicks: Clicks) -> None:
    """Adds /restore, /estimate and /cancel to the page that is being built."""

    def restore(
        photo, prior, task, factor, blur, std, path, sigma, sensitivity, quality, samples, steps, seed, pag_scale,
        mask=None, label="", request: gr.Request = None, progress=gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:  # fmt: skip
        stop = clicks.stops[request.session_hash] = threading.Event()
        with TemporaryDirectory(prefix="restore-") as folder, sentences(photo, mask):
            wish = asked(
                task, factor, blur, std, path, sigma, sensitivity, quality, samples, steps, seed, pag_scale, label
            )
            found, planner = clicks.priors.get(prior), clicks.priors.planner(prior, "restore")
            for item in work.restore([photo] if photo else [], found, wish, planner, folder, stop, mask=mask):
                if isinstance(item, work.Step):
                    progress(item.share or 0.0, desc=item.sentence)
                elif item.error is not None:
                    raise RestoreError(item.error)
                else:
                    yield [str(path) for path in item.files], item.sidecar

    def estimate(
        photo, prior, task, factor, blur, std, path, sigma, sensitivity, quality, samples, steps, seed, pag_scale,
        mask=None, label="",
    ) -> str:  # fmt: skip
        with TemporaryDirectory(prefix="restore-") as folder, sentences(photo, mask):
            wish = asked(
                task, factor, blur, std, path, sigma, sensitivity, quality, samples, steps, seed, pag_scale, label
            )
            found, planner = clicks.priors.get(prior), clicks.priors.planner(prior, "estimate")
            if not photo:
                raise RestoreError("choose a photo first")
            return work.estimate(photo, found, wish, planner, folder, mask=mask).line()

    def cancel(request: gr.Request) -> None:
        clicks.cancel(request)

    with gr.Column(visible=False):
        given = [
            gr.File(label="photo", type="filepath"),
            gr.Textbox(clicks.priors.first.name, label="prior"),
            gr.Textbox("fill", label=f"task: {', '.join(PLAIN)}"),
            gr.Number(4, label=f"factor of enlarge: {', '.join(map(str, FACTORS))}", precision=0),
            gr.Textbox("focus", label=f"blur of sharpen: {', '.join(BLURS)}"),
            gr.Number(1.5, label="std in pixels of the blur focus"),
            gr.Textbox("", label="path of the blur motion: JSON [[x, y], ...] in pixels"),
            gr.Textbox("", label="sigma: noise on [-1, 1]; empty: estimated"),
            gr.Number(0.5, label="sensitivity of the search for damage, 0 to 1"),
            gr.Textbox("balanced", label=f"quality: {', '.join(QUALITIES)}"),
            gr.Number(1, label="samples", precision=0, minimum=1, maximum=MOST),
            gr.Textbox("", label="steps; empty: the preset's"),
            gr.Number(0, label="seed", precision=0, minimum=0),
            gr.Textbox("", label="pag_scale; empty: the preset's, 0: off"),
            gr.File(label="mask of fill: white known, black missing; none: proposed", type="filepath"),
            gr.Textbox("", label="label: what it shows, a class of the prior by name; empty: none"),
        ]
        out = [gr.File(label="files: the result first", file_count="multiple"), gr.JSON(label="side-car")]
        line = gr.Textbox(label="memory and time")
        gr.Button("restore").click(restore, given, out, api_name="restore", concurrency_id="restore")
        gr.Button("estimate").click(estimate, given, line, api_name="estimate")
        gr.Button("cancel").click(cancel, queue=False, api_name="cancel")


def asked(task, factor, blur, std, path, sigma, sensitivity, quality, samples, steps, seed, pag_scale, label) -> Wish:
    """Raises RestoreError for what cannot be read."""
    check_known([quality], QUALITIES, "there is no quality called")
    return Wish(
        task, int(factor), blur, std, drawn(path, 1e4), number(sigma, "sigma"), sensitivity, quality,
        min(int(samples), MOST), parse_steps(steps.strip() or None), int(seed), number(pag_scale, "pag_scale"), True,
        label.strip() or None,
    )  # fmt: skip
