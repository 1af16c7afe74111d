"""Operators one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.base import Operator
from operators.errors import RestoreError
from operators.jpeg import JPEGNoise
from operators.separable import Kronecker


class Compose(Operator):
    """Operators one after the other: Compose(a, b).A(x) = b.A(a.A(x)), the same as `b @ a`.

    noise: None: that of the last operator; if that is JPEG, the noise before it. Raises RestoreError if an earlier one
        has noise.
    """

    name = "compose"
    has_reference = True  # if all its parts have one

    def __init__(self, *operators: Operator, noise=None):
        if not operators or not all(isinstance(operator, Operator) for operator in operators):
            kinds = ", ".join(type(operator).__name__ for operator in operators) or "none"
            raise RestoreError(f"operators must be one or more Operators, got {kinds}; try as_operator for others")
        if any(operator.noise is not None for operator in operators[:-1]):
            raise RestoreError("noise must be set on the last operator of a composition only, got it on an earlier one")
        last = operators[-1].noise
        # of JPEG, the last link, the noise is that before it
        noise = last if noise is None else last.after(noise) if isinstance(last, JPEGNoise) else noise
        image_size = operators[0].image_size
        # a composition among them brings its parts, each with its own scale
        operators = tuple(part for one in operators for part in (one.operators if isinstance(one, Compose) else [one]))
        exact = all(operator.adjoint == "exact" for operator in operators)
        super().__init__(noise=noise, image_size=image_size, adjoint="exact" if exact else "reference")
        self.operators = operators

    @property
    def linear(self) -> bool:
        return all(operator.linear for operator in self.operators)

    @property
    def stationary(self) -> bool:
        return all(operator.stationary for operator in self.operators)

    @property
    def margin(self) -> tuple[int, int]:
        rows, columns, scale = 0, 0, 1
        for operator in self.operators:
            rows, columns = (m + scale * own for m, own in zip((rows, columns), operator.margin, strict=True))
            scale *= operator.factor if getattr(operator, "enlarges", False) else 1
        return rows, columns

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

    def factors(self, image_shape: Sequence[int]) -> Kronecker | None:
        product, shape = Kronecker(), tuple(image_shape)
        for operator in self.operators:
            factors = operator.factors(shape)
            if factors is None:
                return None
            pairs = zip(factors, product, strict=True)
            product = Kronecker(*(b if a is None else a if b is None else a @ b for a, b in pairs))
            shape = tuple(side if factor is None else len(factor) for side, factor in zip(shape, factors, strict=True))
        return product

    def with_adjoint(self, adjoint: str) -> Compose:
        twin = self._replace([operator.with_adjoint(adjoint) for operator in self.operators], adjoint)
        twin.__dict__["_buffers"] = self.__dict__.setdefault("_buffers", {})
        return twin

    def __getitem__(self, rows) -> Compose:
        return self._replace([operator[rows] for operator in self.operators], self.adjoint)

    def _replace(self, operators: list[Operator], adjoint: str) -> Compose:
        if all(new is old for new, old in zip(operators, self.operators, strict=True)):
            return self
        return self._with(operators=tuple(operators), adjoint=adjoint)
