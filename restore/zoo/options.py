"""What weights do not tell of their network: known of a published file, given by the caller, or asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.paths import EXTRA
from restore.zoo.registry import Model, read_registry
from restore.zoo.store import Located, find_expected, read_tensor_names

# Each option with what the sentence that asks for it says.
ASKED = {
    "heads": "heads=NUMBER or head_channels=WIDTH",
    "attention_order": "attention_order=legacy or new",
    "schedule": "schedule=linear, cosine or a scheduler's configuration",
    "prediction_type": "prediction_type=epsilon, v_prediction or sample",
    "rescale_timesteps": "rescale_timesteps=true or false (true is improved-diffusion's default)",
    "scale_factor": "scale_factor=FACTOR of the latents",
}
_UNET = ("heads", "head_channels", "attention_order", "schedule", "prediction_type", "null_class", "weights_key")
# By kind of model, the keywords of its loader that `restore.load` takes.
OPTIONS = {
    "adm": (*_UNET, "resolution", "rescale_timesteps", "lean"),
    "latent": (*_UNET, "scale_factor", "ema", "lean"),
    "stable-diffusion": ("prediction_type", "config"),
    "sd3": ("text_tokens", "quantise"),
    "flux": ("text_tokens", "distilled_guidance", "quantise"),
    "dit": (),
}
MODEL_OPTIONS = tuple(dict.fromkeys(name for names in OPTIONS.values() for name in names))
# Parts of the file names of Stable Diffusion 2 and 2.1 (github.com/Stability-AI/stablediffusion).
SD2_FILES = {"512-base-ema": "epsilon", "v2-1_512": "epsilon", "768-v-ema": "v_prediction", "v2-1_768": "v_prediction"}
SD1_WIDTH, SD2_WIDTH = 768, 1024  # of the text embeddings


def resolve_options(found: Located, given: Mapping[str, Any]) -> Located:
    """Return `found` with the complete keywords of its loader: the caller's before those of its registry entry.

    A file or a folder outside the registry is looked up by its content and its published name, the latter with a
    warning. Raises RestoreError for options that this kind of model does not have, and if something remains unknown
    that the weights do not tell: it is never guessed.
    """
    given = {name: value for name, value in given.items() if value is not None}
    check_known(given, OPTIONS.get(found.kind, ()), f"a model of kind {found.kind} has no option")
    for name in ("heads", "head_channels"):
        if name in given and (not isinstance(given[name], int) or isinstance(given[name], bool) or given[name] < 1):
            raise RestoreError(f"{name} must be a whole number from 1, got {given[name]!r}")
    known = dict(found.options)
    if found.entry is None and found.path is not None:
        stored = (disk.read_json(found.path / EXTRA) or {}).get("options", {}) if found.path.is_dir() else {}
        known = {name: stored[name] for name in OPTIONS.get(found.kind, ()) if name in stored}
        known |= _find_options(found, given)
    if {"heads", "head_channels"} & set(given):
        known = {name: value for name, value in known.items() if name not in ("heads", "head_channels")}
    return replace(found, options=known | given)


def check_parameters(found: Located, count: int) -> None:
    """Raise RestoreError if a network of `count` parameters is not that of the published file with its name."""
    entry = _find_by_name(found.path) if found.entry is None and found.path is not None else None
    if entry is not None and entry.parameters not in (None, count) and entry.loading.items() <= found.options.items():
        raise RestoreError(
            f"{found.path} is not {entry.name}, whose file name it has: it has {count} parameters, not "
            f"{entry.parameters}; give {_list_asked(_needed(found, {}))}, as it was trained"
        )


def _find_options(found: Located, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of weights outside the registry besides the given options. Raises RestoreError."""
    if found.kind == "stable-diffusion":
        return _find_prediction_type(found.path, given) if found.path.is_file() else {}
    told = {*given, *(["heads"] if "head_channels" in given else [])}
    missing = [name for name in _needed(found, given) if name not in told]
    if not missing:
        return {}
    entry = _find_by_content(found.path) if found.path.is_file() else None
    if entry is None and (entry := _find_by_name(found.path)) is not None:
        options = ", ".join(f"{name}={value}" for name, value in entry.loading.items() if name not in given)
        warnings.warn(
            f"{found.path} is taken for {entry.name} by its file name, with {options}; give them to be sure",
            stacklevel=5,
        )
    if entry is not None:
        return entry.loading
    if found.path.is_dir():
        warnings.warn(
            f"{found.path} has no scheduler_config.json, so the defaults of diffusers' DDPMScheduler are taken: linear "
            "noise levels and a network that predicts the noise; give schedule= and prediction_type= to be sure",
            stacklevel=5,
        )
        return {"schedule": "linear"}
    if not _holds_network(found, given):
        return {}  # whose loader explains what it is
    raise RestoreError(
        f"{found.path} does not tell how its network was trained; give {_list_asked(missing)} (weights do not say it; "
        "published files are known by content or name, see `restore models list`)"
    )


