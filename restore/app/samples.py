"""`restore generate`: samples of a prior as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from operators import RestoreError
from restore import disk
from restore import guidance as guidances
from restore.app import files
from restore.app.files import SIGNALS, TRAJECTORY, Photo
from restore.app.run import OF_THE_PRIOR, Outcome
from restore.app.trajectory import Trajectory
from restore.guidance import Guidance
from restore.images import io
from restore.images.formats import PICTURE_SUFFIXES
from restore.method import find_generation
from restore.versions import get_version


def generate_files(
    out: str | Path,
    restorer: Any,
    *,
    n: int,
    guidance: Guidance | None = None,
    labels: Sequence[int | str] | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    steps: int | str | None = None,
    ddim_eta: float | None | str = "preset",
    seed: int = 0,
    batch_size: int = 1,
    overwrite: bool = False,
    save_trajectory: bool = False,
    trajectory_steps: int | None = None,
    callback: Callable[[dict], None] | None = None,
) -> Iterator[Outcome]:
    """Write samples of the prior as sample-0000.png, ... with side-cars into the folder `out`, yielding each outcome.

    labels: one class, or one per image. save_trajectory, trajectory_steps: draw each sample through time, see
    `Trajectory`. The other arguments are those of Restorer.generate; sample i depends only on (seed, i), so that
    finished samples are kept and more can be added. Raises RestoreError before the first sample if a file of another
    program or a sample with other settings would be replaced, unless `overwrite`.
    """
    if labels is not None and len(labels) not in (1, n):
        raise RestoreError(f"labels must be one class or {n}, one per image, got {len(labels)}")
    labels = None if labels is None else list(labels) * (n if len(labels) == 1 else 1)
    require_folder(out)
    files.make_writable_folder(Path(out))
    paths = [Path(out) / f"sample-{i:04d}.png" for i in range(n)]
    places = [Photo(path.with_suffix(""), path) for path in paths]
    files.check_outputs(places, [place.outputs(trajectory=save_trajectory) for place in places], overwrite)
    method = find_generation(restorer.name, steps, ddim_eta)
    steps, ddim_eta = method.steps, method.parameters["ddim_eta"]
    prompts = {"prompt": prompt, "negative_prompt": negative_prompt}
    options = {"guidance": guidance, "steps": steps, "ddim_eta": ddim_eta, "seed": seed}
    options |= {"batch_size": batch_size}
    described = guidances.describe_guidance(guidance)
    protocol = restorer.protocol(None, replace(method, guidance=guidance))
    settings = {key: protocol[key] for key in OF_THE_PRIOR if key in protocol}
    settings |= {"steps": steps, "ddim_eta": ddim_eta, "seed": seed, "guidance": described, **prompts}
    settings |= {"trajectory": trajectory_steps or True} if save_trajectory else {}
    each = [settings | {"index": i, "label": None if labels is None else labels[i]} for i in range(n)]
    finished = [not overwrite and files.is_finished(*pair) for pair in zip(places, each, strict=True)]
    for first in range(0, n, batch_size):
        batch = range(first, min(first + batch_size, n))
        if all(finished[i] for i in batch):
            yield from (Outcome(places[i], skipped=True) for i in batch)
            continue
        drawn, observed = [], callback
        for k in range(len(batch) if save_trajectory else 0):
            observed = Trajectory(observed, k, trajectory_steps)
            drawn.append(observed)
        of_batch = None if labels is None else labels[first : batch.stop]
        images = restorer.generate(len(batch), first=first, labels=of_batch, callback=observed, **prompts, **options)
        for i, image in zip(batch, images, strict=True):
            if finished[i]:
                yield Outcome(places[i], skipped=True)
                continue
            pictures = _draw_trajectory(drawn[i - first], places[i], described or ()) if drawn else {}
            names = [path.name for path in (paths[i], places[i].sidecar, *pictures)]
            sidecar = {"version": get_version(), "finished": False, "files": names} | each[i]
            with places[i].remove_on_failure(1, False, save_trajectory):
                disk.write_json(places[i].sidecar, sidecar)
                for path, picture in pictures.items():
                    io.write_image(path, io.to_tensor(picture)[0])
                like = io.ImageRecord(image, paths[i], "PNG", grey=len(image) == 1)
                io.write_image(paths[i], image.expand(3, -1, -1), like=like)
                written = {path.name: disk.hash_file(path) for path in (paths[i], *pictures)}
                disk.write_json(places[i].sidecar, sidecar | {"finished": True, "written": written})
            yield Outcome(places[i])


def require_folder(out: str | Path) -> None:
    """Raise RestoreError for what means a picture: "-", the standard output, and names of image files."""
    if str(out) == "-" or (Path(out).suffix.lower() in PICTURE_SUFFIXES and not Path(out).is_dir()):
        raise RestoreError(f"out must be a folder for the samples, got {out}")


def _draw_trajectory(trajectory: Trajectory, place: Photo, described: Sequence) -> dict[Path, Any]:
    pictures = {place.companion(TRAJECTORY): trajectory.estimates(described)}
    if trajectory.guided:
        pictures[place.companion(SIGNALS)] = trajectory.guidance(described)
    return pictures
