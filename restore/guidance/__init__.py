"""The score estimate: weak branches, and how strong and weak predictions are combined."""

from restore.guidance.base import CFG, PAG, Estimate, Guidance, estimator
from restore.guidance.layers import resolve
from restore.guidance.targets import TARGETS

__all__ = ["CFG", "PAG", "TARGETS", "Estimate", "Guidance", "estimator", "resolve"]
