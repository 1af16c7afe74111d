"""Flow-Driven Posterior Sampling (FlowDPS, arXiv 2503.08136) and FlowChef (arXiv 2412.00100), guided velocities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from operators import RestoreError
from operators.naming import check_known
from restore.backbones.base import Backbone, flow_matching
from restore.guidance import estimator
from restore.samplers.steps import require_finite

RULES = ("flowdps", "flowchef")


def flowdps(
    prior: Backbone,
    operator,
    y: torch.Tensor,
    *,
    noise: Callable[..., torch.Tensor],
    steps: int | str | Sequence[float],
    step_size: float,
    inner_steps: int = 3,
    rule: str = "flowdps",
    guidance=None,
    condition: Any = None,
    callback: Callable[[dict], None] | None = None,
) -> torch.Tensor:
    """Sample z_0 with decode(z_0) ~ p(x_0 | y) approximately; the network is never differentiated, only the decoder.

    With x_t = (1 − sigma) x_0 + sigma x_1 and the velocity v = x_1 − x_0, each step has z0_hat = z_t − sigma v and
    z1_hat = z_t + (1 − sigma) v. From z0_hat, `inner_steps` steps of size `step_size` down ||y − A(D(z))||² / 2 lead to
    z0_y. With s' the next step's sigma and n fresh noise the transition is

        flowdps:   z0 = (1 − sigma) z0_hat + sigma z0_y,   z = (1 − s') z0 + s' (sqrt(s') z1_hat + sqrt(1 − s') n)
        flowchef:  z = z0_hat + s' (z1_hat − z0_hat) + (z0_y − z0_hat)         (FlowChef takes one inner step)

    guidance: e.g. PAG(...). The likelihood sees the unguided z0_hat, and what it moves it by is added to the guided
        one; z1_hat is guided too (the rule of PAG, Ahn et al. 2024, App. A.3).
    prior: any backbone of the image's size (restore.backbones.sizes.Sized); those of other noise levels than flow
        matching's are seen as such by a change of variables. operator: anything with a differentiable `A`.
    noise, steps, condition: as in restore.samplers.dps.dps; noise is of kind "start" and "latent".
    step_size: where D and A are linear with singular values up to 1, 1 removes all of what is visible of the residual.
    callback: called after every step with step, steps, t, x_t (latent), x0_hat (image), z0_hat, eps, and residual, the
        norm (B,) before the inner steps.
    Returns images decode(z_0), (B, 3, H, W), not clamped. Raises RestoreError when the iterate is no longer finite
    or an option does not apply.
    """
    check_known([rule], RULES, "flowdps has no rule")
    if inner_steps < 1:
        raise RestoreError(f"inner_steps must be at least 1, not {inner_steps}")
    prior = flow_matching(prior)
    timesteps = prior.schedule.timesteps(steps)
    sigmas = [*(prior.schedule.sigma(t) for t in timesteps), 0.0]
    z_t = sigmas[0] * noise(0, (len(y), *prior.shape), "start")
    with estimator(prior, guidance) as estimate:
        for k, t in enumerate(timesteps):
            sigma, sigma_next = sigmas[k], sigmas[k + 1]
            with torch.no_grad():
                strong, eps = estimate(z_t, t, condition)  # eps is x_1
            z0_hat = strong.x0.detach()

            # Likelihood: the decoded unguided estimate must explain y.
            z0_y, first = z0_hat, None
            for _ in range(inner_steps):
                z0_y = z0_y.detach().requires_grad_()
                x0_hat = prior.decode(z0_y)
                r = (y - operator.A(x0_hat)).flatten(1)
                (gradient,) = torch.autograd.grad(r.square().sum() / 2, z0_y)
                z0_y = (z0_y - step_size * gradient).detach()
                first = (x0_hat.detach(), torch.linalg.vector_norm(r.detach(), dim=1)) if first is None else first

            # Transition, guided: what guidance adds to eps it takes, sigma / alpha times, from z0_hat.
            shift, moved = eps - strong.eps, z0_y - z0_hat
            z0 = z0_hat - sigma / (1 - sigma) * shift
            if rule == "flowdps":
                z0 = z0 + sigma * moved
                n = sigma_next**0.5 * eps + (1 - sigma_next) ** 0.5 * noise(k, z_t.shape, "latent")
                z_t = (1 - sigma_next) * z0 + sigma_next * n
            else:
                z_t = z0 + sigma_next * (eps - z0) + moved
            require_finite(z_t, k, f"step_size={step_size:g}")
            if callback is not None:
                state = {"x_t": z_t, "x0_hat": first[0], "z0_hat": z0_hat, "eps": eps, "residual": first[1]}
                callback({"step": k, "steps": len(timesteps), "t": t, **state})
    with torch.no_grad():
        return prior.decode(z_t)
