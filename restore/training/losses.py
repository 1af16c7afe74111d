"""The training objective of ADM: noise prediction plus a variational term for the learned variance."""

from __future__ import annotations

import torch


def hybrid_loss(
    eps_hat: torch.Tensor,
    v: torch.Tensor | None,
    x0: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
    alpha_bar: torch.Tensor,
    snr_gamma: float,
    high_noise_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weighted noise error, variational term), both means over the batch.

    The noise error is weighted by min(SNR, gamma)/SNR (Hang et al. 2023, Min-SNR) plus min(1/SNR, high_noise_weight):
    without a bound the sum 1 + 1/SNR is the weight of v-prediction (Salimans & Ho 2022, SNR + 1 on x0). The second
    part teaches colours and lighting, whose error, 1/SNR times the noise error, would otherwise be lost in the mean.
    The variational term is L_{t-1} of Nichol & Dhariwal 2021, eq. 15-16, in bits per dimension, with the predicted
    mean held fixed so that it trains only the variance channels; at t = 0 the Gaussian negative log-likelihood of x0
    replaces the discretised one. It is 0 if v is None.
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = ((snr_gamma / snr).clamp(max=1) + (1 / snr).clamp(max=high_noise_weight))[t].float()
    simple = (weight * ((eps_hat - eps) ** 2).mean(dim=(1, 2, 3))).mean()
    if v is None:
        return simple, simple.new_zeros(())

    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    posterior_variance = beta * (1 - previous) / (1 - alpha_bar)
    posterior_variance[0] = posterior_variance[1]
    coef_x0 = beta * previous.sqrt() / (1 - alpha_bar)
    a, c, lo, hi = (
        values[t].float().view(-1, 1, 1, 1) for values in (alpha_bar, coef_x0, posterior_variance.log(), beta.log())
    )
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    x0_hat = ((x_t - (1 - a).sqrt() * eps_hat.detach()) / a.sqrt()).clamp(-1, 1)
    # The two means differ only through their x0 term: mean = c1 x0 + c2 x_t.
    squared_gap = (c * (x0 - x0_hat)) ** 2
    log_var = (v + 1) / 2 * hi + (1 - v) / 2 * lo
    kl = 0.5 * (log_var - lo + torch.exp(lo - log_var) + squared_gap * torch.exp(-log_var) - 1)
    nll = 0.5 * (log_var + squared_gap * torch.exp(-log_var) + torch.log(torch.tensor(2 * torch.pi)))
    term = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean(dim=(1, 2, 3)) / torch.log(torch.tensor(2.0))
    return simple, term.mean()
