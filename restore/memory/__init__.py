"""Bytes and seconds of a Method before it runs, and how to stay within the memory there is."""

from restore.memory.available import available_memory
from restore.memory.count import LiveBytes
from restore.memory.duration import Pace, format_duration, format_range, widen
from restore.memory.plan import Plan, Planner, choose_batch_size
from restore.memory.trace import SamplerTrace, trace_sampler

__all__ = [
    "LiveBytes",
    "Pace",
    "Plan",
    "Planner",
    "SamplerTrace",
    "available_memory",
    "choose_batch_size",
    "format_duration",
    "format_range",
    "trace_sampler",
    "widen",
]
