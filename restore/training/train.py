"""The training loop. Flat, resumable to the exact step, no state but the one in the checkpoint."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from operators import RestoreError
from operators.naming import nearest
from restore import atomic
from restore.backbones.adm import ADM
from restore.backbones.schedule import Schedule
from restore.backbones.sizes import Sized
from restore.images import grids, io
from restore.samplers.generate import generate
from restore.samplers.noise import ImageNoise
from restore.training import dataset
from restore.training.losses import hybrid_loss

log = logging.getLogger(__name__)
HELD_OUT_LEVELS = (10, 50, 100, 200, 300, 450, 600, 800)


def native_bf16() -> bool:
    """True where bf16 convolutions are faster than fp32 ones rather than emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def held_out_loss(model, images: torch.Tensor, alpha_bar: torch.Tensor, device) -> dict[int, float]:
    """Mean squared error of the predicted noise per timestep, on fixed noise, over `images` in [-1, 1]."""
    result = {}
    for t in HELD_OUT_LEVELS:
        generator = torch.Generator().manual_seed(t)
        total = 0.0
        for chunk in images.split(32):
            eps = torch.randn(chunk.shape, generator=generator)
            a = float(alpha_bar[t])
            x_t = (math.sqrt(a) * chunk + math.sqrt(1 - a) * eps).to(device)
            out = model(x_t, torch.full((len(chunk),), t, device=device), return_dict=False)[0].float().cpu()
            total += float(((out[:, :3] - eps) ** 2).mean(dim=(1, 2, 3)).sum())
        result[t] = total / len(images)
    return result


def sample_grid(backbone: ADM, path: Path, n: int = 16, steps: int = 50) -> None:
    """A grid of unconditional DDIM samples, always from the same noise, so that grids of one run can be compared."""
    noise = ImageNoise([(0, str(i), 0) for i in range(n)], backbone.device)
    prior = Sized(backbone, backbone.resolution, backbone.resolution)
    write_grid(path, generate(prior, n, steps=steps, noise=noise, ddim_eta=0.0))


def write_grid(path: Path, images: torch.Tensor) -> None:
    """A square number of images (N, 3, H, W) in [-1, 1] as one picture."""
    side = math.isqrt(len(images))
    rows = [list(images[r * side : (r + 1) * side].cpu()) for r in range(side)]
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_image(path, io.to_tensor(grids.comparison_grid(rows, [""] * side))[0])


def load_config(path: str | Path, settings: list[str]) -> DictConfig:
    """The YAML file with key=value settings merged in. Raises RestoreError for a missing file or unknown key."""
    if not Path(path).is_file():
        raise RestoreError(f"there is no training configuration {path}")
    try:
        config = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise RestoreError(f"{path} is not readable YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, DictConfig):
        raise RestoreError(f"{path} must be a mapping of keys to values, such as configs/train/embedded.yaml")
    for setting in settings:
        key = setting.split("=", 1)[0]
        if "=" not in setting or key not in _keys(config):
            raise RestoreError(f"'{setting}' is not key=value with a key of {path}; {nearest(key, _keys(config))}")
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(settings))
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise RestoreError(f"{sorted(missing)[0]} must be given, e.g. {sorted(missing)[0]}=PATH")
    return config


