"""Pixel-space noise predictors: guided-diffusion (ADM) checkpoints and diffusers' UNet2DModel folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.backbones import adm_weights
from restore.backbones.base import PREDICTION_TYPES, AttentionLayer, Pixels, Prediction, require_shape
from restore.backbones.checkpointing import set_checkpointing
from restore.backbones.schedule import Schedule
from restore.backbones.weights import as_dtype, first_line, own_memory, read

WEIGHTS, CONFIG, EXTRA = "diffusion_pytorch_model.safetensors", "config.json", "restore.json"
PICKLED = "diffusion_pytorch_model.bin"  # all that the oldest folders on the hub have
SCHEDULER = "scheduler_config.json"
# guided-diffusion's two schedules (Ho et al. 2020; Nichol & Dhariwal 2021, eq. 17) as diffusers describes them.
SCHEDULES = {"linear": {"beta_schedule": "linear"}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
TRAINED = ("schedule", "prediction_type", "null_class", "labels")  # what restore.json says for the constructor
# Attention weights of diffusers before 0.15, as the DDPM checkpoints on the hub still have them.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ADM(Pixels):
    """A frozen UNet2DModel as a `Backbone` (see restore.backbones.base).

    network: a UNet2DModel; with twice as many output channels as input channels it predicts the learned-range
        variance too.
    schedule: the noise levels it was trained on, "linear", "cosine" or a diffusers scheduler's configuration.
    prediction_type: "epsilon", "v_prediction" or "sample"; what the network outputs, in diffusers' words.
    null_class: index of the class that means "no class". guided-diffusion's class-conditional models have
        none, so null_condition is None; the one exception made unasked is a table of 1001 rows, read as
        ImageNet's 1000 classes and a null class 1000.
    labels: names of the first classes, in their order; none where classes have numbers alone.
    dtype: torch.float32 (None), bfloat16 or float16, or "fp32", "bf16", "fp16": precision of the network's
        arithmetic by autocast; weights stay fp32 and eps is returned in fp32.
    channels_last: memory format of the weights; None: only in low precision on a GPU, where convolutions are
        faster that way. On a CPU the backward of group normalisation costs more than they gain (1.5 times the
        time of a DPS step in bf16). In fp32 another order of summation would be enough to leave the official DPS
        trajectories: a pixel that rounds across the clamp of x0_hat switches its gradient.
    checkpointing: keep only the blocks' inputs for backward and recompute the rest.
    """

    encode_prompt = None

    def __init__(
        self,
        network: UNet2DModel,
        *,
        schedule: str | Mapping = "linear",
        prediction_type: str = "epsilon",
        null_class: int | None = None,
        labels: Sequence[str] = (),
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        channels_last: bool | None = None,
        checkpointing: bool = False,
    ):
        self.network = network.eval().requires_grad_(False).to(device=device)
        self.dtype = as_dtype(dtype)
        if channels_last is None:
            channels_last = self.dtype != torch.float32 and self.device.type == "cuda"
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        config = network.config
        if isinstance(schedule, str):
            check_known([schedule], SCHEDULES, "unknown noise schedule")
        check_known([prediction_type], PREDICTION_TYPES, "unknown prediction type")
        self.trained_schedule, self.prediction_type = schedule, prediction_type
        self.schedule = Schedule.from_config(SCHEDULES[schedule] if isinstance(schedule, str) else schedule)
        if self.schedule.kind != "vp" or config.time_embedding_type != "positional":
            raise RestoreError("the network is no DDPM: expected discrete, variance-preserving noise levels")
        self.channels = config.in_channels
        self.learned_variance = config.out_channels == 2 * config.in_channels
        if not self.learned_variance and config.out_channels != config.in_channels:
            raise RestoreError(
                f"a network with {config.in_channels} input and {config.out_channels} output channels predicts neither "
                "eps alone nor eps and its variance"
            )
        self.multiple = 2 ** (len(config.block_out_channels) - 1)
        # Published models reach 8x8 at their deepest level; a config that states its size is believed.
        size = config.sample_size
        self.resolution = 8 * self.multiple if size is None else int(size if isinstance(size, int) else min(size))
        self.classes = config.num_class_embeds
        if null_class is None and self.classes == 1001:
            null_class = 1000
        if null_class is not None and not 0 <= null_class < (self.classes or 0):
            raise RestoreError(f"null_class {null_class} is not one of the network's {self.classes or 0} classes")
        if len(labels) > (self.classes or 0):
            raise RestoreError(f"{len(labels)} labels are too many for the network's {self.classes or 0} classes")
        self.null_class, self.labels = null_class, tuple(labels)
        self.null_condition = None if null_class is None else torch.tensor([null_class])
        self.attention = attention_layers(network)
        self.checkpointing = checkpointing
        set_checkpointing(network, checkpointing)

    @property
    def device(self) -> torch.device:
        return self.network.conv_in.weight.device

    def predict(self, x_t: torch.Tensor, t: float, condition: torch.Tensor | int | None = None) -> Prediction:
        """The prediction at x_t (B, C, H, W), fp32 of that shape (variance None when it is not learned).

        t: 0..999, also between; a (B,) tensor gives every image its own. condition: class labels, LongTensor
        (B,) or one for the whole batch; None only for an unconditional network or one with a null class.
        Raises RestoreError for sizes not divisible by `multiple`, a bad t or missing or wrong labels.
        """
        require_shape(x_t, self.channels, self.multiple)
        alpha, sigma = self.schedule.levels(t, x_t)
        # A tensor of floats: diffusers would truncate a number to an integer.
        times = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).reshape(-1)
        labels = self._labels(condition, len(x_t))
        low = self.dtype != torch.float32
        with torch.autocast(x_t.device.type, dtype=self.dtype) if low else nullcontext():
            out = self.network(x_t, times, class_labels=labels, return_dict=False)[0].to(x_t.dtype)
        out, variance = out.chunk(2, dim=1) if self.learned_variance else (out, None)
        return Prediction.of(PREDICTION_TYPES[self.prediction_type], out, x_t, alpha, sigma, variance)

    def _labels(self, condition, batch: int) -> torch.Tensor | None:
        if condition is None:
            condition = self.null_condition
        if self.classes is None:
            if condition is not None:
                raise RestoreError("this network is unconditional: it takes no class labels, pass condition=None")
            return None
        if condition is None:
            raise RestoreError(
                f"this network is class-conditional: pass condition=labels, a LongTensor (B,) of 0..{self.classes - 1}"
            )
        return class_labels(condition, batch, self.classes).to(self.device)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        heads: int | None = None,
        head_channels: int | None = None,
        attention_order: str = "legacy",
        resolution: int | None = None,
        schedule: str | Mapping | None = None,
        prediction_type: str | None = None,
        null_class: int | None = None,
        **options,
    ) -> ADM:
        """A network from a guided-diffusion `.pt`/`.safetensors` file, a folder with a UNet2DModel or a DDPMPipeline's.

        heads, head_channels, attention_order: what a guided-diffusion file does not tell (see
            adm_weights.head_counts; default 64 channels per head, "legacy" order); not for folders.
        resolution: trained side in pixels; default 8·2^(levels−1) for files (true of the published models).
        schedule, prediction_type, null_class: default from the folder's scheduler_config.json or restore.json,
            else "linear", "epsilon" and none.
        options: device, dtype, channels_last, checkpointing of the constructor.
        Weights of any stored precision load as fp32. Raises RestoreError for a missing, truncated or corrupt
        file, a pickle with code (never run), and weights that do not fit, with the first missing name.
        """
        source = Path(source)
        if source.is_dir():
            if heads is not None or head_channels is not None or attention_order != "legacy":
                raise RestoreError(f"{source} is a converted model: its heads and attention order are already settled")
            network, trained = _load_folder(source)
        else:
            network, trained = _convert_file(source, heads, head_channels, attention_order), {}
        own_memory(network)
        if resolution is not None:
            network.register_to_config(sample_size=resolution)
        given = {"schedule": schedule, "prediction_type": prediction_type, "null_class": null_class}
        return cls(network, **trained | {key: value for key, value in given.items() if value is not None} | options)

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
            **({"labels": list(self.labels)} if self.labels else {}),
        }
        config = json.loads(self.network.to_json_string())
        weights = {k: v.detach().cpu().to(as_dtype(dtype)).contiguous() for k, v in self.network.state_dict().items()}
        # Weights last: a folder whose writing was cut short has none under the final name.
        disk.write_json(folder / CONFIG, config)
        disk.write_json(folder / EXTRA, extra)
        disk.write_safetensors(folder / WEIGHTS, weights, {"format": "pt"})


def class_labels(condition: torch.Tensor | int, batch: int, classes: int) -> torch.Tensor:
    """Class labels as a LongTensor (batch,), one serving all. Raises RestoreError for what is none of 0..classes−1."""
    labels = torch.as_tensor(condition)
    if labels.is_floating_point() or labels.ndim > 1 or labels.numel() not in (1, batch):
        raise RestoreError(f"condition must be integer class labels, one for the batch or {batch}, one per image")
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RestoreError(f"class labels must lie in 0..{classes - 1}")
    return labels.to(torch.long).reshape(-1).expand(batch)


def attention_layers(network: UNet2DModel) -> dict[str, AttentionLayer]:
    """Self-attention layers of a UNet2DModel by diffusers path, in order of execution.

    Block numbers are guided-diffusion's: input blocks count conv_in as 0 and the downsamplers too.
    """
    depth = network.config.layers_per_block
    levels = len(network.down_blocks)
    layers = {}

    def add(path: str, module: nn.Module | None, paper: str, short: str, level: int) -> None:
        if module is not None:
            layers[path] = AttentionLayer(path, paper, short, module, module.heads, module.query_dim, 2**level)

    for i, block in enumerate(network.down_blocks):
        for j, module in enumerate(getattr(block, "attentions", [])):
            n = 1 + i * (depth + 1) + j
            add(f"down_blocks.{i}.attentions.{j}", module, f"input_blocks.{n}.1", f"i{n}", i)
    for j, module in enumerate(network.mid_block.attentions if network.mid_block is not None else []):
        add(f"mid_block.attentions.{j}", module, f"middle_block.{2 * j + 1}", f"m{2 * j + 1}", levels - 1)
    for i, block in enumerate(network.up_blocks):
        for j, module in enumerate(getattr(block, "attentions", [])):
            n = i * (depth + 1) + j
            add(f"up_blocks.{i}.attentions.{j}", module, f"output_blocks.{n}.1", f"o{n}", levels - 1 - i)
    return layers


def _convert_file(path: Path, heads: int | None, head_channels: int | None, attention_order: str) -> UNet2DModel:
    return convert_state(_read_tensors(path), path, heads, head_channels, attention_order)


def convert_state(
    state: Mapping[str, torch.Tensor],
    path: Path,
    heads: int | None = None,
    head_channels: int | None = None,
    attention_order: str = "legacy",
) -> UNet2DModel:
    """The network of a guided-diffusion state dict, all of whose tensors are used. path: for errors."""
    try:
        arch = adm_weights.infer_architecture({name: tuple(tensor.shape) for name, tensor in state.items()})
    except RestoreError as error:
        raise RestoreError(f"{path} does not fit: {error}") from None
    counts = adm_weights.head_counts(arch, heads, head_channels)
    config = adm_weights.network_config(arch, counts, resolution=8 * 2 ** (len(arch.channels) - 1))
    network = adm_weights.build_network(config, arch.base, counts)
    weights = adm_weights.convert(state, arch, counts, attention_order, network.state_dict())
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    state = read(path)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise RestoreError(f"{path} holds no flat state dict of tensors, as guided-diffusion saves its models")
    return state


def _load_folder(folder: Path) -> tuple[UNet2DModel, dict]:
    """The network, and what the folder says of its training (keyword arguments of ADM)."""
    trained, index = {}, folder / "model_index.json"
    if index.is_file():
        parts = disk.read_json(index, required=True)
        if "UNet2DModel" not in (parts.get("unet") or []) or any(name in parts for name in ("vae", "vqvae")):
            raise RestoreError(f"{folder} holds a {parts.get('_class_name')}, which is no diffusion model of pixels")
    # Older pipelines on the hub keep the parts' files side by side.
    for scheduler in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER):
        if scheduler.is_file() and not trained:
            config = disk.read_json(scheduler, required=True)
            trained = {"schedule": config, "prediction_type": config.get("prediction_type", "epsilon")}
    if index.is_file() and not trained:
        raise RestoreError(f"{folder} has no {SCHEDULER}: the noise levels of its network are not known")
    network, more = load_network(folder / "unet" if (folder / "unet").is_dir() else folder)
    return network, trained | more


def load_network(folder: Path) -> tuple[UNet2DModel, dict]:
    """The UNet2DModel in the diffusers folder of its own, and what restore.json there says (keywords of ADM).

    Every weight is filled from the file and every tensor used; else RestoreError with the first that is not.
    """
    if not (folder / CONFIG).is_file():
        raise RestoreError(f"{folder} is no model folder: it has no {CONFIG}")
    config = disk.read_json(folder / CONFIG, required=True)
    extra = disk.read_json(folder / EXTRA, required=True) if (folder / EXTRA).is_file() else {}
    if config.get("_class_name") != "UNet2DModel":
        raise RestoreError(f"{folder / CONFIG} describes a {config.get('_class_name')}, expected a UNet2DModel")
    try:
        heads = {int(channels): count for channels, count in extra.get("heads", {}).items()}
        network = adm_weights.build_network(config, extra.get("time_channels"), heads)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RestoreError(f"{folder / CONFIG} describes no network that can be built: {first_line(error)}") from None
    pickled = (folder / PICKLED).is_file() and not (folder / WEIGHTS).is_file()
    found = _read_tensors(folder / (PICKLED if pickled else WEIGHTS))
    state = {_present_name(name): tensor.float() for name, tensor in found.items()}
    targets = network.state_dict()
    missing = [name for name in targets if name not in state]
    unexpected = [name for name in state if name not in targets]
    wrong = [name for name in targets if name in state and targets[name].shape != state[name].shape]
    if missing or unexpected or wrong:
        raise RestoreError(
            f"the weights in {folder} do not fit its {CONFIG}: first missing {next(iter(missing), 'none')}, first "
            f"unexpected {next(iter(unexpected), 'none')}, first of another shape {next(iter(wrong), 'none')}"
        )
    network.load_state_dict(state, strict=True, assign=True)
    return network, {key: extra[key] for key in TRAINED if key in extra}


def _present_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    path, _, layer = stem.rpartition(".")
    return f"{path}.{FORMER_NAMES[layer]}.{kind}" if layer in FORMER_NAMES else name