def _holds_network(found: Located, given: Mapping[str, Any]) -> bool:
    """Return whether a file holds the weights of such a network. Raises RestoreError if it cannot be read."""
    from restore.backbones.weights import read_weights, unwrap_state

    anchor = "time_embed.0.weight" if found.kind == "adm" else "model.diffusion_model.time_embed.0.weight"
    return unwrap_state(read_weights(found.path, "meta"), anchor, found.path, given.get("weights_key")) is not None


def _needed(found: Located, given: Mapping[str, Any]) -> list[str]:
    """Return the options that weights outside the registry do not tell, some only beside others that are given."""
    if found.kind not in ("adm", "latent"):
        return []
    if found.path.is_dir():
        places = ("scheduler/scheduler_config.json", "scheduler_config.json")
        is_told = any((found.path / place).is_file() for place in (*places, "model_index.json"))
        extra = disk.read_json(found.path / EXTRA) or {}
        return [] if is_told or "schedule" in extra else ["schedule"]
    if found.kind == "adm":
        schedule = given.get("schedule")
        levels = schedule.get("num_train_timesteps", 1000) if isinstance(schedule, Mapping) else 1000
        return ["heads", "attention_order", "schedule"] + ["rescale_timesteps"] * (levels != 1000)
    names = read_tensor_names(found.path)
    buffers = {"schedule": b"betas", "scale_factor": b"scale_factor"}
    told = {option for option, buffer in buffers.items() if buffer in names}
    return [
        name for name in ("heads", "attention_order", "schedule", "prediction_type", "scale_factor") if name not in told
    ]


def _list_asked(names: list[str]) -> str:
    return "; ".join(ASKED[name] for name in names)


def _find_by_content(path: Path) -> Model | None:
    """Return the registered model whose file has the content of `path`, by the checksums known here."""
    digest, size = None, path.stat().st_size
    for entry in read_registry().values():
        expected = find_expected(entry) if entry.download is not None else (None, None)
        if expected[1] is not None and expected[0] == size:
            digest = digest or disk.hash_file(path)
            if digest == expected[1]:
                return entry
    return None


def _find_by_name(path: Path) -> Model | None:
    """Return the registered model that is published under the file name of `path`; every LDM is a model.ckpt."""
    known = (entry for entry in read_registry().values() if entry.kind == "adm" and entry.download is not None)
    return next((entry for entry in known if path.name in (entry.download.file, *entry.download.names)), None)


def _find_prediction_type(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a single file of Stable Diffusion predicts, unless it or its architecture's folder is given.

    Version 1 predicts the noise, version 2 exists with both; files of later trainers say it by a tensor `v_pred`.
    """
    if "prediction_type" in given or "config" in given:
        return {}
    from restore.backbones.weights import read_weights

    content = read_weights(path, "meta")
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    widths = {t.shape[-1] for name, t in state.items() if str(name).endswith("attn2.to_k.weight")}
    if not widths:
        return {}  # whose loader explains what it is
    if "v_pred" in state:
        return {"prediction_type": "v_prediction"}
    kind = next((kind for part, kind in SD2_FILES.items() if part in path.name), None)
    if widths == {SD1_WIDTH}:
        kind, reason = "epsilon", "as Stable Diffusion 1 does"
    elif widths == {SD2_WIDTH} and kind is not None:
        reason = "by its file name"
    else:
        raise RestoreError(
            f"{path} does not tell what its network predicts; give {ASKED['prediction_type']} (Stable Diffusion 2 of "
            "512 pixels: epsilon, of 768: v_prediction), or the diffusers folder of its architecture, config=FOLDER"
        )
    warnings.warn(f"{path} is taken to predict {kind}, {reason}; give prediction_type= to be sure", stacklevel=6)
    return {"prediction_type": kind}
