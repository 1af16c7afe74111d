"""The training loop of every kind of network. Flat, resumable to the exact step, no state but the checkpoint's."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from operators import RestoreError
from operators.naming import check_known
from restore import disk
from restore.config import read_config
from restore.training.autoencoder import Autoencoder
from restore.training.diffusion import Diffusion
from restore.training.precision import FullPrecisionAttention, native_bf16

log = logging.getLogger(__name__)
KINDS = {"pixels": Diffusion, "latents": Diffusion, "autoencoder": Autoencoder}

DEFAULTS = {"kind": "pixels", "schedule": {}, "prediction_type": "epsilon"}


def load_config(path: str | Path, settings: list[str]) -> DictConfig:
    """The YAML file, or the name of one in configs/train, with key=value settings merged in. Raises RestoreError for a
    missing file or an unknown key."""
    config = OmegaConf.create(read_config(path, settings, "train", DEFAULTS))
    check_known([config.kind], KINDS, f"{path}: unknown kind")
    return config


def build(config: DictConfig, device: torch.device):
    """What `config.kind` trains: see Diffusion and Autoencoder, which the loop asks for the same things."""
    return KINDS[config.kind](config, device)


def train(config: DictConfig) -> Path:
    """Train until `config.steps` or `config.minutes`; returns the folder with the EMA weights.

    Continues from `config.out`/checkpoint.pt when it is there. Raises RestoreError for a missing
    data folder, unreadable images or a checkpoint made with another model configuration.
    """
    started = time.monotonic()
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
    out = disk.make_folder(config.out)

    kind = build(config, device)
    model, adversary = kind.model.to(memory_format=torch.channels_last), kind.adversary
    ema = EMAModel(
        model.parameters(), decay=config.ema.decay, use_ema_warmup=True, power=config.ema.power,
        foreach=device.type == "cuda",
    )  # fmt: skip
    options = {"lr": config.optimizer.lr, "betas": tuple(config.optimizer.betas)}
    optimizer = torch.optim.AdamW(model.parameters(), **options, weight_decay=config.optimizer.weight_decay)
    judging = None if adversary is None else torch.optim.AdamW(adversary.parameters(), **options, weight_decay=0.0)
    description = json.dumps(OmegaConf.to_container(config.model) | kind.description, sort_keys=True)
    step, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state.get("batch", config.batch * world) != config.batch * world:
            raise RestoreError(
                f"{checkpoint} was made with {state['batch']} images a step, which batch= gives again, not "
                f"{config.batch * world}; or choose another out=FOLDER"
            )
        if state["model_config"] != description:
            raise RestoreError(f"{checkpoint} was made with another model configuration; choose another out=FOLDER")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        # What learns no more stays at its average, which is what was saved for others to use.
        for parameter, average in zip(model.parameters(), ema.shadow_params, strict=True):
            if not parameter.requires_grad:
                parameter.data.copy_(average)
        if adversary is not None and "adversary" in state:  # it may have been asked for since
            adversary.load_state_dict(state["adversary"])
            judging.load_state_dict(state["judging"])
        step = state["step"]
        log.info("continuing from step %d", step)
    model, optimizer = accelerator.prepare(model, optimizer)
    if adversary is not None:
        kind.adversary, judging = accelerator.prepare(adversary, judging)
    ema.to(device)
    compiled = torch.compile(model) if config.compile else model
    last_log, recent = time.monotonic(), []

    # Gradients of attention in bf16 are up to thirty times slower on a CPU than those in fp32.
    attention = FullPrecisionAttention() if precision == "bf16" and device.type == "cpu" else nullcontext()

    def forward(*args, **kwargs):
        with accelerator.autocast(), attention:  # the network alone: data and losses keep their precision
            return compiled(*args, **kwargs)

    def save() -> None:
        state = {
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "model_config": description,
            "batch": config.batch * world,
        }
        if adversary is not None:
            state |= {"adversary": adversary.state_dict(), "judging": judging.state_dict()}
        with disk.open_atomic(checkpoint) as file:
            torch.save(state, file)
        kind.save(averaged(), out / "ema")

    def averaged() -> torch.nn.Module:
        """The EMA weights in a frozen network of their own."""
        network = copy.deepcopy(accelerator.unwrap_model(model))
        ema.copy_to(network.parameters())
        return network.eval().requires_grad_(False)

    def means() -> dict[str, float]:
        """Of what was logged since the last time. Raises RestoreError where training has diverged."""
        rows = {name: [row[name].float() for row in recent if name in row] for name in recent[-1]}
        found = {name: float(torch.stack(values).mean()) for name, values in rows.items()}
        if not all(map(math.isfinite, found.values())):
            raise RestoreError(f"the loss is not finite at step {step}; lower optimizer.lr and continue")
        return found

    def out_of_time() -> bool:
        return config.minutes is not None and time.monotonic() - started > 60 * config.minutes

    bar = tqdm(total=config.steps, initial=step, disable=not accelerator.is_main_process, mininterval=10)
    while step < config.steps and not out_of_time():
        # Everything random in a step is drawn from a generator seeded by the step itself.
        number = step * world + rank
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + number)
        torch.manual_seed(config.seed * 1_000_003 + number)  # dropout's
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, (step + 1) / config.optimizer.warmup_steps)
        loss, logged, pair = kind.loss(forward, number, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        if judging is not None and number >= kind.starts:
            judging.zero_grad(set_to_none=True)  # what the generator's loss left there
            logged["judging"] = kind.adversary_loss(pair)
            accelerator.backward(logged["judging"])
            judging.step()
            judging.zero_grad(set_to_none=True)
            logged["judging"] = logged["judging"].detach()
        step += 1
        bar.update()

        recent.append(logged)
        if not accelerator.is_main_process:
            continue
        if step % config.log_every == 0:
            row = {"step": step, **means()}
            row["images_per_second"] = len(recent) * config.batch * world / (time.monotonic() - last_log)
            _append(out / "log.jsonl", row)
            bar.set_postfix({name: f"{value:.4f}" for name, value in row.items() if name != "step"})
            recent, last_log = [], time.monotonic()
        if step % config.held_out_every_steps == 0:
            _append(out / "held_out.jsonl", {"step": step, **kind.held_out(averaged())})
        if step % config.samples_every_steps == 0:
            kind.picture(averaged(), out / "samples" / f"{step:07d}.png")
        if step % config.checkpoint_every_steps == 0 and step < config.steps:
            save()
    bar.close()
    if accelerator.is_main_process:
        if recent:
            means()
        save()
    return out / "ema"


def _append(path: Path, row: dict) -> None:
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RestoreError(f"cannot write {path}: {disk.describe_os_error(error)}") from error
