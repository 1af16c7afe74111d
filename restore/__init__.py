"""Training-free image restoration with diffusion priors."""

from operators import RestoreError
from restore.guidance import CFG, PAG
from restore.restorer import Restoration, Restorer, load

__all__ = ["CFG", "PAG", "RestoreError", "Restoration", "Restorer", "load"]
