"""`restore look`: what is wrong with a photo, and the commands that would restore it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from operators import RestoreError
from restore.app.options import Overwrite, Recursive, print_passed_over, split_settings

if TYPE_CHECKING:
    from restore.images.findings import Findings


def look(
    inputs: Annotated[list[str], typer.Argument(help="Images, folders, globs; sensitivity=0 to 1 for damage.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the proposed mask, for you to correct: a PNG or a folder.")
    ] = None,
    recursive: Recursive = False,
    overwrite: Overwrite = False,
) -> None:
    """Show noise, blur, JPEG, damage and colour of a photo, and what to run: `restore look photo.png`."""
    from operators.naming import check_known
    from operators.validate import require_number
    from restore.app import files
    from restore.images import io
    from restore.images.findings import SENSITIVITY, inspect_photo

    names, settings = split_settings(inputs)
    check_known(settings, ["sensitivity"], "look has no setting")
    sensitivity = require_number(settings.get("sensitivity", SENSITIVITY), "sensitivity", low=0.0, high=1.0)
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
            found = inspect_photo(source, sensitivity)
            if target is not None:
                io.write_image(target, (found.mask * 2 - 1)[0].expand(3, -1, -1))
        except RestoreError as error:
            failed.append(str(error))
        else:
            given = f" sensitivity={sensitivity:g}" if "sensitivity" in settings else ""
            typer.echo("\n".join(_format_findings(source, found, target, given)))
    print_passed_over(files.explain_passed_over(names, out, recursive))
    if failed:
        raise RestoreError("; ".join(failed))


def _quote(path: Path) -> str:
    """A path for a command; one that would be an option is told to be a file."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _format_findings(source: Path, found: Findings, mask: Path | None, settings: str = "") -> list[str]:
    from restore.repair import choose_repair

    hue = {"grey": "none, stays grey", "one hue": "a single hue, which is kept", "colour": "yes"}[found.hue]
    where = "see the mask" if mask else "-o mask.png draws it"
    blur = f"about {found.blur:.1f} pixels" if found.blur else "none or very little"
    if found.motion:
        blur = f"motion over {found.motion.length:.0f} pixels at {found.motion.angle:.0f} degrees"
    lines = [
        f"{source}  {found.size[1]} x {found.size[0]}",
        f"  colour  {hue}",
        f"  noise   sigma {found.sigma:g} on [-1, 1], {127.5 * found.sigma:.1f} of 255",
        f"  blur    {blur}",
        f"  JPEG    {f'quality {found.quality}' if found.jpeg else 'does not show'}",
        f"  damage  {f'{found.describe_damage()}, {where}' if found.damage else 'none found'}",
    ]
    run, folder = f"  restore run {_quote(source)}", "-o restored/"
    try:
        repair = choose_repair(found)
    except RestoreError:
        return [*lines, "  nothing found to restore; to enlarge it:", f"{run} --task sr2 {folder}"]
    single = []  # one thing alone
    if found.damage:
        single.append(f"{run} --task inpaint --mask {_quote(mask) if mask else f'auto{settings}'} {folder}")
    if found.blur:
        single.append(f"{run} --task gaussian-blur std={found.blur} {folder}")
    if found.jpeg and not found.noisy:
        options = "" if "tables" in found.jpeg else f" quality={found.quality}"
        single.append(f"{run} --task jpeg{options} {folder}")
    if found.noisy:
        single.append(f"{run} --task denoise {folder}")
    lines += [f"  at once: {', '.join(repair.done)}", f"{run}{settings} {folder}"]
    if single and len(repair.done) > 1:
        lines += ["  or one thing alone, each from the photo itself:", *single]
    return lines
