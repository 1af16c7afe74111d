"""Pixel-space noise predictors: guided-diffusion (ADM) checkpoints and diffusers' UNet2DModel folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from operators import RestoreError
from operators.device import is_on_host
from operators.naming import check_known
from restore import disk
from restore.backbones import adm_weights, pipeline_files, weights
from restore.backbones.ambient import no_autocast
from restore.backbones.attention_layers import find_attention_layers
from restore.backbones.base import PREDICTION_TYPES, Pixels, Prediction, expand_times, require_shape
from restore.backbones.diffusers_parts import UNet2DModel
from restore.backbones.lean import find_lean, prepare_lean
from restore.backbones.precision import keep_gradient
from restore.backbones.schedule import Schedule
from restore.paths import EXTRA

SCHEDULER = "scheduler_config.json"
AUTOENCODERS = ("vqvae", "vae")  # names of the autoencoder in a pipeline's folder
PICKLED = "diffusion_pytorch_model.bin"  # the only weights of the oldest folders on the hub
# guided-diffusion's two schedules (Ho et al. 2020; Nichol & Dhariwal 2021, eq. 17) as diffusers describes them.
SCHEDULES = {"linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
# Keywords of ADM that restore.json may hold.
TRAINED = ("schedule", "prediction_type", "null_class", "labels", "patch", "rescale_timesteps")
# Names of attention weights before diffusers 0.15, which the DDPM checkpoints on the hub still have.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ADM(Pixels):
    """A frozen UNet2DModel as a `Backbone` (see restore.backbones.base).

    network: a UNet2DModel; with twice as many output channels as input channels it predicts the learned-range
        variance too.
    schedule: the noise levels it was trained on, "linear", "cosine" or a diffusers scheduler's configuration.
    prediction_type: the output of the network in diffusers' words, "epsilon", "v_prediction" or "sample".
    null_class: index of the class that means "no class", or None: guided-diffusion's class-conditional models have
        none. A table of 1001 rows is taken for ImageNet's 1000 classes and the null class 1000.
    labels: names of the first classes in order; empty if classes only have numbers.
    rescale_timesteps: the network is given times of 0 to 1000 whatever the number of levels (improved-diffusion's
        `--rescale_timesteps True`, its default).
    patch: the network sees squares of patch x patch pixels as the channels of one cell (pixel unshuffle), which makes
        it cheaper (FFDNet, Zhang et al. 2018).
    dtype: torch.float32 (None), bfloat16 or float16, or "fp32", "bf16", "fp16": precision of the network's
        arithmetic by autocast; weights stay fp32 and eps is returned in fp32.
    channels_last: memory format of the weights; by default only in low precision on a GPU, where convolutions are
        faster that way. On a CPU group normalisation's backward costs more than they gain, and in fp32 another order
        of summation leaves the official DPS trajectories: a pixel rounded across the clamp switches its gradient.
    lean: in samplers without gradients, run in fewer operations on a CPU in fp32 (restore.backbones.lean), equal to
        rounding; False: the network's own.
    """

    encode_prompt = None

    one_beyond = False  # whether the time after the last of the table may be asked for

    def __init__(
        self,
        network: UNet2DModel,
        *,
        schedule: str | Mapping = "linear",
        prediction_type: str = "epsilon",
        null_class: int | None = None,
        labels: Sequence[str] = (),
        patch: int = 1,
        rescale_timesteps: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        channels_last: bool | None = None,
        lean: bool = True,
    ):
        # By torch's own `to`: diffusers' looks for offloading, whose import takes seconds.
        self.network = nn.Module.to(network.eval().requires_grad_(False), device=device)
        self.dtype = weights.as_dtype(dtype)
        if channels_last is None:
            channels_last = self.dtype != torch.float32 and self.device.type == "cuda"
        if channels_last:
            nn.Module.to(self.network, memory_format=torch.channels_last)
        if lean:
            prepare_lean(self.network)
        config = network.config
        if isinstance(schedule, str):
            check_known([schedule], SCHEDULES, "unknown noise schedule")
        check_known([prediction_type], PREDICTION_TYPES, "unknown prediction type")
        self.trained_schedule, self.prediction_type = schedule, prediction_type
        self.schedule = Schedule.from_config(SCHEDULES[schedule] if isinstance(schedule, str) else schedule)
        self.time_scale = 1000 / len(self.schedule) if rescale_timesteps else 1.0
        if self.schedule.kind != "vp" or config.time_embedding_type != "positional":
            raise RestoreError("the network must be a DDPM, with discrete, variance-preserving noise levels")
        if patch < 1 or config.in_channels % patch**2:
            raise RestoreError(f"patch must divide the network's {config.in_channels} channels twice, got {patch}")
        self.patch, self.channels = patch, config.in_channels // patch**2
        self.learned_variance = config.out_channels == 2 * config.in_channels
        if not self.learned_variance and config.out_channels != config.in_channels:
            raise RestoreError(
                f"the network must have {config.in_channels} output channels or twice as many, got "
                f"{config.out_channels}"
            )
        levels = 2 ** (len(config.block_out_channels) - 1)
        self.multiple = patch * levels
        # Published models reach 8x8 at their deepest level, unless the configuration states a size.
        size = config.sample_size
        self.resolution = patch * (8 * levels if size is None else int(size if isinstance(size, int) else min(size)))
        self.classes = config.num_class_embeds
        if null_class is None and self.classes == 1001:
            null_class = 1000
        if null_class is not None and not 0 <= null_class < (self.classes or 0):
            raise RestoreError(f"null_class must be one of the network's {self.classes or 0} classes, got {null_class}")
        if len(labels) > (self.classes or 0):
            raise RestoreError(f"labels must be at most the network's {self.classes or 0} classes, got {len(labels)}")
        self.null_class, self.labels = null_class, tuple(labels)
        self.null_condition = None if null_class is None else torch.tensor([null_class], device=self.device)
        self.attention = find_attention_layers(network)

    @property
    def device(self) -> torch.device:
        return self.network.conv_in.weight.device

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | int | None = None) -> Prediction:
        """Return the prediction at x_t (B, C, H, W), fp32 of that shape (variance None if it is not learned).

        t: 0..999, also between; a (B,) tensor gives every image its own. condition: class labels, LongTensor
        (B,) or one for the whole batch; None only for an unconditional network or one with a null class.
        Raises RestoreError for sizes not divisible by `multiple`, times out of range, missing and wrong labels.
        """
        require_shape(x_t, self.channels, self.multiple)
        alpha, sigma = self.schedule.levels(self.schedule.come_back(t) if self.one_beyond else t, x_t)
        times = expand_times(t, x_t) * self.time_scale
        labels = self._labels(condition, len(x_t))
        low = self.dtype != torch.float32

        def run(x: torch.Tensor) -> torch.Tensor:
            return run_network(self.network, x, times, labels, self.patch).to(x.dtype)

        with torch.autocast(x_t.device.type, dtype=self.dtype) if low else no_autocast(x_t.device):
            out = keep_gradient(run, x_t, self.dtype)
        return Prediction.of(PREDICTION_TYPES[self.prediction_type], out, x_t, alpha, sigma)

    def _labels(self, condition, batch: int) -> torch.Tensor | None:
        condition = self.null_condition if condition is None else condition
        if self.classes is None:
            if condition is not None:
                raise RestoreError(f"condition must be None for an unconditional network, got {condition}")
            return None
        if condition is None:
            raise RestoreError(f"condition must be 0..{self.classes - 1} for a class-conditional network, got None")
        return check_labels(condition, batch, self.classes).to(self.device)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        heads: int | None = None,
        head_channels: int | None = None,
        attention_order: str | None = None,
        resolution: int | None = None,
        weights_key: str | None = None,
        **options,
    ) -> ADM:
        """Load a guided-diffusion `.pt`/`.safetensors` file, a folder with a UNet2DModel or that of a DDPMPipeline.

        heads, head_channels, attention_order: what a guided-diffusion file does not tell (see
            adm_weights.count_heads; default 64 channels per head, "legacy" order); not for folders. `restore.load`
            asks for what it does not know instead of assuming this default.
        resolution: trained side in pixels; default 8·2^(levels−1) for files (true of the published models).
        weights_key: which network of a file that holds several, such as "ema".
        options: of the constructor; schedule, prediction_type, null_class and labels default to the folder's
            scheduler_config.json or restore.json. A pipeline without either needs a schedule; a network alone
            has the linear one.
        Weights stored in any precision load as fp32. Raises RestoreError for a missing, truncated or corrupt file, a
        pickle with code (which is never run) and weights that do not fit, with the first missing name.
        """
        source = Path(source)
        if source.is_dir():
            if any(option is not None for option in (heads, head_channels, attention_order)):
                raise RestoreError(
                    f"heads, head_channels and attention_order must be left out for {source}, a converted model"
                )
            network, trained, extra = read_folder(source, weights_key=weights_key)
            trained |= extra
            if is_pipeline(source):
                require_schedule(source, trained | options)
        else:
            state = _read_state(source, "time_embed.0.weight", weights_key)
            order = attention_order or "legacy"
            network, trained = adm_weights.convert_state(state, source, heads, head_channels, order), {}
        weights.align_memory(network)
        trained |= {key: value for key, value in options.items() if value is not None}
        if resolution is not None:
            network.register_to_config(sample_size=resolution // trained.get("patch", 1))
        return cls(network, **trained)

    def save(self, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
        """Write config.json, restore.json and safetensors weights (fp32, or `dtype`) that `load` reads back.

        With heads or a timestep embedding that UNet2DModel's own config cannot express (restore.json holds them)
        the folder is for `ADM.load`, not for `UNet2DModel.from_pretrained`.
        """
        folder = disk.make_folder(folder)
        heads = {layer.channels: layer.heads for layer in self.attention.values()}
        extra = {
            "time_channels": self.network.time_embedding.linear_1.in_features,
            "heads": {str(channels): count for channels, count in sorted(heads.items())},
            "schedule": self.trained_schedule,
            "prediction_type": self.prediction_type,
            "null_class": self.null_class,
            **({"patch": self.patch} if self.patch > 1 else {}),
            **({"rescale_timesteps": True} if self.time_scale != 1 else {}),
            **({"labels": list(self.labels)} if self.labels else {}),
        }
        disk.write_json(folder / EXTRA, extra)
        weights.save_network(self.network, folder, dtype)


def run_network(network: Callable, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, patch: int):
    """Return the raw output (B, C or 2C, H, W) of a UNet2DModel, or of a function like it, on patches of x_t."""
    cells, is_lean = F.pixel_unshuffle(x_t, patch) if patch > 1 else x_t, find_lean(x_t) is not None
    if is_lean:
        cells = cells.contiguous(memory_format=torch.channels_last)
    out = network(cells, t, class_labels=labels, return_dict=False)[0]
    out = out.contiguous() if is_lean else out
    return F.pixel_shuffle(out, patch) if patch > 1 else out


def check_labels(condition: torch.Tensor | int, batch: int, classes: int) -> torch.Tensor:
    """Return class labels as a LongTensor (batch,). Raises RestoreError unless they lie in 0..classes−1."""
    labels = torch.as_tensor(condition)
    if labels.is_floating_point() or labels.ndim > 1 or labels.numel() not in (1, batch):
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise RestoreError(f"condition must be integers, one for the batch or {batch}, one per image, got {given}")
    if is_on_host(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RestoreError(f"condition must be class labels in 0..{classes - 1}, got {labels.tolist()}")
    return labels.to(torch.long).reshape(-1).expand(batch)


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is that of a diffusers pipeline, not of a network alone."""
    return (folder / pipeline_files.INDEX).is_file()


