"""The `restore` command. Each verb parses, calls one public function and prints; imports come late."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Restore images with diffusion priors, training-free."
)
models_app = typer.Typer(no_args_is_help=True, help="Known checkpoints: list, show, pull, import.")
app.add_typer(models_app, name="models")

Inputs = Annotated[list[str], typer.Argument(help="Images, folders or globs, and key=value settings.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A folder, or a file for a single image.")]
Task = Annotated[str, typer.Option(help="sr4, sr8, inpaint, gaussian-blur, motion-blur, blur, denoise, colorize, ...")]
MaskFile = Annotated[Path | None, typer.Option(help="Image of the known pixels (white) and the hole (black).")]
KernelFile = Annotated[Path | None, typer.Option(help="Blur kernel: .npy, .txt or an image.")]
Backbone = Annotated[str, typer.Option(help="A model of `restore models list`, a folder or a checkpoint file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Seed = Annotated[int, typer.Option(help="All noise is a function of the seed and the image's name.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
PagScale = Annotated[float | None, typer.Option(help="PAG scale s, 0 is off; default: the preset's.")]
Layers = Annotated[str | None, typer.Option(help="PAG layers, e.g. i9 or input_blocks.9.1,m1.")]


def split_settings(arguments: list[str]) -> tuple[list[str], dict]:
    """Inputs and key=value settings of one list; a file whose name holds '=' counts as an input."""
    from omegaconf import OmegaConf

    settings = [a for a in arguments if "=" in a and a.split("=", 1)[0].isidentifier() and not Path(a).exists()]
    inputs = [a for a in arguments if a not in settings]
    return inputs, OmegaConf.to_container(OmegaConf.from_dotlist(settings))


class Progress:
    """A tqdm bar over all sampling steps of a run, with the residual of the current one."""

    def __init__(self, files: int) -> None:
        self.files, self.bar = files, None

    def __call__(self, step: dict) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=self.files * step["steps"] * step["total"], unit="step", leave=False)
        self.bar.update(step["count"])
        if "residual" in step:
            self.bar.set_postfix(residual=f"{float(step['residual'].mean()):.3g}", refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@app.command()
def run(
    inputs: Inputs,
    task: Task,
    out: Out,
    mask: MaskFile = None,
    kernel: KernelFile = None,
    degrade: Annotated[
        bool, typer.Option("--degrade", help="Degrade clean images first, restore them, report PSNR and SSIM.")
    ] = False,
    backbone: Backbone = "embedded",
    sampler: Annotated[str | None, typer.Option(help="dps or psld; default: the backbone's.")] = None,
    pag_scale: PagScale = None,
    layers: Layers = None,
    steps: Annotated[str | None, typer.Option(help="Number of steps; default: the preset's.")] = None,
    samples: Annotated[int, typer.Option(help="Posterior samples per image.")] = 1,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Samples computed together.")] = 1,
    device: Device = "auto",
    precision: Precision = "fp32",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, about 30 % slower.")] = False,
    max_windows: Annotated[int, typer.Option(help="Windows of a large photo per network call.")] = 16,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Less memory for large photos in latents.")] = False,
    data: Annotated[str | None, typer.Option(help="Presets published for ffhq or imagenet.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Compute what the authors' PSLD code does.")] = False,
    solve_at: Annotated[
        int | None, typer.Option(help="Restore at this side and bring back, as PSLD's numbers: 512.")
    ] = None,
    resample: Annotated[
        str | None, typer.Option(help="With --solve-at: bicubic, or nearest as in PSLD's code.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo finished files.")] = False,
    save_trajectory: Annotated[bool, typer.Option("--save-trajectory", help="A strip of x0_hat through time.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Write PNG whatever the input's format.")] = False,
    offline: Offline = False,
) -> None:
    """Restore images: `restore run photo.png --task sr4 -o restored/`."""
    from restore import restorer
    from restore.app import run as work
    from restore.images.resampling import resampling

    names, settings = split_settings(inputs)
    model = restorer.load(
        backbone,
        device=device,
        precision=precision,
        offline=offline,
        checkpointing=checkpointing,
        max_windows=max_windows,
        vae_tiling=vae_tiling,
    )
    todo = work.plan(names, out, png=png)
    progress = Progress(len(todo))
    results = work.restore_files(
        todo,
        model,
        work.task_config(task, settings, mask=mask, kernel=kernel),
        parameters=settings,
        degrade=degrade,
        sampler=sampler,
        pag_scale=pag_scale,
        layers=layers,
        steps=steps,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        data=data,
        reference=reference,
        resampled=resampling(solve_at, resample, reference),
        overwrite=overwrite,
        save_trajectory=save_trajectory,
        callback=progress,
    )
    try:
        for result in results:
            typer.echo(result.line())
    finally:
        progress.close()


@app.command()
def degrade(
    inputs: Inputs,
    task: Task,
    out: Out,
    mask: MaskFile = None,
    kernel: KernelFile = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo finished files.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Write PNG whatever the input's format.")] = False,
) -> None:
    """Degrade clean images: `restore degrade photo.png --task motion-blur -o blurred/`."""
    from restore.app import run as work

    names, settings = split_settings(inputs)
    todo = work.plan(names, out, png=png)
    config = work.task_config(task, settings, mask=mask, kernel=kernel)
    if settings:
        from operators import RestoreError

        raise RestoreError(f"task {task} has no setting '{next(iter(settings))}'")
    for output in work.degrade_files(todo, config, seed=seed, overwrite=overwrite):
        typer.echo(str(output))


@app.command()
def generate(
    out: Out,
    n: Annotated[int, typer.Option("-n", help="Number of images.")] = 4,
    backbone: Backbone = "embedded",
    pag_scale: Annotated[float, typer.Option(help="PAG scale s, 0 is off.")] = 0.0,
    layers: Layers = None,
    cfg_scale: Annotated[float, typer.Option(help="CFG scale w of the paper's Eq. 14, 0 is off.")] = 0.0,
    labels: Annotated[str | None, typer.Option(help="Class labels, comma separated.")] = None,
    steps: Annotated[str, typer.Option(help="Number of steps, or ddimN with --ddim-eta.")] = "250",
    ddim_eta: Annotated[float | None, typer.Option(help="DDIM eta; default: DDPM.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Images computed together.")] = 1,
    device: Device = "auto",
    precision: Precision = "fp32",
    offline: Offline = False,
) -> None:
    """Sample images from a prior: `restore generate -n 16 --pag-scale 1 -o samples/`."""
    from restore import restorer
    from restore.app import run as work

    model = restorer.load(backbone, device=device, precision=precision, offline=offline)
    progress = Progress(1)
    try:
        for output in work.generate_files(
            out,
            model,
            n=n,
            pag_scale=pag_scale,
            layers=layers,
            cfg_scale=cfg_scale,
            labels=None if labels is None else [int(x) for x in labels.split(",")],
            steps=steps,
            ddim_eta=ddim_eta,
            seed=seed,
            batch_size=batch_size,
            callback=progress,
        ):
            typer.echo(str(output))
    finally:
        progress.close()


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: the preset's.")] = None,
    device: Device = "auto",
) -> None:
    """Restore the shipped photos under four degradations, with DPS and DPS+PAG, and draw a comparison."""
    from restore.app.demo import run_demo

    progress = Progress(1)
    try:
        summary = run_demo(out, steps=steps, device=device, callback=progress)
    finally:
        progress.close()
    typer.echo(summary)


@app.command()
def ui(
    backbone: Backbone = "embedded",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets others on the network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 7860,
    device: Device = "auto",
    precision: Precision = "fp32",
    offline: Offline = False,
) -> None:
    """Open a page in the browser for one photo at a time (needs the extra `ui`)."""
    from restore import restorer
    from restore.app.ui import build

    page = build(restorer.load(backbone, device=device, precision=precision, offline=offline))
    page.launch(server_name=host, server_port=port)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="configs/train/embedded.yaml or your own.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.folder=faces/")] = None,
    card: Annotated[Path | None, typer.Option(help="Do not train: write card.json and samples.png there.")] = None,
    weights: Annotated[Path | None, typer.Option(help="With --card: the folder of the weights.")] = None,
) -> None:
    """Train the embedded prior; continues where the last run stopped."""
    import logging

    from restore.training import load_config, train

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if card is not None:
        from restore.training.card import measure, table

        loaded = load_config(config, settings or [])
        typer.echo(table(measure(loaded, weights or Path(loaded.out) / "ema", card)))
        return
    typer.echo(f"EMA weights in {train(load_config(config, settings or []))}")


@app.command()
def profile(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. size=128 repeats=5")] = None,
) -> None:
    """Measure the cost of DPS and of PAG (naive, batched, shared prefix) and the memory of a step."""
    from restore.bench.profile import profile as measure

    _, options = split_settings(settings or [])
    typer.echo(measure(**options))


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="configs/benchmark/*.yaml or your own.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.folder=ffhq/ batch=8")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batches, their NFE, time and memory.")] = False,
) -> None:
    """Run a benchmark, or what is left of it after an interruption."""
    from tqdm import tqdm

    from restore.bench import run as work

    if dry_run:
        typer.echo("task | method | batches | images | NFE | seconds | peak MB")
        for line in work.dry_run(config, settings or []):
            cost = [f"{value:.0f}" if value is not None else "-" for value in (line.seconds, line.peak_memory_mb)]
            row = [line.task, line.method, line.batches, line.images, line.nfe or "-", *cost]
            typer.echo(" | ".join(str(value) for value in row))
        return
    with tqdm(unit="batch") as bar:

        def progress(state: dict) -> None:
            if "done" in state:
                bar.total, bar.n = state["total"], state["done"]
                bar.set_postfix_str(state["batch"])
            else:
                bar.set_postfix_str(f"measuring {state['measuring']}")

        result = work.bench(config, settings or [], progress=progress)
    typer.echo(f"{result.folder}: {result.done} batches done, {result.kept} found finished")
    typer.echo(f"restore report {result.folder}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of benchmark runs.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: the first run's.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Leave out pictures made from the data set.")] = False,
) -> None:
    """Write report.html and report.md about finished runs."""
    from restore.report.write import report as write

    written = write(runs, out, private=private)
    for first, second, different in written.differences:
        typer.echo(f"{first} and {second} are not in one table: {', '.join(different)} differ")
    typer.echo(f"{written.html}\n{written.markdown}")


@app.command()
def evaluate(
    results: Annotated[Path, typer.Argument(help="Folder of restored images.")],
    reference: Annotated[Path, typer.Option(help="Folder of true images with the same names.")],
    metrics: Annotated[str, typer.Option(help="psnr, ssim, lpips, fid, kid, is, pr; comma separated.")] = "psnr,ssim",
    full_reference: Annotated[Path | None, typer.Option(help="A larger set for FID, reported apart.")] = None,
    lpips_net: Annotated[str, typer.Option(help="alex or vgg.")] = "alex",
    weights: Annotated[
        list[str] | None, typer.Option(help="A metric's network: inception=FILE, vgg16=FILE or alexnet=FILE.")
    ] = None,
    device: Device = "auto",
    allow_small: Annotated[bool, typer.Option("--allow-small", help="FID on few images.")] = False,
    allow_incomplete: Annotated[bool, typer.Option("--allow-incomplete", help="Means over what there is.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file with everything.")] = None,
) -> None:
    """Compare a folder of results, from whatever program, with the truth."""
    from restore import atomic
    from restore.metrics.evaluate import evaluate as compare
    from restore.metrics.weights import weight_files
    from restore.restorer import choose_device

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    done = compare(
        results,
        reference,
        metrics=names,
        full_reference=full_reference,
        lpips_net=lpips_net,
        weights=weight_files(weights or []),
        device=str(choose_device(device)),
        allow_small=allow_small,
        allow_incomplete=allow_incomplete,
    )
    if out is not None:
        atomic.write_json(out, done.to_dict())
    typer.echo(f"{len(done.per_image)} of {done.expected} images compared")
    for name, estimate in done.means.items():
        typer.echo(f"{name} {estimate.mean:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]")
    for name, value in done.set_values.items():
        typer.echo(f"{name} {value:.4f}")
    for kind in ("missing", "mismatched", "extra"):
        names = getattr(done, kind)
        if names:
            typer.echo(f"{kind}: {len(names)}, e.g. {', '.join(names[:3])}")
    for note in done.notes:
        typer.echo(note)


@models_app.command("list")
def models_list() -> None:
    """All known checkpoints and whether they are on this machine."""
    from restore import zoo

    for line in zoo.listing():
        typer.echo(line)


@models_app.command("show")
def models_show(name: str) -> None:
    """Source, licence, size and checksum of a checkpoint."""
    from restore import zoo

    typer.echo(zoo.describe(name))


@models_app.command("pull")
def models_pull(name: str, offline: Offline = False) -> None:
    """Download a checkpoint into the cache, resuming an interrupted download."""
    from restore import zoo

    typer.echo(f"{name} is at {zoo.pull(name, offline=offline)}")


@models_app.command("import")
def models_import(name: str, file: Path) -> None:
    """Verify a checkpoint fetched by hand and put it into the cache."""
    from restore import zoo

    typer.echo(f"{name} is at {zoo.import_file(name, file)}")


@models_app.command("layers")
def models_layers(name: str, offline: Offline = False) -> None:
    """The self-attention layers of a backbone, under all their names."""
    from restore import restorer

    for line in restorer.load(name, device="cpu", offline=offline).layer_table():
        typer.echo(line)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    from operators import RestoreError

    interrupted = "restore: interrupted; finished files are kept, run the same command to continue"
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how typer reports Ctrl-C
            typer.echo(interrupted, err=True)
        sys.exit(code if isinstance(code, int) else 0)
    except RestoreError as error:
        typer.echo(f"restore: {error}", err=True)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(interrupted, err=True)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            typer.echo(f"restore: {error.format_message()}", err=True)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
