"""Posterior Sampling with Latent Diffusion (PSLD, Rout et al. 2023, Algorithm 2) with guided scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from operators import RestoreError
from restore.backbones.base import Backbone, variance_preserving
from restore.backbones.schedule import Schedule
from restore.guidance import estimator
from restore.samplers.dps import l2_norm
from restore.samplers.steps import decoded, decoder_error, require_finite, require_linear_gaussian

REFERENCE = {"measurement_noise": True, "encoding": "sample", "index_shift": True}
"""What the authors' code does beyond the paper; with the operator's adjoint="reference" it reproduces their numbers."""


def psld(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    eta: float,
    gamma: float,
    guidance=None,
    condition: Any = None,
    ddim_eta: float = 0.0,
    measurement_noise: bool = False,
    encoding: str = "mean",
    index_shift: bool = False,
    decoder_sigma: float = 0.0,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample z_0 with decode(z_0) ~ p(x_0 | y) approximately; DDIM steps, each followed by a step of size 1 down

        eta ||y - A(D(z0_hat))|| + gamma ||z0_hat - E(A^T y + (I - A^T A) D(z0_hat))||,

    norms per image and not squared, the gradient taken through the decoder, the encoder and the U-Net.

    prior: a backbone of the image's size (restore.backbones.sizes.Sized). operator: anything with differentiable
        `A` and `A_adjoint`. y: measurement (B, ...) of decoded images.
    noise: noise(k, shape, kind) -> standard normal: kind "start" for z_T, "latent", "measurement" and "posterior"
        for the steps, k counting from the noisiest one.
    steps: how many, see `psld_timesteps`, or the times to visit.
    eta, gamma: steps of the data and of the gluing term. gamma = 0 is DPS in latent space ("latent DPS"):
        the encoder is then not run.
    guidance: e.g. PAG(...); the loss sees the unguided z0_hat, the update the guided eps (PAG, Ahn et al.
        2024, App. A.3). condition: prompt embedding, None for the empty prompt.
    ddim_eta: DDIM's sigma; 0 is deterministic and draws no latent noise.
    measurement_noise: add the operator's Gaussian noise to A(D(z0_hat)) at every step.
    encoding: "mean" or "sample" of the encoder's posterior.
    index_shift: count steps as the authors, and when every training step is visited, take alpha_bar at t - 1.
        These three reproduce the authors' code, see REFERENCE.
    decoder_sigma: 0, the paper's: the result is decode(z_0). Else y is put back into it, see
        restore.samplers.steps.decoded; for a linear A and Gaussian noise.
    callback: called after every step with step, steps, t, x_t (latent), x0_hat (image), z0_hat, eps,
        gradient, and residual and glue, the two norms (B,).
    Returns images decode(z_0), (B, 3, H, W), not clamped. Raises RestoreError when the iterate is no longer finite
    or an option does not apply.
    """
    if encoding not in ("mean", "sample"):
        raise RestoreError(f"encoding={encoding!r} is not known; expected mean or sample")
    sigma_y = require_sigma(operator) if measurement_noise else 0.0
    decoder_sigma, level = decoder_error(prior, decoder_sigma), 0.0
    if decoder_sigma:
        level = require_linear_gaussian("psld with decoder_sigma", prior, operator, None, latents=True)
    prior = variance_preserving(prior)
    if isinstance(steps, (int, str)):
        steps = [prior.schedule.time(i) for i in psld_timesteps(steps, len(prior.schedule), reference=index_shift)]
    timesteps = sorted(steps, reverse=True)
    alpha_bar, alpha_bar_prev = alpha_bars(prior.schedule, timesteps, index_shift)
    z_t = noise(0, (len(y), *prior.shape), "start")
    with estimator(prior, guidance) as estimate:
        for k, t in enumerate(timesteps):
            a, a_prev = alpha_bar[k], alpha_bar_prev[k]

            # Score: a pass with a graph for the likelihood.
            z_t = z_t.detach().requires_grad_()
            strong = estimate.strong(z_t, t, condition)

            # Likelihood: the decoded estimate must explain y, and survive being glued to y and encoded.
            z0_hat = (z_t - (1 - a) ** 0.5 * strong.eps) / a**0.5
            x0_hat = prior.decode(z0_hat)
            y_hat = operator.A(x0_hat)
            predicted = y_hat + sigma_y * noise(k, y.shape, "measurement") if measurement_noise else y_hat
            residual = l2_norm(y - predicted, y)
            glue = torch.zeros_like(residual)
            if gamma:
                x_glued = x0_hat + operator.A_adjoint(y) - operator.A_adjoint(y_hat)
                n = noise(k, z_t.shape, "posterior") if encoding == "sample" else None
                glue = l2_norm(z0_hat - prior.encode(x_glued, n), y)
            (gradient,) = torch.autograd.grad((eta * residual + gamma * glue).sum(), z_t)

            # Prior: DDIM with the guided score (Song et al. 2021, eq. 12), then the likelihood step. The weak pass
            # comes now, when the graph's memory is free again.
            with torch.no_grad():
                eps = estimate.guided(strong, z_t, t, condition)
                sigma_t = ddim_eta * ((1 - a_prev) / (1 - a)) ** 0.5 * (1 - a / a_prev) ** 0.5
                z0_guided = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
                z_next = a_prev**0.5 * z0_guided + max(1 - a_prev - sigma_t**2, 0.0) ** 0.5 * eps
                if sigma_t:
                    z_next = z_next + sigma_t * noise(k, z_t.shape, "latent")
                z_t = z_next - gradient
            require_finite(z_t, k, f"eta={eta:g}, gamma={gamma:g}")
            if callback is not None:
                callback(
                    {
                        "step": k,
                        "steps": len(timesteps),
                        "t": t,
                        "x_t": z_t,
                        "x0_hat": x0_hat.detach(),
                        "z0_hat": z0_hat.detach(),
                        "eps": eps,
                        "gradient": gradient,
                        "residual": residual.detach(),
                        "glue": glue.detach(),
                    }
                )
    with torch.no_grad():
        return decoded(prior, operator, y, z_t.detach(), level, decoder_sigma)


