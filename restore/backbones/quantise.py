"""Weights of transformers in 8 bits, by torchao."""

from __future__ import annotations

from torch import nn

from operators import RestoreError

# By choice, torchao's configuration: integers with a scale for each row, or numbers of 8 bits (e4m3).
QUANTISE = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def quantise_weights(network: nn.Module, choice: str) -> None:
    """Replace the weights of the linear layers of `network`; inputs and products keep their precision, and gradients
    to the input are those of the rounded weights.

    choice: a name in QUANTISE. Raises RestoreError if torchao is not installed.
    """
    try:
        from torchao import quantization
    except ImportError as error:
        raise RestoreError(f"quantise={choice} needs torchao; install restore-diffusion[quantised]") from error
    quantization.quantize_(network, getattr(quantization, QUANTISE[choice])())
