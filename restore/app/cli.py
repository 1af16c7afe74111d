"""The `restore` command. Each verb parses, calls one public function and prints; heavy imports come late."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from operators import RestoreError, naming
from restore.app import models, options, research
from restore.app.look import look
from restore.app.threads import let_threads_sleep

SUMMARY = "Restore images with diffusion priors, training-free."
app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}, help=SUMMARY)
app.add_typer(models.app, name="models")


@app.callback()
def common(version: options.Version = False) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    inputs: options.Inputs,
    out: options.Out,
    task: options.ChosenTask = "auto",
    mask: options.MaskFile = None,
    invert_mask: options.InvertMask = False,
    mask_threshold: options.MaskThreshold = None,
    kernel: options.KernelFile = None,
    degrade: Annotated[bool, typer.Option("--degrade", help="Degrade clean images, restore and score them.")] = False,
    backbone: options.ChosenBackbone = None,
    sampler: Annotated[
        str | None, typer.Option(help="dps, psld, ..., module:function; default: the best suited.")
    ] = None,
    quality: options.Quality = None,
    pag_scale: options.PagScale = None,
    layers: options.Layers = None,
    target: options.Target = None,
    strength: options.Strength = None,
    guidance: options.Guide = None,
    steps: Annotated[str | None, typer.Option(help="Number of steps; default: the preset's.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Posterior samples per image.")] = 1,
    seed: options.Seed = 0,
    batch_size: Annotated[str, typer.Option(help="Samples computed together; auto: what memory allows.")] = "1",
    device: options.Device = "auto",
    precision: options.OwnPrecision = None,
    model_option: options.ModelOption = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, about 30 % slower.")] = False,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of a large photo per network call.")] = 16,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Less memory for large photos in latents.")] = False,
    label: options.Label = None,
    vae: options.Vae = None,
    prompt: options.Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    data: Annotated[str | None, typer.Option(help="Use the presets published for ffhq or imagenet.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Compute what PSLD's own code computes.")] = False,
    solve_at: Annotated[int | None, typer.Option(help="Restore at this side length, then resize; PSLD: 512.")] = None,
    resample: Annotated[str | None, typer.Option(help="With --solve-at: bicubic, or nearest (PSLD's code).")] = None,
    overwrite: options.Overwrite = False,
    save_trajectory: options.SaveTrajectory = False,
    png: options.Png = False,
    recursive: options.Recursive = False,
    offline: options.Offline = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print memory and time of each photo.")] = False,
    memory: options.Memory = None,
    force: Annotated[bool, typer.Option("--force", help="Try photos that do not fit into memory.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Restore images: `restore run photo.png --task sr4 -o restored/`."""
    quiet = quiet or str(out) == "-"
    options.announce_start(quiet)
    from restore import restorer
    from restore.app import files
    from restore.app.choice import MethodChoice
    from restore.app.priors import FACES, PriorChooser
    from restore.app.progress import Progress
    from restore.app.run import Condition, RestoreJob
    from restore.images.resampling import select_resampling
    from restore.memory import Planner
    from restore.task import load_task

    names, settings = options.split_settings(inputs)
    masks = {"invert_mask": invert_mask, "mask_threshold": mask_threshold}
    selected = load_task(task, settings, mask=mask, kernel=kernel, blind=task != "auto" or not degrade, **masks)
    options.check_settings(settings, sampler, context.params)
    guided = options.parse_guidance(guidance, pag_scale, layers, target, strength)
    method = MethodChoice(sampler, quality, guided, options.parse_steps(steps), settings, data, reference)
    resampled = select_resampling(solve_at, resample, reference)
    names, out = context.with_resource(files.bind_standard_streams(names, out, recursive))
    photos = files.find_photos(names, out, png=png, recursive=recursive)
    files.check_outputs(photos, [photo.outputs(samples, degrade, save_trajectory) for photo in photos], overwrite)
    loading = options.parse_model_options(model_option)
    saving = {"checkpointing": checkpointing, "max_windows": max_windows, "vae_tiling": vae_tiling}
    own = precision if precision or sampler is None else "fp32"  # measured with the default samplers, without gradients
    machine = {"device": device, "precision": own, "offline": offline, "vae": vae, **saving, **loading}
    condition, limit = Condition(label, prompt, negative_prompt), memory and memory * 1e9
    together = options.parse_batch_size(batch_size)
    sampling = {"samples": samples, "seed": seed, "batch_size": together, "resampled": resampled}
    writing = {"degrade": degrade, "save_trajectory": save_trajectory, "overwrite": overwrite}
    writing["any_precision"] = precision in (None, naming.AUTO)
    limits = {"force": force, "dry_run": dry_run}
    with Progress(len(photos), quiet, together) as progress:
        load, model, chooser = partial(restorer.load, **machine), None, None
        if backbone is None:
            # Attention, classes and published settings: what only the prior of faces has, which knows photos too.
            special = sampler, label, prompt, vae, solve_at, data, *loading, None if guided == "preset" else guided
            only = FACES if any(option is not None for option in special) else None
            chooser = PriorChooser(load, only, limit, progress.watch)
        else:
            model = load(backbone)
            progress.watch(model.backbone)
        planner = None if model is None else Planner(model, limit)
        shown = {"announce": None if dry_run else progress.announce, "callback": progress}
        priors = {"chooser": chooser, "planner": planner}
        job = RestoreJob(model, selected, method, condition, **sampling, **writing, **limits, **shown, **priors)
        options.print_outcomes(
            progress.follow(job.run(photos)), quiet, files.explain_passed_over(names, out, recursive)
        )


