"""The score estimate: weak branch x scale(t) x combination."""

from restore.guidance.base import SCHEDULES, Estimate, Guidance, Term, estimator
from restore.guidance.branches import BRANCHES, CFG, PAG, NullCondition, PerturbedAttention
from restore.guidance.combine import APG, COMBINATIONS, Rescale
from restore.guidance.config import build, chosen, describe
from restore.guidance.layers import resolve
from restore.guidance.sag import SAG, SelfAttention
from restore.guidance.signals import watched
from restore.guidance.targets import TARGETS, AttentionRecord
from restore.guidance.tpg import TPG, ShuffledTokens
from restore.guidance.tsg import TSG, PerturbedTime
from restore.guidance.weaker import SWG, Autoguidance, SmallWindows, WeakerModel

__all__ = [
    "APG",
    "BRANCHES",
    "CFG",
    "COMBINATIONS",
    "PAG",
    "SAG",
    "SCHEDULES",
    "SWG",
    "TARGETS",
    "TPG",
    "TSG",
    "AttentionRecord",
    "Autoguidance",
    "Estimate",
    "Guidance",
    "NullCondition",
    "PerturbedAttention",
    "PerturbedTime",
    "Rescale",
    "SelfAttention",
    "ShuffledTokens",
    "SmallWindows",
    "Term",
    "WeakerModel",
    "build",
    "chosen",
    "describe",
    "estimator",
    "resolve",
    "watched",
]
