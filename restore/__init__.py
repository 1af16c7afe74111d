"""Training-free image restoration with diffusion priors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from operators.errors import RestoreError

if TYPE_CHECKING:
    from restore.backbones.graphs import compile_networks
    from restore.guidance import CFG, PAG, SAG, SWG, TPG, TSG, Autoguidance
    from restore.guidance.pipelines import guided
    from restore.method import Method
    from restore.restorer import Restoration, Restorer, load

# Names are imported when they are used: `restore --help` and `restore models list` do not wait for torch.
_MODULES = {
    "restore.backbones.graphs": ("compile_networks",),
    "restore.guidance": ("Autoguidance", "CFG", "PAG", "SAG", "SWG", "TPG", "TSG"),
    "restore.guidance.pipelines": ("guided",),
    "restore.method": ("Method",),
    "restore.restorer": ("Restoration", "Restorer", "load"),
}

__all__ = [
    "Autoguidance",
    "CFG",
    "Method",
    "PAG",
    "RestoreError",
    "Restoration",
    "Restorer",
    "SAG",
    "SWG",
    "TPG",
    "TSG",
    "compile_networks",
    "guided",
    "load",
]


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'restore' has no attribute '{name}'")
