"""Bytes and seconds of a Method before it runs, and how to stay within the memory there is."""

from restore.memory.available import available_memory
from restore.memory.count import LiveBytes
from restore.memory.plan import Plan, Planner, format_duration
from restore.memory.trace import SamplerTrace, trace_sampler

__all__ = ["LiveBytes", "Plan", "Planner", "SamplerTrace", "available_memory", "format_duration", "trace_sampler"]
