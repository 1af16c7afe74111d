"""The layout of the page. Each function adds one section and keeps its components in `Parts`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from restore.app.page.models import Priors, class_choices, describe_fit, describe_prior
from restore.app.page.request import BLURS, FACTORS, PLAIN
from restore.app.page.text import format_status, label_versions
from restore.method import QUALITIES

HONEST = (
    "Anything your photo does not show is <b>invented</b>: it may look right and still be wrong, and an invented face "
    "is nobody's likeness."
)
SHORT = "What your photo does not show is <b>invented</b>."
IDLE = "Choose a photo and press Restore."
BARE = {"show_label": False, "container": False}
IMAGE_FILE = {"file_types": ["image"], "type": "filepath"}


class Parts(SimpleNamespace):
    """The page's components by name; handlers take their values by the same names."""

    def select(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def updates(self, **changes: Any) -> dict[Any, Any]:
        """Changes by name as gradio takes them, by component."""
        return {getattr(self, name): change for name, change in changes.items()}


def add_header() -> None:
    where = "Everything is computed on the machine that serves this page."
    gr.HTML(f"<h1>Restore an old photo</h1><p>{where}</p>", elem_id="head")
    # One of the two is shown: on a phone the whole note would cover too much of the screen.
    gr.HTML(f'<p role="note">{HONEST}</p>', elem_id="honest")
    gr.HTML(f"<p>{SHORT}</p>", elem_id="honest-short")


def add_photo_section(parts: Parts) -> None:
    _add_heading("1. Your photo")
    label = "Your photo: drop it here, choose it, paste it or take it with the camera"
    form = {"sources": ["upload", "clipboard", "webcam"], "type": "filepath", "image_mode": None, "format": "png"}
    parts.photo = gr.Image(label=label, height=260, elem_id="photo", **form)
    # The uploaded file itself, unread: alpha and 16 bits are kept, and a file that is no picture gets our own message.
    parts.photo.preprocess = lambda payload: None if payload is None else payload.path
    stage = {"photo": "", "painting": False, "proposal": "", "visible": "hidden", "elem_id": "stage"}
    parts.stage = gr.HTML("", **_read_canvas("stage"), **stage)
    with gr.Column(elem_id="filling", visible=False) as parts.filling:
        with gr.Row(equal_height=True):
            half: dict[str, Any] = {"min_width": 150, "scale": 1}
            parts.propose = gr.Button("Propose scratches and dust", size="md", **half)
            parts.sensitivity = gr.Slider(0, 1, 0.5, step=0.05, label="Sensitivity", elem_id="keenly", **half)
        with gr.Accordion("Or upload a mask: black is missing, white is kept", open=False):
            parts.mask = gr.File(label="Mask", **IMAGE_FILE)
    parts.again = gr.Button("Choose another photo", size="sm", visible=False, elem_id="again")


def add_task_section(parts: Parts) -> None:
    _add_heading("2. What should be done?")
    first = next(iter(PLAIN))
    parts.task = gr.Radio(_list_choices(PLAIN), value=first, label="What should be done?", elem_id="task", **BARE)
    parts.factor = gr.Radio([(f"×{n}", n) for n in FACTORS], value=2, label="How many times larger", visible=False)
    with gr.Column(visible=False) as parts.sharpening:
        parts.blur = gr.Radio(_list_choices(BLURS), value="focus", label="Why it is blurred", elem_id="blur")
        with gr.Row(equal_height=True) as parts.focus:
            info = "standard deviation in pixels, estimated from your photo"
            parts.std = gr.Slider(0.3, 12, 1.5, step=0.1, label="Size of the blur", info=info, elem_id="std", scale=3)
            parts.measure = gr.Button("Estimate", scale=1)
        with gr.Column(visible=False) as parts.motion:
            gr.HTML("<p>Draw how the camera moved: the streak that a point of light left.</p>", elem_classes="fine")
            parts.path = gr.HTML("", **_read_canvas("path"), elem_id="path")
            parts.extent = gr.Slider(5, 61, 21, step=2, label="Width of the square, in pixels of the photo")
    words = {"label": "How strong the noise is"}
    words["info"] = "estimated from your photo; sigma_y, its standard deviation on [-1, 1]"
    parts.noise = gr.Slider(0.01, 1, 0.1, step=0.005, elem_id="noise", visible=first == "denoise", **words)


def add_start_section(parts: Parts) -> None:
    with gr.Column(elem_id="start"):
        parts.plan = gr.HTML(elem_id="plan", elem_classes="fine")
        with gr.Row():
            parts.go = gr.Button("Restore", variant="primary", elem_id="go", min_width=150, scale=3)
            parts.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=80, scale=1)