def require_schedule(folder: Path, options: Mapping) -> None:
    """Raise RestoreError unless the keywords of ADM for a folder hold the noise levels of its network."""
    if options.get("schedule") is None:
        raise RestoreError(
            f"{folder} has no scheduler/{SCHEDULER}: the noise levels of its network are not known; give "
            "schedule=linear, schedule=cosine or a scheduler's configuration, and prediction_type="
        )


def _read_state(path: Path, anchor: str, key: str | None = None) -> dict[str, torch.Tensor]:
    """Return the weights in a file of the network that has a tensor called `anchor`; other tensors as they are."""
    content = weights.read_weights(path)
    state = weights.unwrap_state(content, anchor, path, key)
    if state is not None:
        return state
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, torch.Tensor) for v in content.values())
    ):
        raise RestoreError(f"{path} must hold a flat state dict of tensors, of a network with '{anchor}'")
    return dict(content)


def read_folder(
    folder: Path, autoencoder: bool = False, weights_key: str | None = None
) -> tuple[UNet2DModel, dict, dict]:
    """Read a UNet2DModel of pixels or, with `autoencoder`, of latents, from its folder or that of a pipeline.

    weights_key: see weights.unwrap_state. Also returns the keywords of ADM from the scheduler and those from
    restore.json. Raises RestoreError.
    """
    if autoencoder or is_pipeline(folder):
        parts = pipeline_files.read_pipeline_index(folder, "a UNet2DModel and a scheduler")
        if "UNet2DModel" not in (parts.get("unet") or []) or any(name in parts for name in AUTOENCODERS) != autoencoder:
            kind = "latents, with an autoencoder" if autoencoder else "pixels"
            raise RestoreError(f"{folder} must hold a diffusion model of {kind}, got a {parts.get('_class_name')}")
    # Older pipelines on the hub keep the files of all parts in one folder.
    path = next((path for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if path.is_file()), None)
    config = {} if path is None else disk.read_json(path, required=True)
    trained = {"schedule": config, "prediction_type": config.get("prediction_type", "epsilon")} if path else {}
    network, extra = load_network(folder / "unet" if (folder / "unet").is_dir() else folder, weights_key)
    return network, trained, extra


