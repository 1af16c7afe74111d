"""Update rules of respaced diffusion: the coefficients of one step between the visited times.

diffusers' DDPMScheduler is not used here: for respaced steps with a learned variance range it does
not reproduce guided-diffusion's arrays (the clipped posterior variance at index 0 differs).
"""

from __future__ import annotations

import torch

import operators
from operators import RestoreError
from operators.validate import require_number
from restore.backbones.schedule import Schedule

SIGMA_MIN = 1e-4  # noise of y that inverses of A assume at least: about what its rounding is, once magnified


class Diffusion:
    """Coefficients of the diffusion restricted to `timesteps`, and its three update rules.

    schedule: noise levels, variance preserving (see `restore.backbones.base.variance_preserving`).
    timesteps: times in any order; step i = 0 is the least noisy.
    All arrays are float64 on the CPU and are rounded to the sample's dtype where they are used.
    """

    def __init__(self, schedule: Schedule, timesteps) -> None:
        self.timesteps = sorted(timesteps)
        if not self.timesteps:
            raise RestoreError("no timesteps: the number of steps must be at least 1")
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
        """Clean estimate x0_hat = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), clamped to [-1, 1]."""
        a = self.alpha_bar[i]
        x0 = _scalar((1 / a).sqrt()) * x_t - _scalar((1 / a - 1).sqrt()) * eps
        return x0.clamp(-1, 1) if clip else x0

    def log_variance(self, v: torch.Tensor | None, i: int) -> torch.Tensor | float:
        """log Sigma, interpolated by the learned v (Nichol & Dhariwal 2021, eq. 15), else the posterior's."""
        low, high = _scalar(self.posterior_log_variance[i]), _scalar(self.beta[i].log())
        if v is None:
            return low
        frac = (v + 1) / 2
        return frac * high + (1 - frac) * low

    def ddpm(self, x_t: torch.Tensor, x0: torch.Tensor, log_variance, i: int, noise: torch.Tensor) -> torch.Tensor:
        """x_{t-1} ~ N(coef_x0 x0 + coef_x_t x_t, Sigma) (Ho et al. 2020, eq. 6-7); no noise at the last step."""
        mean = _scalar(self.coef_x0[i]) * x0 + _scalar(self.coef_x_t[i]) * x_t
        if i == 0:
            return mean
        return mean + torch.exp(0.5 * torch.as_tensor(log_variance, device=x_t.device, dtype=x_t.dtype)) * noise

    def ddim(self, x_t: torch.Tensor, x0: torch.Tensor, eta: float, i: int, noise: torch.Tensor) -> torch.Tensor:
        """x_{t-1} of DDIM (Song et al. 2021, eq. 12 and 16), with eps re-derived from the clamped x0."""
        a, a_prev = self.alpha_bar[i], self.alpha_bar_prev[i]
        eps = (_scalar((1 / a).sqrt()) * x_t - x0) / _scalar((1 / a - 1).sqrt())
        # guided-diffusion looks alpha_bar up in float32, which shows in 1 - alpha_bar near the clean end.
        a, a_prev = a.float().double(), a_prev.float().double()
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        x = _scalar(a_prev.sqrt()) * x0 + _scalar((1 - a_prev - sigma**2).clamp(min=0).sqrt()) * eps
        return x if i == 0 else x + _scalar(sigma) * noise

    def step(self, x_t, eps, v, i, noise, *, ddim_eta: float | None = None, clip: bool = True) -> torch.Tensor:
        """One update from x_t with the (guided) eps: DDPM when `ddim_eta` is None, else DDIM(eta)."""
        x0 = self.x0(x_t, eps, i, clip)
        if ddim_eta is None:
            return self.ddpm(x_t, x0, self.log_variance(v, i), i, noise)
        return self.ddim(x_t, x0, ddim_eta, i, noise)


def _scalar(value: torch.Tensor) -> float:
    """Coefficients are rounded to float32 as guided-diffusion does, then used as Python numbers."""
    return float(value.float())


def require_finite(x_t: torch.Tensor, k: int, setting: str) -> None:
    """Stop a diverged run at the step where it happened. Raises RestoreError."""
    if not torch.isfinite(x_t).all():
        raise RestoreError(
            f"the sample is not finite after step {k + 1}; lower the step size ({setting}) or the guidance scale, "
            "or use precision='fp32'"
        )


