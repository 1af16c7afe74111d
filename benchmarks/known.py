"""Samplers on priors whose posterior is known: `python -m benchmarks.known docs/known-posteriors.md`.

Measures the tables of that page anew (without a file it prints them): every sampler on two Gaussians and on a Gaussian
mixture, against exact posterior samples (problems of the kind that Cardoso et al. 2023 and arXiv 2503.03007 propose).
About five minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.posteriors import (
    WHITE,
    MixturePrior,
    compare_with_posterior,
    draw_measurement,
    example_operators,
    example_priors,
)
from operators import RestoreError
from restore import disk, samplers


@dataclass(frozen=True)
class Entry:
    """A sampler in the tables.

    budgets: evaluations -> steps and parameters that spend them. grid: values to try for each parameter; those that are
    best for a prior with TUNED evaluations, on other measurements, are used.
    """

    sampler: str | Callable
    budgets: Mapping[int, Mapping[str, Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def list_candidates(self, budget: int) -> list[dict[str, Any]]:
        fixed = {**self.parameters, **self.budgets[budget]}
        return [fixed | dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


BUDGETS, TUNED = (20, 50, 100, 1000), 100


def dps(prior, operator, y, *, steps: int, pull: float, **options) -> torch.Tensor:
    """DPS with zeta = pull / steps: as many small steps pull as far as few large ones."""
    return samplers.find_sampler("dps")(prior, operator, y, steps=steps, zeta=pull / steps, **options)


def _each(steps: str) -> dict[int, dict[str, Any]]:
    return {n: {"steps": steps.format(n)} for n in BUDGETS}


_DAPS = {"sigma_max": 10.0, "sigma_min": 0.05, "tau": None, "lr_min_ratio": 0.3}
SETTINGS = {
    "DPS": Entry(dps, {n: {"steps": n} for n in BUDGETS}, grid={"pull": (3, 10, 30, 100)}),
    "DDRM": Entry("ddrm", _each("ddim{}")),
    "DDNM+": Entry("ddnm", _each("ddim{}")),
    "DiffPIR": Entry("diffpir", _each("quad:{}"), grid={"lam": (1.0, 3.0), "zeta": (0.3, 1.0)}),
    "PiGDM, added": Entry("pigdm", _each("ddim{}"), grid={"prior_variance": (WHITE, 1.0)}),
    "PiGDM, score": Entry("pigdm", _each("karras:{}"), {"gradient": "score"}, {"prior_variance": (WHITE, 1.0)}),
    "DAPS": Entry(
        "daps",
        {
            n: {"steps": steps, "ode_steps": n // steps, "mcmc_steps": 50}
            for n, steps in ((20, 4), (50, 10), (100, 20), (1000, 100))
        },
        {**_DAPS, "lr": 1e-3},
    ),
    "DAPS, exact": Entry(
        "daps",
        {
            n: {"steps": steps, "ode_steps": 2, "mcmc_steps": mcmc}
            for n, steps, mcmc in ((20, 2, 8), (50, 5, 8), (100, 5, 18), (1000, 10, 98))
        },
        {**_DAPS, "conditional": "exact", "momentum": 0.9, "ode_sigma_min": 0.03},
        {"lr": (3e-4, 1e-3)},
    ),
    "FAST-DIPS": Entry(
        "fastdips",
        {n: {"steps": n} for n in BUDGETS},
        {"sigma_max": 10.0, "sigma_min": 0.03, "descent_steps": 2},
        {"epsilon": (0.05, 0.4)},
    ),
    "RED-diff": Entry("reddiff", _each("ddim{}"), {"start": "adjoint", "lr": 0.1}, {"lam": (0.02, 0.1, 0.25)}),
    "PnP-DM": Entry(
        "pnpdm",
        {
            n: {"steps": steps, "iterations": iterations, "decay": decay}
            for n, steps, iterations, decay in (
                (20, "karras:20", 5, 0.4),
                (50, "karras:25", 10, 0.6),
                (100, "karras:25", 20, 0.8),
                (1000, "karras:50", 100, 0.95),
            )
        },
        {"rho_max": 1.0},
        {"rho_min": (0.05, 0.1, 0.2)},
    ),
}


def measure_sampler(
    prior: MixturePrior, sampler: str | Callable, options: Mapping[str, Any], sigma: float, n: int, seed: int
) -> dict[str, float]:
    """Return the mean of compare_with_posterior over the tasks; infinities if the sampler diverges."""
    rows = []
    for operator in example_operators(sigma).values():
        y, posterior = draw_measurement(prior, operator, seed)
        run = partial(samplers.find_sampler(sampler), prior, operator, **options)
        try:
            sample = lambda y, noise, run=run: run(y, noise=noise)  # noqa: E731
            rows.append(compare_with_posterior(prior, y, posterior, sample, n, seed))
        except RestoreError:
            return dict.fromkeys(("mean", "variance", "distance", "floor", "nfe"), math.inf)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def format_table(
    prior: MixturePrior, settings: Mapping[str, Entry], *, sigma: float = 0.1, n: int = 1000
) -> Iterator[str]:
    """Yield lines of Markdown: a row for every sampler and budget, means over the tasks."""
    yield "sampler | evaluations | error of the mean | variance × | distance (floor) | chosen"
    yield "---|---|---|---|---|---"
    for name, entry in settings.items():
        candidates = entry.list_candidates(TUNED) if entry.grid else ()
        distances = [measure_sampler(prior, entry.sampler, o, sigma, n // 5, 1)["distance"] for o in candidates]
        best = distances.index(min(distances)) if distances else 0
        for budget in entry.budgets:
            options = entry.list_candidates(budget)[best]
            got = measure_sampler(prior, entry.sampler, options, sigma, n if budget <= TUNED else n // 4, 0)
            tuned = ", ".join(f"{key} {options[key]:g}" for key in entry.grid)
            shown = f"{got['nfe']:.0f} | {got['mean']:.3f} | {got['variance']:.2f} | {got['distance']:.3f}"
            yield f"{name} | {shown} ({got['floor']:.3f}) | {tuned}"


def main(page: str | None = None) -> None:
    """Print the tables; with a page, write them in place of what follows its line "## Tables"."""
    lines = []
    for title, prior in example_priors().items():
        for line in ("", f"### {title}", "", *format_table(prior, SETTINGS)):
            print(line, flush=True)
            lines.append(line)
    if page is not None:
        text, mark, _ = Path(page).read_text().partition("## Tables\n")
        if not mark:
            raise RestoreError(f"{page} must have a line '## Tables'")
        disk.write_bytes(Path(page), "\n".join([text + mark.rstrip("\n"), *lines, ""]).encode())


if __name__ == "__main__":
    main(*sys.argv[1:2])