def add_more_section(parts: Parts, priors: Priors) -> None:
    """What most visitors do not need."""
    with gr.Accordion("More photos, with the same settings", open=False):
        parts.more = gr.File(label="More photos", file_count="multiple", elem_id="more", **IMAGE_FILE)
        gr.HTML("<p>Noise, blur and damage of each are estimated by themselves.</p>", elem_classes="fine")
    with gr.Accordion("How carefully, and what it shows", open=False):
        choices = [(name.capitalize(), name) for name in QUALITIES]
        parts.quality = gr.Radio(choices, value="balanced", label="How carefully?")
        choices = class_choices(priors.first)
        info = "the kinds of picture that the prior knows; telling it means less guessing"
        known = {"visible": bool(choices), "elem_id": "shows", "info": info}
        parts.label = gr.Radio(choices, value="", label="What it shows", **known)
    with gr.Accordion("Advanced", open=False):
        # Textboxes: an untouched gr.Number posts 0, which would switch PAG off.
        parts.steps = gr.Textbox(label="Steps", info="of the sampler; empty: the preset's")
        parts.seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", info="another seed invents other details")
        parts.pag_scale = gr.Textbox(label="PAG scale s", info="perturbed attention; empty: the preset's, 0: off")
        parts.sigma = gr.Textbox(label="sigma_y", info="noise of all photos on [-1, 1]; empty: estimated")
        info = "|eps − eps_weak| through time"
        parts.trajectory = gr.Checkbox(value=True, label="Keep a picture of the guidance", info=info)
    with gr.Accordion("The prior: where detail comes from", open=False):
        name = priors.default
        parts.fits = gr.Markdown(describe_fit(priors, None), elem_classes="fine", elem_id="fits")
        parts.prior = gr.Dropdown(priors.choices(), value=name, label="Prior")
        parts.about = gr.Markdown(describe_prior(name), elem_classes="fine")
        parts.fetch = gr.Button("Download it", visible=False)


def add_results(parts: Parts) -> None:
    hidden = {"interactive": False, "visible": False}
    _add_heading("Result")
    parts.status = gr.HTML(format_status(IDLE), elem_id="status")
    parts.forming = gr.Image(label="The photo as it forms (x̂0)", format="jpeg", buttons=[], elem_id="forming", **hidden)
    parts.which = gr.Radio([], label="Which photo", visible=False, elem_id="which")
    png = hidden | {"format": "png"}
    parts.slider = gr.ImageSlider(label="Before | after", buttons=["fullscreen"], elem_id="slider", **png)
    parts.download = gr.DownloadButton("Download the photo", variant="primary", visible=False, elem_id="download")
    with gr.Column(visible=False, elem_id="offer") as parts.offer:
        parts.versions = gr.HTML(elem_classes="fine")
        parts.three = gr.Button("Make three versions", elem_id="three")
    form = {"rows": 1, "columns": 3, "height": "auto", "object_fit": "contain"}
    parts.gallery = gr.Gallery(label=label_versions(), elem_id="versions", **form, **png)
    label = "Orange: guesswork, where the versions differ (spread)"
    parts.guessed = gr.Image(label=label, buttons=["download"], elem_id="guessed", **png)
    parts.files = gr.File(label="All files", file_count="multiple", elem_id="files", **hidden)
    with gr.Accordion("For experts", open=False, visible=False) as parts.experts:
        parts.guidance = gr.Image(
            label="Guidance |eps − eps_weak| through time", format="png", elem_id="guidance", **hidden
        )
        parts.sidecar = gr.JSON(label="Side-car: protocol and numbers")


def _add_heading(text: str) -> None:
    gr.HTML(f"<h2>{text}</h2>", elem_classes="step")


def _list_choices(words: dict[str, tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (plain words, name) of PLAIN or BLURS."""
    return [(plain, name) for name, (plain, _) in words.items()]


def _read_canvas(name: str) -> dict[str, str]:
    """The template and script of a part that is drawn on."""
    html, script = (Path(__file__).with_name(f"{name}.{suffix}").read_text("utf-8") for suffix in ("html", "js"))
    return {"html_template": html, "js_on_load": script}
