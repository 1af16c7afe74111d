"""Priors in float64, and weak predictions and their parts computed independently."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_sd import SCHEDULER, tiny_unet, tiny_vae

from restore.backbones.adm import ADM
from restore.backbones.schedule import Schedule
from restore.backbones.stable_diffusion import StableDiffusion
from restore.guidance import estimator

GOLDEN = Path(__file__).parent / "golden"
MIDDLE = "mid_block.attentions.0"


def relative(a, b):
    return float(torch.linalg.norm(a.detach() - b) / torch.linalg.norm(b))


def double_adm(**options):
    model = ADM.load(GOLDEN / "nets/adm_a.safetensors", head_channels=16, **options)
    model.network.double()
    return model


def latent_prior():
    null = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return StableDiffusion(tiny_unet().double(), tiny_vae().double(), Schedule.from_config(SCHEDULER), null)


def weak_of(guidance, backbone, x, t, condition=None):
    """eps_weak, taken from a guided prediction with scale 1: 2 eps − eps_guided."""
    with torch.no_grad(), estimator(backbone, guidance) as estimate:
        strong, eps = estimate(x, t, condition)
    return 2 * strong.eps - eps


def blur_matrix(n, taps, sigma):
    """(n, n): a Gaussian blur with reflection, written down entry by entry."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    weights = [torch.exp(torch.tensor(-0.5 * (d / sigma) ** 2, dtype=torch.float64)) for d in range(-taps, taps + 1)]
    for i in range(n):
        for d, weight in zip(range(-taps, taps + 1), weights, strict=True):
            j = abs(i + d)
            matrix[i, 2 * (n - 1) - j if j >= n else j] += weight / sum(weights)
    return matrix


def maps_of(model, x, t, path=MIDDLE):
    """(prediction, attention maps, (h, w)) of a layer, made from its input and its weights."""
    attn, seen = model.attention[path].module, []
    handle = attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        prediction = model.predict(x, t)
    handle.remove()
    h = attn.group_norm(seen[0].flatten(2)).transpose(1, 2)
    q, k = (to(h).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (attn.to_q, attn.to_k))
    return prediction, (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), tuple(seen[0].shape[-2:])
