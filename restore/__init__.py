"""Training-free image restoration with diffusion priors."""

from operators import RestoreError
from restore.guidance import CFG, PAG
from restore.guidance.pipelines import guided
from restore.restorer import Restoration, Restorer, load

__all__ = ["CFG", "PAG", "RestoreError", "Restoration", "Restorer", "guided", "load"]
