"""The score estimate: weak branch x scale(t) x combination."""

from restore.guidance.base import SCHEDULES, Estimate, Guidance, Term, estimator
from restore.guidance.branches import BRANCHES, CFG, PAG, NullCondition, PerturbedAttention
from restore.guidance.combine import APG, COMBINATIONS, Rescale
from restore.guidance.config import build, chosen, describe
from restore.guidance.layers import resolve
from restore.guidance.targets import TARGETS, AttentionRecord

__all__ = [
    "APG",
    "BRANCHES",
    "CFG",
    "COMBINATIONS",
    "PAG",
    "SCHEDULES",
    "TARGETS",
    "AttentionRecord",
    "Estimate",
    "Guidance",
    "NullCondition",
    "PerturbedAttention",
    "Rescale",
    "Term",
    "build",
    "chosen",
    "describe",
    "estimator",
    "resolve",
]
