"""Objectives of the tests' own, for `objective: planted:NAME`."""

from __future__ import annotations

import torch

TARGETS: dict[bytes, torch.Tensor] = {}  # by the true image: what results are wanted to look like


def distance(results, truth):
    """Mean absolute difference to the planted results, or else to the truth; (N, 3, H, W) twice -> (N,)."""
    wanted = torch.stack([TARGETS.get(x.numpy().tobytes(), x) for x in truth])
    return (results - wanted).abs().mean((1, 2, 3))


def closeness(results, truth):
    return -distance(results, truth)


closeness.better = 1


def whole(results, truth):
    """One number for the set."""
    return distance(results, truth).mean()


def prompt_length(results, prompts):
    """Letters of each image's prompt: an objective of images and prompts."""
    return torch.tensor([float(len(prompt)) for prompt in prompts])


prompt_length.better = 1


def distance_to_grey(results, prompts):
    """Mean absolute value: an objective of images alone."""
    return results.abs().mean((1, 2, 3))
