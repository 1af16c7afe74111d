"""What samplers share: update rules of respaced diffusion, times to visit, starts, and the report of a step.

diffusers' DDPMScheduler is not used here: for respaced steps with a learned variance range it does
not reproduce guided-diffusion's arrays (the clipped posterior variance at index 0 differs).
"""

from __future__ import annotations

import math
from typing import Literal

import torch

import operators
from operators import RestoreError, ranges
from operators.device import is_on_host
from restore.backbones.schedule import Schedule
from restore.samplers.fill import fill_holes, require_mask
from restore.samplers.likelihood import SIGMA_Y_FLOOR, l2_norm

FirstEstimate = Literal["measurement", "dagger", "adjoint", "zero", "fill"]  # see `reconstruct`
Start = Literal["noise", FirstEstimate]  # see `initialise`
ORIENTATIONS = 8  # rotations by a quarter and their mirror images


class Diffusion:
    """Coefficients of the diffusion restricted to `timesteps`, and its update rules.

    schedule: noise levels, variance preserving (see `restore.backbones.base.normalise`).
    timesteps: at least one time, in any order; step i = 0 is the least noisy.
    All arrays are float64 on the CPU, rounded to float32 when used, as in guided-diffusion.
    """

    def __init__(self, schedule: Schedule, timesteps) -> None:
        self.timesteps = sorted(timesteps)
        self.alpha_bar = torch.tensor([schedule.alpha_bar(t) for t in self.timesteps], dtype=torch.float64)
        self.alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.beta = 1 - self.alpha_bar / self.alpha_bar_prev
        self.posterior_variance = self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        # The posterior variance is 0 at step 0, where its logarithm is taken from step 1.
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[1] if len(clipped) > 1 else self.beta[0]
        self.posterior_log_variance = clipped.log()
        self.coef_x0 = self.beta * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.coef_x_t = (1 - self.alpha_bar_prev) * (1 - self.beta).sqrt() / (1 - self.alpha_bar)

    def __len__(self) -> int:
        return len(self.timesteps)

    def x0(self, x_t: torch.Tensor, eps: torch.Tensor, i: int, clip: bool = True) -> torch.Tensor:
        """Return x0_hat = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), clamped to [-1, 1] if `clip`."""
        a = self.alpha_bar[i]
        x0 = _scalar((1 / a).sqrt()) * x_t - _scalar((1 / a - 1).sqrt()) * eps
        return x0.clamp(-1, 1) if clip else x0

    def log_variance(self, v: torch.Tensor | None, i: int) -> torch.Tensor | float:
        """Return log Sigma, interpolated by the learned v (Nichol & Dhariwal 2021, eq. 15), else the posterior's."""
        low, high = _scalar(self.posterior_log_variance[i]), _scalar(self.beta[i].log())
        if v is None:
            return low
        frac = (v + 1) / 2
        return frac * high + (1 - frac) * low

    def ddim(self, x_t: torch.Tensor, x0: torch.Tensor, eta: float, i: int, noise: torch.Tensor) -> torch.Tensor:
        """Return x_{t-1} of DDIM (Song et al. 2021, eq. 12 and 16), with eps derived from the clamped x0."""
        a, a_prev = self.alpha_bar[i], self.alpha_bar_prev[i]
        eps = (_scalar((1 / a).sqrt()) * x_t - x0) / _scalar((1 / a - 1).sqrt())
        # guided-diffusion keeps alpha_bar in float32, which matters in 1 - alpha_bar near the clean end.
        a, a_prev = a.float().double(), a_prev.float().double()
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        x = _scalar(a_prev.sqrt()) * x0 + _scalar((1 - a_prev - sigma**2).clamp(min=0).sqrt()) * eps
        return x if i == 0 else x + _scalar(sigma) * noise

    def step(self, x_t, eps, v, i, noise, *, ddim_eta: float | None = None, clip: bool = True) -> torch.Tensor:
        """Return x_{t-1} from x_t and the (guided) eps: DDIM(eta) or, if `ddim_eta` is None, DDPM's sample of
        N(coef_x0 x0 + coef_x_t x_t, Sigma) (Ho et al. 2020, eq. 6-7), without noise in the last step."""
        x0 = self.x0(x_t, eps, i, clip)
        if ddim_eta is not None:
            return self.ddim(x_t, x0, ddim_eta, i, noise)
        mean = _scalar(self.coef_x0[i]) * x0 + _scalar(self.coef_x_t[i]) * x_t
        variance = self.log_variance(v, i)
        variance = variance.to(x_t.dtype) if isinstance(variance, torch.Tensor) else x_t.new_full((), variance)
        return mean + torch.exp(0.5 * variance) * noise if i else mean