@app.command()
def degrade(
    context: typer.Context,
    inputs: options.Inputs,
    task: options.Task,
    out: options.Out,
    mask: options.MaskFile = None,
    invert_mask: options.InvertMask = False,
    mask_threshold: options.MaskThreshold = None,
    kernel: options.KernelFile = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    png: options.Png = False,
    recursive: options.Recursive = False,
) -> None:
    """Degrade clean images: `restore degrade photo.png --task motion-blur -o blurred/`."""
    import operators
    from operators.naming import check_known
    from restore.app import files
    from restore.app.run import degrade_files
    from restore.task import load_task

    names, settings = options.split_settings(inputs)
    masks = {"invert_mask": invert_mask, "mask_threshold": mask_threshold}
    selected = load_task(task, settings, mask=mask, kernel=kernel, **masks)
    known = ["sigma", *operators.operator_options(selected.config["name"])]
    check_known(settings, known, f"task {task} has no setting")
    quiet = str(out) == "-"
    names, out = context.with_resource(files.bind_standard_streams(names, out, recursive))
    photos = files.find_photos(names, out, png=png, recursive=recursive)
    passed_over = files.explain_passed_over(names, out, recursive)
    options.print_outcomes(degrade_files(photos, selected, seed=seed, overwrite=overwrite), quiet, passed_over)


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the samples.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Number of images.")] = 4,
    backbone: options.Backbone = "embedded",
    pag_scale: Annotated[float, typer.Option(help="PAG scale s, 0 is off.")] = 0.0,
    layers: options.Layers = None,
    target: options.Target = None,
    strength: options.Strength = None,
    cfg_scale: Annotated[float, typer.Option(help="CFG scale, 0 is off: diffusers' guidance_scale - 1.")] = 0.0,
    guidance: options.Guide = None,
    labels: Annotated[str | None, typer.Option(help="Classes, by name or number, comma separated.")] = None,
    prompt: options.Prompt = None,
    negative_prompt: options.NegativePrompt = None,
    steps: Annotated[str | None, typer.Option(help="Number, or ddimN with --ddim-eta; default: the prior's.")] = None,
    ddim_eta: Annotated[str | None, typer.Option(help="DDIM eta, or ddpm; default: the prior's.")] = None,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed together.")] = 1,
    device: options.Device = "auto",
    precision: options.Precision = "fp32",
    model_option: options.ModelOption = None,
    vae: options.Vae = None,
    save_trajectory: options.SaveTrajectory = False,
    trajectory_steps: Annotated[
        int | None, typer.Option(min=1, help="Draw the first steps, so many; default: about ten of all.")
    ] = None,
    overwrite: options.Overwrite = False,
    offline: options.Offline = False,
) -> None:
    """Sample images from a prior: `restore generate -n 16 --pag-scale 1 -o samples/`."""
    from restore import restorer
    from restore.app.progress import Progress
    from restore.app.samples import generate_files, require_folder
    from restore.guidance import CFG
    from restore.method import find_generation

    require_folder(out)
    classes = options.parse_labels(labels)
    if guidance is not None and cfg_scale:
        raise RestoreError("give either guidance= or cfg_scale=, not both")
    guided = options.parse_guidance(guidance, pag_scale or None, layers, target, strength)
    model = restorer.load(
        backbone,
        device=device,
        precision=precision,
        offline=offline,
        vae=vae,
        **options.parse_model_options(model_option),
    )
    if guidance is None:
        preset = find_generation(model.name).guidance if pag_scale else None
        terms = [] if guided == "preset" else [guided.apply(preset, model.default_layers())]
        terms += [CFG(cfg_scale)] if cfg_scale else []
        guided = sum(terms[1:], terms[0]) if terms else None
    condition = {"labels": classes, "prompt": prompt, "negative_prompt": negative_prompt, "guidance": guided}
    sampling = {"steps": options.parse_steps(steps), "ddim_eta": options.parse_ddim_eta(ddim_eta)}
    sampling |= {"seed": seed, "batch_size": batch_size}
    drawn = save_trajectory or trajectory_steps is not None
    sampling |= {"save_trajectory": drawn, "trajectory_steps": trajectory_steps}
    finished = 0  # images, each batch of which is a run of its own
    with Progress(1) as progress:
        shown = {"callback": lambda step: progress({**step, "first": finished, "total": n})}
        for outcome in generate_files(out, model, n=n, overwrite=overwrite, **condition, **sampling, **shown):
            finished += 1
            typer.echo(outcome.line())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default: the preset's.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="The network of LPIPS: alexnet=FILE.")] = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    everything: Annotated[bool, typer.Option("--all", help="Every task, and faces in latents: many minutes.")] = False,
) -> None:
    """Degrade and restore a photo, and shipped faces by DPS and DiffPIR without and with PAG."""
    from restore.app.demo import run_demo
    from restore.app.progress import Progress
    from restore.metrics.weights import parse_weight_files

    with Progress(1) as progress:
        progress.say(f"restoring a photo and faces; pictures in {out}")
        files, show = parse_weight_files(weights or []), lambda path: progress.say(f"written: {path}")
        chosen = {"steps": steps, "device": device, "weights": files, "overwrite": overwrite, "everything": everything}
        summary = run_demo(out, **chosen, callback=progress, show=show)
    typer.echo(summary)


