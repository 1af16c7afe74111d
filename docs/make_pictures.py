"""Draw the pictures of docs/samplers and docs/guidance, and README's samples: python docs/make_pictures.py [NAME ...]

Everything is computed with the embedded priors on a shipped photo, with the settings below or else the presets of
configs/method. A picture may differ in details between machines (docs/protocol.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import restore
from restore import calibration, samplers
from restore.guidance import SAG, SWG, TPG, TSG, Guidance
from restore.images import grids, io
from restore.paths import data_dir
from restore.restorer import Restorer
from restore.samplers.noise import measurement_generator
from restore.task import load_task

PHOTOS = {"pixels": "astronaut-face-64", "latents": "astronaut-face-128"}
SAMPLES = 8
COLOURS, CELL = {"pixels": 64, "latents": 48}, {"pixels": 128, "latents": 80}  # keeps a picture below 40 KB
WHITE = 0.5  # the spread, on [-1, 1], that is drawn white

# Sampler -> arguments that replace its preset's. All restore the same two measurements, for DDNM without noise.
SAMPLERS: dict[str, dict[str, Any]] = {
    "daps": {},
    "ddnm": {"steps": "ddim50"},
    "ddrm": {},
    "diffpir": {"steps": "quad:50"},
    "dpir": {},
    "dps": {"guidance": None},
    "fastdips": {},
    "flowdps": {},
    "pigdm": {"steps": "ddim50"},
    "pnpdm": {},
    "reddiff": {},
}
# The same for the embedded latent prior.
LATENT_SAMPLERS: dict[str, dict[str, Any]] = {"psld": {"guidance": None}}
# Page -> title and guidance of the rows below the unguided one.
GUIDANCE: dict[str, dict[str, Guidance]] = {
    "pag": {"PAG, i5, s = 1": restore.PAG(1.0, layers="i5")},
    "sag": {"SAG, s = 1": SAG(1.0, sigma=2.0, taps=9)},
    "seg": {"SEG, i5, s = 1": restore.PAG(1.0, layers="i5", target={"seg": {"sigma": 1.0}})},
    "swg": {"SWG, s = 1": SWG(1.0, window=32)},
    "tpg": {"TPG, m1, s = 1": TPG(1.0, layers="m1")},
    "tsg": {"TSG, s = 1": TSG(1.0)},
}
# README's picture, with the embedded latent prior.
LATENT_GUIDANCE: dict[str, dict[str, Guidance]] = {
    "pag-samples": {f"PAG, i3, s = {scale}": restore.PAG(scale, layers="i3") for scale in (1, 2)},
}


def draw_restoration(restorer: Restorer, name: str, steps: Any = None) -> Image.Image:
    """Draw a row for each of two measurements: two samples, mean and spread of all samples, the truth. A deterministic
    sampler has one estimate in place of the samples."""
    image_id = PHOTOS[restorer.kind]
    photo = io.read_image(data_dir() / "photos" / f"{image_id}.png")
    rows, deterministic = [], name in samplers.DETERMINISTIC
    for task in ("sr4", "inpaint-box"):
        operator = load_task(task, {"sigma": 0.0} if name == "ddnm" else {}).build(*photo.size)
        y = operator(photo.pixels, [measurement_generator(0, image_id)])
        changes = {**(SAMPLERS | LATENT_SAMPLERS)[name], **({} if steps is None else {"steps": steps})}
        method = restorer.method(operator, task=task, sampler=name, **changes)
        count = 1 if deterministic else SAMPLES
        result = restorer(y, operator, method, samples=count, batch_size=count, image_ids=[image_id])
        if deterministic:
            rows.append([y[0], result.samples[0, 0], photo.pixels[0]])
            continue
        spread = (result.spread[0].mean(dim=0, keepdim=True) * 2 / WHITE - 1).clamp(-1, 1).expand(3, -1, -1)
        rows.append([y[0], *result.samples[0, :2], result.mean[0], spread, photo.pixels[0]])
    if deterministic:
        return grids.draw_grid(
            rows, ["measurement", "the estimate", "truth"], ["SR x4", "box"], cell=CELL[restorer.kind]
        )
    titles = ["measurement", "a sample", "another", f"mean of {SAMPLES}", "spread", "truth"]
    return grids.draw_grid(rows, titles, ["SR x4", "box"], cell=CELL[restorer.kind])


def generate_rows(restorer: Restorer, guidances: dict[str, Guidance], count: int, **options: Any) -> list[list[Any]]:
    """Generate a row of samples without guidance and one with each guidance, from the same noise."""
    options |= {"ddim_eta": 1.0, "batch_size": count}
    return [list(restorer.generate(count, guidance=guidance, **options)) for guidance in (None, *guidances.values())]


def draw_generation(restorer: Restorer, name: str, steps: Any = None) -> Image.Image:
    """Draw samples without and with a guidance; for a page also |eps - eps_weak|."""
    if name in LATENT_GUIDANCE:
        guidances, count = LATENT_GUIDANCE[name], 8
        rows = generate_rows(restorer, guidances, count, steps=steps or "ddim25")
        titles = ["no guidance", *guidances]
    else:
        guidances, count, signals = GUIDANCE[name], 4, []
        keep = lambda step: signals.extend(s for s in step.get("signals", ()) if s is not None)  # noqa: E731
        faces = {"labels": ["face"] * count, "callback": keep}
        rows = generate_rows(restorer, guidances, count, steps=steps or "karras:25", **faces)
        mean = torch.stack(signals).mean(dim=0)
        rows.append([(2 * signal / signal.max() - 1).expand(3, -1, -1) for signal in mean])
        titles = ["no guidance", *guidances, "|eps - eps_weak|"]
    return grids.draw_grid(rows, [""] * count, titles, cell=128)


def draw_trajectory(restorer: Restorer, steps: Any = None) -> Image.Image:
    """Draw x0_hat of the first of six samples through time, and the six samples."""
    count, states = 6, []
    faces = {"labels": ["face"] * count, "batch_size": count}
    samples = restorer.generate(count, steps=steps or 100, callback=states.append, **faces)
    shown = [states[round(k * (len(states) - 1) / (count - 1))] for k in range(count)]
    rows = [[step["x0_hat"][0].clamp(-1, 1) for step in shown], list(samples)]
    return grids.draw_grid(rows, [f"t = {step['t']:g}" for step in shown], ["x0_hat", "samples"], cell=128)


def draw_histogram(row: dict[str, Any], width: int = 120, height: int = 48) -> Image.Image:
    """Draw the rank histogram of a row of the calibration, cut at four times uniform, which is the line; grey: from
    half to one and a half times uniform."""
    picture, bar = Image.new("RGB", (width, height), "white"), width / len(row["histogram"])
    draw, place = ImageDraw.Draw(picture), lambda share: (height - 1) * (1 - min(share, 4) / 4)
    draw.rectangle((0, place(1.5), width - 1, place(0.5)), fill=(215, 215, 215))
    for i, share in enumerate(row["histogram"]):
        draw.rectangle((i * bar, place(share), (i + 1) * bar - 1, height - 1), fill=(0, 114, 178))
    draw.line((0, place(1), width - 1, place(1)), fill=(20, 20, 20))
    return picture


def draw_calibration(folder: Path) -> Path:
    """Write folder/calibration.png: the rank histograms of data/results/calibration.json."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(calibration.data_file().read_text(encoding="utf-8"))["rows"]:
        name = row["name"].replace("ζ", "zeta").replace("Π", "Pi").replace("τ", "tau")  # the font has no Greek
        rows.setdefault(name, []).append(row)
    columns = max(map(len, rows.values()))
    pictures, captions = [], []
    for each in rows.values():
        each = each + [None] * (columns - len(each))
        shown = [row if row and "histogram" in row else None for row in each]
        pictures.append([row and draw_histogram(row) for row in shown])
        captions.append(
            [
                f"{row['evaluations'] or '-'}: {calibration.judge(row)}, {row['spread_error']:.2f}" if row else ""
                for row in shown
            ]
        )
    sheet = grids.draw_grid(pictures, [""] * columns, list(rows), captions, cell=120, font_size=13)
    path = folder / "calibration.png"
    sheet.quantize(16, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def draw_picture(restorer: Restorer, name: str, folder: Path, steps: Any = None) -> Path:
    """Write folder/samplers/NAME.png, folder/guidance/NAME.png or README's folder/pag-samples.png, in few colours.

    steps: instead of those of every picture, for a quick look.
    """
    if name == "generate":
        kind, picture = "samplers", draw_trajectory(restorer, steps)
    elif name in SAMPLERS | LATENT_SAMPLERS:
        kind, picture = "samplers", draw_restoration(restorer, name, steps)
    else:
        kind, picture = "guidance" if name in GUIDANCE else "", draw_generation(restorer, name, steps)
    path = folder / kind / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = COLOURS[restorer.kind] if kind else 256
    picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


if __name__ == "__main__":
    latents = LATENT_SAMPLERS | LATENT_GUIDANCE
    for requested in sys.argv[1:] or [*SAMPLERS, "generate", *GUIDANCE, *latents, "calibration"]:
        if requested == "calibration":
            print(draw_calibration(Path(__file__).parent))
            continue
        prior = restore.load("embedded-latent" if requested in latents else "embedded")
        path = draw_picture(prior, requested, Path(__file__).parent)
        print(f"{path}  {path.stat().st_size / 1024:.1f} KB", flush=True)