def levels(schedule: Schedule, steps) -> list[tuple[float | None, float, float]]:
    """(t, alpha, sigma) at the times to visit, from the noisiest on, of a variance-preserving schedule.

    One entry more than there are steps: the last is the clean image's, (None, 1, 0).
    """
    visited = [(t, schedule.alpha(t), schedule.sigma(t)) for t in schedule.timesteps(steps)]
    if not visited:
        raise RestoreError("no timesteps: the number of steps must be at least 1")
    return [*visited, (None, 1.0, 0.0)]


def linear_gaussian(operator) -> bool:
    """Whether y = A x + n with a linear A and Gaussian n, or none."""
    noise = getattr(operator, "noise", None)
    return getattr(operator, "linear", True) and (noise is None or getattr(noise, "sigma", None) is not None)


def require_linear_gaussian(sampler: str, prior, operator, sigma_y: float | None, *, latents: bool = False) -> float:
    """sigma_y of y = A x + sigma_y n: the given one, else that of the operator's noise, 0 where it has none.

    latents: the sampler works on them too. Raises RestoreError where a sampler written for that model in pixels does
    not apply: x is a latent, A is not linear, or the noise is not Gaussian.
    """
    if prior.downscale != 1 and not latents:
        raise RestoreError(f"{sampler} solves for pixels, but this prior's images are decoded latents; use psld")
    if not getattr(operator, "linear", True):
        raise RestoreError(f"{sampler} needs a linear operator, which {operator.name} is not; use dps")
    noise = getattr(operator, "noise", None)
    if sigma_y is None:
        sigma_y = 0.0 if noise is None else getattr(noise, "sigma", None)
    if sigma_y is None:
        raise RestoreError(f"{sampler} is for Gaussian noise, not {noise!r}: give sigma_y to treat it so, or use dps")
    if not 0 <= float(sigma_y) < float("inf"):
        raise RestoreError(f"sigma_y must be a number >= 0, got {sigma_y!r}")
    return float(sigma_y)


def follow(prior, z0: torch.Tensor, image: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """The x_0 of the image `moved`, where z0 is that of `image` = prior.decode(z0); in pixels that is `moved` itself.

    On latents the move alone is encoded, z0 + E(moved) - E(image): an autoencoder that is no exact inverse would
    otherwise change z0 even where nothing moved.
    """
    return moved if prior.downscale == 1 else z0 + prior.encode(moved) - prior.encode(image)


def decoder_error(prior, decoder_sigma: float) -> float:
    """decoder_sigma as a number, before anything is sampled. Raises RestoreError for one < 0, and in pixels, where
    nothing is decoded, for one > 0."""
    decoder_sigma = require_number(decoder_sigma, "decoder_sigma", low=0.0)
    if decoder_sigma and prior.downscale == 1:
        raise RestoreError("decoder_sigma is the error of a decoder, and this prior works in pixels")
    return decoder_sigma


def decoded(prior, operator, y: torch.Tensor, z0: torch.Tensor, sigma_y: float, decoder_sigma: float) -> torch.Tensor:
    """The image of z0, and with decoder_sigma > 0 what y knows better than the decoder put back into it:

        argmin ||y - A x||^2 / sigma_y^2 + ||x - decode(z0)||^2 / decoder_sigma^2

    is the posterior mean where decode(z0) is the image but for white noise of decoder_sigma, on [-1, 1].
    """
    image = prior.decode(z0)
    if not decoder_sigma:
        return image
    return operators.prox_l2(operator, image, y, (decoder_sigma / max(sigma_y, SIGMA_MIN)) ** 2)


def start(kind: str, prior, operator, y: torch.Tensor, sigma_y: float, alpha: float, sigma: float, n) -> torch.Tensor:
    """x_T: n itself ("noise"), or a linear reconstruction of y at that noise level ("measurement")."""
    if kind == "noise":
        return n
    if kind != "measurement":
        raise RestoreError(f"start={kind!r} is not known; expected noise or measurement")
    # The posterior mean for white x of variance 1: A^+ y without what it makes of the noise.
    found = operators.prox_l2(operator, torch.zeros_like(prior.decode(n)), y, max(sigma_y, SIGMA_MIN) ** -2)
    return alpha * prior.encode(found) + sigma * n


def report(callback, k: int, steps: int, t: float, operator, y: torch.Tensor, x0_hat: torch.Tensor, **state) -> None:
    """Call `callback`, if there is one, with step, steps, t, x0_hat (image), residual (B,) and `state`."""
    if callback is not None:
        residual = torch.linalg.vector_norm((y - operator.A(x0_hat)).flatten(1), dim=1)
        callback({"step": k, "steps": steps, "t": t, "x0_hat": x0_hat, "residual": residual, **state})
