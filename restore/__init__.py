"""Training-free image restoration with diffusion priors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from operators.errors import RestoreError

if TYPE_CHECKING:
    from restore.guidance import CFG, PAG
    from restore.guidance.pipelines import guided
    from restore.restorer import Restoration, Restorer, load

# Names are imported when they are used: `restore --help` and `restore models list` do not wait for torch.
_WHERE = {
    "CFG": "restore.guidance",
    "PAG": "restore.guidance",
    "Restoration": "restore.restorer",
    "Restorer": "restore.restorer",
    "guided": "restore.guidance.pipelines",
    "load": "restore.restorer",
}

__all__ = ["CFG", "PAG", "RestoreError", "Restoration", "Restorer", "guided", "load"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'restore' has no attribute '{name}'")
    globals()[name] = value = getattr(importlib.import_module(_WHERE[name]), name)
    return value
