"""Guidance of the noise estimate: terms with weak passes, their scales in time, and how they are combined."""

from restore.guidance.autoguidance import Autoguidance
from restore.guidance.base import (
    SCHEDULES,
    Change,
    Estimate,
    Guidance,
    Term,
    WeakPass,
    as_guidance,
    estimator,
    remembers,
)
from restore.guidance.cfg import CFG
from restore.guidance.combine import APG, COMBINATIONS, FDG, Rescale, ZeroStar
from restore.guidance.config import TERMS, build_guidance, describe_guidance, resolve_guidance
from restore.guidance.layers import resolve_layers
from restore.guidance.pag import PAG
from restore.guidance.sag import SAG
from restore.guidance.signals import Record, record_guidance
from restore.guidance.slg import SLG
from restore.guidance.ssg import SSG
from restore.guidance.swg import SWG
from restore.guidance.tag import TAG
from restore.guidance.targets import TARGETS, AttentionRecord
from restore.guidance.tpg import TPG
from restore.guidance.tsg import TSG
from restore.guidance.tsr import TSR

__all__ = [
    "APG",
    "CFG",
    "COMBINATIONS",
    "FDG",
    "PAG",
    "SAG",
    "SCHEDULES",
    "SLG",
    "SSG",
    "SWG",
    "TAG",
    "TARGETS",
    "TERMS",
    "TPG",
    "TSG",
    "TSR",
    "AttentionRecord",
    "Autoguidance",
    "Change",
    "Estimate",
    "Guidance",
    "Record",
    "Rescale",
    "Term",
    "WeakPass",
    "ZeroStar",
    "as_guidance",
    "build_guidance",
    "describe_guidance",
    "estimator",
    "remembers",
    "record_guidance",
    "resolve_guidance",
    "resolve_layers",
]
