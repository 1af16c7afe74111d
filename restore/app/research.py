"""The verbs of experiments (train, bench, heads, report, evaluate): each calls one function and prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from operators import RestoreError
from restore.app.options import Device, Overwrite


def train(
    config: Annotated[Path, typer.Argument(help="A file such as configs/train/*.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.folder=faces/")] = None,
    card: Annotated[Path | None, typer.Option(help="Only write card.json and a picture to this folder.")] = None,
    weights: Annotated[Path | None, typer.Option(help="With --card: the folder with the weights.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a pixel prior, an autoencoder or a latent prior, continuing where the last run stopped."""
    import logging

    from restore.training import load_training_config, train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if card is None and (weights is not None or overwrite):
        raise RestoreError("weights= and overwrite= are of a card: give card=FOLDER, too")
    if card is not None:
        from restore.training.card import format_card, write_card

        loaded = load_training_config(config, settings or [])
        typer.echo(format_card(write_card(loaded, weights or Path(loaded.out) / "ema", card, overwrite=overwrite)))
        return
    typer.echo(f"EMA weights in {train(load_training_config(config, settings or []))}")


def bench(
    config: Annotated[Path, typer.Argument(help="A file such as configs/benchmark/*.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.folder=ffhq/ batch=8")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print batches, NFE, time and memory.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Only download the models that it needs.")] = False,
) -> None:
    """Run a benchmark, or the rest of one that was interrupted."""
    if pull:
        from restore.bench.config import load_config
        from restore.bench.pull import pull_needed_models

        for text in pull_needed_models(load_config(config, settings or [], placeholder="-")):
            typer.echo(text)
        return
    from restore.bench import run as work

    if dry_run:
        typer.echo("task | method | batches | images | NFE | seconds | peak MB")
        for line in work.plan_benchmark(config, settings or []):
            cost = [f"{value:.0f}" if value is not None else "-" for value in (line.seconds, line.peak_memory_mb)]
            row = [line.task, line.method, line.batches, line.images, line.nfe or "-", *cost]
            typer.echo(" | ".join(str(value) for value in row))
        return
    with _show_progress() as show:
        result = work.run_benchmark(config, settings or [], progress=show)
    typer.echo(f"{result.folder}: {result.computed} batches done, {result.reused} found finished")
    for path in result.damaged:
        typer.echo(f"{path} was damaged: its image was computed again")
    typer.echo(f"restore report {result.folder}")


def heads(
    config: Annotated[Path, typer.Argument(help="A file such as configs/search/*.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. calibration.folder=faces/")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print candidates, NFE and time.")] = False,
    pull: Annotated[bool, typer.Option("--pull", help="Only download the models that it needs.")] = False,
    gallery: Annotated[
        str | None, typer.Option(help="Draw pictures of heads instead: heads, layers, pairs (comma separated) or all.")
    ] = None,
) -> None:
    """Search for the attention heads whose perturbation helps (HeadHunter), or continue a search."""
    from restore import search

    if pull:
        for text in search.pull_search(config, settings or []):
            typer.echo(text)
        return
    if dry_run:
        plan = search.plan_search(config, settings or [])
        typer.echo(f"{plan.candidates} heads")
        for part, sets, images in zip(("calibration", "test"), (plan.calibration, plan.test), plan.images, strict=True):
            typer.echo(f"{part}: {sets} evaluations (a set of heads on a task) of {images} images")
        if plan.seconds is not None:
            typer.echo(f"about {plan.nfe} network evaluations of an image, {plan.seconds / 60:.0f} minutes")
        return
    if gallery is not None:
        sheets = search.SHEETS if gallery == "all" else [name.strip() for name in gallery.split(",")]
        with _show_progress() as show:
            drawn = search.draw_gallery(config, settings or [], sheets=sheets, progress=show)
        typer.echo("\n".join(map(str, drawn)))
        return
    with _show_progress() as show:
        found = search.search_heads(config, settings or [], progress=show)
    typer.echo(f"{' '.join(found.table['best']['heads'])} is the best set on the calibration images")
    typer.echo(f"{found.folder / 'guidance.yaml'}\n{found.folder / 'report.html'}\n{found.folder / 'report.md'}")


@contextmanager
def _show_progress() -> Iterator[Callable[[dict], None]]:
    """Yield a progress callback that shows a tqdm bar."""
    from tqdm import tqdm

    with tqdm(unit="batch", delay=0.5) as bar:

        def show(state: dict) -> None:
            bar.set_description(state.get("phase"), refresh=False)
            if "done" in state:
                bar.total, bar.n = state["total"], state["done"]
            bar.set_postfix_str(state["batch"] if "done" in state else f"measuring {state['measuring']}")

        yield show


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of benchmark runs.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: the first run's.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Leave out pictures of the data set.")] = False,
    overwrite: Overwrite = False,
    study: Annotated[
        str | None, typer.Option(help="Write study.html instead: A,B, two methods that people compare blind.")
    ] = None,
) -> None:
    """Write report.html and report.md about finished runs."""
    from restore.report.study import write_study
    from restore.report.write import write_report

    if study is not None:
        if private:
            raise RestoreError("a study shows pictures; leave private out")
        methods = [name.strip() for name in study.split(",")]
        if len(methods) != 2:
            raise RestoreError(f"study= must be two methods, separated by a comma, got {study}")
        typer.echo(str(write_study(runs, (methods[0], methods[1]), out, overwrite=overwrite)))
        return
    written = write_report(runs, out, private=private, overwrite=overwrite)
    for pair in written.differences:
        typer.echo(f"{pair.first} and {pair.second} are not in one table: {', '.join(pair.values)} differ")
    typer.echo(f"{written.html}\n{written.markdown}")


def evaluate(
    results: Annotated[Path, typer.Argument(help="Folder of restored images.")],
    reference: Annotated[Path, typer.Option(help="Folder of true images with the same names.")],
    metrics: Annotated[
        str,
        typer.Option(
            help="psnr, ssim, lpips, dists, vif, fid, kid, kid_vgg16, is, pr or module:function; comma separated."
        ),
    ] = "psnr,ssim",
    full_reference: Annotated[Path | None, typer.Option(help="A larger set for FID, reported separately.")] = None,
    lpips_net: Annotated[str, typer.Option(help="alex or vgg.")] = "alex",
    weights: Annotated[
        list[str] | None, typer.Option(help="Networks: inception=FILE, vgg16=FILE, alexnet=FILE.")
    ] = None,
    is_split_size: Annotated[
        int | None, typer.Option(min=1, help="Images of a split of IS; ADM's evaluator: 5000; default: ten splits.")
    ] = None,
    reference_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels to which references of sets are brought, by a centre crop.")
    ] = None,
    device: Device = "auto",
    allow_small: Annotated[bool, typer.Option("--allow-small", help="Allow FID on few images.")] = False,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="Allow means over a part.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for all numbers.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare a folder of results, of any program, with the truth."""
    from restore.metrics.evaluate import check_output, write_evaluation
    from restore.metrics.evaluate import evaluate as compare
    from restore.metrics.table import MetricOptions
    from restore.metrics.weights import parse_weight_files
    from restore.restorer import choose_device

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    files = parse_weight_files(weights or [])
    settings = MetricOptions(lpips_net, files, allow_small=allow_small)
    settings = replace(settings, is_split_size=is_split_size, reference_size=reference_size)
    more = {"full_reference": full_reference, "allow_incomplete": allow_incomplete}
    if out is not None:
        check_output(out, overwrite)  # before hours of work
    done = compare(results, reference, metrics=names, options=settings, device=str(choose_device(device)), **more)
    if out is not None:
        write_evaluation(done, out, overwrite)
    typer.echo(f"{len(done.per_image)} of {done.expected} images compared")
    for name, estimate in done.means.items():
        interval = f"  [{estimate.low:.4f}, {estimate.high:.4f}]" if estimate.n > 1 else ""  # one image has none
        typer.echo(f"{name} {estimate.mean:.4f}{interval}")
    for name, value in done.set_values.items():
        typer.echo(f"{name} {value:.4f}")
    for kind in ("missing", "mismatched", "extra"):
        if names := getattr(done, kind):
            typer.echo(f"{kind}: {len(names)}, e.g. {', '.join(names[:3])}")
    for name, reason in done.failed.items():
        typer.echo(f"{name} cannot be measured: {reason}")
    for note in done.notes:
        typer.echo(note)
