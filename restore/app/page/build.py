"""The page: what stands where, and which function of `clicks` each thing calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from operators import RestoreError
from restore.app.page.models import Priors, described, labels
from restore.app.page.tasks import BLURS, FACTORS, PLAIN
from restore.method import QUALITIES

LARGEST_FILE = "64mb"  # of an upload
HONEST = (
    "What your photo does not show is <b>invented</b>: it may look right and be wrong, and an invented face is no "
    "likeness of anyone."
)
ROLL = """() => {
    if (innerWidth < 768) document.getElementById('status').scrollIntoView({behavior: 'smooth', block: 'center'});
}"""


def launch(page: Any, **options: Any) -> Any:
    """gradio's launch with what this page needs: its looks, the limit on uploads, no history kept in the browser."""
    import gradio as gr

    font = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    fixed = {"max_file_size": LARGEST_FILE, "run_history": False, "ssr_mode": False, "footer_links": ["api"]}
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="stone", **font).set(  # dark enough to be read
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
    )
    return page.launch(theme=theme, css=_css(), **fixed, **options)


def build(restorer: Any, offline: bool = False, fetching: bool = True, **options: Any) -> Any:
    """The page as a gradio.Blocks, not yet launched; see `launch`.

    restorer: the prior it opens with. offline, fetching, options: see Priors. Raises RestoreError when gradio is not
    installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise RestoreError("the browser page needs gradio; install restore[ui]") from None
    from restore.app.page import clicks as page_of
    from restore.app.page.api import endpoints

    clicks = page_of.Clicks(Priors(restorer, offline, fetching, **options))
    here = Path(__file__)
    files = {"file_types": ["image"], "type": "filepath"}
    with gr.Blocks(title="Restore an old photo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(
            "<h1>Restore an old photo</h1><p>Everything is computed on the machine of this page.</p>", elem_id="head"
        )
        gr.HTML(f'<p role="note">{HONEST}</p>', elem_id="honest")
        with gr.Row():
            with gr.Column(min_width=320):
                gr.HTML("<h2>1. Your photo</h2>", elem_classes="step")
                photo = gr.Image(
                    label="Your photo: drop it here, choose it, paste it or take it with the camera",
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    image_mode=None,
                    format="png",
                    height=260,
                    elem_id="photo",
                )
                # The file as it was chosen, unread: alpha and 16 bits are kept, what is no picture gets a sentence.
                photo.preprocess = lambda payload: None if payload is None else payload.path
                stage = gr.HTML(
                    "",
                    html_template=here.with_name("stage.html").read_text(encoding="utf-8"),
                    js_on_load=here.with_name("stage.js").read_text(encoding="utf-8"),
                    photo="",
                    painting=True,
                    proposal="",
                    visible="hidden",
                    elem_id="stage",
                )
                with gr.Column(elem_id="filling") as filling:
                    with gr.Row(equal_height=True):
                        propose = gr.Button("Propose scratches and dust", size="md", min_width=150, scale=1)
                        sensitivity = gr.Slider(
                            0, 1, 0.5, step=0.05, label="How keenly", min_width=150, scale=1, elem_id="keenly"
                        )
                    with gr.Accordion("Or upload a mask: black where something is missing, else white", open=False):
                        mask = gr.File(label="Mask", **files)
                again = gr.Button("Choose another photo", size="sm", visible=False, elem_id="again")
                with gr.Accordion("More photos, one after the other with the same settings", open=False):
                    more = gr.File(label="More photos", file_count="multiple", elem_id="more", **files)
                kinds = labels(restorer)
                shows = gr.Radio(
                    kinds,
                    value="",
                    label="What it shows",
                    visible=bool(kinds),
                    elem_id="shows",
                    info="a class that the prior knows; with it, it guesses less",
                )
                fits = gr.Markdown(clicks.fit(None), elem_classes="fine", elem_id="fits")
                gr.HTML("<h2>2. What should be done?</h2>", elem_classes="step")
                task = gr.Radio(
                    [(words, name) for name, (words, _) in PLAIN.items()],
                    value="fill",
                    label="What should be done?",
                    show_label=False,
                    container=False,
                    elem_id="task",
                )
                factor = gr.Radio(
                    [(f"×{n}", n) for n in FACTORS], value=4, label="How many times larger", visible=False
                )
                with gr.Column(visible=False) as sharpening:
                    blur = gr.Radio(
                        [(words, name) for name, (words, _) in BLURS.items()],
                        value="focus",
                        label="Why it is blurred",
                        elem_id="blur",
                    )
                    with gr.Row(equal_height=True) as focus:
                        std = gr.Slider(
                            0.3,
                            12,
                            1.5,
                            step=0.1,
                            label="Size of the blur",
                            info="standard deviation in pixels",
                            elem_id="std",
                            scale=3,
                        )
                        measure = gr.Button("Estimate", scale=1)
                    with gr.Column(visible=False) as motion:
                        gr.HTML(
                            "<p>Draw how a point of light was smeared: the way of the camera.</p>", elem_classes="fine"
                        )
                        path = gr.HTML(
                            "",
                            html_template=here.with_name("path.html").read_text(encoding="utf-8"),
                            js_on_load=here.with_name("path.js").read_text(encoding="utf-8"),
                            elem_id="path",
                        )
                        extent = gr.Slider(5, 61, 21, step=2, label="The square is this many pixels of the photo wide")
                noise = gr.Slider(
                    0.01,
                    1,
                    0.1,
                    step=0.005,
                    label="How strong the noise is",
                    info="estimated from your photo; sigma_y, its standard deviation on [-1, 1]",
                    elem_id="noise",
                    visible=False,
                )
                gr.HTML("<h2>3. How carefully?</h2>", elem_classes="step")
                quality = gr.Radio(
                    [(name.capitalize(), name) for name in QUALITIES],
                    value="balanced",
                    label="How carefully?",
                    show_label=False,
                    container=False,
                )
                three = gr.Checkbox(
                    value=True,
                    label="Three versions, which show where it is guessed",
                    info="three posterior samples and their spread; takes three times as long",
                )
                plan = gr.HTML(elem_id="plan", elem_classes="fine")
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", elem_id="go", min_width=150, scale=3)
                    stop = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=80, scale=1)
                with gr.Accordion("Advanced", open=False):
                    # Text: a number field that nobody touched posts 0, which would switch PAG off.
                    steps = gr.Textbox(label="Steps", info="of the sampler; empty: the preset's")
                    seed = gr.Number(
                        value=0, precision=0, minimum=0, label="Seed", info="another seed, other inventions"
                    )
                    scale = gr.Textbox(
                        label="PAG scale s", info="perturbed-attention guidance; empty: the preset's, 0: off"
                    )
                    sigma = gr.Textbox(label="sigma_y", info="noise in the photo on [-1, 1]; empty: estimated")
                    traced = gr.Checkbox(
                        value=True, label="Keep a picture of the guidance", info="|eps − eps_weak| in time"
                    )
                with gr.Accordion("The prior: what the missing is taken from", open=False):
                    prior = gr.Dropdown(clicks.priors.choices(), value=restorer.name, label="Prior")
                    about = gr.Markdown(described(restorer.name), elem_classes="fine")
                    fetch = gr.Button("Fetch it", visible=False)
            with gr.Column(min_width=320, elem_id="results"):
                results = _results(gr, page_of.idle())

        endpoints(clicks)  # first, for their names
        given = [photo, stage, more, task, factor, blur, std, path, extent, noise, sensitivity, quality]
        given += [three, steps, seed, scale, sigma, traced, prior, shows]
        private: dict[str, Any] = {"api_visibility": "private"}
        quiet = private | {"show_progress": "hidden"}
        photo.change(clicks.looked, photo, [photo, stage, again, noise], **quiet)
        again.click(lambda: None, None, photo, **quiet)
        gr.on([photo.change, more.change], page_of.counted, [photo, more], go, **quiet)
        task.change(clicks.chosen, task, [stage, filling, factor, sharpening, noise], **quiet)
        blur.change(
            lambda kind: (gr.Row(visible=kind == "focus"), gr.Column(visible=kind == "motion")),
            blur,
            [focus, motion],
            **quiet,
        )
        propose.click(clicks.propose, [photo, stage, sensitivity], stage, **private)
        sensitivity.release(clicks.propose, [photo, stage, sensitivity], stage, **private)
        mask.upload(clicks.masked, mask, stage, **quiet)
        measure.click(clicks.measured, [photo, stage], std, **quiet)
        changes = [
            part.change for part in (stage, more, task, factor, blur, std, path, extent, quality, three, prior, shows)
        ]
        changes += [part.blur for part in (steps, scale)]
        gr.on(changes, clicks.estimated, given, [plan, fits], trigger_mode="always_last", **quiet)
        begun = go.click(clicks.begin, None, [*results, go, stop], js=ROLL, queue=False, **quiet)
        run = begun.then(clicks.restore, given, results, concurrency_id="restore", **quiet)
        run.failure(clicks.failed, None, results, queue=False, **quiet)
        run.then(lambda: page_of.buttons(True), None, [go, stop], queue=False, **quiet)
        stop.click(clicks.cancel, None, results[0], queue=False, **quiet)
        page.unload(clicks.left)
        prior.change(clicks.about, prior, [about, fetch], **quiet)
        prior.change(clicks.shows, prior, shows, **quiet)
        fetched = fetch.click(clicks.fetch, prior, [about, fetch, prior], show_progress_on=about, **private)
        fetched.then(clicks.shows, prior, shows, **quiet)
    return page


def _results(gr: Any, idle: str) -> list[Any]:
    """What a restoration changes, in the order of clicks.RESULTS."""
    gr.HTML("<h2>Result</h2>", elem_classes="step")
    status = gr.HTML(idle, elem_id="status")
    forming = gr.Image(
        interactive=False,
        label="The photo as it forms (x̂0)",
        visible=False,
        format="jpeg",
        buttons=[],
        elem_id="forming",
    )
    slider = gr.ImageSlider(
        interactive=False,
        label="Before | after",
        visible=False,
        format="png",
        buttons=["fullscreen"],
        elem_id="slider",
    )
    download = gr.DownloadButton("Download the photo", variant="primary", visible=False, elem_id="download")
    gallery = gr.Gallery(
        interactive=False,
        label="Three versions, all equally likely",
        rows=1,
        height="auto",
        object_fit="contain",
        columns=3,
        visible=False,
        format="png",
        elem_id="versions",
    )
    guessed = gr.Image(
        interactive=False,
        label="Orange: guessed, for here the versions differ (spread)",
        visible=False,
        format="png",
        buttons=["download"],
        elem_id="guessed",
    )
    everything = gr.File(label="All files", file_count="multiple", interactive=False, visible=False, elem_id="files")
    with gr.Accordion("For experts", open=False, visible=False) as experts:
        guidance = gr.Image(
            label="Guidance |eps − eps_weak| through time",
            interactive=False,
            visible=False,
            format="png",
            elem_id="guidance",
        )
        sidecar = gr.JSON(label="Side-car: protocol and numbers")
    return [status, forming, slider, download, gallery, guessed, everything, experts, guidance, sidecar]


def _css() -> str:
    """The page's, with the field's words behind the plain ones."""
    said = []
    for name, terms in (("task", PLAIN), ("blur", BLURS)):
        for k, (_, term) in enumerate(terms.values(), start=1):
            said.append(f'#{name} label:nth-of-type({k}) > span::after {{ content: "{term}"; }}')
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8") + "\n".join(said)
