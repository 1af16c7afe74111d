"""Versions of the package and of the libraries that affect its results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "restore-diffusion"
LIBRARIES = ("torch", "torchvision", "diffusers", "kornia", "numpy", "scipy", "pillow", "lpips", "torch-fidelity")


def get_version() -> str:
    """Return the version of the installed package, or "checkout" if it is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "checkout"


def collect_versions() -> dict[str, str]:
    """Return the installed versions by name: python, this package and its libraries, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name, distribution in {"restore": DISTRIBUTION, **{library: library for library in LIBRARIES}}.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found
