"""Noise levels: x_t = alpha(t) x_0 + sigma(t) n, for every family of diffusion models in one type.

Discrete variance-preserving tables (DDPM), EDM / variance-exploding ones and flow matching differ in how the ratio
sigma / alpha grows with t, and in how the pair is normalised (alpha² + sigma² = 1, alpha = 1, alpha + sigma = 1). A
`Schedule` is a table of ratios and the name of the normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from operators import RestoreError
from operators.naming import lookup

# (alpha, sigma) of a ratio r = sigma / alpha.
NORMALISATIONS = {
    "vp": lambda r: (1 / math.hypot(1, r), r / math.hypot(1, r)),
    "ve": lambda r: (1.0, r),
    "flow": lambda r: (1 / (1 + r), r / (1 + r)),
}
# n ratios from the highest to the lowest: Karras et al. 2022, eq. 5 with rho = 7, and evenly in log.
SPACINGS = {
    "karras": lambda low, high, n: np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7,
    "log": lambda low, high, n: np.geomspace(high, low, n),
}
# The function of a ratio that is linear in t between the table's times, and its inverse.
LINEAR = {
    "vp": (np.log, np.exp),
    "ve": (lambda r: r, lambda sigma: sigma),
    "flow": (lambda r: r / (1 + r), lambda sigma: sigma / (1 - sigma)),
}


class Schedule:
    """The noise levels a network was trained on.

    ts: times, ascending, in the units its network takes. ratios: sigma / alpha at each, ascending, positive.
    kind: "vp" (alpha² + sigma² = 1), "ve" (alpha = 1) or "flow" (alpha + sigma = 1).
    Between the table's times log(sigma / alpha) is linear in t for "vp", sigma for the others. All in float64.
    """

    def __init__(self, ts: Sequence[float], ratios: Sequence[float], kind: str) -> None:
        self.ts, self.ratios = np.asarray(ts, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
        if len(self.ts) != len(self.ratios) or len(self.ts) < 2 or kind not in NORMALISATIONS:
            raise RestoreError(f"a '{kind}' schedule must have at least two times, a ratio for each and a known kind")
        if not (np.all(np.diff(self.ts) > 0) and np.all(np.diff(self.ratios) > 0) and self.ratios[0] > 0):
            raise RestoreError("the ratios of a schedule must be positive and grow with its times")
        self.kind = kind
        self._linear, self._back = LINEAR[kind]

    @classmethod
    def vp(cls, alphas_cumprod: torch.Tensor) -> Schedule:
        """Return the schedule of a falling table alpha_bar (T,): t = 0 ... T − 1, alpha(t) = sqrt(alpha_bar[t])."""
        table = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        if not (table.ndim == 1 and bool((table > 0).all()) and bool((table < 1).all())):
            raise RestoreError("alpha_bar must lie strictly between 0 and 1 (zero terminal SNR has no x0_hat)")
        schedule = cls(np.arange(len(table)), ((1 - table) / table).sqrt().numpy(), "vp")
        schedule.__dict__["alphas_cumprod"] = table  # without the rounding of the ratios
        return schedule

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, levels: int = 1000) -> Schedule:
        """Return a variance-exploding schedule with t = sigma (Karras et al. 2022)."""
        sigmas = np.geomspace(sigma_min, sigma_max, levels)
        return cls(sigmas, sigmas, "ve")

    @classmethod
    def flow(cls, steps: int = 1000, shift: float = 1.0) -> Schedule:
        """Return `steps` levels of flow matching, sigma from 1/steps to 1 − 1/(2 steps) (at 1, x_t no longer depends on
        x_0), shifted as SD3's; t = steps · sigma."""
        base = np.append(np.arange(1, steps), steps - 0.5) / steps
        sigma = shift * base / (1 + (shift - 1) * base)
        return cls(steps * sigma, sigma / (1 - sigma), "flow")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokens: int | None = None) -> Schedule:
        """Return the schedule described by a diffusers scheduler_config.json; {} is the linear one of Ho et al. 2020.

        tokens: number of tokens of the image, for flow matching with dynamic shifting (FLUX.1-dev; Esser et al. 2024,
            sec. 5.3.2: the more tokens, the more steps in the noise); default: the configuration's largest image.
        Linear, scaled linear and cosine (Nichol & Dhariwal 2021, eq. 17) betas are computed in float64, others by
        diffusers. Raises RestoreError for unknown schedulers and beta schedules, and for zero terminal SNR.
        """
        name = str(config.get("_class_name", ""))
        try:
            if "FlowMatch" in name:
                return cls.flow(int(config.get("num_train_timesteps", 1000)), _shift(config, tokens))
            if name.startswith("EDM"):
                return cls.edm(float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0)))
            if name and config.get("trained_betas") is None and "beta_schedule" not in config:
                raise RestoreError(f"scheduler must be one with betas, got a {name}, whose noise levels are not known")
            return cls.vp(torch.cumprod(1 - _betas(config), dim=0))
        except RestoreError:
            raise
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise RestoreError(f"the scheduler's configuration must describe noise levels: {error}") from None

    def normalise(self, kind: str) -> Schedule:
        """Return the schedule with the same ratios, normalised as "vp", "ve" or "flow"."""
        schedule = copy(self)
        schedule.kind = kind
        return schedule

    def __len__(self) -> int:
        return len(self.ts)

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha_bar = alpha² / (alpha² + sigma²) at the table's times, float64 (T,): that of the variance-preserving
        schedule of x / sqrt(alpha² + sigma²) (see `Renormalised`)."""
        return torch.from_numpy(1 / (1 + self.ratios**2))

    def time(self, index: int) -> float:
        """Return the table's time number `index`, 0 being the least noisy, or an extrapolation by steps of one beyond
        the table (the PSLD code visits T of T)."""
        t = self.ts[index].item() if index < len(self) else self.ts[-1].item() + index - len(self) + 1
        return int(t) if float(t).is_integer() else t

    def come_back(self, t: Any) -> Any:
        """Return t, or the last time for the one beyond the table, at which the PSLD code evaluates the network."""
        is_beyond = not isinstance(t, torch.Tensor) and t == self.time(len(self))
        return self.ts[-1] if is_beyond else t

    def alpha_bar(self, t: float) -> float:
        """Return alpha² / (alpha² + sigma²) at t, the table's own value at its times."""
        index = int(np.searchsorted(self.ts, t))
        if index < len(self) and self.ts[index] == t:
            return float(self.alphas_cumprod[index])
        return 1 / (1 + self.ratio(t) ** 2)

    def ratio(self, t: float) -> float:
        """Return sigma(t) / alpha(t). Raises RestoreError outside of the trained times."""
        low, high = self.ts[0], self.ts[-1]
        if not low - 1e-6 <= t <= high + 1e-6:
            raise RestoreError(f"t must lie in {low:g} to {high:g}, got {t:g}")
        return float(self._back(np.interp(t, self.ts, self._linear(self.ratios))))

    def alpha(self, t: float) -> float:
        """Return the signal's factor at t, which may lie between the table's times."""
        return self._pair(t)[0]

    def sigma(self, t: float) -> float:
        """Return the noise's standard deviation at t."""
        return self._pair(t)[1]

    def levels(self, t: float | torch.Tensor, like: torch.Tensor) -> tuple[Any, Any]:
        """Return (alpha, sigma) at t: floats, or for times (B,) tensors (B, 1, 1, 1) in the dtype of `like`."""
        if not isinstance(t, torch.Tensor) or t.numel() == 1:
            return self._pair(float(t))
        pairs = [self._pair(s) for s in t.tolist()]
        return tuple(torch.tensor(column).to(like).view(-1, 1, 1, 1) for column in zip(*pairs, strict=True))

    def _pair(self, t: float) -> tuple[float, float]:
        if self.kind == "vp":
            alpha_bar = self.alpha_bar(t)
            return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        return NORMALISATIONS[self.kind](self.ratio(t))

    def t(self, ratio: float) -> float:
        """Return the trained time whose sigma / alpha is, or is nearest to, `ratio`."""
        return float(np.interp(self._linear(max(ratio, 1e-12)), self._linear(self.ratios), self.ts))

    def timesteps(self, spec: int | str | Sequence[float]) -> list:
        """Return the times to visit, descending.

        spec: that of `respace`, applied to the table, a sequence of times, "karras:N" or "log:N" for N ratios from the
        largest to the smallest trained (see SPACINGS), which may fall between the table's times, or "quad:N" for the
        indices T - 1 - sqrt(i T^2 / (N - 1)), denser at the clean end (DiffPIR's code).
        Raises RestoreError for other specs.
        """
        if not isinstance(spec, (int, str)):
            with suppress(TypeError, ValueError):
                times = sorted((float(t) for t in spec), reverse=True)
                if len(set(times)) == len(times) > 0 and all(self.ts[0] <= t <= self.ts[-1] for t in times):
                    return [int(t) if t.is_integer() else t for t in times]
            raise RestoreError(
                f"steps must be a number of steps, a text, or different times from {self.ts[0]:g} to {self.ts[-1]:g}, "
                f"got {str(spec)[:100]}"
            )
        name, _, count = str(spec).rpartition(":")
        if name == "quad":
            roots = np.sqrt(np.linspace(0, len(self) ** 2, _count(count, len(self), spec)))
            return [self.time(i) for i in sorted({max(len(self) - 1 - int(root), 0) for root in roots}, reverse=True)]
        if name:
            n = _count(count, 10**6, spec)
            grid = lookup(name, SPACINGS, "spacing of timesteps")(self.ratios[0], self.ratios[-1], n)
            return [self.t(float(ratio)) for ratio in grid]
        return [self.time(i) for i in reversed(respace(len(self), spec))]