def _scalar(value: torch.Tensor) -> float:
    return float(value.float())


def levels(schedule: Schedule, steps) -> list[tuple[float | None, float, float]]:
    """Return (t, alpha, sigma) at the times to visit, from the noisiest on, and (None, 1, 0) of the clean image."""
    return [*((t, schedule.alpha(t), schedule.sigma(t)) for t in schedule.timesteps(steps)), (None, 1.0, 0.0)]


class Momentum:
    """LAMP (2026, arXiv 2605.12573): the data-consistent estimate x0 of every step, less a share of its change since
    the step before,

        (1 - beta) x0 + beta x0_prev,    beta = strength (1 - (1 + h) e^-h) / h_prev,

    h the step's change of log(alpha / sigma). None in the first three steps, nor in the last, which goes to no noise.
    strength: 6 in the paper, whose steps are many: in few the last beta exceeds 1; 0 returns x0 itself.
    """

    def __init__(self, strength: float) -> None:
        self.strength, self.before, self.h_before, self.steps = strength, None, 1.0, 0

    def __call__(self, x0: torch.Tensor, level: tuple, level_next: tuple) -> torch.Tensor:
        """Return the estimate to go on from; level, level_next: (alpha, sigma) of this step and of the next."""
        if not self.strength or not level_next[1]:
            return x0
        h = math.log(level_next[0] * level[1] / (level[0] * level_next[1]))
        beta = self.strength * (1 - (1 + h) * math.exp(-h)) / self.h_before if self.steps >= 3 else 0.0
        result = torch.lerp(x0, self.before, beta) if beta else x0
        self.before, self.h_before, self.steps = x0, h, self.steps + 1
        return result


