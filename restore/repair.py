"""From what was found in a photo to one operator that undoes all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from operators import RestoreError
from restore.images.findings import Findings

AUTO = "auto"
JPEG_NOISE = 0.6  # of the steps' standard deviation q / sqrt(12), for a prior that knows white noise
ENLARGED = 2


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


def choose_repair(found: Findings) -> Repair:
    """Return the operator of a photo: what happened to it, in the order in which it did.

    A blur by the lens or the camera's motion, a smaller size, noise, compression, and scratches on the print. Raises
    RestoreError if nothing is wrong and the photo is not small.
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
    if found.small:
        chain.append({"name": "super_resolution", "factor": ENLARGED})
        seen.append(f"small, {found.size[1]} x {found.size[0]}")
        done.append(f"enlarged {ENLARGED} times")
    if found.noisy:
        seen.append(f"noise of {127.5 * found.sigma:.0f} in 255")
        done.append("noise removed")
    if found.compression:
        seen.append(f"JPEG of quality {found.compression.quality}")
        done.append("blocks removed")
    if found.damage:
        chain.append({"name": "inpainting_mask", "mask": found.mask})
        seen.append(f"scratches or dust on {found.damage:.1%}")
        done.append("filled in")
    if not (chain or found.noisy or found.compression):
        raise RestoreError("nothing was found to restore; to enlarge the photo try task=sr2")
    sigma = found.sigma
    config = chain[0] if len(chain) == 1 else {"name": "compose", "operators": chain} if chain else {"name": "denoising"}
    only_damage = len(chain) == 1 and not (found.noisy or found.compression) and bool(found.damage)
    noise = {"name": "gaussian", "sigma": sigma} if sigma else None
    return Repair({**config, "noise": noise}, tuple(seen), tuple(done), only_damage)
