"""Flow-Driven Posterior Sampling (FlowDPS, arXiv 2503.08136) and FlowChef (arXiv 2412.00100), guided velocities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from operators.ranges import Count, NonNegative, enforce_ranges
from restore.backbones.base import normalise
from restore.guidance import estimator
from restore.samplers.likelihood import l2_norm
from restore.samplers.steps import FiniteCheck, as_column, report

POWER_ITERATIONS = 8  # which find 1 / ||J||² well enough for a limit of twice that


@enforce_ranges
def flowdps(
    prior,
    operator,
    y,
    *,
    noise,
    steps,
    guidance=None,
    condition=None,
    callback=None,
    step_size: NonNegative | None = None,
    inner_steps: Count = 3,
    rule: Literal["flowdps", "flowchef"] = "flowdps",
) -> torch.Tensor:
    """Sample z_0 with decode(z_0) ~ p(x_0 | y) approximately; only the decoder is differentiated, not the network.

    With x_t = (1 − sigma) x_0 + sigma x_1 and the velocity v = x_1 − x_0, each step has z0_hat = z_t − sigma v and
    z1_hat = z_t + (1 − sigma) v. From z0_hat, `inner_steps` steps of size `step_size` down ||y − A(D(z))||² / 2 lead to
    z0_y. With s' the next step's sigma and n fresh noise the transition is

        flowdps:   z0 = (1 − sigma) z0_hat + sigma z0_y,   z = (1 − s') z0 + s' (sqrt(s') z1_hat + sqrt(1 − s') n)
        flowchef:  z = z0_hat + s' (z1_hat − z0_hat) + (z0_y − z0_hat)         (FlowChef takes one inner step)

    Other noise levels go through a change of variables. The arguments of all samplers are in `restore.samplers`.

    operator: a differentiable `A`.
    guidance: of the transition; the likelihood sees the unguided z0_hat (PAG, Ahn et al. 2024, App. A.3).
    step_size: if D and A are linear with singular values up to 1, 1 removes all of the residual that they see. None:
        1 / ||J||², J the derivative of A(D(z)) at the first estimate, each image's own.
    callback: also z0_hat; x0_hat and the residual are those before the inner steps.
    """
    prior = normalise(prior, "flow")
    timesteps = prior.schedule.timesteps(steps)
    sigmas = [*(prior.schedule.sigma(t) for t in timesteps), 0.0]
    z_t = sigmas[0] * noise(0, (len(y), *prior.shape), "start")
    check_finite, shown = FiniteCheck(len(timesteps)), f"step_size={step_size}"
    with estimator(prior, guidance) as estimate:
        for k, t in enumerate(timesteps):
            sigma, sigma_next = sigmas[k], sigmas[k + 1]
            with torch.no_grad():
                strong, eps = estimate(z_t, t, condition)  # eps is x_1
            z0_hat = strong.x0.detach()

            if step_size is None:
                step_size = 1 / as_column(find_gain(lambda z: operator.A(prior.decode(z)), z0_hat), z0_hat)

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
            check_finite(z_t, k, shown)
            x0_hat, residual = first
            report(callback, k, len(timesteps), t, x_t=z_t, x0_hat=x0_hat, z0_hat=z0_hat, eps=eps, residual=residual)
    with torch.no_grad():
        return prior.decode(z_t)


def find_gain(A: Callable, z: torch.Tensor) -> torch.Tensor:
    """Return ||J||² of each image (B,), J the derivative of A at z, by power iterations."""
    z = z.detach()
    with torch.enable_grad():
        start = z.clone().requires_grad_()
        a = A(start)
    u = a.detach()
    for _ in range(POWER_ITERATIONS):
        (v,) = torch.autograd.grad(a, start, u, retain_graph=True)
        v = v / as_column(l2_norm(v, v).clamp(min=torch.finfo(v.dtype).tiny), v)
        with torch.no_grad():
            u = A(z + v) - a.detach()
    return u.flatten(1).square().sum(dim=1).clamp(min=torch.finfo(u.dtype).tiny)
