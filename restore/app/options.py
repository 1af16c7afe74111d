"""The command line's options and settings, and how typed text becomes values."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from operators import RestoreError
from operators.naming import AUTO, suggest


def print_version(requested: bool) -> None:
    if requested:
        from restore.versions import get_version

        typer.echo(f"restore {get_version()}")
        raise typer.Exit()


Inputs = Annotated[list[str], typer.Argument(help="Images, folders, globs, - for standard input; key=value settings.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A folder; for one image also a file, - for standard output.")]
Task = Annotated[str, typer.Option(help="sr4, sr8, inpaint, motion-blur, blur, denoise, colorize, ...; a YAML file.")]
ChosenTask = Annotated[
    str, typer.Option(help="auto: what is found in each photo; sr4, inpaint, denoise, blur, ...; a YAML file.")
]
MaskFile = Annotated[Path | None, typer.Option(help="Mask: white known, black missing; a folder of masks; auto.")]
InvertMask = Annotated[bool, typer.Option("--invert-mask", help="In the mask, white is missing.")]
MaskThreshold = Annotated[int | None, typer.Option(min=0, max=254, help="Values of a grey mask above this are white.")]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Include sub-folders.")]
KernelFile = Annotated[Path | None, typer.Option(help="What a point becomes in the blur: .npy, .txt or an image.")]
Backbone = Annotated[str, typer.Option(help="A model of `restore models list`, a folder or a checkpoint file.")]
ChosenBackbone = Annotated[
    str | None,
    typer.Option(
        help="A model of `restore models list`, a folder or a checkpoint file; default: embedded for faces up to 64 "
        "pixels, else embedded-photo."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
_PRECISIONS = "fp32, bf16, fp16, or auto: bf16 where the processor has it, else fp32"
Precision = Annotated[str, typer.Option(help=f"{_PRECISIONS}.")]
OwnPrecision = Annotated[
    str | None, typer.Option(help=f"{_PRECISIONS}; default: auto for priors that restore as well so, fp32 for others.")
]
Seed = Annotated[int, typer.Option(min=0, help="All noise is a function of the seed and the image's name.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Version = Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo finished files and replace existing ones.")]
Png = Annotated[bool, typer.Option("--png", help="Write PNG for every input format.")]
SaveTrajectory = Annotated[bool, typer.Option("--save-trajectory", help="Draw x0_hat and guidance over time.")]
PagScale = Annotated[float | None, typer.Option(help="PAG scale s, 0 is off; default: the preset's.")]
Layers = Annotated[str | None, typer.Option(help="PAG layers, e.g. i9 or input_blocks.9.1,m1; i5:0,3 for heads.")]
Target = Annotated[str | None, typer.Option(help="What replaces attention maps: identity, ..., '{seg: {sigma: 4}}'.")]
Strength = Annotated[str | None, typer.Option(help="u of (1-u) A + u A' in [0, 1]; by head: '{i5: {0: 0.5, 3: 1}}'.")]
Guide = Annotated[str | None, typer.Option("--guidance", help="YAML text or file: {pag: {scale: 1, layers: i9}}.")]
Quality = Annotated[str | None, typer.Option(help="fast, balanced or best: sampler and steps in one word.")]
Label = Annotated[str | None, typer.Option(help="Class, by name or number, for a class-conditional backbone.")]
Vae = Annotated[str | None, typer.Option(help="Autoencoder of a latent backbone: tiny, a name or a folder.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option", help="key=value of the loader: heads=4, schedule=cosine, per_channel=true; may be repeated."
    ),
]
Memory = Annotated[float | None, typer.Option(min=0.1, help="GB that may be used; default: all that is free.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Prompt = Annotated[str | None, typer.Option(help="Text for a text-conditional backbone.")]
NegativePrompt = Annotated[str | None, typer.Option(help="Text for the weak pass of CFG.")]


def split_settings(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split arguments into inputs and key=value settings; an existing file with '=' in its name is an input."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from restore.config import resolve_references

    settings = [a for a in arguments if "=" in a and a.split("=", 1)[0].isidentifier() and not os.path.exists(a)]
    inputs = [a for a in arguments if a not in settings]
    try:
        return inputs, resolve_references(OmegaConf.from_dotlist(settings))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RestoreError(f"{' '.join(settings)} cannot be read as settings: {str(error).splitlines()[0]}") from None


def parse_model_options(texts: list[str] | None) -> dict[str, Any]:
    """Return the keyword arguments of restore.load among `key=value` texts. Raises RestoreError for other texts."""
    names, options = split_settings(texts or [])
    if names:
        raise RestoreError(f"model_option must be key=value, such as heads=4, got {names[0]!r}")
    from restore.zoo.options import MODEL_OPTIONS

    known = (*MODEL_OPTIONS, "per_channel")
    for name in options:
        if name not in known:
            raise RestoreError(f"model_option has no key {name!r}; {suggest(name, known)}")
    return options


def check_settings(settings: dict[str, Any], sampler: str | None, options: Iterable[str]) -> None:
    """Check a sampler's settings before a model is loaded.

    sampler: None if the backbone decides; then the settings of every sampler are accepted. options: the command's own
    options. Raises RestoreError for a setting that is an option, one that the sampler does not have, and one out of its
    range.
    """
    from operators import ranges
    from operators.naming import check_known
    from restore import samplers

    for name, value in settings.items():
        if name in options:
            raise RestoreError(f"'{name}' is an option, not a setting: {name}={value}")
    known: dict[str, list[Any]] = {}  # the ranges of a parameter in all samplers that have it
    for function in map(samplers.find_sampler, samplers.SAMPLERS if sampler is None else [sampler]):
        own, hints = samplers.sampler_parameters(function), ranges.read_hints(function)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            return
        for name in own:
            known.setdefault(name, []).append(hints.get(name, Any))
    check_known(settings, known, "no sampler has the parameter" if sampler is None else f"sampler {sampler} has no")
    for name, value in settings.items():
        if not any(ranges.fits(value, hint) for hint in known[name]):
            ranges.check(value, known[name][0], name)


def parse_steps(steps: str | None) -> int | str | None:
    """Return a number of steps as an int; "ddimN" and the like stay text."""
    steps = None if steps is None else " ".join(steps.split())
    return int(steps) if steps is not None and re.fullmatch(r"[+-]?[0-9]+", steps) else steps


def parse_batch_size(batch_size: str) -> int | str:
    """Return a number of samples, or "auto". Raises RestoreError for other text."""
    if batch_size != AUTO and not (batch_size.isdecimal() and int(batch_size) >= 1):
        raise RestoreError(f"batch_size must be a whole number of 1 or more, or auto, got {batch_size}")
    return batch_size if batch_size == AUTO else int(batch_size)


def parse_ddim_eta(ddim_eta: str | None) -> float | None | str:
    """Return "preset" for nothing, None for "ddpm", else the number. Raises RestoreError for other text."""
    if ddim_eta in (None, "ddpm"):
        return "preset" if ddim_eta is None else None
    try:
        return float(ddim_eta)
    except ValueError:
        raise RestoreError(f"ddim_eta={ddim_eta!r} must be a number from 0 to 1, or ddpm") from None


def parse_labels(labels: str | None) -> list[str] | None:
    """Split comma-separated class numbers or names. Raises RestoreError if one is empty or negative."""
    names = None if labels is None else [label.strip() for label in labels.split(",")]
    if names is not None and not all(name and name[0] != "-" for name in names):
        raise RestoreError(f"labels={labels!r} must be comma-separated names or class numbers from 0, such as 207,360")
    return names


def parse_guidance(
    guidance: str | None, scale: float | None, layers: str | None, target: str | None, strength: str | None
) -> Any:
    """Return a Guidance, a PAGOverride or "preset", checked as far as possible without a network. Raises RestoreError.

    guidance: YAML text or a file, instead of the options of PAG. target, strength: a name, a number or YAML in braces.
    """
    from restore import guidance as guidances
    from restore.app.choice import PAGOverride
    from restore.config import read_yaml
    from restore.guidance import PAG

    target, strength = (
        read_yaml(text, name) if text is not None and text.lstrip().startswith("{") else text
        for text, name in ((target, "target"), (strength, "strength"))
    )
    if isinstance(strength, str):
        try:
            strength = float(strength)
        except ValueError:
            raise RestoreError(
                f"strength={strength!r} must be a number, or a mapping of heads such as {{i5: {{0: 0.5, 3: 1}}}}"
            ) from None
    override = PAGOverride(scale, layers, target, strength)
    if guidance is not None:
        if override != PAGOverride():
            raise RestoreError("give either guidance= or pag_scale=, layers=, target= and strength=, not both")
        return guidances.build_guidance(read_yaml(guidance, "guidance"))
    if override == PAGOverride():
        return "preset"
    if layers is not None and not layers.strip(" ,"):
        raise RestoreError("layers='' names no attention layer")
    override.apply(PAG(0.0, layers="m1"), [])  # raises for a wrong scale, target or strength
    return override


def translate_parameters(message: str, names: Iterable[str]) -> str:
    """Return a message of the library with its parameters (`solve_at=512`) as options (`--solve-at 512`).

    names: the parameters that are options of the command. `degrade=True` becomes a bare `--degrade`; a name is also
    translated in `steps must`, and with an underscore everywhere. Keywords of the loader become `--model-option`s.
    """
    if "model_option" in names:
        from restore.zoo.options import MODEL_OPTIONS

        own = "|".join(name for name in (*MODEL_OPTIONS, "per_channel") if name not in names)
        message = re.sub(rf"(?<![\w/.=-])(?=(?:{own})=)", "--model-option ", message)
    for name in names:
        option = "--" + name.replace("_", "-")

        def write(match: re.Match, option: str = option) -> str:
            value = (match["value"] or "").strip("'\"")
            return option if value in ("", "True") else f"{option} {value}"

        value = r"""=(?P<value>"[^"]*"|'[^']*'|[^\s,;:)]*)"""
        message = re.sub(rf"(?<![\w/.-]){name}{value}", write, message)
        message = re.sub(rf"(?<![\w/.-]){name}(?= must\b)", option, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w/.-]){name}\b(?!\()", option, message)
    return message


def announce_start(quiet: bool = False) -> None:
    """Tell a person at a terminal, before the imports that take seconds, that the command has begun."""
    if not quiet and sys.stderr.isatty():
        typer.echo("restore: loading ...", err=True)


def print_outcomes(outcomes: Iterable[Any], quiet: bool = False, passed_over: str | None = None) -> None:
    """Print each outcome's line as it comes, and its cautions and `passed_over` at the end, unless quiet.

    Raises RestoreError at the end if any failed, by reason."""
    failed: dict[str, list[str]] = {}
    cautions: dict[str, None] = {}
    count = 0
    for outcome in outcomes:
        count += 1
        if outcome.error is not None:
            failed.setdefault(outcome.error, []).append(outcome.photo.source.name)
        elif not quiet:
            typer.echo(outcome.line())
            cautions |= dict.fromkeys(filter(None, [outcome.caution]))
    for caution in cautions:
        typer.echo(f"restore: {caution}", err=True)
    if not quiet:
        print_passed_over(passed_over)
    if count == 1 and failed:
        raise RestoreError(next(iter(failed)))
    if failed:
        lines = [f"{reason} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for reason, names in failed.items()]
        raise RestoreError(f"{sum(map(len, failed.values()))} of {count} files failed: {'; '.join(lines)}")


def print_passed_over(line: str | None) -> None:
    """Print the result of files.explain_passed_over, if any, on the standard error."""
    if line is not None:
        typer.echo(f"restore: {translate_parameters(line, ['recursive'])}", err=True)
