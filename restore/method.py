"""How an image is restored, in one record: for presets, the command line, benchmarks and protocols alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf

from operators import RestoreError
from operators.naming import check_known, suggest
from restore import guidance as guidances
from restore import samplers
from restore.guidance import Guidance
from restore.paths import configs_dir

QUALITIES = ("fast", "balanced", "best")


@dataclass(frozen=True)
class Method:
    """One way to restore.

    sampler: a name in restore.samplers.SAMPLERS, "module:function" or a function.
    steps: what the sampler takes (see restore.backbones.schedule.Schedule.timesteps); None: not settled yet.
    parameters: the sampler's own keywords. guidance: of its score estimate, None for none.
    unguided: parameters that replace those when there is no guidance: the plain sampler as it was published.
    source: where the numbers come from.
    """

    sampler: str | Callable
    steps: int | str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    guidance: Guidance | None = None
    unguided: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """From the keys of the same names, `guidance` as restore.guidance.build takes it. Raises RestoreError."""
        check_known(config, cls.__dataclass_fields__, "a method has no key")
        if not config.get("sampler"):
            raise RestoreError("a method needs a sampler")
        kept = {key: value for key, value in config.items() if value is not None}
        return cls(**{**kept, "guidance": guidances.build(config.get("guidance"))})

    def changed(
        self,
        *,
        steps: int | str | None = None,
        guidance: Guidance | None | str = "preset",
        parameters: Mapping[str, Any] | None = None,
    ) -> Method:
        """With what a caller gives in place of its own; guidance "preset" keeps it, None is the plain sampler.

        Where the result is not guided, `unguided` applies; what the caller gives always does. Raises RestoreError
        for a guidance that is none, an unknown parameter and one that is still missing.
        """
        guidance = guidances.chosen(guidance, self.guidance)
        own = dict(self.parameters)
        if guidance is None or not any(term.scale for term in guidance.terms):
            own |= self.unguided
        own |= parameters or {}
        samplers.check_parameters(self.sampler, own)
        return replace(
            self, steps=_steps(self.steps if steps is None else steps), guidance=guidance, parameters=own, unguided={}
        )

    def describe(self) -> dict[str, Any]:
        """Everything, ready for JSON; `from_config` reads it back where no function was given."""
        described = {
            "sampler": samplers.sampler_name(self.sampler),
            "steps": self.steps if isinstance(self.steps, (int, str, type(None))) else list(self.steps),
            "parameters": {key: samplers.sampler_name(v) if callable(v) else v for key, v in self.parameters.items()},
            "guidance": guidances.describe(self.guidance),
            "source": self.source,
        }
        return {**described, "unguided": dict(self.unguided)} if self.unguided else described


def find(
    backbone: str,
    task: str | None,
    operator: str,
    sampler: str | Callable | None = None,
    data: str | None = None,
    kind: str = "pixels",
    quality: str | None = None,
    linear: bool = True,
    windows: bool = False,
    several: bool = False,
) -> Method:
    """The first preset of configs/method that fits.

    backbone, task, operator: names (task: of configs/task, operator: an operator's `name`); an entry's `backbone`
        and `task` are a name, a list of names or "*", and its task may name either. kind: "pixels" or "latents", for
        entries that name one. sampler: None takes the one that configs/method/defaults.yaml names for both. linear:
        that y = A x + n is linear and Gaussian, which most of those samplers need. windows: that the image is larger
        than the backbone's. several: that more than one sample is wanted, which a sampler that draws nothing has not.
    data: "ffhq" or "imagenet", where settings were published for both with one backbone; None takes the first.
    A sampler without any preset file (a caller's own) has no settings but its own defaults.
    Raises RestoreError for an unknown sampler and where no preset fits.
    """
    if sampler is not None and quality is not None:
        raise RestoreError(f"quality='{quality}' chooses the sampler; give either quality or sampler")
    if data is not None:
        check_known(
            [data], {entry["data"] for entry in _entries() if "data" in entry}, "no settings were published for"
        )
    own = {}
    if sampler is None:
        own = default(backbone, task, operator, kind, quality or QUALITIES[1], linear, windows, several)
        sampler = own["sampler"]
    name = samplers.sampler_name(sampler)
    samplers.find_sampler(sampler)
    entries = [entry for entry in _entries() if entry["sampler"] == name]
    for entry in entries:
        fits = _matches(entry["backbone"], backbone) and any(_matches(entry["task"], n) for n in (task, operator))
        if fits and _matches(entry.get("kind", "*"), kind) and data in (None, entry.get("data", data)):
            wanted = {key: entry.get(key) for key in Method.__dataclass_fields__}
            return Method.from_config({**wanted, **own, "sampler": sampler})
    if entries:
        raise RestoreError(f"no preset of sampler {name} fits backbone {backbone} and task {task or operator}")
    return Method(sampler, source="no preset: the sampler's own defaults")


def default(
    backbone: str,
    task: str | None,
    operator: str,
    kind: str,
    quality: str,
    linear: bool = True,
    windows: bool = False,
    several: bool = False,
) -> dict[str, Any]:
    """The sampler, and the steps and parameters where they differ from its preset's, when no sampler is named."""
    if quality not in QUALITIES:
        raise RestoreError(f"unknown quality '{quality}'; {suggest(quality, QUALITIES)}")
    for entry in _yaml("defaults")["defaults"]:
        fits = _matches(entry["backbone"], backbone) and any(_matches(entry["task"], n) for n in (task, operator))
        fits = fits and _matches(entry["kind"], kind) and linear >= entry.get("linear", False)
        fits = fits and windows >= entry.get("windows", False)
        fits = fits and not (several and entry["sampler"] in samplers.DETERMINISTIC)
        if fits and _matches(entry.get("quality", "*"), quality):
            return {key: entry[key] for key in ("sampler", "steps", "parameters") if key in entry}
    raise RestoreError(f"configs/method/defaults.yaml names no sampler for {backbone}")


def reference(sampler: str | Callable) -> dict[str, Any]:
    """Parameters that make a sampler compute what its authors' code does. RestoreError where there are none."""
    name = samplers.sampler_name(sampler)
    block = _yaml(name).get("reference") if (configs_dir() / "method" / f"{name}.yaml").is_file() else None
    if not block:
        raise RestoreError(f"sampler {name} has no reference preset: its default is what its authors' code does")
    return dict(block["parameters"])


def default_layers(backbone: str) -> list[str]:
    """The layers of the first preset with PAG that names this backbone; [] when there is none."""
    for entry in _entries():
        pag = (entry.get("guidance") or {}).get("pag")
        if pag and entry["backbone"] != "*" and _matches(entry["backbone"], backbone):
            return list(pag["layers"])
    return []


@lru_cache
def _yaml(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(configs_dir() / "method" / f"{name}.yaml"))


@lru_cache
def _entries() -> tuple[dict, ...]:
    files = sorted(path.stem for path in (configs_dir() / "method").glob("*.yaml") if path.stem != "defaults")
    return tuple({"sampler": _yaml(name)["sampler"], **entry} for name in files for entry in _yaml(name)["presets"])


def _matches(pattern: str | list[str], name: str | None) -> bool:
    return pattern == "*" or name == pattern or (isinstance(pattern, list) and name in pattern)


def _steps(steps: Any) -> Any:
    """A number of steps as an int wherever it is one, however it was written."""
    return int(steps) if isinstance(steps, str) and steps.isdecimal() else steps
