"""Stable Diffusion 1.x / 2.x (Rombach et al. 2022) as a noise-prediction network on latents.

The network is diffusers' `UNet2DConditionModel`, the autoencoder its `AutoencoderKL`; nothing of either
is rewritten here. `StableDiffusion.load` reads a diffusers folder, a hub id or a single checkpoint file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore.backbones.autoencoder import Latents, vae_precision
from restore.backbones.base import PREDICTION_TYPES, AttentionLayer, Prediction
from restore.backbones.schedule import Schedule
from restore.backbones.weights import as_dtype


class StableDiffusion(Latents):
    """A latent diffusion model with its autoencoder and the embedding of the empty prompt.

    unet: UNet2DConditionModel. vae: AutoencoderKL or AutoencoderTiny. schedule: the noise levels.
    null_condition: (1, tokens, width), what the text encoder makes of the empty prompt.
    prediction_type: "epsilon", "v_prediction" (Salimans & Ho 2022) or "sample".
    encode_prompt: text -> (1, tokens, width); None without a text encoder.

    x is a scaled latent (B, 4, h, w); `resolution`, `multiple` are in latent cells, of `downscale` pixels.
    Raises RestoreError when the parts do not belong together.
    """

    tiny_vae = "taesd"

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        schedule: Schedule,
        null_condition: torch.Tensor,
        *,
        prediction_type: str = "epsilon",
        encode_prompt=None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        checkpointing: bool = False,
    ) -> None:
        require_compatible(unet, null_condition, prediction_type)
        self.network = unet.eval().requires_grad_(False)
        self.schedule = schedule
        self.null_condition = null_condition.detach()
        self.prediction_type = prediction_type
        self.encode_prompt = encode_prompt
        self.attention: Mapping[str, AttentionLayer] = attention_layers(unet)
        self.channels = unet.config.in_channels
        self.resolution = _first(unet.config.sample_size)
        # The U-Net halves its input at every level but the last.
        self.multiple = 2 ** (len(unet.config.block_out_channels) - 1)
        self.use_vae(vae, slicing=vae_slicing, tiling=vae_tiling, checkpointing=checkpointing)
        if checkpointing:
            unet.enable_gradient_checkpointing()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        vae_dtype: torch.dtype | str | None = None,
        vae: nn.Module | None = None,
        config: str | Path | None = None,
        revision: str | None = None,
        offline: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        checkpointing: bool = False,
    ) -> StableDiffusion:
        """Load from a diffusers folder, a hub id ("owner/name") or a single .safetensors / .ckpt file.

        dtype: precision of the U-Net: a torch dtype or "fp32", "bf16", "fp16". vae_dtype: of the
            autoencoder; by default the same, except that with float16 it stays float32, because the
            decoder's activations overflow float16. vae: an autoencoder in place of the model's.
        config: for a single file, the diffusers folder or hub id of the same architecture.
        offline: use only what is on this machine. revision: commit or branch of a hub id.
        vae_slicing, vae_tiling: decode one image, one tile at a time. checkpointing: recompute
            activations in the backward pass, for about half the memory and a third more time.
        The text encoder is kept no longer than the empty prompt takes; `encode_prompt` reads it again (and keeps
        it, on the CPU). Raises RestoreError for anything that is not a complete model of this family.
        """
        from restore.backbones import stable_diffusion_files as files

        dtype = as_dtype(dtype)
        parts = files.read(source, config=config, revision=revision, offline=offline)
        return cls(
            # Module.to, because diffusers' own warns about modules to keep in float32 even where there are none.
            nn.Module.to(parts["unet"], device, dtype),
            nn.Module.to(parts["vae"] if vae is None else vae, device, vae_precision(vae_dtype, dtype)),
            Schedule.from_config(parts["scheduler"]),
            files.embed("", parts["tokenizer"], parts["text_encoder"]).to(device),
            prediction_type=parts["scheduler"].get("prediction_type", "epsilon"),
            encode_prompt=files.prompt_encoder(source, config=config, revision=revision, offline=offline),
            vae_slicing=vae_slicing,
            vae_tiling=vae_tiling,
            checkpointing=checkpointing,
        )

    def to(self, device: torch.device | str) -> StableDiffusion:
        """Move to `device`; returns self."""
        self.network.to(device)
        self.vae.to(device)
        self.null_condition = self.null_condition.to(device)
        return self

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | None = None) -> Prediction:
        """The prediction for a latent x_t (B, 4, h, w), in the dtype of x_t.

        t: 0..T−1, also between; a (B,) tensor gives every latent its own. condition: prompt embedding (1 or B,
        tokens, width); None is the empty prompt. Raises RestoreError for another condition and a t outside.
        """
        dtype = self.network.dtype
        text = self.null_condition if condition is None else condition
        if not isinstance(text, torch.Tensor) or text.ndim != 3 or len(text) not in (1, len(x_t)):
            raise RestoreError(
                f"condition must be a prompt's embedding (1 or {len(x_t)}, tokens, width), as encode_prompt makes it"
            )
        # The PSLD code tells the network T of T times, a step beyond its table.
        beyond = not isinstance(t, torch.Tensor) and t == self.schedule.time(len(self.schedule))
        alpha, sigma = self.schedule.levels(self.schedule.ts[-1] if beyond else t, x_t)
        times = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).reshape(-1)
        text = text.to(x_t.device, dtype).expand(len(x_t), -1, -1)
        out = scaled_gradients(
            lambda x: self.network(x, times, encoder_hidden_states=text, return_dict=False)[0], x_t, dtype
        )
        return Prediction.of(PREDICTION_TYPES[self.prediction_type], out, x_t, alpha, sigma)


HALF_SCALE = 2.0**10
"""The data term's gradient, spread over the activations, falls below float16's smallest normal number, 6e-5."""


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scaled_gradients(network, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """network(x) computed in `dtype`, result in x's; float16's gradients are scaled on their way (see HALF_SCALE)."""
    if dtype != torch.float16:
        return network(x.to(dtype)).to(x.dtype)
    out = network(ScaledGradient.apply(x, 1 / HALF_SCALE).to(dtype)).to(x.dtype)
    return ScaledGradient.apply(out, HALF_SCALE)


def attention_layers(unet: nn.Module) -> dict[str, AttentionLayer]:
    """Self-attention modules of a UNet2DConditionModel by diffusers path, in order of execution.

    Paper names are those of the original code: `input_blocks.8.1` is the attention of the ninth input
    block. A block with several transformer layers (SDXL) has `.transformer_blocks.n.attn1` appended.
    Cross-attention, also where a model puts it in attn1 (the x4 upscaler), is left out.
    """
    layers: dict[str, AttentionLayer] = {}

    def add(block: nn.Module, index: int, prefix: str, paper: str, short: str, downsampling: int) -> None:
        attentions = getattr(block, "attentions", None)
        if attentions is None or not hasattr(attentions[index], "transformer_blocks"):
            return
        blocks = attentions[index].transformer_blocks
        for n, transformer in enumerate(blocks):
            attn = transformer.attn1
            if attn is None or attn.is_cross_attention:
                continue
            path = f"{prefix}.attentions.{index}.transformer_blocks.{n}.attn1"
            tail, tail_short = (f".transformer_blocks.{n}.attn1", f".{n}") if len(blocks) > 1 else ("", "")
            layers[path] = AttentionLayer(
                path, paper + tail, short + tail_short, attn, attn.heads, attn.to_q.in_features, downsampling
            )

    # Input block 0 is conv_in; every residual block and every downsampler counts as one.
    number, downsampling = 1, 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            add(block, j, f"down_blocks.{i}", f"input_blocks.{number}.1", f"i{number}", downsampling)
            number += 1
        if block.downsamplers is not None:
            number, downsampling = number + 1, downsampling * 2
    if unet.mid_block is not None:
        add(unet.mid_block, 0, "mid_block", "middle_block.1", "m1", downsampling)
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            add(block, j, f"up_blocks.{i}", f"output_blocks.{number}.1", f"o{number}", downsampling)
            number += 1
        if block.upsamplers is not None:
            downsampling //= 2
    return layers


def require_compatible(unet: nn.Module, null_condition: torch.Tensor, prediction_type: str) -> None:
    """Refuse parts that do not make a plain text-to-image latent model. Raises RestoreError."""
    config = unet.config
    if config.in_channels != config.out_channels:
        raise RestoreError(
            f"the U-Net takes {config.in_channels} channels and predicts {config.out_channels}: it is an inpainting or "
            "upscaling model, which needs more than a latent; use a text-to-image model such as Stable Diffusion 1.5"
        )
    if config.addition_embed_type is not None or config.class_embed_type is not None:
        raise RestoreError(
            "the U-Net needs more conditions than a prompt (as SDXL does), which is not supported; "
            "use a Stable Diffusion 1.x or 2.x model"
        )
    width = null_condition.shape[-1]
    if width != _first(config.cross_attention_dim):
        raise RestoreError(
            f"the text encoder's embeddings are {width} wide but the U-Net attends to {config.cross_attention_dim}: "
            "they belong to different models; take both from the same one"
        )
    check_known([prediction_type], PREDICTION_TYPES, "unknown prediction type")


def _first(value):
    return value[0] if isinstance(value, (list, tuple)) else value
