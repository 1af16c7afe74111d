"""How far the spread of several samples can be trusted: what benchmarks/calibration.py measured on known posteriors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from restore import samplers
from restore.method import Method
from restore.paths import data_dir

LEVELS = (50, 80, 95)  # of the credible regions and intervals whose coverage was measured, in %
# A pixel's spread over its error is 1 if it can be trusted. Below ESTIMATES a sampler gives one answer.
ESTIMATES, TOLERANCE = 0.5, 0.1


def data_file() -> Path:
    """Return the file that benchmarks/calibration.py writes."""
    return data_dir() / "results" / "calibration.json"


@lru_cache
def _read_rows() -> list[dict[str, Any]]:
    return [row for row in json.loads(data_file().read_text(encoding="utf-8"))["rows"] if "sampler" in row]


def judge(row: Mapping[str, Any]) -> str:
    """Return what a row of the file says of a sampler, within TOLERANCE:

    "samples": spread and coverage are those of the posterior; "spread only": the spread of a pixel is as large as its
    error, but the samples are not the posterior's; "too narrow", "too wide"; "estimates": less than ESTIMATES of it.
    """
    ratio = row["spread_error"]
    regions, intervals = ([row[key][str(n)] - n / 100 for n in LEVELS] for key in ("coverage", "intervals"))
    if ratio < ESTIMATES:
        return "estimates"
    if ratio < 1 - TOLERANCE or min(intervals) < -TOLERANCE:
        return "too narrow"
    if ratio > 1 + TOLERANCE or max(intervals) > TOLERANCE:
        return "too wide"
    posterior = abs(row["spread"] - 1) <= TOLERANCE and max(map(abs, regions)) <= TOLERANCE
    return "samples" if posterior else "spread only"


def find_row(method: Method, evaluations: int) -> dict[str, Any] | None:
    """Return the row of a method's sampler and options with the nearest number of evaluations (by ratio); None if none
    was measured, or not with these options."""
    name, own = samplers.sampler_name(method.sampler), samplers.sampler_parameters(method.sampler)
    rows = [row for row in _read_rows() if row["sampler"] == name]
    decisive = {key for row in rows for key in row["options"]}

    def effective(given: Mapping[str, Any]) -> list[Any]:
        return [given.get(key, own[key].default) for key in sorted(decisive)]

    fitting = [row for row in rows if "error" not in row and effective(row["options"]) == effective(method.parameters)]
    distance = lambda row: abs(math.log(row["evaluations"] / max(evaluations, 1)))  # noqa: E731
    return min(fitting, key=distance, default=None)


def describe_spread(method: Method, evaluations: int) -> dict[str, Any] | None:
    """Return what a side-car says of the spread of a method's samples, or None if nothing is known of it.

    verdict: see `judge`. spread_error: the spread of a typical pixel over the error of the samples' mean; intervals:
    the share of true values in the samples' central 50, 80 and 95 %, pixel by pixel; coverage: that of truths in the
    regions of highest density; all on known posteriors with so many `evaluations`. caution: a
    sentence for who looks at the samples, if they are one answer rather than samples.
    """
    row = find_row(method, evaluations)
    if row is None:
        return None
    verdict = judge(row)
    facts = {key: row[key] for key in ("evaluations", "spread_error", "intervals", "coverage")}
    facts = {"verdict": verdict, **facts, "source": "docs/calibration.md"}
    if method.guidance is not None:
        facts["note"] = "measured without guidance"
    if verdict == "estimates":
        facts["caution"] = (
            f"the spread of samples by {row['sampler']} at {row['evaluations']} evaluations is too narrow by "
            f"{1 / row['spread_error']:.1f}x on problems with a known answer; see {facts['source']}"
        )
    return facts
