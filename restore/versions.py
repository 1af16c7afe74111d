"""The versions of everything that touches a number."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "diffusers", "kornia", "numpy", "scipy", "pillow", "lpips", "torch-fidelity")


def versions() -> dict[str, str]:
    """Name to installed version, python first; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("restore", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
