"""Hyper-parameters by (backbone, task, sampler), read from configs/method/*.yaml with their source."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf

from operators import RestoreError
from restore.guidance import CFG, PAG, Guidance
from restore.paths import configs_dir


@dataclass(frozen=True)
class Preset:
    """One published or measured setting.

    steps: respacing (see restore.samplers.schedule.respace). parameters: keywords of the sampler.
    guidance: mapping such as {"pag": {"scale": 1.0, "layers": ["input_blocks.9.1"]}}, or None.
    source: where the numbers come from.
    """

    sampler: str
    steps: int | str
    parameters: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] | None = None
    source: str = ""


@lru_cache
def _entries() -> tuple[dict, ...]:
    entries = []
    for file in sorted((configs_dir() / "method").glob("*.yaml")):
        config = OmegaConf.to_container(OmegaConf.load(file))
        entries += [{"sampler": config["sampler"], **entry} for entry in config["presets"]]
    return tuple(entries)


def find(backbone: str, task: str, sampler: str | None = None) -> Preset:
    """The first preset that names this backbone and task (an operator's build name), else the sampler's default.

    An entry's `backbone` and `task` are a name, a list of names or "*". Raises RestoreError when no
    configuration file knows the sampler.
    """
    known = sorted({entry["sampler"] for entry in _entries()})
    if sampler is not None and sampler not in known:
        raise RestoreError(f"unknown sampler '{sampler}'; known: {', '.join(known)}")
    for entry in _entries():
        matches = _matches(entry["backbone"], backbone) and _matches(entry["task"], task)
        if matches and sampler in (None, entry["sampler"]):
            fields = {key: entry[key] for key in ("sampler", "steps", "guidance", "source") if key in entry}
            return Preset(parameters=dict(entry.get("parameters") or {}), **fields)
    raise RestoreError(f"no preset of sampler {sampler} fits backbone {backbone} and task {task}")


def default_layers(backbone: str) -> list[str]:
    """The layers of the first preset with PAG that names this backbone; [] when there is none."""
    for entry in _entries():
        pag = (entry.get("guidance") or {}).get("pag")
        if pag and entry["backbone"] != "*" and _matches(entry["backbone"], backbone):
            return list(pag["layers"])
    return []


def _matches(pattern: str | list[str], name: str) -> bool:
    return pattern == "*" or name == pattern or (isinstance(pattern, list) and name in pattern)


def build_guidance(config: dict[str, Any] | None) -> Guidance | None:
    """{"pag": {...}, "cfg": {...}} -> the sum of those guidances; None or {} -> None."""
    terms = []
    for name, options in (config or {}).items():
        if name not in ("pag", "cfg"):
            raise RestoreError(f"unknown guidance '{name}'; known: pag, cfg")
        try:
            terms.append({"pag": PAG, "cfg": CFG}[name](**options))
        except TypeError as error:
            raise RestoreError(f"guidance.{name}: {error}") from None
    total = None
    for term in terms:
        total = term if total is None else total + term
    return total
