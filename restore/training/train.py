"""The training loop of every kind of network, resumable to the exact step."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from operators import RestoreError
from operators.naming import check_known
from operators.validate import require_integer
from restore import disk
from restore.backbones.precision import has_native_bf16
from restore.config import read_config
from restore.training.autoencoder import Autoencoder
from restore.training.dataset import hash_split
from restore.training.diffusion import Diffusion
from restore.training.precision import FullPrecisionAttention

log = logging.getLogger(__name__)
KINDS = {"pixels": Diffusion, "latents": Diffusion, "autoencoder": Autoencoder}
DEFAULTS = {"kind": "pixels", "schedule": {}, "prediction_type": "epsilon", "patch": 1, "denoising": None}
INTERVALS = (
    "log_every",
    "held_out_every_steps",
    "samples_every_steps",
    "checkpoint_every_steps",
    "data.held_out_every",
)


def load_training_config(path: str | Path, settings: list[str]) -> DictConfig:
    """Load a YAML file, or the one of that name in configs/train, with key=value settings merged in.

    Raises RestoreError for a missing file, an unknown key, and intervals below 1.
    """
    config = OmegaConf.create(read_config(path, settings, "train", DEFAULTS))
    check_known([config.kind], KINDS, f"{path}: unknown kind")
    for key in INTERVALS:
        require_integer(OmegaConf.select(config, key), key)
    require_integer(config.optimizer.warmup_steps, "optimizer.warmup_steps", minimum=0)
    return config


def train(config: DictConfig) -> Path:
    """Train until `config.steps` or `config.minutes`; return the folder with the EMA weights.

    Continues from `config.out`/checkpoint.pt if it exists. Raises RestoreError for a missing data folder, unreadable
    images, a checkpoint of another model configuration, batch size, split of the images or task (kind, schedule,
    prediction type, patch, encoder), weights without their checkpoint, which would be replaced, and a loss that is
    not finite.
    """
    started = time.monotonic()
    torch.manual_seed(config.seed)
    # Gradients and second moments fall into the denormal range as training settles, where x86 convolutions
    # become several times slower. Set before the first parallel kernel: worker threads inherit it.
    torch.set_flush_denormal(True)
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = {"auto": "bf16" if has_native_bf16() else "no", "fp32": "no"}.get(config.precision, config.precision)
    accelerator = Accelerator(mixed_precision=precision)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    out = disk.make_folder(config.out)

    kind = KINDS[config.kind](config, device)
    # On the device before the optimizer is made: not every one keeps the parameters that it moves.
    network, discriminator = kind.model.to(device, memory_format=torch.channels_last), kind.discriminator
    averaging = {"decay": config.ema.decay, "use_ema_warmup": True, "power": config.ema.power}
    ema = EMAModel(network.parameters(), **averaging, foreach=device.type == "cuda")
    options = {"lr": config.optimizer.lr, "betas": tuple(config.optimizer.betas)}
    options["weight_decay"] = config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    parts = {"model": network, "optimizer": optimizer, "ema": ema}  # of a checkpoint
    if discriminator is not None:
        judging = torch.optim.AdamW(discriminator.to(device).parameters(), **options | {"weight_decay": 0.0})
        parts |= {"adversary": discriminator, "judging": judging}
    description = json.dumps(OmegaConf.to_container(config.model) | kind.description, sort_keys=True)
    facts = {"model_config": description, "batch": config.batch * world, "split": hash_split(config.data)}
    facts |= {"kind": config.kind} | kind.facts
    step, checkpoint = 0, out / "checkpoint.pt"
    if (out / "ema").exists() and not checkpoint.exists():
        raise RestoreError(
            f"{out / 'ema'} exists without {checkpoint.name}: its weights would be replaced; try another out="
        )
    if checkpoint.exists():
        step = _load_checkpoint(checkpoint, parts, facts)
        # The checkpoint has the options of its own session: those of this one count.
        ema.decay, ema.power = config.ema.decay, config.ema.power
        optimizer.param_groups[0].update(options)
        if discriminator is not None:
            judging.param_groups[0].update(options | {"weight_decay": 0.0})
        log.info("continuing from step %d", step)
    model, optimizer = accelerator.prepare(network, optimizer)
    if discriminator is not None:
        kind.discriminator, judging = accelerator.prepare(discriminator, judging)
    ema.to(device)
    compiled = torch.compile(model) if config.compile else model
    last_log, recent = time.monotonic(), []

    # Gradients of attention in bf16 are up to thirty times slower on a CPU than those in fp32.
    attention = FullPrecisionAttention() if precision == "bf16" and device.type == "cpu" else nullcontext()

    def forward(*args, **kwargs):
        with accelerator.autocast(), attention:  # only the network: data and losses keep their precision
            return compiled(*args, **kwargs)

    def save() -> None:
        check_finite()  # or the last good checkpoint would be lost
        with disk.open_atomic(checkpoint) as file:
            torch.save({name: part.state_dict() for name, part in parts.items()} | facts | {"step": step}, file)
        kind.save(copy_average(), out / "ema")

    def copy_average() -> torch.nn.Module:
        """A frozen copy of the network with the EMA weights."""
        average = copy.deepcopy(network)
        ema.copy_to(average.parameters())
        return average.eval().requires_grad_(False)

    def average_log() -> dict[str, float]:
        """Means over the steps since the last row of the log. Raises RestoreError if training has diverged."""
        columns = {name: [row[name].float() for row in recent if name in row] for name in recent[-1]}
        means = {name: float(torch.stack(values).mean()) for name, values in columns.items()}
        if not all(map(math.isfinite, means.values())):
            raise RestoreError(f"the loss is not finite at step {step}; lower optimizer.lr and continue")
        return means

    def check_finite() -> None:
        """Raise RestoreError if a loss since the last row of the log, or a weight, is not finite."""
        if recent:
            average_log()
        networks = [network] if discriminator is None else [network, discriminator]
        if not all(bool(p.isfinite().all()) for one in networks for p in one.parameters()):
            raise RestoreError(f"the weights are not finite at step {step}; lower optimizer.lr and continue")

    def decay(step: int) -> float:
        """The factor of the learning rate: 1, or falling linearly to 0 between the two steps of optimizer.decay."""
        first, last = config.optimizer.get("decay") or (math.inf, math.inf)
        return 1.0 if step < first else max(0.0, (last - step) / (last - first))

    warmup = max(1, config.optimizer.warmup_steps)
    deadline = math.inf if config.minutes is None else started + 60 * config.minutes
    bar = tqdm(total=config.steps, initial=step, disable=not accelerator.is_main_process, mininterval=10)
    while step < config.steps and time.monotonic() <= deadline:
        # Everything random in a step is drawn from a generator seeded by the step itself.
        number = step * world + rank
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + number)
        torch.manual_seed(config.seed * 1_000_003 + number)  # dropout's
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, (step + 1) / warmup) * decay(step)
        loss, logged, pair = kind.loss(forward, number, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        if discriminator is not None and number >= kind.discriminator_start:
            judging.zero_grad(set_to_none=True)  # left by the generator's loss
            loss = kind.discriminator_loss(pair)
            accelerator.backward(loss)
            judging.step()
            judging.zero_grad(set_to_none=True)
            logged["judging"] = loss.detach()
        step += 1
        bar.update()

        recent.append(logged)
        if not accelerator.is_main_process:
            continue
        if step % config.log_every == 0:
            row = {"step": step, **average_log()}
            row["images_per_second"] = len(recent) * config.batch * world / (time.monotonic() - last_log)
            _append(out / "log.jsonl", row)
            bar.set_postfix({name: f"{value:.4f}" for name, value in row.items() if name != "step"})
            recent, last_log = [], time.monotonic()
        if step % config.held_out_every_steps == 0:
            _append(out / "held_out.jsonl", {"step": step, **kind.measure_held_out(copy_average())})
        if step % config.samples_every_steps == 0:
            kind.write_samples(copy_average(), out / "samples" / f"{step:07d}.png")
        if step % config.checkpoint_every_steps == 0 and step < config.steps:
            save()
    bar.close()
    if accelerator.is_main_process:
        save()
    return out / "ema"


def _load_checkpoint(path: Path, parts: dict[str, Any], facts: dict[str, Any]) -> int:
    """Load the state of every part and return the step. Raises RestoreError for a checkpoint with other `facts`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise RestoreError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not {"model_config", "step", "model", "optimizer", "ema"} <= state.keys():
        raise RestoreError(f"{path} must be a checkpoint of `restore train`, got another file; try another out=FOLDER")
    if state.get("batch", facts["batch"]) != facts["batch"]:
        raise RestoreError(
            f"batch must give {state['batch']} images a step to continue {path}, got {facts['batch']};"
            " try another out=FOLDER"
        )
    if state.get("split", facts["split"]) != facts["split"]:  # those of earlier versions have none
        raise RestoreError(
            f"data must have the files and held_out_every of the training that {path} continues, got others, by which"
            " images that it was trained on could be held out; try the former ones, or another out=FOLDER"
        )
    if state["model_config"] != facts["model_config"]:
        raise RestoreError(f"{path} is of another model configuration; try another out=FOLDER")
    if state.get("encoder", facts.get("encoder")) != facts.get("encoder"):
        raise RestoreError(
            f"autoencoder must have the encoder on whose latents {path} was trained, got another one; try another"
            " out=FOLDER"
        )
    for name in ("kind", "schedule", "prediction_type", "patch"):
        if name in facts and state.get(name, facts[name]) != facts[name]:
            raise RestoreError(
                f"{name} must be {state[name]} to continue {path}, got {facts[name]}; try another out=FOLDER"
            )
    for name, part in parts.items():
        if name in state or name not in ("adversary", "judging"):  # these may have been enabled since
            part.load_state_dict(state[name])
    # Frozen parameters stay at their average, which is what was saved and may be in use.
    for parameter, average in zip(parts["model"].parameters(), parts["ema"].shadow_params, strict=True):
        if not parameter.requires_grad:
            parameter.data.copy_(average)
    return state["step"]


def _append(path: Path, row: dict) -> None:
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RestoreError(f"cannot write {path}: {disk.describe_os_error(error)}") from error
