"""Precision of a training step."""

import torch
import torch.nn.functional as F

from restore.training.precision import FullPrecisionAttention


def test_attention_is_trained_in_full_precision():
    """Under bf16 autocast, which still applies to the rest of the network."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 8, generator=g).bfloat16().requires_grad_() for _ in range(3))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    with torch.autocast("cpu", dtype=torch.bfloat16), FullPrecisionAttention():
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
    (gradient,) = torch.autograd.grad(found.float().square().sum(), q)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
