"""What a report says of a run in words: its protocol in a sentence, its warnings, its cost."""

from __future__ import annotations

from collections.abc import Sequence

from restore.report import tables
from restore.report.tables import Run, number


def summary_line(run: Run) -> str:
    """The protocol in one sentence, to stand under a table."""
    p = run.protocol
    images = p["images"]
    what = f"{images['count']} images of {images['set']} (sha256 {images['sha256'][:12]})" if images else (
        "; ".join(f"{tables.task_title(run, k)}: {t['count']} images" for k, t in run.config["tasks"].items())
    )  # fmt: skip
    sigmas = sorted({t["sigma_y"] for t in p["tasks"].values() if "sigma_y" in t})
    noise = f"sigma_y = {', '.join(map(str, sigmas))} on {p['sigma_range']}" if sigmas else ""
    weights = [name[:12] for files in p["backbone"].values() for name in files.values()]
    backbone = ", ".join(p["backbone"]) + (f" (sha256 {', '.join(weights[:3])})" if weights else "")
    metrics = p["metrics"]
    fidelity = metrics.get("fidelity", {}).get("implementation", "")
    parts = [what, noise, f"seed {p['seed']}", backbone, p["precision"], metrics.get("lpips", ""), fidelity]
    return "; ".join(part for part in parts if part) + "."


def warnings_of(run: Run) -> list[str]:
    """What is wrong with a run, as far as it can be known: what is missing, too small or not the published thing."""
    notes = []
    for task, cells in run.table.items():
        for method, cell in cells.items():
            if cell["missing"]:
                where = f"{tables.method_title(run, method)}, {tables.task_title(run, task)}"
                notes.append(
                    f"Incomplete: {where}: {cell['done']} of {cell['expected']} images; {cell['missing']} missing."
                )
    small = run.config["metrics"]["allow_small"]
    if small and any(cell["set_values"] for cells in run.table.values() for cell in cells.values()):
        notes.append("FID and the other set metrics were computed on fewer images than they need (allow_small).")
    fidelity = run.protocol["metrics"].get("fidelity", {})
    own = [e["file"] for e in [*fidelity.values(), run.protocol["metrics"].get("lpips_weights")]
           if isinstance(e, dict) and not e.get("published", True)]  # fmt: skip
    if own:
        notes.append(
            f"Metrics used weights that are not the published ones ({', '.join(own)}): not comparable with papers."
        )
    return notes


COST_HEADS = ("network evaluations", "seconds per image", "steps/s", "peak memory MB", "not sampling", "device")


def cost_rows(group: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    rows = []
    for run in group:
        for task, cells in run.table.items():
            for method, cell in cells.items():
                c = cell["cost"]
                if c:
                    memory = f"{number(c['peak_memory_mb'], 0)} ({c['memory_of']})"
                    values = [str(c["nfe"]), number(c["seconds_per_image"], 3), number(c["iterations_per_second"], 2)]
                    values += [memory, f"{100 * c['overhead']:.1f} %", ", ".join(c["devices"])]
                    rows.append((tables.task_title(run, task), tables.method_title(run, method), values))
    return rows