def psld_timesteps(steps: int | str, num_train_steps: int, reference: bool = False) -> list[int]:
    """Indices to visit, descending: 1, 1 + c, 1 + 2c, ... with c = num_train_steps / steps.

    Where c is no integer the positions are rounded down, and with c = 1 all of 0 ... T-1 are visited. The
    authors' code (reference=True) rounds c itself, so that 30 steps are 31, and with c = 1 visits 1 ... T.
    Raises RestoreError for a count that is not between 1 and num_train_steps.
    """
    if not str(steps).isdecimal() or not 1 <= int(steps) <= num_train_steps:
        raise RestoreError(f"steps={steps}: the number of steps of PSLD must be between 1 and {num_train_steps}")
    steps = int(steps)
    if reference:
        ascending = [1 + t for t in range(0, num_train_steps, num_train_steps // steps)]
    elif steps == num_train_steps:
        ascending = list(range(num_train_steps))
    else:
        ascending = [1 + i * num_train_steps // steps for i in range(steps)]
    return ascending[::-1]


def alpha_bars(schedule: Schedule, timesteps: list, shift: bool) -> tuple[list[float], list[float]]:
    """alpha_bar at descending `timesteps` and at the one that follows each.

    After the last one comes the least noise the model was trained on, or 1 when that is the last. With `shift`, and
    only if as many steps are visited as there are, every time is lowered by one although the network is told t;
    the least noise then comes twice and the last step changes nothing.
    """
    T, first = len(schedule), schedule.time(0)
    lower = 1 if shift and len(timesteps) == T else 0
    if not timesteps or timesteps[0] - lower > schedule.time(T - 1) or timesteps[-1] - lower < first:
        raise RestoreError(
            f"timesteps must be between {first:g} and {schedule.time(T - 1):g}, got {_ends(timesteps) or 'none'}"
        )
    # Rounded to float32, as everybody's schedules are.
    at = torch.tensor([schedule.alpha_bar(t - lower) for t in timesteps], dtype=torch.float32).double().tolist()
    last = float(torch.tensor(schedule.alpha_bar(first), dtype=torch.float32)) if timesteps[-1] > first else 1.0
    return at, [*at[1:], last]


def _ends(timesteps: list) -> str:
    return f"{len(timesteps)} from {timesteps[0]:g} to {timesteps[-1]:g}" if timesteps else ""


def require_sigma(operator) -> float:
    """sigma_y of the operator's Gaussian noise. Raises RestoreError when it has another noise or none."""
    sigma = getattr(getattr(operator, "noise", None), "sigma", None)
    if sigma is None:
        raise RestoreError(
            "measurement_noise=True adds the operator's Gaussian noise to its prediction, but this operator has none; "
            "give it noise=GaussianNoise(sigma) or leave measurement_noise off"
        )
    return float(sigma)
