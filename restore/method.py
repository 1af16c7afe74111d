"""How an image is restored, in one record: for presets, the command line, benchmarks and protocols alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from operators import RestoreError
from operators.naming import check_known, suggest
from restore import guidance as guidances
from restore import samplers
from restore.config import read_yaml
from restore.guidance import Guidance
from restore.paths import configs_dir

QUALITIES = ("fast", "balanced", "best")


@dataclass(frozen=True)
class Method:
    """One way to restore: everything that is decided before the first step.

    sampler: a name in restore.samplers.SAMPLERS, "module:function" or a function.
    steps: as Schedule.timesteps takes them; None: not decided yet.
    parameters: the sampler's own keyword arguments.
    guidance: of the sampler's score estimate, or None.
    unguided: parameters that replace those above without guidance: the sampler's published settings.
    source: where the numbers come from.
    adjoint: "exact", or "reference" for the approximate transposes of the published code (operators.with_adjoint).
    """

    sampler: str | Callable
    steps: int | str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    guidance: Guidance | None = None
    unguided: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    adjoint: str = "exact"

    def __post_init__(self):
        object.__setattr__(self, "guidance", guidances.as_guidance(self.guidance))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """Build a method from a mapping with the keys of this class; `guidance` as in restore.guidance.build_guidance.

        Raises RestoreError for an unknown key and if there is no sampler.
        """
        check_known(config, cls.__dataclass_fields__, "a method has no key")
        if not config.get("sampler"):
            raise RestoreError("sampler must be given, got none; try sampler: diffpir")
        given = {key: value for key, value in config.items() if value is not None}
        return cls(**{**given, "guidance": guidances.build_guidance(config.get("guidance"))})

    def override(
        self,
        *,
        steps: int | str | None = None,
        guidance: Guidance | None | str = "preset",
        parameters: Mapping[str, Any] | None = None,
    ) -> Method:
        """Return the method with a caller's choices in place of its own.

        guidance: "preset" keeps the method's, None removes it; without guidance `unguided` applies, below the
        caller's parameters. Raises RestoreError for an invalid guidance, and unknown or missing parameters.
        """
        guidance = guidances.resolve_guidance(guidance, self.guidance)
        merged = dict(self.parameters)
        if guidance is None or not any(term.scale for term in guidance.terms):
            merged |= self.unguided
        merged |= parameters or {}
        samplers.check_parameters(self.sampler, merged)
        steps = self.steps if steps is None else steps
        if isinstance(steps, str) and steps.isdecimal():
            steps = int(steps)
        return replace(self, steps=steps, guidance=guidance, parameters=merged, unguided={})

    def check_samples(self, samples: int) -> None:
        """Raise RestoreError if several samples are requested of a deterministic sampler."""
        name = samplers.sampler_name(self.sampler)
        if samples > 1 and name in samplers.DETERMINISTIC:
            raise RestoreError(f"samples must be 1 for the deterministic sampler {name}, got {samples}")

    def describe(self) -> dict[str, Any]:
        """Return the method as plain data for JSON; `from_config` reads it back unless it holds functions."""
        described = {
            "sampler": samplers.sampler_name(self.sampler),
            "steps": self.steps if isinstance(self.steps, (int, str, type(None))) else list(self.steps),
            "parameters": {key: samplers.sampler_name(v) if callable(v) else v for key, v in self.parameters.items()},
            "guidance": guidances.describe_guidance(self.guidance),
            "source": self.source,
        }
        if self.unguided:
            described["unguided"] = dict(self.unguided)
        if self.adjoint != "exact":
            described["adjoint"] = self.adjoint
        return described


@dataclass(frozen=True)
class Situation:
    """What a preset is looked up by.

    backbone, operator, task: names (task: of configs/task; operator: an operator's `name`).
    kind: "pixels" or "latents", what the backbone works on.
    linear: whether y = A x + n is linear with Gaussian noise, or none.
    sigma: standard deviation of the Gaussian noise, 0 without noise; None: of another noise.
    windows: whether the image is larger than the backbone's.
    samples: how many are wanted of each image.
    data: "ffhq" or "imagenet", if settings were published for both with one backbone; None: the first.
    """

    backbone: str
    operator: str
    task: str | None = None
    kind: str = "pixels"
    linear: bool = True
    sigma: float | None = 0.0
    windows: bool = False
    samples: int = 1
    data: str | None = None

    def matches(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry of configs/method fits: its `backbone` and `task` are a name, a list of names or "*"; the
        task may be either the task's or the operator's name."""
        tasks = (self.task, self.operator)
        return (
            _matches(entry["backbone"], self.backbone)
            and any(_matches(entry["task"], name) for name in tasks)
            and _matches(entry.get("kind", "*"), self.kind)
            and self.data in (None, entry.get("data", self.data))
        )


def find_preset(situation: Situation, sampler: str | Callable | None = None, quality: str | None = None) -> Method:
    """Return the first preset of configs/method that fits.

    sampler: None takes the one that configs/method/defaults.yaml names for the situation and `quality` (one of
    QUALITIES, default "balanced"). A sampler without a preset file (a caller's own) has only its own defaults.
    Raises RestoreError for an unknown sampler, quality or data set, and if no preset fits.
    """
    if sampler is not None and quality is not None:
        raise RestoreError(f"quality must be left out with sampler=, got '{quality}'; it chooses the sampler")
    if situation.data is not None:
        published = {entry["data"] for entry in _presets() if "data" in entry}
        check_known([situation.data], published, "no settings were published for")
    default: dict[str, Any] = {}
    if sampler is None:
        default = find_default(situation, quality or "balanced")
        sampler = default.pop("sampler")
    name = samplers.sampler_name(sampler)
    samplers.find_sampler(sampler)
    presets = [entry for entry in _presets() if entry["sampler"] == name]
    for entry in presets:
        if situation.matches(entry):
            return _build_preset(entry, **default, sampler=sampler)
    if presets:
        task = situation.task or situation.operator
        raise RestoreError(f"no preset of sampler {name} fits backbone {situation.backbone} and task {task}")
    return Method(sampler, source="no preset: the sampler's own defaults")


def find_default(situation: Situation, quality: str) -> dict[str, Any]:
    """Return the default sampler, with steps and parameters if they differ from its preset's.

    Raises RestoreError for an unknown quality.
    """
    if quality not in QUALITIES:
        raise RestoreError(f"unknown quality '{quality}'; {suggest(quality, QUALITIES)}")
    for entry in _read_method_file("defaults")["defaults"]:
        if (
            situation.matches(entry)
            and situation.linear >= entry.get("linear", False)
            and (situation.sigma or 0.0) >= entry.get("sigma", 0.0)
            and situation.windows >= entry.get("windows", False)
            and not (situation.samples > 1 and entry["sampler"] in samplers.DETERMINISTIC)
            and _matches(entry.get("quality", "*"), quality)
        ):
            return {key: _select(entry[key], quality) for key in ("sampler", "steps", "parameters") if key in entry}
    raise RestoreError(f"configs/method/defaults.yaml names no sampler for {situation.backbone}")


def find_reference(sampler: str | Callable) -> dict[str, Any]:
    """Return the `reference` block of a sampler's file, which makes it compute what its authors' code does.

    Keys: parameters, and optionally adjoint. Raises RestoreError if the sampler has no such block.
    """
    name = samplers.sampler_name(sampler)
    is_shipped = (configs_dir() / "method" / f"{name}.yaml").is_file()
    block = _read_method_file(name).get("reference") if is_shipped else None
    if not block:
        raise RestoreError(
            f"reference must be False for sampler {name}: its file in configs/method has no reference block"
        )
    return block


def find_pag_layers(backbone: str) -> list[str]:
    """Return the layers of the first preset with PAG that names this backbone; [] if there is none."""
    for entry in _presets():
        pag = (entry.get("guidance") or {}).get("pag")
        if pag and entry["backbone"] != "*" and _matches(entry["backbone"], backbone):
            return list(pag["layers"])
    return []


def find_generation(backbone: str, steps: int | str | None = None, ddim_eta: float | None | str = "preset") -> Method:
    """Return the settings of a backbone's samples (configs/method/generate.yaml): steps, ddim_eta and, if published,
    PAG, which is used only on request. steps, ddim_eta: in place of the preset's; ddim_eta=None is DDPM."""
    presets = _read_method_file("generate")["presets"]
    entry = next(entry for entry in presets if _matches(entry["backbone"], backbone))
    preset = _build_preset(entry, sampler="generate")
    eta = preset.parameters["ddim_eta"] if ddim_eta == "preset" else ddim_eta
    return replace(preset, steps=preset.steps if steps is None else steps, parameters={"ddim_eta": eta})


def list_guided_presets(backbone: str) -> list[Method]:
    """Return the presets with guidance that name this backbone: of its samples, then of its restorations."""
    entries = [{"sampler": "generate", **entry} for entry in _read_method_file("generate")["presets"]]
    return [
        _build_preset(entry)
        for entry in (*entries, *_presets())
        if entry.get("guidance") and entry["backbone"] != "*" and _matches(entry["backbone"], backbone)
    ]


def _build_preset(entry: Mapping[str, Any], **override: Any) -> Method:
    return Method.from_config({key: entry.get(key) for key in Method.__dataclass_fields__} | override)


@lru_cache
def _read_method_file(name: str) -> dict[str, Any]:
    return read_yaml(configs_dir() / "method" / f"{name}.yaml")


@lru_cache
def _presets() -> tuple[dict, ...]:
    names = sorted({path.stem for path in (configs_dir() / "method").glob("*.yaml")} - {"defaults", "generate"})
    files = [_read_method_file(name) for name in names]
    return tuple({"sampler": file["sampler"], **entry} for file in files for entry in file["presets"])


def _select(value: Any, quality: str) -> Any:
    """The value of a quality where there is one for each, at any depth; null leaves it to the sampler."""
    if not isinstance(value, Mapping):
        return value
    if set(value) == set(QUALITIES):
        return value[quality]
    selected = {key: _select(item, quality) for key, item in value.items()}
    return {key: item for key, item in selected.items() if item is not None}


def _matches(pattern: str | list[str], name: str | None) -> bool:
    return pattern == "*" or name == pattern or (isinstance(pattern, list) and name in pattern)
