"""The `restore` command. Each verb parses, calls one public function and prints; imports come late."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from restore.app import models, research
from restore.app.look import look
from restore.app.options import (
    Backbone,
    Device,
    Guide,
    Inputs,
    InvertMask,
    KernelFile,
    Label,
    Layers,
    MaskFile,
    MaskThreshold,
    Memory,
    NegativePrompt,
    Offline,
    Out,
    Overwrite,
    PagScale,
    Png,
    Precision,
    Progress,
    Prompt,
    Quality,
    Quiet,
    Recursive,
    Seed,
    Strength,
    Target,
    Task,
    Vae,
    Version,
    check_settings,
    in_options,
    parse_guidance,
    parse_labels,
    parse_pag,
    parse_steps,
    report,
    split_settings,
)

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Restore images with diffusion priors, training-free.",
)
app.add_typer(models.app, name="models")


@app.callback()
def common(version: Version = False) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    inputs: Inputs,
    task: Task,
    out: Out,
    mask: MaskFile = None,
    invert_mask: InvertMask = False,
    mask_threshold: MaskThreshold = None,
    kernel: KernelFile = None,
    degrade: Annotated[
        bool, typer.Option("--degrade", help="Degrade clean images first, restore them, report PSNR and SSIM.")
    ] = False,
    backbone: Backbone = "embedded",
    sampler: Annotated[str | None, typer.Option(help="dps, psld, ... or module:function; default: fits.")] = None,
    quality: Quality = None,
    pag_scale: PagScale = None,
    layers: Layers = None,
    target: Target = None,
    strength: Strength = None,
    guidance: Guide = None,
    steps: Annotated[str | None, typer.Option(help="Number of steps; default: the preset's.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Posterior samples per image.")] = 1,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples computed together.")] = 1,
    device: Device = "auto",
    precision: Precision = "fp32",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, about 30 % slower.")] = False,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of a large photo per network call.")] = 16,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Less memory for large photos in latents.")] = False,
    label: Label = None,
    vae: Vae = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    data: Annotated[str | None, typer.Option(help="Presets published for ffhq or imagenet.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Compute what the authors' PSLD code does.")] = False,
    solve_at: Annotated[
        int | None, typer.Option(help="Restore at this side and bring back, as PSLD's numbers: 512.")
    ] = None,
    resample: Annotated[
        str | None, typer.Option(help="With --solve-at: bicubic, or nearest as in PSLD's code.")
    ] = None,
    overwrite: Overwrite = False,
    save_trajectory: Annotated[
        bool, typer.Option("--save-trajectory", help="Pictures of x0_hat and guidance through time.")
    ] = False,
    png: Png = False,
    recursive: Recursive = False,
    offline: Offline = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory and time of each photo, restore none.")
    ] = False,
    memory: Memory = None,
    force: Annotated[bool, typer.Option("--force", help="Try a photo that does not fit into the memory.")] = False,
    quiet: Quiet = False,
) -> None:
    """Restore images: `restore run photo.png --task sr4 -o restored/`."""
    from restore import restorer
    from restore.app import files
    from restore.app import run as work
    from restore.images.resampling import select_resampling
    from restore.memory import Planner
    from restore.task import load_task

    names, settings = split_settings(inputs)
    masked = {"mask": mask, "invert_mask": invert_mask, "mask_threshold": mask_threshold}
    found = load_task(task, settings, kernel=kernel, **masked)
    check_settings(settings, sampler, context.params)
    guided = parse_guidance(guidance, pag_scale, layers, target, strength)
    resampled = select_resampling(solve_at, resample, reference)
    quiet = quiet or str(out) == "-"
    names, out = context.with_resource(files.bind_standard_streams(names, out))
    photos = files.find_photos(names, out, png=png, recursive=recursive)
    files.check_outputs(photos, [photo.outputs(samples, degrade, save_trajectory) for photo in photos], overwrite)
    model = restorer.load(
        backbone,
        device=device,
        precision=precision,
        offline=offline,
        checkpointing=checkpointing,
        max_windows=max_windows,
        vae_tiling=vae_tiling,
        vae=vae,
    )
    with Progress(len(photos), quiet) as progress:
        report(
            work.restore_files(
                photos,
                model,
                found,
                parameters=settings,
                degrade=degrade,
                sampler=sampler,
                quality=quality,
                guidance=guided,
                steps=parse_steps(steps),
                samples=samples,
                seed=seed,
                batch_size=batch_size,
                label=label,
                prompt=prompt,
                negative_prompt=negative_prompt,
                data=data,
                reference=reference,
                resampled=resampled,
                overwrite=overwrite,
                save_trajectory=save_trajectory,
                callback=progress,
                planner=Planner(model, None if memory is None else memory * 1e9),
                announce=None if dry_run else progress.say,
                force=force,
                dry_run=dry_run,
            ),
            quiet,
        )


@app.command()
def degrade(
    inputs: Inputs,
    task: Task,
    out: Out,
    mask: MaskFile = None,
    invert_mask: InvertMask = False,
    mask_threshold: MaskThreshold = None,
    kernel: KernelFile = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    png: Png = False,
    recursive: Recursive = False,
) -> None:
    """Degrade clean images: `restore degrade photo.png --task motion-blur -o blurred/`."""
    import operators
    from operators.naming import check_known
    from restore.app import files
    from restore.app import run as work
    from restore.task import load_task

    names, settings = split_settings(inputs)
    masked = {"mask": mask, "invert_mask": invert_mask, "mask_threshold": mask_threshold}
    found = load_task(task, settings, kernel=kernel, **masked)
    check_known(settings, ["sigma", *operators.operator_options(found.config["name"])], f"task {task} has no setting")
    report(
        work.degrade_files(
            files.find_photos(names, out, png=png, recursive=recursive), found, seed=seed, overwrite=overwrite
        )
    )


@app.command()
def generate(
    out: Out,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 4,
    backbone: Backbone = "embedded",
    pag_scale: Annotated[float, typer.Option(help="PAG scale s, 0 is off.")] = 0.0,
    layers: Layers = None,
    target: Target = None,
    strength: Strength = None,
    cfg_scale: Annotated[float, typer.Option(help="CFG scale w of the paper's Eq. 14, 0 is off.")] = 0.0,
    guidance: Guide = None,
    labels: Annotated[str | None, typer.Option(help="Classes, by name or number, comma separated.")] = None,
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    steps: Annotated[str, typer.Option(help="Number of steps, or ddimN with --ddim-eta.")] = "250",
    ddim_eta: Annotated[float | None, typer.Option(help="DDIM eta; default: DDPM.")] = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 1,
    device: Device = "auto",
    precision: Precision = "fp32",
    vae: Vae = None,
    overwrite: Overwrite = False,
    offline: Offline = False,
) -> None:
    """Sample images from a prior: `restore generate -n 16 --pag-scale 1 -o samples/`."""
    from operators import RestoreError
    from restore import restorer
    from restore.app import samples

    numbers = parse_labels(labels)
    guided = None if guidance is None else parse_guidance(guidance, None, None, None, None)
    if guidance is not None and (pag_scale or cfg_scale or layers or target or strength):
        raise RestoreError("give either guidance= or pag_scale=, layers=, target=, strength= and cfg_scale=, not both")
    pag = parse_pag(target, strength)
    model = restorer.load(backbone, device=device, precision=precision, offline=offline, vae=vae)
    if guidance is None:
        guided = samples.generation_guidance(pag_scale, layers, cfg_scale, model, *pag)
    with Progress(n) as progress:
        for output in samples.generate_files(
            out,
            model,
            n=n,
            guidance=guided,
            labels=numbers,
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=parse_steps(steps),
            ddim_eta=ddim_eta,
            seed=seed,
            batch_size=batch_size,
            overwrite=overwrite,
            callback=lambda step: progress({**step, "total": 1}),
        ):
            typer.echo(str(output))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: the preset's.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="For LPIPS in the table: alexnet=FILE.")] = None,
    device: Device = "auto",
) -> None:
    """Restore the shipped faces under four degradations, by DPS and the best sampler, without and with PAG."""
    from restore.app.demo import run_demo
    from restore.metrics.weights import parse_weight_files

    with Progress(1) as progress:
        files = parse_weight_files(weights or [])
        summary = run_demo(out, steps=steps, device=device, weights=files, callback=progress)
    typer.echo(summary)


@app.command()
def ui(
    backbone: Backbone = "embedded",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets others on the network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="A public address for three days, through the servers of gradio.")
    ] = False,
    auth: Annotated[str | None, typer.Option(envvar="RESTORE_AUTH", help="user:password that lets in.")] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    offline: Offline = False,
) -> None:
    """Open a page in the browser for old photos (needs the extra `ui`)."""
    from operators import RestoreError
    from restore import restorer
    from restore.app.page import build_page, launch

    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise RestoreError("auth= must be user:password")
    alone = not share and host in ("127.0.0.1", "localhost", "::1")
    options = {"device": device, "precision": precision}
    model = restorer.load(backbone, offline=offline, **options)
    page = build_page(model, offline=offline, fetching=alone or auth is not None, **options)
    launch(page, server_name=host, server_port=port, share=share, auth=(user, password) if auth else None)


app.command()(look)
for verb in (research.train, research.bench, research.heads, research.report, research.evaluate):
    app.command()(verb)


def _options(arguments: list[str]) -> list[str]:
    """Parameters of the command that these arguments call, where they are options of it."""
    command: Any = typer.main.get_command(app)
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    return [item.name for item in command.params if any(name.startswith("--") for name in item.opts)]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    from operators import RestoreError

    sys.path.append(os.getcwd())  # where "module:attribute" finds one's own samplers and operators
    interrupted = "restore: interrupted; finished files are kept, run the same command to continue"
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how typer reports Ctrl-C
            typer.echo(interrupted, err=True)
        sys.exit(code if isinstance(code, int) else 0)
    except RestoreError as error:
        typer.echo(f"restore: {in_options(str(error), _options(sys.argv[1:]))}", err=True)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(interrupted, err=True)
        sys.exit(130)
    except OSError as error:
        # Of what this program's own files do not answer themselves: standard output, temporary files.
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise
        typer.echo("restore: cannot write: the disk is full", err=True)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            typer.echo(f"restore: {error.format_message()}", err=True)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
