"""Pictures of one restoration through time: x0_hat and the contribution of the guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image

from restore.images import grids, io


class Trajectory:
    """A callback that keeps about ten evenly spaced steps of the first sample and passes every step on to `then`."""

    def __init__(self, then: Callable[[dict], None] | None = None) -> None:
        self.then, self.steps = then, []

    def __call__(self, step: dict) -> None:
        every = max(1, step["steps"] // 10)
        if step["first"] == 0 and (step["step"] % every == 0 or step["step"] == step["steps"] - 1):
            signals = [None if signal is None else signal[0, 0].float().cpu() for signal in step.get("signals", ())]
            self.steps.append((step["t"], step["x0_hat"][0].float().cpu(), signals))
        if self.then is not None:
            self.then(step)

    def estimates(self) -> PIL.Image.Image:
        """Return x0_hat of the steps side by side."""
        pictures = [io.to_pil(x0_hat) for _, x0_hat, _ in self.steps]
        return grids.draw_grid([pictures], [""] * len(pictures), cell=128, font_size=14)

    @property
    def guided(self) -> bool:
        """Whether any guidance was active."""
        return any(signal is not None for _, _, signals in self.steps for signal in signals)

    def guidance(self, described: Sequence[Mapping[str, Any]]) -> PIL.Image.Image:
        """Return |eps − eps_weak|, averaged over the channels, in a row for each term that was active.

        described: the result of restore.guidance.describe_guidance. A row is black for 0 and white for its largest
        value, with square roots between; its means stand below. A cell is empty if the term was off.
        """
        rows = [list(row) for row in zip(*(signals for _, _, signals in self.steps), strict=True)]
        names = [next(iter(term.items())) for term in described if "combine" not in term]
        titles, pictures, captions = [], [], []
        for (name, options), row in zip(names, rows, strict=True):
            largest = max((float(signal.max()) for signal in row if signal is not None), default=None)
            if largest is None:
                continue
            cells = [None if s is None else (2 * (s / max(largest, 1e-12)).sqrt() - 1).expand(3, *s.shape) for s in row]
            layers = options.get("layers", ())
            layers = layers if isinstance(layers, str) else ", ".join(layers)
            titles.append("\n".join(filter(None, [f"{name} {options['scale']:g}", layers, f"white: {largest:.2g}"])))
            pictures.append(cells)
            captions.append(["" if signal is None else f"{float(signal.mean()):.3g}" for signal in row])
        return grids.draw_grid(pictures, [f"t = {t:g}" for t, _, _ in self.steps], titles, captions, cell=128)
