"""What a user chooses of a method. The rest comes from the preset of the photo's task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators import RestoreError
from restore import guidance as guidances
from restore.guidance import Guidance
from restore.guidance.layers import Strength
from restore.method import Method


@dataclass(frozen=True)
class PAGOverride:
    """The preset's guidance with these options of PAG in place of its own; None keeps the preset's."""

    scale: float | None = None
    layers: str | Sequence[str] | None = None
    target: str | Mapping[str, Any] | None = None
    strength: Strength | None = None

    def apply(self, preset: Guidance | None, layers: Sequence[str]) -> Guidance | None:
        """Return the changed guidance; the preset's other terms stay. layers: PAG's if the preset has no PAG.

        Raises RestoreError for a preset with several PAG terms, one without PAG if no scale is given, and as PAG does.
        """
        changes = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        terms = guidances.describe_guidance(preset) or []
        pag = [term["pag"] for term in terms if "pag" in term]
        if len(pag) > 1:
            raise RestoreError("the preset has several PAG terms: give all of them by guidance=")
        if not pag and self.scale is None:
            raise RestoreError(f"{next(iter(changes))}= needs pag_scale=: the preset uses no PAG")
        if pag:
            pag[0].update(changes)
        else:
            terms.insert(0, {"pag": {"layers": list(layers), **changes}})
        return guidances.build_guidance(terms)


@dataclass(frozen=True)
class MethodChoice:
    """The arguments of Restorer.method that hold for all photos; guidance may be a PAGOverride too."""

    sampler: str | Callable | None = None
    quality: str | None = None
    guidance: Guidance | PAGOverride | None | str = "preset"
    steps: int | str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    reference: bool = False

    def resolve(self, restorer: Any, operator: Any, **situation: Any) -> Method:
        """Return the method for an operator. situation: task, size and samples, as of Restorer.method."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | situation
        if isinstance(self.guidance, PAGOverride):
            preset = restorer.method(operator, **options | {"guidance": "preset"}).guidance
            options["guidance"] = self.guidance.apply(preset, restorer.default_layers())
        return restorer.method(operator, **options)
