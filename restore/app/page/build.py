"""The page: its sections, and which handler each event calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from operators import RestoreError

LARGEST_FILE = "64mb"  # of an upload
# On a phone the results stand below the settings.
SCROLL_TO_STATUS = """() => {
    if (innerWidth < 768) document.getElementById('status').scrollIntoView({behavior: 'smooth', block: 'center'});
}"""
# The inputs of a restoration. A change of SETTINGS makes a new estimate, as does leaving the steps or pag_scale field.
SETTINGS = ("stage", "more", "task", "factor", "blur", "std", "path", "extent", "quality", "prior", "label")
INPUTS = (*SETTINGS, "photo", "noise", "sensitivity", "seed", "sigma", "trajectory", "steps", "pag_scale")


def launch(page: Any, **options: Any) -> Any:
    """Launch the page with its theme, its limit on uploads and no history kept in the browser.

    options: of gradio.Blocks.launch.
    """
    import gradio as gr

    font = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    fixed = {"max_file_size": LARGEST_FILE, "run_history": False, "ssr_mode": False, "footer_links": ["api"]}
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="stone", **font).set(  # enough contrast to be read
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
    )
    return page.launch(theme=theme, css=_read_css(), **fixed, **options)


def build_page(restorer: Any, offline: bool = False, fetching: bool = True, named: bool = False, **options: Any) -> Any:
    """Return the page as a gradio.Blocks, not yet launched; see `launch`.

    restorer: the prior it opens with. offline, fetching, named, options: see Priors. Raises RestoreError if gradio is
    not installed.
    """
    try:
        import gradio as gr
    except ImportError:
        raise RestoreError("the browser page needs gradio; install restore-diffusion[ui]") from None
    from restore.app.page import api, handlers, layout, models
    from restore.app.page.store import open_store

    open_store()  # after gradio's client, which keeps its own folder for downloads
    priors, parts = models.Priors(restorer, offline, fetching, named, **options), layout.Parts()
    with gr.Blocks(title="Restore an old photo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        layout.add_header()
        with gr.Row():
            with gr.Column(min_width=320):
                layout.add_photo_section(parts)
                layout.add_task_section(parts)
                layout.add_start_section(parts)
                layout.add_more_section(parts, priors)
            with gr.Column(min_width=320, elem_id="results"):
                layout.add_results(parts)
        called = handlers.Handlers(priors, parts)
        api.add_endpoints(called)  # before the page's own events, which would take the names
        _connect(page, parts, called)
    return page


def _connect(page: Any, parts: Any, handlers: Any) -> None:
    """Have each event call its handler with the values of parts, by name."""
    import gradio as gr

    private: dict[str, Any] = {"api_visibility": "private"}
    quiet = private | {"show_progress": "hidden"}

    def select(*names: str, outputs: str) -> dict[str, Any]:
        return {"inputs_kwargs": parts.select(*names), "outputs": list(parts.select(*outputs.split()).values())}

    parts.photo.change(handlers.open_photo, **select("photo", outputs="photo stage again noise std"), **quiet)
    parts.again.click(lambda: None, outputs=parts.photo, **quiet)
    gr.on([parts.photo.change, parts.more.change], handlers.count, **select("photo", "more", outputs="go"), **quiet)
    shown = "stage filling factor sharpening noise"
    parts.task.change(handlers.choose_task, **select("task", outputs=shown), **quiet)
    parts.blur.change(handlers.choose_blur, **select("blur", outputs="focus motion"), **quiet)
    propose = [parts.propose.click, parts.sensitivity.release]
    gr.on(propose, handlers.propose_mask, **select("photo", "stage", "sensitivity", outputs="stage"), **private)
    parts.mask.upload(handlers.paint_mask, **select("mask", outputs="stage"), **quiet)
    parts.measure.click(handlers.measure_blur, **select("photo", "stage", outputs="std"), **quiet)
    changes = [part.change for part in parts.select(*SETTINGS).values()] + [parts.steps.blur, parts.pag_scale.blur]
    gr.on(changes, handlers.estimate, **select(*INPUTS, outputs="plan fits"), trigger_mode="always_last", **quiet)
    shown = f"{' '.join(handlers.RESULTS)} guidance sidecar"
    results = f"status {shown}"
    begun = select(outputs=f"{results} go cancel")
    runs = (
        (parts.go, handlers.begin, handlers.restore, select(*INPUTS, outputs=results)),
        (parts.three, handlers.begin_versions, handlers.restore_versions, select("which", outputs=results)),
    )
    offered = select("which", outputs="offer versions")
    for button, begin, restore, inputs in runs:
        begin = button.click(begin, **begun, js=SCROLL_TO_STATUS, queue=False, **quiet)
        run = begin.then(restore, **inputs, concurrency_id="restore", **quiet)
        run.failure(handlers.report_failure, **select(outputs="status"), queue=False, **quiet)
        done = run.then(handlers.finish, **select(outputs="go cancel"), queue=False, **quiet)
        done.then(handlers.offer_versions, **offered, **quiet)
    chosen = parts.which.input(handlers.show, **select("which", outputs=shown), **quiet)
    chosen.then(handlers.offer_versions, **offered, **quiet)
    parts.cancel.click(handlers.cancel, **select(outputs="status"), queue=False, **quiet)
    page.unload(handlers.leave)
    parts.prior.change(handlers.describe_prior, **select("prior", outputs="about fetch"), **quiet)
    label = select("prior", outputs="label")
    parts.prior.change(handlers.offer_labels, **label, **quiet)
    fetched = select("prior", outputs="about fetch prior")
    fetch = parts.fetch.click(handlers.fetch, **fetched, show_progress_on=parts.about, **private)
    fetch.then(handlers.offer_labels, **label, **quiet)


def _read_css() -> str:
    """Return the page's style sheet, with the field's terms behind the plain words."""
    from restore.app.page.request import BLURS, PLAIN

    rules = [
        f'#{name} label:nth-of-type({k}) > span::after {{ content: "{term}"; }}'
        for name, terms in (("task", PLAIN), ("blur", BLURS))
        for k, (_, term) in enumerate(terms.values(), start=1)
    ]
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8") + "\n".join(rules)