@app.command()
def ui(
    backbone: options.ChosenBackbone = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: the whole network.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Public address for three days, through gradio.")] = False,
    auth: Annotated[str | None, typer.Option(envvar="RESTORE_AUTH", help="Require this user:password.")] = None,
    device: options.Device = "auto",
    precision: options.OwnPrecision = None,
    model_option: options.ModelOption = None,
    offline: options.Offline = False,
) -> None:
    """Serve a page for old photos to your browser (needs the extra `ui`)."""
    from restore.app.page.serve import LOCAL, serve

    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise RestoreError("auth= must be user:password")
    machine = {"device": device, "precision": precision}
    private = not share and host in LOCAL

    def load() -> Any:
        from restore import restorer
        from restore.app.priors import FACES

        return restorer.load(backbone or FACES, offline=offline, **machine, **options.parse_model_options(model_option))

    building = {"offline": offline, "fetching": private or auth is not None, "named": backbone is not None, **machine}
    serve(load, host=host, port=port, building=building, share=share, auth=(user, password) if auth else None)


app.command()(look)
for verb in (research.train, research.bench, research.heads, research.report, research.evaluate):
    app.command()(verb)


def list_options(arguments: list[str]) -> list[str]:
    """Return the parameters, of the command that these arguments call, that are options."""
    command: Any = typer.main.get_command(app)
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    return [item.name for item in command.params if any(name.startswith("--") for name in item.opts)]


def translate(message: object) -> str:
    """Return a message of the library in the words of the command that was called."""
    return options.translate_parameters(str(message), list_options(sys.argv[1:]))


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    let_threads_sleep(os.environ)
    naming.MODULE_FOLDERS.append(os.getcwd())  # so that "module:attribute" finds the user's samplers and operators
    warnings.formatwarning = lambda message, *_: f"restore: {translate(message)}\n"
    for stream in (sys.stdout, sys.stderr):  # a file name may have bytes, and a terminal lack letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    interrupted = "restore: interrupted; finished files are kept, run the same command to continue"
    try:
        code = app(standalone_mode=False)
        if code == 130:  # how typer reports Ctrl-C
            typer.echo(interrupted, err=True)
        sys.exit(code if isinstance(code, int) else 0)
    except RestoreError as error:
        typer.echo(f"restore: {translate(error)}", err=True)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo(interrupted, err=True)
        sys.exit(130)
    except OSError as error:
        # A full disk while writing to standard output or a temporary file; other files raise RestoreError.
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
