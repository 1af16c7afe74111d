"""Classifier-free guidance (CFG, Ho & Salimans 2022): the weak pass has no condition.

eps + w (eps − eps_null),      w = guidance_scale − 1 of diffusers                               (PAG, eq. 14)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from operators import RestoreError
from restore.backbones.base import Backbone, Prediction
from restore.guidance.base import Term, WeakPass


@dataclass(frozen=True)
class CFG(Term):
    """Classifier-free guidance. See Term for scale (w), interval and schedule.

    null: condition of the weak pass (a negative prompt, say); None: the backbone's null_condition, and no weak pass if
        the strong one has no condition either.
    """

    null: Any = field(default=None, kw_only=True)

    def bind(self, backbone: Backbone) -> WeakPass:
        """Raises RestoreError if neither the backbone nor `null` gives a null condition."""
        null = backbone.null_condition if self.null is None else self.null
        if null is None:
            raise RestoreError("cfg needs a null condition, got a prior without one; try CFG(scale, null=...) or PAG")

        def eps(x_t: torch.Tensor, t: float, condition: Any, strong: Prediction) -> torch.Tensor | None:
            if condition is None and self.null is None:
                return None
            return backbone.predict(x_t, t, null).eps

        return WeakPass(eps)
