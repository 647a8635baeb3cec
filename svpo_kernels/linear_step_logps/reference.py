"""The spec of `linear_step_logps`, in plain PyTorch.

    z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature      (columns below vocab_size only)
    logp[n] = log_softmax(z[row of n])[labels[n]]
    out[s] = sum (or mean) of logp[n] over the predictions n of step s

The product is taken in the input dtype, as `F.linear` does; all after it in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import PlanTensors
from ..step_logps.reference import reduce_steps, row_logps, row_statistics, transform
from . import modes
from .products import gather_rows


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def linear_step_logps_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: list[Tensor], vocab_size: int, temperature: float,
    softcap: float, reduction: str, logits_budget_mb: float, mode: str,
) -> tuple[Tensor, ...]:
    """hidden (B, L, D), weight (V, D), bias (V,) or None. Nothing is kept: what the mode would keep stays unwritten."""
    view = PlanTensors(*plan)
    h = gather_rows(hidden, view.rows)
    z = head(h, weight, bias, vocab_size, temperature, softcap)
    logp = row_logps(z, view)
    kept = modes.budget(vocab_size, h.element_size(), logits_budget_mb, h.device.type, mode).kept
    saved = h.new_empty(modes.saved_shape(mode, *h.shape, vocab_size, kept))
    return reduce_steps(logp, view, reduction), logp, *row_statistics(z), torch.zeros_like(logp), saved


def linear_step_logps_bwd(
    grad_out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, logp: Tensor, row_max: Tensor,
    row_logsum: Tensor, label_z0: Tensor, saved: Tensor, plan: list[Tensor], vocab_size: int, temperature: float,
    softcap: float, reduction: str, logits_budget_mb: float, mode: str, needs_hidden: bool, needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias by autograd over the formula; a tensor of size 0 for one not needed."""
    view = PlanTensors(*plan)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(needed)
                  for t, needed in ((hidden, needs_hidden), (weight, needs_weight), (bias, needs_bias))]
        z = head(gather_rows(leaves[0], view.rows), leaves[1], leaves[2], vocab_size, temperature, softcap)
        out = reduce_steps(row_logps(z, view), view, reduction)
    needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(torch.autograd.grad(out, needed, grad_out, materialize_grads=True))
    empty = hidden.new_empty(0)
    return tuple(next(grads).contiguous() if leaf is not None and leaf.requires_grad else empty for leaf in leaves)


def head(h: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int, temperature: float, softcap: float) -> Tensor:
    """z (R, vocab_size) of gathered rows."""
    logits = torch.nn.functional.linear(h, weight[:vocab_size], None if bias is None else bias[:vocab_size])
    return transform(logits, vocab_size, temperature, softcap)
