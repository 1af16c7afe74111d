"""The command line's options and settings: what is typed becomes values here, once."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from operators import RestoreError


def print_version(asked: bool) -> None:
    if asked:
        from restore.versions import get_version

        typer.echo(f"restore {get_version()}")
        raise typer.Exit()


Inputs = Annotated[list[str], typer.Argument(help="Images, folders, globs, - for standard input; key=value settings.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="A folder, or for one image a file; - for standard output.")]
Task = Annotated[
    str,
    typer.Option(help="sr4, sr8, inpaint, gaussian-blur, motion-blur, blur, denoise, colorize, ... or a YAML file."),
]
MaskFile = Annotated[
    Path | None, typer.Option(help="Image of the known pixels (white) and the hole (black), a folder of such, or auto.")
]
InvertMask = Annotated[bool, typer.Option("--invert-mask", help="The mask has its hole white.")]
MaskThreshold = Annotated[int | None, typer.Option(min=0, max=254, help="A mask with greys: what is above is white.")]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Folders with their sub-folders.")]
KernelFile = Annotated[Path | None, typer.Option(help="Blur kernel: .npy, .txt or an image.")]
Backbone = Annotated[str, typer.Option(help="A model of `restore models list`, a folder or a checkpoint file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Seed = Annotated[int, typer.Option(min=0, help="All noise is a function of the seed and the image's name.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Version = Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="The version.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Redo finished files and replace any that are there.")]
Png = Annotated[bool, typer.Option("--png", help="Write PNG whatever the input's format.")]
PagScale = Annotated[float | None, typer.Option(help="PAG scale s, 0 is off; default: the preset's.")]
Layers = Annotated[str | None, typer.Option(help="PAG layers, e.g. i9 or input_blocks.9.1,m1; i5:0,3 for heads.")]
Target = Annotated[str | None, typer.Option(help="What PAG makes of the maps: identity, ..., '{seg: {sigma: 4}}'.")]
Strength = Annotated[str | None, typer.Option(help="u of (1-u) A + u A' in [0, 1]; by head: '{i5: {0: 0.5, 3: 1}}'.")]
Guide = Annotated[str | None, typer.Option("--guidance", help="YAML, or its file: {pag: {scale: 1, layers: i9}}.")]
Quality = Annotated[str | None, typer.Option(help="fast, balanced or best: sampler and steps in one word.")]
Label = Annotated[str | None, typer.Option(help="Class, by name or number, for a class-conditional backbone.")]
Vae = Annotated[str | None, typer.Option(help="tiny: the small autoencoder of a latent backbone; or a name, a folder.")]
Memory = Annotated[float | None, typer.Option(min=0.1, help="GB that may be used; default: what is free.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Prompt = Annotated[str | None, typer.Option(help="Text for a text-conditional backbone.")]
NegativePrompt = Annotated[str | None, typer.Option(help="Text for the weak branch of CFG.")]


def split_settings(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Inputs and key=value settings of one list; a file whose name holds '=' counts as an input."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = [a for a in arguments if "=" in a and a.split("=", 1)[0].isidentifier() and not Path(a).exists()]
    inputs = [a for a in arguments if a not in settings]
    try:
        return inputs, OmegaConf.to_container(OmegaConf.from_dotlist(settings), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RestoreError(f"{' '.join(settings)} is not readable: {str(error).splitlines()[0]}") from None


def check_settings(settings: dict[str, Any], sampler: str | None, options: Iterable[str]) -> None:
    """What a typing mistake makes of a sampler's settings, found before a model is loaded.

    sampler: None: the backbone decides, so a setting of any sampler may be right. options: names of the verb's own
    options, which no setting may repeat. Raises RestoreError for those, for a setting that the sampler does not have
    and for a value that is no number where one is needed.
    """
    from operators.naming import check_known
    from restore import samplers

    for name, value in settings.items():
        if name in options:
            raise RestoreError(f"'{name}' is not a setting but an option: {name}={value}")
    known: dict[str, Any] = {}
    for function in samplers.SAMPLERS if sampler is None else [sampler]:
        known |= samplers.sampler_parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    check_known(settings, known, "no sampler has the parameter" if sampler is None else f"sampler {sampler} has no")
    for name, value in settings.items():
        kind = str(known[name].annotation)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if re.match(r"float|int", kind) and not number and not (value is None and "None" in kind):
            raise RestoreError(f"{name} must be a finite number, not {value!r}")
        if isinstance(value, (list, dict)) and re.match(r"bool|str", kind):
            raise RestoreError(f"{name} must be one value, not {value!r}")


def parse_steps(steps: str | None) -> int | str | None:
    """A number of steps as an int, "ddimN" and the like as they are."""
    steps = None if steps is None else " ".join(steps.split())
    return int(steps) if steps is not None and re.fullmatch(r"[+-]?[0-9]+", steps) else steps


def parse_labels(labels: str | None) -> list[str] | None:
    """Class numbers or names, comma separated. Raises RestoreError where one is empty or a negative number."""
    if labels is None:
        return None
    found = [label.strip() for label in labels.split(",")]
    if not all(found) or any(label.startswith("-") for label in found):
        raise RestoreError(f"labels={labels!r} must be class numbers from 0 or names, comma separated, such as 207,360")
    return found


def parse_pag(target: str | None, strength: str | None) -> tuple[Any, Any]:
    """Target and strength as PAG takes them: a name, a number, or YAML between braces. Raises RestoreError."""
    from restore.config import read_yaml

    def value(text: str | None, what: str) -> Any:
        return read_yaml(text, what) if text is not None and text.lstrip().startswith("{") else text

    strength = value(strength, "strength")
    if isinstance(strength, str):
        try:
            strength = float(strength)
        except ValueError:
            raise RestoreError(
                f"strength={strength!r} must be a number, or for each head such as {{i5: {{0: 0.5, 3: 1}}}}"
            ) from None
    return value(target, "target"), strength


def parse_guidance(
    guidance: str | None, scale: float | None, layers: str | None, target: str | None, strength: str | None
) -> Any:
    """What --guidance or the options of PAG ask for, as run.restore_files takes it; checked as far as it can be
    without a network. Raises RestoreError."""
    from restore import guidance as guidances
    from restore.app.run import ChangedPAG
    from restore.config import read_yaml
    from restore.guidance import PAG

    change = ChangedPAG(scale, layers, *parse_pag(target, strength))
    given = change != ChangedPAG()
    if guidance is not None:
        if given:
            raise RestoreError("give either guidance= or pag_scale=, layers=, target= and strength=, not both")
        return guidances.build_guidance(read_yaml(guidance, "guidance"))
    if given:
        if layers is not None and not layers.strip(" ,"):
            raise RestoreError("layers='' names no attention layer")
        change.applied(PAG(0.0, layers="m1"), [])  # a wrong scale, target or strength is found here
    return change if given else "preset"


def in_options(message: str, names: Iterable[str]) -> str:
    """A message of the library, which speaks of parameters (`solve_at=512`), in a command's options (`--solve-at 512`).

    names: the parameters that are options of the command. `degrade=True` becomes a bare `--degrade`; a name with an
    underscore is translated without a value too.
    """
    for name in names:
        option = "--" + name.replace("_", "-")

        def written(match: re.Match, option: str = option) -> str:
            value = (match["value"] or "").strip("'\"")
            return option if value in ("", "True") else f"{option} {value}"

        value = r"""=(?P<value>"[^"]*"|'[^']*'|[^\s,;:)]*)"""
        message = re.sub(rf"(?<![\w/.-]){name}{value}", written, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w/.-]){name}\b(?!\()", option, message)
    return message


class Progress:
    """A tqdm bar over all sampling steps of a run, with the residual of the current one; nothing where quiet."""

    def __init__(self, files: int, quiet: bool = False) -> None:
        self.files, self.quiet, self.bar = files, quiet, None

    def say(self, outcome: Any) -> None:
        """Print an outcome's line above the bar."""
        from tqdm import tqdm

        if not self.quiet:
            tqdm.write(outcome.line(), file=sys.stderr)

    def __call__(self, step: dict) -> None:
        from tqdm import tqdm

        if self.quiet:
            return
        if self.bar is None:
            self.bar = tqdm(total=self.files * step["steps"] * step["total"], unit="step", leave=False)
        self.bar.update(step["count"])
        if "residual" in step:
            self.bar.set_postfix(residual=f"{float(step['residual'].mean()):.3g}", refresh=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def report(outcomes: Iterable[Any], quiet: bool = False) -> None:
    """Print each outcome's line as it comes, unless quiet; those that failed at the end, one sentence for each reason.

    Raises RestoreError when there were any.
    """
    failed: dict[str, list[str]] = {}
    count = 0
    for outcome in outcomes:
        count += 1
        if outcome.error is None:
            if not quiet:
                typer.echo(outcome.line())
        else:
            failed.setdefault(outcome.error, []).append(outcome.photo.source.name)
    lines = [f"{reason} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for reason, names in failed.items()]
    if count == 1 and failed:
        raise RestoreError(next(iter(failed)))
    if failed:
        total = sum(map(len, failed.values()))
        raise RestoreError("\n".join([f"{total} of {count} files could not be done", *lines]))
