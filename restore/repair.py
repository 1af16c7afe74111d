"""From what was found in a photo to one operator that undoes all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators import RestoreError
from operators.naming import AUTO
from operators.validate import require_number
from restore.images.findings import SENSITIVITY, Findings

ENLARGED, TINY = 2, 64  # the factor of a small photo, twice that where no side exceeds so many pixels
SHARPENED = 0.003  # least sigma on [-1, 1] by which a blur is undone: with an estimated kernel no measurement is exact


def read_auto(settings: dict[str, Any], blind: bool, **files: Path | None) -> dict[str, Any]:
    """Return the configuration of task auto with the `settings` that it knows, which are removed: sensitivity, sigma.

    Raises RestoreError for photos that are clean (not blind), and for a mask or a kernel.
    """
    if not blind:
        raise RestoreError("task=auto looks at damaged photos; name what is to be done to clean ones, such as task=sr4")
    for name, path in files.items():
        if path is not None:
            raise RestoreError(f"{name}={path} needs a task: inpaint for a mask, blur for a kernel")
    sensitivity = require_number(settings.pop("sensitivity", SENSITIVITY), "sensitivity", low=0.0, high=1.0)
    sigma = settings.pop("sigma", AUTO)
    sigma = None if sigma == AUTO else require_number(sigma, "sigma", low=0.0)
    return {"name": AUTO, "sensitivity": sensitivity, "sigma": sigma}


@dataclass(frozen=True)
class Repair:
    """What is done to a photo. config: as operators.build_operator takes it. seen, done: in words, for a person.
    keep_known: nothing but the damage is touched."""

    config: dict[str, Any]
    seen: tuple[str, ...]
    done: tuple[str, ...]
    keep_known: bool = False

    def describe(self) -> str:
        return f"seen: {', '.join(self.seen) or 'nothing wrong'}; done: {', '.join(self.done)}"


def choose_repair(found: Findings, sigma: float | None = None) -> Repair:
    """Return the operator of a photo: what happened to it, in the order in which it did.

    A blur by the lens or the camera's motion, noise, compression, and scratches on the print; or, if none of them, or
    noise in a tiny one, a smaller size. sigma: of the noise on [-1, 1], if somebody knows better than `found`.
    Raises RestoreError if nothing is wrong and the photo is not small.
    """
    chain: list[dict[str, Any]] = []
    seen, done = [], []
    if found.motion:
        chain.append({"name": "blur", "kernel": found.motion.kernel()})
        seen.append(f"motion over {found.motion.length:.0f} pixels at {found.motion.angle:.0f} degrees")
        done.append("sharpened")
    elif found.blur:
        size = 2 * max(2, round(4 * found.blur)) + 1
        chain.append({"name": "gaussian_blur", "std": found.blur, "kernel_size": size})
        seen.append(f"blur of {found.blur:.1f} pixels")
        done.append("sharpened")
    if found.noisy:
        seen.append(f"noise of {127.5 * found.sigma:.0f} in 255")
        done.append("noise removed")
    if found.jpeg:
        if not found.damage:  # the mask would have to come after it, and rounding has no part in a hole
            chain.append({"name": "jpeg", **found.jpeg})
        seen.append(f"JPEG of quality {found.quality}")
        done.append("blocks removed")
    if found.damage:
        chain.append({"name": "inpainting_mask", "mask": found.mask})
        seen.append(found.describe_damage())
        done.append("filled in")
    # What else was done to it would be enlarged with it, but for noise; a face of TINY pixels has a prior of its own.
    noise_alone = len(seen) == found.noisy
    if found.small and (not seen or (noise_alone and max(found.size) < TINY)):
        factor = ENLARGED * (2 if max(found.size) <= TINY else 1)
        chain.append({"name": "super_resolution", "factor": factor})
        seen.append(f"small, {found.size[1]} x {found.size[0]}")
        done.append(f"enlarged {factor} times")
    if not seen:
        raise RestoreError("nothing was found to restore; to enlarge the photo try task=sr2")
    if sigma is None:
        sigma = max(found.sigma, SHARPENED) if found.motion or found.blur else found.sigma
    if found.jpeg and found.damage:
        sigma = math.hypot(sigma, found.jpeg["loss"])
    config = (
        chain[0] if len(chain) == 1 else {"name": "compose", "operators": chain} if chain else {"name": "denoising"}
    )
    only_damage = len(chain) == 1 and not (found.noisy or found.jpeg) and bool(found.damage)
    noise = {"name": "gaussian", "sigma": sigma} if sigma else None
    return Repair({**config, "noise": noise}, tuple(seen), tuple(done), only_damage)
