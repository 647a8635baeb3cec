"""The spec of `linear_step_logps`, in plain PyTorch.

    z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature      (columns below vocab_size only)
    logp[n] = log_softmax(z[row of n])[labels[n]]
    out[s] = sum (or mean) of logp[n] over the predictions n of step s

The product is taken in the input dtype, as `F.linear` does; all after it in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import PlanTensors, gather_rows, scatter_rows
from ..step_logps.reference import reduce_steps, row_gradient, row_logps, row_statistics, transform
from . import modes


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def linear_step_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    vocab_size: int,
    temperature: float,
    softcap: float,
    reduction: str,
    logits_budget_mb: float,
    mode: str,
) -> tuple[Tensor, ...]:
    """hidden (B, L, D), weight (V, D), bias (V,) or None. Nothing is kept: what the mode would keep stays zero."""
    view = PlanTensors(*plan)
    h = gather_rows(hidden, view.rows)
    z = transform(logits(h, weight, bias, vocab_size), vocab_size, temperature, softcap)
    logp = row_logps(z, view)
    kept = modes.budget(vocab_size, h.element_size(), logits_budget_mb, h.device.type, mode).kept
    saved = h.new_zeros(modes.saved_shape(mode, *h.shape, vocab_size, kept))
    return reduce_steps(logp, view, reduction), logp, *row_statistics(z), torch.zeros_like(logp), saved


def linear_step_logps_bwd(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    row_max: Tensor,
    row_logsum: Tensor,
    label_z0: Tensor,
    saved: Tensor,
    plan: list[Tensor],
    vocab_size: int,
    temperature: float,
    softcap: float,
    reduction: str,
    logits_budget_mb: float,
    mode: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each in its dtype; a tensor of size 0 for one that is not needed."""
    view = PlanTensors(*plan)
    h = gather_rows(hidden, view.rows)
    drows = row_gradient(
        grad_out, logits(h, weight, bias, vocab_size), view, vocab_size, temperature, softcap, reduction
    )
    drows = drows.to(h.dtype)
    dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
    if needs_hidden:
        dhidden = hidden.new_zeros(hidden.shape)
        scatter_rows(dhidden, view.rows, drows @ weight[:vocab_size])
    if needs_weight:
        dweight = weight.new_zeros(weight.shape)
        dweight[:vocab_size] = drows.t() @ h
    if needs_bias:
        dbias = bias.new_zeros(bias.shape)
        dbias[:vocab_size] = drows.sum(0)
    return dhidden, dweight, dbias


def logits(h: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int) -> Tensor:
    """(R, vocab_size), rounded once to the input dtype."""
    return torch.nn.functional.linear(h, weight[:vocab_size], None if bias is None else bias[:vocab_size])
