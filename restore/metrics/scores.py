"""Scores of generated images by published models: how well an image fits its prompt, and how people would like it.

CLIP score  100 max(cos, 0) of the embeddings of image and prompt (Hessel et al. 2021, with 100 for their 2.5)
PickScore   exp(logit_scale) cos, CLIP fine-tuned on people's choices (Kirstain et al. 2023)
HPSv2       100 cos, CLIP fine-tuned on people's rankings (Wu et al. 2023), its weights of version 2.1
aesthetic   a linear network on CLIP's embedding of the image alone (LAION, sac+logos+ava1-l14-linearMSE)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore import disk, zoo
from restore.backbones.weights import first_line, hide_progress_bars, read_weights
from restore.images import io
from restore.zoo.download import fetch_file

BATCH = 16


@dataclass(frozen=True)
class PublishedModel:
    """A model that scores need. place: a hub id, `owner/name/file` of the hub, or an address; megabytes: to fetch."""

    place: str
    megabytes: int
    licence: str
    page: str


MODELS = {
    "clip_l": PublishedModel(
        "openai/clip-vit-large-patch14", 1710, "MIT", "https://huggingface.co/openai/clip-vit-large-patch14"
    ),
    "clip_h": PublishedModel(
        # Of it only the configuration and the processor are needed, by PickScore and HPSv2.
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        4,
        "MIT",
        "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    "pick_score": PublishedModel(
        "yuvalkirstain/PickScore_v1", 3940, "MIT", "https://huggingface.co/yuvalkirstain/PickScore_v1"
    ),
    "hpsv2": PublishedModel(
        "xswu/HPSv2/HPS_v2.1_compressed.pt", 1970, "Apache-2.0", "https://huggingface.co/xswu/HPSv2"
    ),
    "arniqa": PublishedModel(
        "https://github.com/miccunifi/ARNIQA/releases/download/weights/ARNIQA.pth",
        100,
        "Apache-2.0",
        "https://github.com/miccunifi/ARNIQA",
    ),
    "arniqa_regressor": PublishedModel(
        "https://github.com/miccunifi/ARNIQA/releases/download/weights/regressor_koniq10k.pth",
        1,
        "Apache-2.0",
        "https://github.com/miccunifi/ARNIQA",
    ),
    "aesthetic": PublishedModel(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        4,
        "Apache-2.0",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
}


def find_place(name: str, models: Mapping[str, str]) -> str:
    """Return where a model of MODELS is: the user's folder, file or hub id, else the published place.

    Raises RestoreError for names that are not in MODELS and for paths without a file.
    """
    check_known(models, MODELS, "scores have no model")
    given = str(models.get(name) or MODELS[name].place)
    path = Path(given).expanduser()
    if path.exists() or name not in models:
        return str(path) if path.exists() else given
    if given.startswith(("/", ".", "~")) or "/" not in given:
        raise RestoreError(f"metrics.models.{name} must be a folder, a file or a hub id, but {given} does not exist")
    return given


def describe_download(name: str) -> str:
    """Return size, licence and place of a published model of MODELS, in one line."""
    model = MODELS[name]
    return f"{model.megabytes} MB if it is not here yet, {model.licence}, {model.page}"


def describe_models(names: Sequence[str], models: Mapping[str, str]) -> dict[str, Any]:
    """Return the protocol's entry of these models: their places, and of local weights the SHA-256."""
    described: dict[str, Any] = {}
    for name in sorted(set(names)):
        place = find_place(name, models)
        path = Path(place)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
        described[name] = {file.name: disk.hash_file_once(file) for file in files} or place
    return described


Score = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]  # images (B, 3, H, W) in [-1, 1], prompts -> (B,)


def load_clip_score(options: Any, device: str = "cpu") -> Score:
    """Return the CLIP score as a function of images and prompts."""
    clip = _load_clip("clip_l", options, device)
    return lambda images, prompts: 100 * clip.cosine(images, prompts).clamp(min=0)


def load_pick_score(options: Any, device: str = "cpu") -> Score:
    """Return PickScore as a function of images and prompts."""
    clip = _load_clip("pick_score", options, device, "clip_h")
    return lambda images, prompts: clip.network.logit_scale.exp().cpu() * clip.cosine(images, prompts)


def load_hpsv2(options: Any, device: str = "cpu") -> Score:
    """Return HPSv2 as a function of images and prompts."""
    clip = _load_clip("hpsv2", options, device, "clip_h")
    return lambda images, prompts: 100 * clip.cosine(images, prompts)


def load_aesthetic(options: Any, device: str = "cpu") -> Score:
    """Return the aesthetic score as a function of images; prompts are not looked at."""
    clip = _load_clip("clip_l", options, device)
    state = read_weights(fetch_model("aesthetic", options))
    indices = sorted(int(key.split(".")[1]) for key in state if re.fullmatch(r"layers\.\d+\.weight", key))
    if not indices:
        raise RestoreError("metrics.models.aesthetic must hold linear layers layers.N.weight; give the published file")

    def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        x = clip.embed(images, [""] * len(images))[0]
        for i in indices:  # the published network has no activations, and in use no dropout
            x = nn.functional.linear(x, state[f"layers.{i}.weight"].float(), state[f"layers.{i}.bias"].float())
        return x.flatten()

    return score


