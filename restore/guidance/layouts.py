"""What a pipeline's call of its network means: its time, which rows have the prompt, what it holds for each image."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from operators import RestoreError
from restore.backbones.attention_layers import takes_positions
from restore.backbones.diffusers_parts import Timesteps
from restore.backbones.prefix import Tape

PARTS = ("auto", "all", "second", "first")
# diffusers' pipelines that do not say by do_classifier_free_guidance whether the batch is [without, with the prompt]:
# the part with it where the same latents are twice in the batch.
LAYOUTS = {
    "DiTPipeline": "first",
    **dict.fromkeys(
        (
            "AuraFlowPipeline",
            "LDMTextToImagePipeline",
            "PaintByExamplePipeline",
            "PixArtAlphaPipeline",
            "PixArtSigmaPipeline",
            "StableDiffusionGLIGENPipeline",
            "StableDiffusionImageVariationPipeline",
            "StableDiffusionUpscalePipeline",
            "StableUnCLIPImg2ImgPipeline",
            "StableUnCLIPPipeline",
            "TextToVideoSDPipeline",
            "VideoToVideoSDPipeline",
        ),
        "second",
    ),
}
# Those whose batch has further parts: for each edit, or for the picture that is edited.
EDITING = (
    "LEditsPPPipelineStableDiffusion",
    "LEditsPPPipelineStableDiffusionXL",
    "SemanticStableDiffusionPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
)
# Arguments of diffusers' networks with one row for each image.
PER_IMAGE = frozenset(
    "sample hidden_states timestep encoder_hidden_states class_labels timestep_cond guidance pooled_projections "
    "attention_mask encoder_attention_mask encoder_hidden_states_mask added_cond_kwargs added_time_ids "
    "down_block_additional_residuals mid_block_additional_residual down_intrablock_additional_residuals "
    "block_controlnet_hidden_states controlnet_block_samples".split()
)


class NetworkCall:
    """One call of a network by its pipeline.

    x: the batch, (B, ...). rows: those with the prompt. t: the time in the units of the scheduler. output: what the
    strong pass, of the whole batch, returned. cut: whether the weak pass may run on `rows` alone: every tensor among
    the arguments is known to have a row for each image, and no module keeps one between calls. Else it runs on the
    whole batch, which gives the same and takes longer. tapes: recordings of the strong pass, which are cut with it.
    scale: what time_scale says of the network, if a caller with many calls has asked it already.
    """

    def __init__(
        self,
        network: nn.Module,
        args: tuple,
        kwargs: dict,
        pipe: Any,
        conditional: str,
        tapes: Sequence[Tape] = (),
        scale: float | None = None,
    ) -> None:
        self.network, self.given, self.tapes = network, (args, kwargs), tapes
        self.arguments = _copy(self.given)  # a network may take what it needs out of the lists it is given
        named = name_arguments(network, args, kwargs)
        self.name = "sample" if "sample" in named else "hidden_states"
        if not isinstance(named.get(self.name), torch.Tensor) or "timestep" not in named:
            raise RestoreError(
                f"arguments of a {type(network).__name__} must be {self.name} and timestep, got {[*named]}"
            )
        self.x = named[self.name]
        t = named["timestep"]
        self.t = (time_scale(network) if scale is None else scale) * (
            float(t.flatten()[0]) if isinstance(t, torch.Tensor) else float(t)
        )
        self.rows = find_rows(pipe, named, self.x, conditional)
        self.output: Any = None
        self.cut = len(self.x[self.rows]) < len(self.x) and _is_per_image(named, self.x) and not _keeps_rows(network)

    def run(self) -> torch.Tensor:
        """Run the strong pass on the whole batch and return its prediction.

        Raises RestoreError if it changed a tensor of its arguments in place, since no second pass is possible then.
        """
        tensors = [leaf for leaf in tree_flatten(self.arguments)[0] if isinstance(leaf, torch.Tensor)]
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        self.output = self.network(*self.given[0], **self.given[1])
        if versions != [None if tensor.is_inference() else tensor._version for tensor in tensors]:
            name = type(self.network).__name__
            raise RestoreError(
                f"a guided network must leave the tensors it is given unchanged, got a {name} that does not"
            )
        for tape in self.tapes if self.cut else ():
            tape.cut(self.rows, len(self.x))
        return sample_of(self.output)

    def run_weak(self, x_t: torch.Tensor) -> torch.Tensor:
        """Return the prediction of a pass at x_t, which has the rows with the prompt, with the arguments as given."""
        x = x_t
        if self.cut:

            def part(value):
                batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == len(self.x)
                return value[self.rows] if batched else value

            args, kwargs = tree_map(part, self.arguments)
        else:
            args, kwargs = _copy(self.arguments)
            if len(x_t) < len(self.x):
                x = self.x.detach().clone()
                x[self.rows] = x_t
        if self.name in kwargs:
            kwargs[self.name] = x
        else:
            args = (x, *args[1:])
        output = sample_of(self.network(*args, **kwargs))
        return output if self.cut else output[self.rows]


def name_arguments(network: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of a call by the names that the network's class gives them."""
    names = [name for name in inspect.signature(type(unwrap(network)).forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | kwargs


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside the wrapper of torch.compile."""
    return getattr(network, "_orig_mod", network)


def time_scale(network: nn.Module) -> float:
    """Return the factor from the network's times to its scheduler's: 1000 where they run from 0 to 1.

    FLUX, Chroma and FLUX.2 multiply their times by 1000 themselves, QwenImage and AuraFlow let the embedding do it;
    Sana has its own factor.
    """
    network = unwrap(network)
    embeddings = [module for module in network.modules() if isinstance(module, Timesteps)]
    if takes_positions(network) or any(getattr(embedding, "scale", 1) == 1000 for embedding in embeddings):
        return 1000.0
    return 1.0 / getattr(getattr(network, "config", None), "timestep_scale", 1.0)


def is_packed(x: torch.Tensor) -> bool:
    """Whether x is a sequence of tokens (B, tokens, C), as FLUX's: their pipelines never put latents twice into the
    batch, but call the network twice, with the prompt first."""
    return x.ndim == 3


def find_rows(pipe: Any, named: dict[str, Any], x: torch.Tensor, conditional: str) -> slice:
    """Return the rows of the batch x that have the prompt. Raises RestoreError if "auto" cannot tell."""
    if conditional == "auto":
        conditional = find_layout(pipe, named, x)
    if conditional == "all":
        return slice(None)
    if len(x) % 2:
        raise RestoreError(f"conditional={conditional!r} needs a batch of two halves, got {len(x)} images")
    half = len(x) // 2
    return slice(half, None) if conditional == "second" else slice(0, half)


def find_layout(pipe: Any, named: dict[str, Any], x: torch.Tensor) -> str:
    """Return which part of the batch has the prompt: "all", "first" or "second" half. Raises RestoreError for layouts
    that are not known."""
    if isinstance(pipe, nn.Module) or is_packed(x):
        return "all"
    kinds, name = [kind.__name__ for kind in type(pipe).__mro__], type(pipe).__name__
    remedy = "try conditional='second', 'first' or 'all', the part of the batch with the prompt"
    if "ModularPipeline" in kinds:  # whose calls with and without the prompt must be told apart
        raise RestoreError(
            f"pipe must be an ordinary pipeline, got a {name}; try restore.integrations.diffusers.Guider"
        )
    if any(kind in EDITING for kind in kinds):
        raise RestoreError(
            f"pipe must put one prompt into its batch, got a {name}, which adds parts for edits;"
            " try conditional='all', which guides each part for itself"
        )
    does_cfg = getattr(pipe, "do_classifier_free_guidance", None)
    half = len(x) // 2
    doubled = len(x) % 2 == 0 and torch.equal(x[:half], x[half:])
    if does_cfg is not None:
        if does_cfg and not doubled:
            raise RestoreError(f"batch of {name} must be the same latents without and with the prompt; {remedy}")
        return "second" if does_cfg else "all"
    layout = next((LAYOUTS[kind] for kind in kinds if kind in LAYOUTS), None)
    if layout is not None:
        return layout if doubled else "all"
    conditions = [
        leaf for key in named.keys() - {"sample", "hidden_states", "timestep"} for leaf in _tensors(named[key])
    ]
    if conditions:
        raise RestoreError(f"layout of the batch must be known, got that of {name}; {remedy}")
    return "all"


def sample_of(output: Any) -> torch.Tensor:
    """Return the prediction in a network's output, a tuple or an object."""
    return output[0] if isinstance(output, tuple) else output.sample


def _copy(value: Any) -> Any:
    """Copy lists, tuples and mappings, not what they hold."""
    return tree_map(lambda leaf: leaf, value)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _is_per_image(named: dict[str, Any], x: torch.Tensor) -> bool:
    """Whether every tensor is known to have a row for each image, or one for all; in videos frames may be rows."""
    held = [(name, tensor) for name, value in named.items() for tensor in _tensors(value)]
    rows = all(name in PER_IMAGE and (tensor.ndim == 0 or len(tensor) in (1, len(x))) for name, tensor in held)
    return rows and x.ndim == 4


def _keeps_rows(network: nn.Module) -> bool:
    """Whether a module keeps a tensor as a plain attribute (the faces of an IP-Adapter FaceID), or attention is done by
    a processor that may look at the whole batch."""
    for module in network.modules():
        own = vars(module)
        for value in own.values():  # a loop, since this runs before every weak pass
            if isinstance(value, torch.Tensor) and value.ndim and len(value) > 1:
                return True
        processor = own.get("processor", own["_modules"].get("processor"))
        if processor is not None and not type(processor).__module__.startswith("diffusers.models."):
            return True
    return False
