"""Degradation operators y = A(x) + n."""

from operators.errors import RestoreError

__all__ = ["RestoreError"]