def as_column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the number of each image (B,) in the shape of factors of `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def annealing_levels(
    schedule: Schedule, steps, sigma_max: float, sigma_min: float, to_zero: bool = True
) -> list[float]:
    """Return sigma / alpha of the levels to visit, descending: so many from sigma_max towards sigma_min (rho_grid), or
    those of the times that `steps` gives. to_zero: 0 follows, which takes the place of sigma_min."""
    end = [0.0] if to_zero else []
    if str(steps).isdecimal() and int(steps) > 0:
        n = int(steps)
        return [*rho_grid(sigma_max, sigma_min, n if to_zero else max(n - 1, 1))[:n], *end]
    return [*(schedule.ratio(t) for t in schedule.timesteps(steps)), *end]


def rho_grid(high: float, low: float, n: int, rho: float = 7.0) -> list[float]:
    """Return n + 1 levels from high to low (Karras et al. 2022, eq. 5)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + i / n * (b - a)) ** rho for i in range(n + 1)]


def ldm_timesteps(schedule: Schedule, steps, *, reference: bool = False) -> list:
    """Return the times of latent diffusion's DDIM, descending: of the indices 1, 1 + c, 1 + 2c, ... with c = T / steps.

    If c is no integer the positions are rounded down, and with c = 1 all of 0 ... T - 1 are visited. The authors' code
    (`reference`) rounds c itself, so that 30 steps are 31, and with c = 1 visits 1 ... T. A list of times is sorted.
    Raises RestoreError for a number of steps that is not between 1 and T.
    """
    if not isinstance(steps, (int, str)):
        return sorted(steps, reverse=True)
    T = len(schedule)
    if not str(steps).isdecimal() or not 1 <= int(steps) <= T:
        raise RestoreError(f"steps must be a list of times or a number between 1 and {T}, got {steps}")
    steps = int(steps)
    indices = [1 + i * T // steps for i in range(steps)] if steps < T else range(T)
    indices = range(1, T + 1, T // steps) if reference else indices
    return [schedule.time(i) for i in reversed(indices)]


def alpha_bars(schedule: Schedule, timesteps: list, *, shift: bool = False) -> tuple[list[float], list[float]]:
    """Return alpha_bar at descending `timesteps`, and at the time that follows each.

    The last one is followed by the least noise the model was trained on, or by 1 if it has that itself. With `shift`,
    and only if all T steps are visited, every time is lowered by one, but not for the network (PSLD's authors' code).
    Raises RestoreError for times that were not trained.
    """
    T, first = len(schedule), schedule.time(0)
    lower = 1 if shift and len(timesteps) == T else 0
    if not timesteps or timesteps[0] - lower > schedule.time(T - 1) or timesteps[-1] - lower < first:
        given = f"{timesteps[0]:g} to {timesteps[-1]:g}" if timesteps else "none"
        raise RestoreError(f"timesteps must be between {first:g} and {schedule.time(T - 1):g}, got {given}")
    # Rounded to float32, as every published code has them.
    at = torch.tensor([schedule.alpha_bar(t - lower) for t in timesteps], dtype=torch.float32).double().tolist()
    last = float(torch.tensor(schedule.alpha_bar(first), dtype=torch.float32)) if timesteps[-1] > first else 1.0
    return at, [*at[1:], last]


def reconstruct(start_from: str, prior, operator, y: torch.Tensor, sigma_y: float) -> torch.Tensor:
    """Return a first x_0 (B, ...) made of y without the network.

    start_from: "measurement", the posterior mean if x were white with variance 1 (A⁺ y without its magnified noise);
        "dagger", A⁺ y; "adjoint", Aᵀ y; "zero"; "fill", y with smooth holes (see `fill_holes`).
    Raises RestoreError for another name, and for "fill" unless the operator has a mask.
    """
    ranges.check(start_from, FirstEstimate, "start_from")
    zero = y.new_zeros(len(y), *prior.shape)
    if start_from == "zero":
        return zero
    if start_from == "fill":
        filled = fill_holes(y, require_mask(operator, "start_from='fill'"))
        return prior.encode(filled)
    if start_from == "measurement":
        image = torch.zeros_like(prior.decode(zero))
        return prior.encode(operators.prox_l2(operator, image, y, max(sigma_y, SIGMA_Y_FLOOR) ** -2))
    return prior.encode(operator.A_dagger(y) if start_from == "dagger" else operator.A_adjoint(y))


def initialise(start_from: str, prior, operator, y, sigma_y: float, level: tuple, n: torch.Tensor) -> torch.Tensor:
    """Return x_T at a (t, alpha, sigma): the noise n itself ("noise"), or alpha x_0 + sigma n, x_0 of `reconstruct`."""
    _, alpha, sigma = level
    return n if start_from == "noise" else alpha * reconstruct(start_from, prior, operator, y, sigma_y) + sigma * n


class FiniteCheck:
    """Raises RestoreError if the sample is no longer finite after a step, without making an accelerator wait.

    On the CPU every step is looked at when it is done. Elsewhere the finite steps are counted on the device, and the
    number is read every READ_EVERY steps and at the end; the sentence still names the first step that was not finite.

    steps: how many there will be.
    """

    READ_EVERY = 32

    def __init__(self, steps: int) -> None:
        self.steps, self.seen, self.finite, self.good = steps, 0, True, 0

    def __call__(self, x_t: torch.Tensor, k: int, setting: str) -> None:
        """Take in the sample x_t after step k; setting: the step size, for the message."""
        if is_on_host(x_t):
            if not torch.isfinite(x_t).all():
                self._fail(k, setting)
            return
        self.finite = ((x_t.detach() * 0).sum() == 0) & self.finite
        self.good, self.seen = self.finite + self.good, self.seen + 1
        if k + 1 == self.steps or self.seen % self.READ_EVERY == 0:
            good = int(self.good)
            if good < self.seen:
                self._fail(k + 1 - self.seen + good, setting)

    def _fail(self, k: int, setting: str) -> None:
        hint = f"lower the step size ({setting}) or the guidance scale, or use precision='fp32'"
        raise RestoreError(f"the sample is not finite after step {k + 1}; {hint}")


def report(callback, k: int, steps: int, t: float, *, operator=None, y=None, **state) -> None:
    """Call `callback`, if there is one, after step k (from 0) of `steps`, at time t, with one dict of

    step, steps, t; x_t: the sample after the step; x0_hat: the clean estimate as an image; eps: the guided noise.
    residual: ||y - A(x0_hat)|| (B,), computed here if operator and y are given.
    used: numbers that the sampler derived from its parameters, for the record of the run.
    Anything else is the sampler's own. Tensors are detached.
    """
    if callback is None:
        return
    if operator is not None:
        state["residual"] = l2_norm(y - operator.A(state["x0_hat"]), y)
    state = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    callback({"step": k, "steps": steps, "t": t, **state})


def turn(x: torch.Tensor, k: int) -> torch.Tensor:
    """Return x (B, C, H, W) in orientation k of ORIENTATIONS: mirrored from 4 on, then rotated by k quarters."""
    return torch.rot90(x.flip(-1) if k >= 4 else x, k % 4, (-2, -1)) if k else x


def turn_back(x: torch.Tensor, k: int) -> torch.Tensor:
    """Undo `turn`."""
    x = torch.rot90(x, -(k % 4), (-2, -1)) if k else x
    return x.flip(-1) if k >= 4 else x
