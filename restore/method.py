"""Hyper-parameters by (backbone, task, sampler), read from configs/method/*.yaml with their source."""

from __future__ import annotations

import dataclasses
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

    steps: respacing (see restore.samplers.steps.respace). parameters: keywords of the sampler;
        without_guidance: those that differ when it runs unguided.
    guidance: mapping such as {"pag": {"scale": 1.0, "layers": ["input_blocks.9.1"]}}, or None.
    source: where the numbers come from.
    """

    sampler: str
    steps: int | str
    parameters: dict[str, Any] = field(default_factory=dict)
    without_guidance: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] | None = None
    source: str = ""

    def parameters_for(self, guidance: Guidance | None) -> dict[str, Any]:
        """The sampler's parameters; where the plain sampler was published with others, those without guidance."""
        guided = guidance is not None and any(term.scale for term in guidance.terms)
        return dict(self.parameters) if guided else {**self.parameters, **self.without_guidance}


@lru_cache
def _entries() -> tuple[dict, ...]:
    entries = []
    for file in sorted((configs_dir() / "method").glob("*.yaml")):
        config = OmegaConf.to_container(OmegaConf.load(file))
        entries += [{"sampler": config["sampler"], **entry} for entry in config["presets"]]
    return tuple(entries)


def find(backbone: str, task: str, sampler: str, data: str | None = None) -> Preset:
    """The first preset that names this backbone and task (an operator's `name`), else the sampler's default.

    An entry's `backbone` and `task` are a name, a list of names or "*". data: "ffhq" or "imagenet", where
    settings were published for both with one backbone; None takes the first. Raises RestoreError when no
    configuration file knows the sampler.
    """
    known = sorted({entry["sampler"] for entry in _entries()})
    if sampler not in known:
        raise RestoreError(f"unknown sampler '{sampler}'; known: {', '.join(known)}")
    for entry in _entries():
        matches = _matches(entry["backbone"], backbone) and _matches(entry["task"], task)
        if matches and entry["sampler"] == sampler and data in (None, entry.get("data", data)):
            known_fields = {item.name for item in dataclasses.fields(Preset)}
            return Preset(**{key: value for key, value in entry.items() if key in known_fields})
    raise RestoreError(f"no preset of sampler {sampler} fits backbone {backbone} and task {task}")


def reference(sampler: str) -> dict[str, Any]:
    """Parameters that make a sampler compute what its authors' code does. RestoreError where there are none."""
    file = configs_dir() / "method" / f"{sampler}.yaml"
    block = OmegaConf.to_container(OmegaConf.load(file)).get("reference") if file.is_file() else None
    if not block:
        raise RestoreError(f"sampler {sampler} has no reference preset: its default is what its authors' code does")
    return dict(block["parameters"])


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