def load_network(folder: Path, weights_key: str | None = None) -> tuple[UNet2DModel, dict]:
    """Load the UNet2DModel in a diffusers folder of its own, and the keywords of ADM in the restore.json there.

    Raises RestoreError, with the first name, unless the file's tensors are exactly the network's.
    """
    path = folder / weights.CONFIG
    if not path.is_file():
        raise RestoreError(f"{folder} must be the folder of a model, but has no {weights.CONFIG}")
    config = disk.read_json(path, required=True)
    extra = disk.read_json(folder / EXTRA, required=True) if (folder / EXTRA).is_file() else {}
    if config.get("_class_name") != "UNet2DModel":
        raise RestoreError(f"{path} must describe a UNet2DModel, got {config.get('_class_name')}")
    try:
        heads = {int(channels): count for channels, count in extra.get("heads", {}).items()}
        network = adm_weights.build_network(config, extra.get("time_channels"), heads)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RestoreError(f"{path} is of a network that cannot be built: {weights.first_line(error)}") from None
    pickled = (folder / PICKLED).is_file() and not (folder / weights.WEIGHTS).is_file()
    tensors = _read_state(folder / (PICKLED if pickled else weights.WEIGHTS), "conv_in.weight", weights_key)
    state = {_update_name(name): tensor.float() for name, tensor in tensors.items()}
    weights.load_state(network, state, f"the weights in {folder}")
    return network, {key: extra[key] for key in TRAINED if key in extra}


def _update_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    path, _, layer = stem.rpartition(".")
    return f"{path}.{FORMER_NAMES[layer]}.{kind}" if layer in FORMER_NAMES else name
