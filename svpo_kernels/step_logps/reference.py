"""The spec of `step_logps`, in plain PyTorch.

    z = softcap * tanh(logits / softcap) / temperature          (columns below vocab_size only)
    logp[n] = log_softmax(z[row of n])[labels[n]]
    out[s] = sum (or mean) of logp[n] over the predictions n of step s

fp32 compute for fp32, bf16 and fp16; fp64 for fp64. Rows that predict nothing are never looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import PlanTensors, gather_rows, row_of_prediction, scatter_rows


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def step_logps_fwd(
    logits: Tensor, plan: list[Tensor], vocab_size: int, temperature: float, softcap: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (B, L, V) -> out (S,) or (N,), logp (N,), row_max (R,), row_logsum (R,) = log sum exp(z - row_max)."""
    view = PlanTensors(*plan)
    z = transform(gather_rows(logits, view.rows), vocab_size, temperature, softcap)
    logp = row_logps(z, view)
    return reduce_steps(logp, view, reduction), logp, *row_statistics(z)


def step_logps_bwd(
    grad_out: Tensor,
    logits: Tensor,
    logp: Tensor,
    row_max: Tensor,
    row_logsum: Tensor,
    plan: list[Tensor],
    vocab_size: int,
    temperature: float,
    softcap: float,
    reduction: str,
    inplace: bool = False,
) -> Tensor:
    """The gradient of logits (B, L, V); written over the logits when `inplace`."""
    view = PlanTensors(*plan)
    rows = gather_rows(logits, view.rows)
    drows = row_gradient(grad_out, rows, view, vocab_size, temperature, softcap, reduction)
    grad = scatter_rows(logits, view.rows, drows.to(logits.dtype))
    return logits.copy_(grad) if inplace else grad


def row_gradient(
    grad_out: Tensor,
    rows: Tensor,
    plan: PlanTensors,
    vocab_size: int,
    temperature: float | Tensor,
    softcap: float,
    reduction: str,
) -> Tensor:
    """(R, V) gradient of gathered logits: J (sum of g_n onehot(l_n) - G softmax(z)), J = dz/dlogits, G = sum of g_n."""
    z = transform(rows, vocab_size, temperature, softcap)
    row, scored = row_of_prediction(plan)
    grad = z.new_zeros(rows.shape)
    if z.numel() == 0:
        return grad
    g = grad_out.to(z.dtype)
    if reduction == "mean":
        g = g / (plan.step_start[1:] - plan.step_start[:-1]).clamp_min(1)
    g = torch.where(scored, g if reduction == "none" else g[plan.step_ids] if g.numel() else g.sum(), 0.0)
    inside = (plan.labels >= 0) & (plan.labels < z.shape[1])
    G = z.new_zeros(z.shape[0]).index_add(0, row, g)
    dz = -G.unsqueeze(1) * torch.softmax(z, -1)
    g = torch.zeros_like(g).index_add(0, plan.first, torch.where(inside, g, g * torch.nan))  # equal targets, in order
    dz.index_put_((row, torch.where(inside, plan.labels, 0)), g, accumulate=True)
    slope = 1.0 - torch.tanh(rows[:, :vocab_size].to(z.dtype) / softcap).square() if softcap else 1.0
    grad[:, :vocab_size] = dz * slope / temperature
    return grad


def transform(rows: Tensor, vocab_size: int, temperature: float | Tensor, softcap: float) -> Tensor:
    """z of the rows, in fp32 (fp64 for fp64). temperature: one of all, or (R, 1). softcap 0 means none."""
    z = rows[:, :vocab_size]
    z = z if z.dtype == torch.float64 else z.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z if isinstance(temperature, float) and temperature == 1.0 else z / temperature


def row_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Largest z of each row and the log of the sum of exp(z - largest), both (R,)."""
    if z.shape[1] == 0:
        return z.new_zeros(z.shape[0]), z.new_zeros(z.shape[0])
    row_max = z.amax(-1)
    return row_max, torch.logsumexp(z, -1) - row_max


def row_logps(z: Tensor, plan: PlanTensors) -> Tensor:
    """Log-probs (N,) of the plan's labels under z (R, V); 0 for padding, NaN for a label out of range."""
    row, scored = row_of_prediction(plan)
    if z.numel() == 0:
        return z.new_zeros(plan.labels.shape[0])
    inside = (plan.labels >= 0) & (plan.labels < z.shape[1])
    logp = torch.log_softmax(z, -1)[row, torch.where(inside, plan.labels, 0)]
    return torch.where(scored, torch.where(inside, logp, torch.nan), 0.0)


def reduce_steps(logp: Tensor, plan: PlanTensors, reduction: str) -> Tensor:
    """(N,) -> (S,) by sum or mean; `none` gives (N,) back."""
    if reduction == "none":
        return logp.clone()
    S = plan.step_start.shape[0] - 1
    counts = plan.step_start[1:] - plan.step_start[:-1]
    # Padding sorts behind the last step: it falls into one step more, which is dropped.
    step = torch.repeat_interleave(
        torch.arange(S + 1, device=logp.device),
        torch.cat([counts, (logp.shape[0] - plan.step_start[-1]).unsqueeze(0)]),
        output_size=logp.shape[0],
    )
    total = logp.new_zeros(S + 1).index_add(0, step, logp[plan.step_order])[:S]
    return total / counts.clamp_min(1) if reduction == "mean" else total
