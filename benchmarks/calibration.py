"""Whether samplers sample: `python -m benchmarks.calibration`, on priors whose posterior is known.

Writes data/results/calibration.json, from which `restore run --samples` says how far a spread can be trusted, and the
tables of docs/calibration.md. A row that the file has with the same settings is not measured again. Settings:
quick=true, a few truths and no 1000 evaluations, prints only; rows=dps,diffpir: of these samplers; file=, page=: where
to.
Then `python docs/make_pictures.py calibration` draws the picture.
See benchmarks/ranks.py for what is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.known import BUDGETS, SETTINGS, TUNED, Entry
from benchmarks.measure import run_command
from benchmarks.ranks import (
    PRIORS,
    SAMPLES,
    SIGMA,
    TASKS,
    Problem,
    draw_exact,
    draw_problems,
    measure,
    repeat_mean,
)
from operators import RestoreError
from restore import disk, samplers
from restore.calibration import LEVELS, data_file, judge

TRUTHS, FEW = 12, 6  # of each of the four problems, and where there are 1000 evaluations
PAGE = "docs/calibration.md"


def run_sampler(sampler: str | Callable, options: Mapping[str, Any]) -> Callable:
    """Return a sampler of the package in the form of `measure`."""
    return lambda problem, y, noise: samplers.find_sampler(sampler)(
        problem.prior, problem.operator, y, noise=noise, **options
    )


def choose(entry: Entry, problems: Sequence[Problem]) -> int:
    """Return which of an entry's candidates has the best score with TUNED evaluations."""
    if not entry.grid:
        return 0
    scores = []
    for options in entry.list_candidates(TUNED):
        try:
            score = measure(run_sampler(entry.sampler, options), problems)[1]
        except RestoreError:  # it diverges
            score = math.inf
        scores.append(score if math.isfinite(score) else math.inf)
    return scores.index(min(scores))


@dataclass(frozen=True)
class Row:
    """A row of the table: an entry of benchmarks/known.py with `options` fixed, by which a method is recognised."""

    sampler: str
    entry: Entry
    options: Mapping[str, Any]


def psld(prior, operator, y, *, steps: int, pull: float, **options) -> torch.Tensor:
    """PSLD with eta = pull / steps and gamma a tenth of it, its published ratio; the autoencoder is the identity."""
    return samplers.find_sampler("psld")(
        prior, operator, y, steps=steps, eta=pull / steps, gamma=pull / steps / 10, **options
    )


_COUNTS = {n: {"steps": n} for n in BUDGETS}
_DIFFPIR = SETTINGS["DiffPIR"]
# Options beside what they change, and samplers on latents, for which an image is its own latent here. ReSample's fits
# end at the noise, as they should.
ENTRIES = SETTINGS | {
    "DPS, Adam": replace(SETTINGS["DPS"], parameters={"adam": True}),
    "DiffPIR, dual": replace(_DIFFPIR, parameters={"dual": True}),
    "DiffPIR, Flower": replace(_DIFFPIR, parameters={"prox": "flower", "lam": 1.0, "zeta": 1.0}, grid={}),
    "DiffPIR, LAMP": replace(_DIFFPIR, parameters={"lamp": 1.0}),
    "PSLD": Entry(psld, _COUNTS, grid={"pull": (3, 10, 30)}),
    "FlowDPS": Entry("flowdps", _COUNTS, grid={"step_size": (0.25, 1.0, 4.0)}),
    "ReSample": Entry(
        "resample",
        _COUNTS,
        {"tolerance": None, "pixel_iterations": 100, "latent_iterations": 100, "pixel_lr": 0.05, "latent_lr": 0.05},
        {"gamma": (4.0, 40.0)},
    ),
}


def _row(name: str, sampler: str, **options: Any) -> Row:
    entry = ENTRIES[name]
    grid = {key: values for key, values in entry.grid.items() if key not in options}
    return Row(sampler, replace(entry, parameters={**entry.parameters, **options}, grid=grid), options)


