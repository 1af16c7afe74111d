"""Pictures of one sample through time, as PAG's Figures 2, 3, 42 and 43: clean estimates, and |eps − eps_weak|."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from restore.images import grids

CELL = 128  # pixels of a picture's longer side
COLUMNS = 10  # about so many steps are kept of a whole run
WHITE = 0.99  # the share of a row's values of |eps − eps_weak| below white: outliers are clipped (PAG, App. A.1)


class Trajectory:
    """A callback that keeps steps of one sample and passes every step on to `then`.

    index: of the sample. initial: keep every one of the first steps, so many; None: about ten, evenly spaced.
    """

    predictions = True  # are wanted, see restore.restoration.observe_run

    def __init__(self, then: Callable[[dict], None] | None = None, index: int = 0, initial: int | None = None) -> None:
        self.then, self.index, self.initial = then, index, initial
        self.times: list[float] = []
        self.rows: dict[str | int, list[PIL.Image.Image | None]] = {}  # clean estimates, of term k under k
        self.signals: list[list[torch.Tensor | None]] = []

    def __call__(self, step: dict) -> None:
        row = self.index - step["first"]
        if 0 <= row < step.get("count", 1) and self._is_kept(step):
            self.times.append(step["t"])
            self.signals.append([None if s is None else s[row, 0].float().cpu() for s in step.get("signals", ())])
            self._keep_estimates(step, row)
        if self.then is not None:
            self.then(step)

    def _is_kept(self, step: dict) -> bool:
        if self.initial is not None:
            return step["step"] < self.initial
        every = max(1, step["steps"] // COLUMNS)
        return step["step"] % every == 0 or step["step"] == step["steps"] - 1

    @torch.no_grad()
    def _keep_estimates(self, step: dict, row: int) -> None:
        predictions, x0_hat = step.get("predictions", {}), step["x0_hat"]
        decode = step.get("decode", lambda x: x)
        if "x_t" in step and step["x_t"].shape == x0_hat.shape:  # generation does not decode it
            x0_hat = decode(x0_hat)
        estimates = {"x0_hat": x0_hat[row]}
        for name, x0 in (*predictions.items(), *enumerate(predictions.get("weak", ()))):
            if name != "weak":
                estimates[name] = None if x0 is None else decode(x0[row : row + 1])[0]
        for name, image in estimates.items():
            picture = None if image is None else grids.fit_image(image.float().cpu().expand(3, -1, -1), CELL)
            self.rows.setdefault(name, []).append(picture)

    def estimates(self, described: Sequence[Mapping[str, Any]] = ()) -> PIL.Image.Image:
        """Return the steps side by side: x0_hat of the sampler and, under guidance, of the guided, the strong and each
        weak prediction, and |eps − eps_weak|. Equal rows are drawn once.

        described: the result of restore.guidance.describe_guidance.
        """
        names = [name for name, _ in _list_terms(described)]
        titles, pictures = [], []
        for name, row in self.rows.items():
            title = f"weak: {names[name]}" if isinstance(name, int) else name
            same = next((k for k, other in enumerate(pictures) if _look_equal(row, other)), None)
            if same is not None:
                titles[same] += f"\n{title}"
            elif any(row):
                titles.append(title)
                pictures.append(row)
        signals = self._draw_signals(described)
        if len(pictures) == 1 and not signals:
            return grids.draw_grid(pictures, [""] * len(self.times), cell=CELL, font_size=14)
        titles += [title for title, _, _ in signals]
        pictures += [row for _, row, _ in signals]
        return grids.draw_grid(pictures, [f"t = {t:g}" for t in self.times], titles, cell=CELL)

    @property
    def guided(self) -> bool:
        """Whether any guidance was active."""
        return any(signal is not None for signals in self.signals for signal in signals)

    def guidance(self, described: Sequence[Mapping[str, Any]]) -> PIL.Image.Image:
        """Return |eps − eps_weak|, averaged over the channels, in a row for each term that was active.

        described: the result of restore.guidance.describe_guidance. A row is black for 0 and white from the value on
        that 99 % of its pixels are below; its means stand below. A cell is empty if the term was off.
        """
        titles, pictures, captions = zip(*self._draw_signals(described), strict=True)
        return grids.draw_grid(pictures, [f"t = {t:g}" for t in self.times], titles, captions, cell=CELL)

    def _draw_signals(self, described: Sequence[Mapping[str, Any]]) -> list[tuple[str, list, list[str]]]:
        """Return (title, pictures, means) of each term that was active."""
        drawn, rows = [], zip(*self.signals, strict=True)
        for (name, options), row in zip(_list_terms(described), rows, strict=False):
            values = [signal.flatten() for signal in row if signal is not None]
            if not values:
                continue
            white = max(float(np.quantile(torch.cat(values).numpy(), WHITE)), 1e-12)
            cells = [None if s is None else (2 * s / white - 1).clamp(-1, 1).expand(3, *s.shape) for s in row]
            layers = options.get("layers", ())
            layers = layers if isinstance(layers, str) else ", ".join(layers)
            title = "\n".join(filter(None, [f"{name} {options['scale']:g}", layers, f"white: {white:.2g}"]))
            drawn.append((title, cells, ["" if signal is None else f"{float(signal.mean()):.3g}" for signal in row]))
        return drawn


def _list_terms(described: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [next(iter(term.items())) for term in described if "combine" not in term]


def _look_equal(first: Sequence[PIL.Image.Image | None], second: Sequence[PIL.Image.Image | None]) -> bool:
    """Whether two rows differ by no more than rounding to 8 bit."""
    if any((a is None) != (b is None) for a, b in zip(first, second, strict=True)):
        return False
    pairs = [(np.asarray(a, int), np.asarray(b, int)) for a, b in zip(first, second, strict=True) if a is not None]
    return all(a.shape == b.shape and np.abs(a - b).max() <= 1 for a, b in pairs)
