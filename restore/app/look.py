"""`restore look`: what is wrong with a photo, and the commands that would restore it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from operators import RestoreError
from restore.app.options import Overwrite, Recursive, print_passed_over, split_settings

NOISY, BLURRED = 0.04, 1.3  # a command is proposed from here on: sigma on [-1, 1], std in pixels


def look(
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, globs; sensitivity=0 to 1 for damage.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the proposed mask, for you to correct: a PNG or a folder.")
    ] = None,
    recursive: Recursive = False,
    overwrite: Overwrite = False,
) -> None:
    """Show noise, blur, damage and colour of a photo, and what to run: `restore look photo.png`."""
    from operators.naming import check_known
    from operators.validate import require_number
    from restore.app import files
    from restore.images import io

    names, settings = split_settings(inputs)
    check_known(settings, ["sensitivity"], "look has no setting")
    sensitivity = require_number(settings.get("sensitivity", 0.5), "sensitivity", low=0.0, high=1.0)
    if out is None:
        if recursive or overwrite:
            raise RestoreError("recursive=True and overwrite=True need out=: they concern the masks that it writes")
        pairs = [(source, None) for source in files.expand_inputs(names)]
    else:
        pairs = [(photo.source, photo.target) for photo in files.find_photos(names, out, png=True, recursive=recursive)]
        taken = [target for _, target in pairs if os.path.exists(target)]
        if taken and not overwrite:
            raise RestoreError(f"{taken[0]} exists already: overwrite=True replaces it")
    failed = []
    for source, target in pairs:
        try:
            findings = inspect_photo(source, sensitivity)
            if target is not None:
                io.write_image(target, (findings["mask"] * 2 - 1)[0].expand(3, -1, -1))
        except RestoreError as error:
            failed.append(str(error))
        else:
            typer.echo("\n".join(_format_findings(source, findings, target)))
    print_passed_over(files.explain_passed_over(names, out, recursive))
    if failed:
        raise RestoreError("; ".join(failed))


def inspect_photo(source: str | Path, sensitivity: float = 0.5) -> dict[str, Any]:
    """Return width, height, hue ("grey", "one hue", "colour"), sigma on [-1, 1], blur (std in pixels), damage (share of
    the pixels) and mask (1, 1, H, W) of a photo. Raises RestoreError below 32 pixels a side.
    """
    from restore.images import estimate, io
    from restore.images.tint import estimate_tint

    record = io.read_image(source)
    mask = estimate.detect_damage(record.pixels, sensitivity)
    grey = record.grey or estimate.measure_grey_share(record.pixels) == 1
    return {
        "width": record.size[1],
        "height": record.size[0],
        "hue": "grey" if grey else "colour" if estimate_tint(record.pixels) is None else "one hue",
        "sigma": float(f"{estimate.estimate_noise(record.pixels):.3g}"),
        "blur": round(estimate.estimate_blur(record.pixels), 1),
        "damage": 1 - float(mask.mean()),
        "mask": mask,
    }


def _format_findings(source: Path, found: dict[str, Any], mask: Path | None) -> list[str]:
    hue = {"grey": "none, stays grey", "one hue": "a single hue, which is kept", "colour": "yes"}[found["hue"]]
    where = "see the mask" if mask else "-o mask.png draws it"
    share = f"scratches and dust on {found['damage']:.1%}, {where}" if found["damage"] else "none found"
    blur = f"about {found['blur']:.1f} pixels" if found["blur"] >= BLURRED else "none or very little"
    sigma, commands, run = found["sigma"], [], f"  restore run {shlex.quote(str(source))} --task"
    if found["damage"]:
        commands.append(f"{run} inpaint --mask {shlex.quote(str(mask)) if mask else 'auto'} sigma=auto -o restored/")
    if found["blur"] >= BLURRED:
        commands.append(f"{run} gaussian-blur std={found['blur']} sigma=auto -o restored/")
    elif sigma >= NOISY:
        commands.append(f"{run} denoise sigma=auto -o restored/")
    return [
        f"{source}  {found['width']} x {found['height']}",
        f"  colour  {hue}",
        f"  noise   sigma {sigma:g} on [-1, 1], {127.5 * sigma:.1f} of 255",
        f"  blur    {blur}",
        f"  damage  {share}",
        *(commands or ["  nothing found to restore; to enlarge it: --task sr2, sr4 or sr8"]),
    ]