ROWS: dict[str, Row] = {
    "DiffPIR, ζ = 1": _row("DiffPIR", "diffpir", zeta=1.0),
    "DiffPIR, ζ = 0.3": _row("DiffPIR", "diffpir", zeta=0.3),
    "DiffPIR, dual": _row("DiffPIR, dual", "diffpir", zeta=1.0, dual=True),
    "DiffPIR, Flower": _row("DiffPIR, Flower", "diffpir", zeta=1.0, prox="flower"),
    "DiffPIR, LAMP": _row("DiffPIR, LAMP", "diffpir", zeta=1.0, lamp=1.0),
    "DPS": _row("DPS", "dps", adam=False, ddim_eta=None),
    "DPS, Adam": _row("DPS, Adam", "dps", adam=True, ddim_eta=None),
    "DDRM": _row("DDRM", "ddrm", eta=0.85, eta_b=1.0, lamp=0.0),
    "DDNM+": _row("DDNM+", "ddnm", eta=0.85, travel_repeat=1, lamp=0.0),
    "ΠGDM, added": _row("PiGDM, added", "pigdm", gradient="added", eta=1.0, weight=1.0),
    "ΠGDM, score": _row("PiGDM, score", "pigdm", gradient="score", eta=1.0, weight=1.0),
    "PnP-DM": _row("PnP-DM", "pnpdm", eta=1.0),
    # The published tau of 0.01 belongs to sigma_y = 0.05.
    "DAPS": Row("daps", _row("DAPS", "daps", tau=0.01 * SIGMA / 0.05, lr=2e-4).entry, {"tau": 0.01}),
    "DAPS, τ of the noise": _row("DAPS", "daps", tau=None),
    "DAPS, exact": _row("DAPS, exact", "daps", tau=None, conditional="exact"),
    "FAST-DIPS": _row("FAST-DIPS", "fastdips", rho=None, epsilon=0.05, admm_steps=3),
    "RED-diff": _row("RED-diff", "reddiff"),
    "PSLD": _row("PSLD", "psld", ddim_eta=0.0),
    "FlowDPS": _row("FlowDPS", "flowdps", rule="flowdps"),
    "ReSample": _row("ReSample", "resample"),
}
CONTROLS = {"exact samples": draw_exact, "posterior mean": repeat_mean}