def _betas(config: Mapping[str, Any]) -> torch.Tensor:
    kind, steps = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", 1000))
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        kind = None
    if kind in ("linear", "scaled_linear"):
        power, start, end = 1 + (kind != "linear"), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        return torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power
    if kind == "squaredcos_cap_v2":
        f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    from diffusers import DDPMScheduler

    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    options = {key: config[key] for key in (*known, "rescale_betas_zero_snr") if key in config}
    return DDPMScheduler(**options).betas.double()


def _shift(config: Mapping[str, Any], tokens: int | None) -> float:
    """Return flow matching's shift: fixed, or e^mu with mu linear in the tokens (diffusers' calculate_shift)."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * ((many if tokens is None else tokens) - few) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def respace(num_train_steps: int, spec: int | str) -> list[int]:
    """Return the indices to visit, ascending (Nichol & Dhariwal 2021, sec. 4; rounded as in guided-diffusion).

    spec: N or "N" for N steps spread evenly with both ends included; "N1,N2,..." for N_i steps in
        each of equal sections; "ddimN" for a constant integer stride from 0 (Song et al. 2021).
    Raises RestoreError for a count that is not positive or larger than the number of training steps.
    """
    text = str(spec)
    if text.startswith("ddim"):
        n = _count(text[4:], num_train_steps, spec)
        grids = (range(0, num_train_steps, stride) for stride in range(1, num_train_steps + 1))
        if grid := next((grid for grid in grids if len(grid) == n), None):
            return list(grid)
        raise RestoreError(f"steps must fit an integer stride, got {spec}: none visits {n} of {num_train_steps} steps")
    counts = [_count(part, num_train_steps, spec) for part in text.split(",")]
    size, extra = divmod(num_train_steps, len(counts))
    visited, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise RestoreError(f"steps must fit their sections, got {spec}: {count} of {length} steps")
        strides = [(length - 1) / max(count - 1, 1)] * (count - 1)
        visited += [start + round(position) for position in accumulate(strides, initial=0.0)]
        start += length
    return visited


def _count(text: str, limit: int, spec: int | str) -> int:
    try:
        n = int(text)
    except ValueError:
        raise RestoreError(
            f"steps must be a number of steps, 'N1,N2,...', 'ddimN', 'karras:N', 'log:N' or 'quad:N', got {spec}"
        ) from None
    if not 1 <= n <= limit:
        raise RestoreError(f"steps must be between 1 and {limit}, got {spec}")
    return n
