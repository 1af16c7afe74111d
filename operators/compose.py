"""Operators one after the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from operators import separable
from operators.base import Operator
from operators.errors import RestoreError


class Compose(Operator):
    """Operators one after the other: Compose(a, b).A(x) = b.A(a.A(x)), the same as `b @ a`.

    The noise is that of the last operator unless `noise` is given. Raises RestoreError where an
    earlier operator carries noise: noise in the middle of a chain would be degraded itself.
    """

    name = "compose"
    has_reference = True  # where all its parts have one

    def __init__(self, *operators: Operator, noise=None, image_size=None):
        if not operators or not all(isinstance(operator, Operator) for operator in operators):
            raise RestoreError("Compose needs at least one Operator; wrap other objects with as_operator first.")
        if any(operator.noise is not None for operator in operators[:-1]):
            raise RestoreError("only the last operator of a composition can carry noise; remove it from the others.")
        exact = all(operator.adjoint == "exact" for operator in operators)
        super().__init__(
            noise=operators[-1].noise if noise is None else noise,
            image_size=operators[0].image_size if image_size is None else image_size,
            adjoint="exact" if exact else "reference",
        )
        self.operators = operators

    @property
    def linear(self) -> bool:
        return all(operator.linear for operator in self.operators)

    def A(self, x: torch.Tensor) -> torch.Tensor:
        self._check_image(x)
        for operator in self.operators:
            x = operator.A(x)
        return x

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        for operator in reversed(self.operators):
            y = operator.A_adjoint(y)
        return y

    def image_shape(self, y: torch.Tensor) -> tuple[int, ...]:
        for operator in reversed(self.operators):
            y = torch.empty(operator.image_shape(y), device="meta")
        return tuple(y.shape)

    def factors(self, image_shape: Sequence[int]) -> separable.Factors | None:
        product, shape = (None, None, None), tuple(image_shape)
        for operator in self.operators:
            factors = operator.factors(shape)
            if factors is None:
                return None
            product = tuple(_matmul(after, before) for after, before in zip(factors, product, strict=True))
            shape = tuple(side if factor is None else len(factor) for side, factor in zip(shape, factors, strict=True))
        return product

    def with_adjoint(self, adjoint: str) -> Compose:
        twin = self._with(tuple(operator.with_adjoint(adjoint) for operator in self.operators), adjoint)
        twin.__dict__["_buffers"] = self.__dict__.setdefault("_buffers", {})
        return twin

    def __getitem__(self, rows) -> Compose:
        return self._with(tuple(operator[rows] for operator in self.operators), self.adjoint)

    def _with(self, operators: tuple[Operator, ...], adjoint: str) -> Compose:
        if all(new is old for new, old in zip(operators, self.operators, strict=True)):
            return self
        twin = copy.copy(self)
        twin.operators, twin.adjoint = operators, adjoint
        return twin


def _matmul(after: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor | None:
    if after is None or before is None:
        return before if after is None else after
    return after @ before