def _load_clip(name: str, options: Any, device: str, base: str | None = None) -> Clip:
    places = [find_place(model, options.models) for model in (name, base or name)]
    return Clip(places[0], device, places[1], options.offline)


class Clip:
    """A CLIP model of transformers with its processor.

    place: folder or hub id of a CLIPModel, or a file in open_clip's layout with the architecture of `base`. base: whose
    processor is used; None: the model's own. offline: never use the network. Raises RestoreError if it is missing,
    incomplete or of another kind.
    """

    def __init__(self, place: str, device: str = "cpu", base: str | None = None, offline: bool = False) -> None:
        from transformers import CLIPModel, CLIPProcessor

        local, base = {"local_files_only": zoo.is_offline(offline or None)}, base or place
        try:
            with hide_progress_bars():
                if place.endswith((".pt", ".pth", ".bin")):
                    self.network = _read_open_clip(_fetch(place, offline), base, local)
                else:
                    self.network, info = CLIPModel.from_pretrained(place, output_loading_info=True, **local)
                    if missing := sorted(info["missing_keys"]):  # transformers only warns, and leaves them random
                        raise RestoreError(f"{place} must hold a whole CLIP model, but {missing[0]} is missing")
                self.processor = CLIPProcessor.from_pretrained(base, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise RestoreError(f"the CLIP model {place} cannot be loaded: {first_line(error)}") from error
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def embed(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalised embeddings (B, D) of images and prompts, on the CPU. Prompts are cut to 77 tokens."""
        image_embeds, text_embeds = [], []
        for first in range(0, len(images), BATCH):
            part = slice(first, first + BATCH)
            options = {"padding": True, "truncation": True, "return_tensors": "pt"}
            pixels = list(io.to_uint8(images[part]))
            inputs = self.processor(text=list(prompts[part]), images=pixels, **options)
            out = self.network(**inputs.to(self.network.device))
            image_embeds.append(nn.functional.normalize(out.image_embeds, dim=-1).cpu())
            text_embeds.append(nn.functional.normalize(out.text_embeds, dim=-1).cpu())
        return torch.cat(image_embeds), torch.cat(text_embeds)

    def cosine(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the cosine (B,) between each image and its prompt."""
        if len(prompts) != len(images) or not all(prompts):
            raise RestoreError("a score compares every image with its prompt; give tasks with a file of prompts")
        image_embeds, text_embeds = self.embed(images, prompts)
        return (image_embeds * text_embeds).sum(dim=1)


def fetch_model(name: str, options: Any) -> Path:
    """Return the file of a model of MODELS, downloaded if it is not here. Raises RestoreError."""
    return _fetch(find_place(name, options.models), options.offline)


def _fetch(place: str, offline: bool) -> Path:
    """Return the file at a path, an address, or `owner/name/file` of the hub."""
    offline = zoo.is_offline(offline or None)
    if Path(place).is_file():
        return Path(place)
    name = place.rsplit("/", 1)[-1].replace("%2B", "+")
    if place.startswith("https:"):
        target = disk.make_folder(zoo.cache_dir() / "scores") / name
        if not target.is_file():
            if offline:
                raise RestoreError(f"{target} is missing and the run is offline; fetch {place} to that place")
            fetch_file((place,), target)
        return target
    from huggingface_hub import hf_hub_download

    try:
        repo = place.removesuffix("/" + name)
        return Path(hf_hub_download(repo, name, local_files_only=offline))
    except (OSError, ValueError) as error:
        raise RestoreError(f"{name} of {place} cannot be fetched: {first_line(error)}") from error


# Parts of the names of CLIP in open_clip, and in transformers.
OPEN_CLIP = (
    (r"^visual\.(class_embedding)$", r"vision_model.embeddings.\1"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' own spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _read_open_clip(path: Path, base: str, local: Mapping[str, Any]) -> nn.Module:
    """Return a CLIPModel with the weights of a file in open_clip's layout and the architecture of `base`."""
    from transformers import CLIPConfig, CLIPModel

    state = read_weights(path)
    state = state.get("state_dict", state)
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if "attn_mask" in key:
            continue
        for old, new in OPEN_CLIP:
            key = re.sub(old, new, key)
        if ".attn.in_proj_" in key:  # queries, keys and values in one
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace(".attn.in_proj_", f".self_attn.{name}_proj.")] = part
        else:
            renamed[key] = value.T if key in ("visual_projection.weight", "text_projection.weight") else value
    network = CLIPModel(CLIPConfig.from_pretrained(base, **local))
    missing, unexpected = network.load_state_dict({k: v.float() for k, v in renamed.items()}, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        raise RestoreError(
            f"{path} must hold a whole CLIP of open_clip like {base}, not without {(missing + unexpected)[0]}"
        )
    return network
