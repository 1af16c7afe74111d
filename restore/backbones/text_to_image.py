"""Text-to-image pipelines of diffusers, as published: Stable Diffusion 1.x and 2.x, SDXL, SD3 and 3.5, FLUX.1.

Prompts are embedded first, and the text encoders released before the network is loaded: FLUX's are 10 GB beside its
24. Whatever an index names and no sampler needs (safety checker, feature extractor, image encoder) is not read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.backbones import pipeline_files as files
from restore.backbones.memory_options import free_memory
from restore.backbones.quantise import QUANTISE, quantise_weights
from restore.backbones.weights import first_line, hide_progress_bars, load_part

OFFLOAD = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
PIPELINES = {files.KINDS[kind][0]: kind for kind in ("stable-diffusion", "sdxl", "sd3", "flux")}
# Prompts whose embeddings are kept: FLUX's are 4 MB each. With more the encoders are read again between parts of them.
KEPT = 1000
OURS = ("num_inference_steps", "latents", "generator", "output_type", "return_dict", "num_images_per_prompt")


@dataclass
class PipelineOptions:
    """How diffusers loads a text-to-image pipeline, where it puts it, and what it is called with.

    variant: of the weight files, such as "fp16". scheduler: a class of diffusers in place of the stored one (Stable
    Diffusion 1.x and 2.x: of DDIM, as in the papers). quantise: "int8" or "fp8", the network's weights by torchao.
    device_map: of the network, accelerate's ("auto", "balanced", a mapping). offload: "model" or "sequential",
    diffusers' to the CPU. call: further arguments of the pipeline, such as height, width, max_sequence_length or, for
    the distilled FLUX.1-dev, guidance_scale.
    """

    variant: str | None = None
    scheduler: str | None = None
    quantise: str | None = None
    device_map: Any = None
    offload: str | None = None
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_known([self.offload] if self.offload else [], OFFLOAD, "pipeline.offload has no choice")
        check_known([self.quantise] if self.quantise else [], QUANTISE, "pipeline.quantise has no choice")
        if self.offload and self.device_map:
            raise RestoreError("a pipeline must have offload or device_map, got both; leave one of them out")


def detect_pipeline(folder: Path) -> str:
    """Return the kind of the pipeline in a folder, one of the values of PIPELINES. Raises RestoreError for others."""
    name = str(files.read_pipeline_index(folder, "a text-to-image pipeline").get("_class_name"))
    if name not in PIPELINES:
        hint = "; use kind=generation, with labels" if name == "DiTPipeline" else ""
        raise RestoreError(f"{folder} must hold one of {', '.join(PIPELINES)}, got a {name}{hint}")
    return PIPELINES[name]


class TextToImage:
    """An unmodified pipeline of diffusers in a folder, from prompts to images.

    upcoming, negatives: the prompts and negative prompts that will be needed, the former in order: embedded together,
        so that the encoders are read once.
    Raises RestoreError for other pipelines, and when used if parts are missing or do not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        options: PipelineOptions | None = None,
        upcoming: Sequence[str] = (),
        negatives: Sequence[str] = ("",),
    ) -> None:
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.kind, self.options = detect_pipeline(self.folder), options or PipelineOptions()
        self.upcoming, self.negatives = list(dict.fromkeys(upcoming)), tuple(negatives)
        self.pipe: Any = None
        self.embedded: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        if self.options.offload and self.device.type == "cpu":
            raise RestoreError("pipeline.offload must be null on the CPU, where there is nothing to offload from")

    def prepare(self, prompts: Sequence[str], negative: str | None = None) -> Any:
        """Return the pipeline, ready for these prompts and, if not None, this negative prompt.

        For Stable Diffusion 1.x and 2.x, whose text encoder is small, it embeds them itself when it is called.
        """
        if self.kind != "stable-diffusion":
            needed = [(text, False) for text in prompts] + [(negative, True)] * (negative is not None)
            if any(key not in self.embedded for key in needed):
                self._embed(needed)
        if self.pipe is None:
            with hide_progress_bars():
                self.pipe = self._read()
            self._place(self.pipe)
        return self.pipe

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        noise: Callable[[Sequence[int]], torch.Tensor],
        *,
        steps: int,
        cfg: float = 0.0,
        negative: str = "",
        generators: Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Return the images (B, 3, H, W) in [-1, 1] of the prompts, on the CPU.

        noise: function of a shape (B, C, h, w) -> the latents to start from. cfg: w of PAG's eq. 14, diffusers' scale
        minus 1; 0: no classifier-free guidance. negative: its prompt. generators: one for each image, of schedulers
        that draw noise. Raises RestoreError for options that the pipeline does not take.
        """
        own = self._check_call()  # before minutes of reading
        pipe = self.prepare(prompts, negative if cfg else None)
        scale = {"true_cfg_scale" if self.kind == "flux" else "guidance_scale": 1.0 + cfg}
        arguments = {"num_inference_steps": int(steps), "output_type": "pt", "generator": generators, **scale, **own}
        if self.kind == "stable-diffusion":
            arguments |= {"prompt": list(prompts), "negative_prompt": [negative] * len(prompts)}
        else:
            keys = [[(text, False) for text in prompts]] + [[(negative, True)] * len(prompts)] * bool(cfg)
            for rows in keys:
                for name in self.embedded[rows[0]]:
                    tensors = torch.cat([self.embedded[row][name] for row in rows])
                    arguments[name] = tensors.to(self.device, self.dtype)
        latents = noise((len(prompts), *self._latent_shape(pipe, own)))
        arguments["latents"] = F.pixel_unshuffle(latents, 2).flatten(2).mT if self.kind == "flux" else latents
        try:
            images = pipe(**arguments).images
        except ValueError as error:  # such as sides that the pipeline does not take
            raise RestoreError(f"the {type(pipe).__name__} cannot run: {first_line(error)}") from error
        return images.float().mul(2).sub(1).clamp(-1, 1).cpu()

    def _latent_shape(self, pipe: Any, own: dict[str, Any]) -> tuple[int, int, int]:
        network, downscale = self._network(pipe), pipe.vae_scale_factor
        packed = 4 if self.kind == "flux" else 1
        side = pipe.default_sample_size if packed > 1 else network.config.sample_size
        pixels = [own.get(name) or side * downscale for name in ("height", "width")]
        multiple = downscale * (2 if packed > 1 else 1)
        rows, columns = (n // multiple * (multiple // downscale) for n in pixels)
        return network.config.in_channels // packed, rows, columns

    def _network(self, pipe: Any) -> nn.Module:
        return getattr(pipe, files.KINDS[self.kind][1])

    def _check_call(self) -> dict[str, Any]:
        """Return options.call without what is for the embedding of prompts."""
        import diffusers

        pipeline = files.KINDS[self.kind][0]
        known = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
        for name in self.options.call:
            is_ours = name in OURS or "prompt" in name or name == "true_cfg_scale"
            if is_ours or (name == "guidance_scale" and self.kind != "flux"):
                hint = "; give guidance: {cfg: {scale: w}}, w = guidance_scale - 1" if "scale" in name else ""
                raise RestoreError(f"pipeline.call must leave {name} to the benchmark{hint}")
            check_known([name], [key for key in known if key not in OURS], f"{pipeline} has no argument")
        encoding = () if self.kind == "stable-diffusion" else ("clip_skip", "max_sequence_length")
        return {name: value for name, value in self.options.call.items() if name not in encoding}

    def _embed(self, needed: Sequence[tuple[str, bool]]) -> None:
        """Embed the needed prompts, each by itself, and the upcoming ones from there on; keep KEPT of them."""
        self.pipe = None  # the network and the encoders are never in memory together
        first = next((text for text, is_negative in needed if not is_negative), None)
        start = self.upcoming.index(first) if first in self.upcoming else len(self.upcoming)
        needed = [*needed, *((text, True) for text in self.negatives)]
        keys = dict.fromkeys([*needed, *((text, False) for text in self.upcoming[start:])])
        kept = {key: value for key, value in self.embedded.items() if key in keys or key[1]}
        free_memory(self.device)
        with hide_progress_bars():
            encoders = self._build(self._read_encoders())
        if self.kind == "sd3" and encoders.text_encoder_3 is None:  # its zeros have the width that the network says
            config = disk.read_json(self.folder / "transformer" / "config.json", required=True)
            encoders.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        self._place(encoders)
        for key in list(keys)[: max(KEPT, len(needed))]:
            if key not in kept:
                kept[key] = self._encode(encoders, *key)
        self.embedded = kept
        del encoders
        free_memory(self.device)

    @torch.no_grad()
    def _encode(self, pipe: Any, text: str, is_negative: bool) -> dict[str, torch.Tensor]:
        options = {k: v for k, v in self.options.call.items() if k in ("clip_skip", "max_sequence_length")}
        if self.kind == "flux":
            embeds, pooled, _ = pipe.encode_prompt(text, prompt_2=None, device=self.device, **options)
        else:
            others = {"prompt_2": None} | ({"prompt_3": None} if self.kind == "sd3" else {})
            options |= {"device": self.device, "do_classifier_free_guidance": False, **others}
            embeds, _, pooled, _ = pipe.encode_prompt(text, **options)
            if is_negative and not text and pipe.config.get("force_zeros_for_empty_prompt"):  # as SDXL was trained
                embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        prefix = "negative_" if is_negative else ""
        return {f"{prefix}prompt_embeds": embeds.cpu(), f"{prefix}pooled_prompt_embeds": pooled.cpu()}

    def _read_encoders(self) -> dict[str, Any]:
        encoders = files.KINDS[self.kind][3]
        dtype = self.dtype
        if files.T5 in encoders and dtype == torch.float16:  # in which T5's activations overflow
            dtype = torch.bfloat16
        if not files.has_text_encoders(self.folder, self.kind):
            raise RestoreError(f"{self.folder} must have the text encoders of its pipeline to embed prompts")
        return self._explain_variants(files.read_text_encoders, self.folder, self.kind, dtype, self.options.variant)

    def _read(self) -> Any:
        """Return the pipeline on the CPU, its network wherever device_map puts it."""
        import diffusers

        options, (_, part, network, _) = self.options, files.KINDS[self.kind]
        files.require_parts(self.folder, [part, "vae", "scheduler"])
        where = {"pickles": True, "variant": options.variant}
        own = {**where, "device_map": options.device_map}
        parts = {
            part: self._explain_variants(load_part, getattr(diffusers, network), self.folder, part, self.dtype, **own)
        }
        vae = disk.read_json(self.folder / "vae" / "config.json", required=True).get("_class_name", "AutoencoderKL")
        check_known([vae], ("AutoencoderKL", "AutoencoderTiny"), f"{self.folder / 'vae'} holds the unknown autoencoder")
        parts["vae"] = load_part(getattr(diffusers, vae), self.folder, "vae", self.dtype, **where)
        if options.quantise:
            quantise_weights(parts[part], options.quantise)
        if self.kind == "stable-diffusion":
            parts |= self._read_encoders()
        return self._build(parts | {"scheduler": self._read_scheduler()})

    def _read_scheduler(self) -> Any:
        import diffusers

        config = disk.read_json(self.folder / "scheduler" / "scheduler_config.json", required=True)
        name = self.options.scheduler or ("DDIMScheduler" if self.kind == "stable-diffusion" else config["_class_name"])
        known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
        check_known([name], known, "diffusers has no scheduler")
        return getattr(diffusers, name).from_config(config)

    def _build(self, parts: dict[str, Any]) -> Any:
        import diffusers

        cls = getattr(diffusers, files.KINDS[self.kind][0])
        index = files.read_pipeline_index(self.folder, "a text-to-image pipeline")
        options: dict[str, Any] = {}
        if self.kind == "stable-diffusion":
            options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        elif self.kind == "sdxl":
            zeros = index.get("force_zeros_for_empty_prompt", True)
            options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        absent = {name: None for name in known if name.startswith(("text_encoder", "tokenizer", "scheduler"))}
        absent |= {name: None for name in ("vae", files.KINDS[self.kind][1])}
        pipe = cls(**{**absent, **options, **parts})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _place(self, pipe: Any) -> None:
        if self.options.offload:
            try:
                getattr(pipe, OFFLOAD[self.options.offload])(device=self.device)
            except (ImportError, RuntimeError) as error:
                raise RestoreError(f"pipeline.offload must be null here: {first_line(error)}") from error
            return
        for name, part in pipe.components.items():
            mapped = self.options.device_map and name == files.KINDS[self.kind][1]
            if isinstance(part, nn.Module) and not mapped:
                part.to(self.device)

    def _explain_variants(self, read: Callable, *arguments, **options) -> Any:
        try:
            return read(*arguments, **options)
        except RestoreError as error:
            names = {path.name.split(".")[1].split("-")[0] for path in self.folder.glob("*/*.*.safetensors")}
            if self.options.variant in names or not names:
                raise
            raise RestoreError(f"{error}; try pipeline.variant={sorted(names)[0]}") from error
