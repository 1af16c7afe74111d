"""DISTS, VIF and ARNIQA, by torchmetrics: `pip install restore-diffusion[metrics]`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torchvision

from operators import RestoreError
from restore.backbones.weights import first_line, read_weights
from restore.metrics.scores import Score, fetch_model
from restore.metrics.single import round_to_8_bits
from restore.metrics.weights import find_weights

VIF_SIZE = 41  # pixels, for four scales of windows of up to 17


def require_torchmetrics(name: str) -> None:
    """Raise RestoreError if torchmetrics is not installed; name: the metric that needs it."""
    if find_spec("torchmetrics") is None:
        raise RestoreError(f"{name} needs torchmetrics; install restore-diffusion[metrics]")


def vif(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the visual information fidelity in pixels per image, (B,) float64, of (B, 3, H, W) in [-1, 1] rounded to 8
    bits (Sheikh & Bovik 2006, mean over channels); 1 if equal, above 1 if contrast is enhanced.

    Raises RestoreError for images smaller than VIF_SIZE, and without torchmetrics.
    """
    require_torchmetrics("vif")
    from torchmetrics.functional.image import visual_information_fidelity

    x, y = round_to_8_bits(image, truth)
    if min(x.shape[-2:]) < VIF_SIZE:
        raise RestoreError(f"VIF needs images of at least {VIF_SIZE} pixels, got {x.shape[-2]} x {x.shape[-1]}")
    return torch.cat([visual_information_fidelity(a[None], b[None]).view(1) for a, b in zip(x, y, strict=True)]).cpu()


def load_dists(options: Any, device: str = "cpu") -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return DISTS (Ding et al. 2020) as a function (image, truth) -> (B,) float64 of images rounded to 8 bits; 0 if
    equal.

    Its VGG-16 is that of `weights.find_weights`, and nothing is downloaded. Raises RestoreError.
    """
    require_torchmetrics("dists")
    from torchmetrics.functional.image import dists

    def make_trunk(**_: Any) -> torch.nn.Module:
        with torch.device("meta"):
            return torchvision.models.vgg16()

    path = find_weights("vgg16", options.weights)
    with mock.patch.object(dists, "vgg16", make_trunk):  # in place of downloading it
        network = dists.DISTSNetwork()
    state, own = read_weights(path), network.state_dict()
    try:
        trunk = {key: state["features." + key.split(".", 1)[1]] for key in own if key.endswith((".weight", ".bias"))}
    except KeyError as error:
        raise RestoreError(f"{path} must hold a complete vgg16, but {error} is missing") from error
    network.load_state_dict(own | trunk, assign=True)
    network.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def measure(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        x, y = (v.float().to(device) / 255 for v in round_to_8_bits(image, truth))
        return network(x, y).reshape(-1).double().cpu()

    return measure


def load_arniqa(options: Any, device: str = "cpu") -> Score:
    """Return ARNIQA (Agnolucci et al. 2024), on KonIQ-10k, as a function of images; prompts are not looked at.

    Raises RestoreError without torchmetrics, and if its encoder or regressor is missing.
    """
    require_torchmetrics("arniqa")
    from torchmetrics.functional.image.arniqa import _ARNIQA

    encoder, regressor = (fetch_model(name, options) for name in ("arniqa", "arniqa_regressor"))

    class Local(_ARNIQA):
        def _load_weights(self) -> None:
            state = {key.replace("model.", ""): value for key, value in read_weights(encoder).items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its authors' format, which torch is leaving
                head = torch.jit.load(regressor, map_location="cpu").state_dict()
            self.encoder.load_state_dict({key: value for key, value in state.items() if "projector" not in key})
            self.regressor.load_state_dict({"weight": head["weights"], "bias": head["biases"].reshape(1)})

    try:
        network = Local("koniq10k").eval().to(device)
    except (KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise RestoreError(
            f"metrics.models arniqa and arniqa_regressor must be the published files: {reason}"
        ) from error

    @torch.no_grad()
    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        (x,) = round_to_8_bits(images)
        return network(x.float().to(device) / 255, normalize=True).reshape(-1).double().cpu()

    return score