def _keys(config, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(prefix + key)
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            keys += _keys(config[key], f"{prefix}{key}.")
    return keys


def build_model(config: DictConfig) -> UNet2DModel:
    """The network of `config.model`, with the weights in the folder `config.init` if there is one.

    Raises RestoreError for a folder that holds no model, or one whose weights have other shapes.
    """
    model = UNet2DModel(**OmegaConf.to_container(config.model))
    if config.init is None:
        return model
    if not (Path(config.init) / "config.json").exists():
        raise RestoreError(f"init={config.init} is not a folder with config.json and safetensors weights")
    start = UNet2DModel.from_pretrained(config.init, torch_dtype=torch.float32).state_dict()
    if {k: v.shape for k, v in start.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise RestoreError(f"the weights in init={config.init} do not have the shapes that `model` describes")
    model.load_state_dict(start)
    return model


def train(config: DictConfig) -> Path:
    """Train until `config.steps` or `config.minutes`; returns the folder with the EMA weights.

    Continues from `config.out`/checkpoint.pt when it is there. Raises RestoreError for a missing
    data folder, unreadable images or a checkpoint made with another model configuration.
    """
    torch.manual_seed(config.seed)
    # Gradients and second moments fall into the denormal range as training settles, where x86 convolutions
    # become several times slower. Set before the first parallel kernel: worker threads inherit it.
    torch.set_flush_denormal(True)
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if native_bf16() else "no"
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    training, held_out = dataset.split(dataset.list_images(config.data.folder), config.data.held_out_every)
    images = dataset.load(training, config.data.stored_size)
    size = config.model.sample_size
    validation = torch.nn.functional.interpolate(
        dataset.load(held_out, config.data.stored_size).float() / 127.5 - 1, size=(size, size), mode="area"
    )

    model = build_model(config).to(memory_format=torch.channels_last)
    ema_options = {"decay": config.ema.decay, "use_ema_warmup": True, "power": config.ema.power}
    ema = EMAModel(model.parameters(), **ema_options)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.lr,
        betas=tuple(config.optimizer.betas),
        weight_decay=config.optimizer.weight_decay,
    )
    step = 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state.get("batch", config.batch * world) != config.batch * world:
            raise RestoreError(
                f"{checkpoint} was made with {state['batch']} images a step, which batch= gives again, not "
                f"{config.batch * world}; or choose another out=FOLDER"
            )
        if state["model_config"] != json.dumps(OmegaConf.to_container(config.model), sort_keys=True):
            raise RestoreError(f"{checkpoint} was made with another model configuration; choose another out=FOLDER")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step = state["step"]
        log.info("continuing from step %d", step)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema.to(device)
    forward = torch.compile(model) if config.compile else model
    alpha_bar = Schedule.from_config({}).alphas_cumprod  # DDPM's, as ADM is trained with
    started, last_log, recent = time.monotonic(), time.monotonic(), []

    def save(model) -> None:
        raw = accelerator.unwrap_model(model)
        state = {
            "model": raw.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "batch": config.batch * world,
            "model_config": json.dumps(OmegaConf.to_container(config.model), sort_keys=True),
        }
        with atomic.writing(checkpoint) as file:
            torch.save(state, file)

    def averaged() -> ADM:
        """The EMA weights as a frozen backbone of their own."""
        network = copy.deepcopy(accelerator.unwrap_model(model))
        ema.copy_to(network.parameters())
        return ADM(network)

    def out_of_time() -> bool:
        return config.minutes is not None and time.monotonic() - started > 60 * config.minutes

    bar = tqdm(total=config.steps, initial=step, disable=not accelerator.is_main_process, mininterval=10)
    while step < config.steps and not out_of_time():
        # Everything random in a step is drawn from a generator seeded by the step itself.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step * world + rank)
        chosen = dataset.batch_indices(len(images), config.batch, step * world + rank, config.seed)
        x0 = dataset.augment(images[chosen], size, generator, config.data.augment).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        # Stratified timesteps: one per equal slice of the range, which lowers the gradient's variance.
        slots = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
        t = (slots * len(alpha_bar)).long().to(device)
        a = alpha_bar.to(device)[t].float().view(-1, 1, 1, 1)
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * eps).contiguous(memory_format=torch.channels_last)

        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, (step + 1) / config.optimizer.warmup_steps)
        with accelerator.autocast():
            prediction = forward(x_t, t, return_dict=False)[0].float()
        weights = (config.snr_gamma, config.high_noise_weight)
        simple, vlb = hybrid_loss(prediction[:, :3], prediction[:, 3:], x0, eps, t, alpha_bar.to(device), *weights)
        loss = simple + config.vlb_weight * vlb
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        step += 1
        bar.update()

        recent.append((float(simple.detach()), float(vlb.detach())))
        if not math.isfinite(recent[-1][0] + recent[-1][1]):
            raise RestoreError(f"the loss is not finite at step {step}; lower optimizer.lr and continue")
        if not accelerator.is_main_process:
            continue
        if step % config.log_every == 0:
            mean = np.mean(recent, axis=0)
            row = {"step": step, "eps_loss": float(mean[0]), "vlb_bits": float(mean[1])}
            row["images_per_second"] = len(recent) * config.batch * world / (time.monotonic() - last_log)
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=f"{mean[0]:.4f}", vlb=f"{mean[1]:.4f}")
            recent, last_log = [], time.monotonic()
        if step % config.held_out_every_steps == 0:
            levels = held_out_loss(averaged().network, validation, alpha_bar, device)
            with open(out / "held_out.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "eps_mse": levels}) + "\n")
        if step % config.samples_every_steps == 0:
            sample_grid(averaged(), out / "samples" / f"{step:07d}.png")
        if step % config.checkpoint_every_steps == 0 and step < config.steps:
            save(model)
            averaged().save(out / "ema", dtype="fp16")
    bar.close()
    if accelerator.is_main_process:
        save(model)
        averaged().save(out / "ema", dtype="fp16")
    return out / "ema"