class Measured:
    """The rows that a file has, and its new ones, each written at once; likewise what was chosen of grids."""

    def __init__(self, path: Path | None) -> None:
        self.path, content = path, {"chosen": {}, "rows": []}
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
        self.chosen, self.rows = content["chosen"], {row["key"]: row for row in content["rows"]}

    def choose(self, settings: Mapping[str, Any], make: Callable[[], int]) -> int:
        """Return which candidate of these settings is best."""
        key = _hash(settings)
        if key not in self.chosen:
            self.chosen[key] = make()
            self.write(self.rows.values())
        return self.chosen[key]

    def find(self, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of these settings, made if the file does not have it."""
        key = _hash(settings)
        if key not in self.rows:
            self.rows[key] = {"key": key, **make()}
            self.write(self.rows.values())
        return self.rows[key]

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows, one a line."""
        if self.path is not None:
            lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
            head = f'"made_by": "python -m benchmarks.calibration",\n"chosen": {json.dumps(self.chosen)},\n"rows": ['
            disk.write_bytes(self.path, f"{{\n{head}\n{lines}\n]}}\n".encode())


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def calibrate(rows: Sequence[str], budgets: Sequence[int], scale: float, measured: Measured) -> list[dict[str, Any]]:
    """Measure ROWS of these names, and the controls. scale: of the numbers of truths."""
    problems = {n: draw_problems(max(round(scale * (TRUTHS if n <= TUNED else FEW)), 2), 0) for n in budgets}
    tuning, found = draw_problems(max(round(scale * TRUTHS / 4), 2), 1), []
    protocol = {"sigma": SIGMA, "samples": SAMPLES, "problems": [*product(PRIORS, TASKS)]}
    protocol["truths"] = TRUTHS * scale, FEW * scale
    for name, sample in CONTROLS.items():
        make = partial(_measure_row, {"name": name}, sample, problems[budgets[0]])
        found.append(measured.find({"name": name, **protocol}, make))
    for budget, name in product(budgets, rows):
        row = ROWS[name]
        tried = {"name": name, "parameters": dict(row.entry.parameters), "grid": dict(row.entry.grid)}
        best = measured.choose({**tried, **protocol}, lambda row=row: choose(row.entry, tuning))
        options = row.entry.list_candidates(budget)[best]
        facts = {"name": name, "sampler": row.sampler, "options": dict(row.options)}
        facts["chosen"] = {key: options[key] for key in row.entry.grid}
        make = partial(_measure_row, facts, run_sampler(row.entry.sampler, options), problems[budget])
        found.append(measured.find({**facts, **options, **protocol}, make))
        print(format_row(found[-1]), flush=True)
    return sorted(found, key=lambda row: [*CONTROLS, *rows].index(row["name"]))


def _measure_row(facts: Mapping[str, Any], sample: Callable, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the row of a sampler, without numbers if it diverges."""
    try:
        return {**facts, **measure(sample, problems)[0]}
    except RestoreError as error:
        return {**facts, "error": str(error)}


def format_row(row: Mapping[str, Any]) -> str:
    """Return a line of the Markdown table."""
    if "error" in row:
        return f"{row['name']} | – | diverges"
    chosen = ", ".join(f"{key} {value:g}" for key, value in row.get("chosen", {}).items())
    covered = " | ".join(f"{100 * row['coverage'][str(level)]:.0f}" for level in LEVELS)
    covered += "".join(f" | {100 * row['intervals'][str(level)]:.0f}" for level in LEVELS)
    spread = f"{row['spread_error']:.2f} | {row['spread']:.2f} | {row['uniform']:.2g}"
    return f"{row['name']} | {row['evaluations'] or '–'} | {covered} | {spread} | {judge(row)} | {chosen}"


def run(quick: bool = False, rows: str = "", file: str = "", page: str = PAGE) -> str:
    """Measure all rows, or some, write the file and the page's table, and return a sentence. quick: prints only.

    rows: samplers, separated by commas.
    """
    names = [name for name, row in ROWS.items() if not rows or row.sampler in rows.split(",")]
    if not names:
        raise RestoreError(f"rows must be samplers among {', '.join(samplers.SAMPLERS)}, got {rows}")
    measured = Measured(None if quick else Path(file) if file else data_file())
    begun = time.process_time()
    found = calibrate(names, (20, 50, 100) if quick else BUDGETS, 0.1 if quick else 1.0, measured)
    if not quick and not rows:
        measured.write(found)  # rows of settings that are no more are dropped
        write_table(Path(page), found)
    return f"{len(found)} rows in {time.process_time() - begun:.0f} CPU seconds"


def write_table(page: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the tables, of verdicts and of all numbers, in place of what follows the page's line "## Tables"."""
    text, mark, _ = page.read_text(encoding="utf-8").partition("## Tables\n")
    if not mark:
        raise RestoreError(f"{page} must have a line '## Tables'")
    cells: dict[str, list[str]] = {}
    for row in rows:
        shown = "diverges" if "error" in row else f"{judge(row)}, {row['spread_error']:.2f}"
        cells.setdefault(row["name"], []).append(shown)
    lines = [
        "",
        "Verdict, and spread / error:",
        "",
        "evaluations, about | " + " | ".join(map(str, BUDGETS)),
        "---|" * 4 + "---",
    ]
    lines += [" | ".join([name, *each, *["–"] * (len(BUDGETS) - len(each))]) for name, each in cells.items()]
    levels = " | ".join(f"{kind} {level} %" for kind in ("HPD", "pixels") for level in LEVELS)
    head = f"sampler | evaluations | {levels} | spread / error | spread / exact | χ² | verdict | chosen"
    lines += [
        "",
        "All numbers, in %, and the parameters chosen:",
        "",
        head,
        "---|" * 12 + "---",
        *map(format_row, rows),
        "",
    ]
    disk.write_bytes(page, "\n".join([text + mark.rstrip("\n"), *lines]).encode())


if __name__ == "__main__":
    run_command(run)
