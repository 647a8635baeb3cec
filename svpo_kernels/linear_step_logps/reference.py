"""The spec of `linear_step_logps`, in plain PyTorch.

    z0 = hidden @ weight.T + bias + lora_scaling * (hidden @ lora_a.T) @ lora_b.T
    z = softcap * tanh(z0 / softcap) / temperature      (columns below vocab_size only)
    logp[n] = log_softmax(z[row of n])[labels[n]]
    out[s] = sum (or mean) of logp[n] over the predictions n of step s

temperature: of all rows, or of each its own. A logit scale c is temperature / c and softcap / c. Statistics of n, with
p = softmax(z[row of n]): entropy = -sum p log p, logsumexp = log sum exp z, log_sum_sq_probs = log sum p^2, mean_logit
= sum z / vocab_size, top1: whether labels[n] is the first column with the largest z.

Products are taken in the input dtype, as `F.linear` does; all after them in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..plan import PlanTensors, gather_rows, scatter_rows, spread_rows
from ..step_logps.reference import reduce_steps, row_gradient, row_logps, row_statistics, transform
from . import modes, shards
from .head import product
from .row_kernels import MoreStats, Stats, per_prediction


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def linear_step_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    plan: list[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    """hidden (B, L, D), weight (V, D), bias (V,), lora_a (r, D), lora_b (V, r) or None. Nothing is kept: what the mode
    would keep stays zero."""
    o, view = modes.Options(*options).of_rows(_column(temperatures)), PlanTensors(*plan)
    h = gather_rows(hidden, view.rows)
    z = transform(logits(h, weight, bias, lora_a, lora_b, o), o.vocab_size, *o.transform)
    logp = row_logps(z, view)
    D = h.shape[1] + (0 if lora_a is None else lora_a.shape[0])
    share = shards.share(o)
    kept = modes.limits(share.widest, h, o).kept(h.shape[0])
    saved = h.new_zeros(modes.saved_shape(o.mode, h.shape[0], D, share.columns, kept))
    row_max, row_logsum = row_statistics(z)
    stats = Stats(torch.zeros_like(logp), logp, row_max, row_logsum, row_entropy(z) if o.entropy else None)
    asked = per_prediction(stats, row_stats(z, row_max) if o.more_stats else None, view, o)
    entropy = logp.new_empty(0) if stats.entropy is None else stats.entropy
    return reduce_steps(logp, view, o.reduction), *asked, *stats[1:4], entropy, stats.label_z0, saved


def linear_step_logps_bwd(
    grad_out: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    logp: Tensor,
    row_max: Tensor,
    row_logsum: Tensor,
    entropy: Tensor,
    label_z0: Tensor,
    saved: Tensor,
    plan: list[Tensor],
    needs: list[bool],
    *options: Any,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight, bias, lora_a and lora_b, each in its dtype; a tensor of size 0 for one that is not
    needed, and for weight's when main_grad has taken it."""
    o, view = modes.Options(*options).of_rows(_column(temperatures)), PlanTensors(*plan)
    h = gather_rows(hidden, view.rows)
    z0 = logits(h, weight, bias, lora_a, lora_b, o)
    drows = row_gradient(grad_out, z0, view, o.vocab_size, *o.transform, o.reduction)
    if o.entropy or o.logsumexp:
        E, L = (row_sums(grad, view) if grad.numel() else 0.0 for grad in (grad_entropy, grad_logsumexp))
        drows = drows + stats_gradient(E, L, z0, o)
    first, V, _ = shards.share(o)
    drows = drows[:, first : first + V].to(h.dtype)  # the columns of this process
    low = dlow = None
    if lora_a is not None:
        low = o.lora_scaling * linear(h.to(lora_a.dtype), lora_a)
        dlow = o.lora_scaling * (drows.to(lora_b.dtype) @ lora_b[:V])
    dhidden, dweight, dbias, da, db, values = (hidden.new_empty(0) for _ in range(6))
    needs_hidden, needs_weight, needs_bias, needs_a, needs_b = needs
    if needs_hidden:
        values = product(drows, weight[:V])
    if o.group:
        values, dlow = shards.sum_(o, values, dlow)
    if needs_hidden:
        values = values if dlow is None else values + (dlow @ lora_a).to(h.dtype)
        dhidden = scatter_rows(hidden, view.rows, values)
    if needs_a:
        da = dlow.t() @ h.to(dlow.dtype)
    if needs_weight:
        if main_grad is None:
            dweight = padded(drows.t() @ h, weight)
        else:
            main_grad[:V] += drows.t() @ h
    if needs_bias:
        dbias = padded(drows.sum(0), bias)
    if needs_b:
        db = padded(drows.to(low.dtype).t() @ low, lora_b)
    return dhidden, dweight, dbias, da, db


def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    plan: list[Tensor],
    k: int,
    vocab_size: int,
    temperature: float,
    softcap: float,
    logits_budget_mb: float,
    lora_scaling: float,
) -> tuple[Tensor, Tensor]:
    """ids and log-probs (R, k) of the likeliest columns, ties to the lower id; -1 and 0 for padding."""
    options = modes.Options(vocab_size, temperature, softcap, "none", logits_budget_mb, "forward", (), lora_scaling)
    o, rows = options.of_rows(_column(temperatures)), PlanTensors(*plan).rows
    z = transform(logits(gather_rows(hidden, rows), weight, bias, lora_a, lora_b, o), vocab_size, *o.transform)
    ids = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :k]
    padding = (rows < 0).unsqueeze(1)
    logps = torch.log_softmax(z, -1).gather(1, ids)
    return ids.masked_fill(padding, -1), logps.masked_fill(padding, 0.0)


def logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, o: modes.Options
) -> Tensor:
    """z0 (R, vocab_size), of all shards, rounded to the input dtype after each of its two terms."""
    V = shards.share(o).columns
    z0 = linear(h, weight[:V], None if bias is None else bias[:V])
    if lora_a is not None:
        z0 = (z0 + linear(linear(h.to(lora_a.dtype), lora_a), lora_b[:V]) * o.lora_scaling).to(h.dtype)
    return shards.gather_columns(z0, o) if o.group else z0


def row_entropy(z: Tensor) -> Tensor:
    """(R,) entropies of the rows; a column of -inf counts 0."""
    logp = torch.log_softmax(z, -1)
    return -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)


def row_stats(z: Tensor, row_max: Tensor) -> MoreStats:
    powers = (z - row_max.unsqueeze(1)).exp()
    top_at = z.argmax(-1) if z.shape[1] else torch.zeros_like(row_max, dtype=torch.int64)
    return MoreStats(powers.sum(-1), powers.square().sum(-1), z.sum(-1), row_max, top_at)


def stats_gradient(E: Tensor | float, L: Tensor | float, z0: Tensor, o: modes.Options) -> Tensor:
    """(R, V) p (L - E (log p + H)) J, for upstreams E (R,) of the entropies H and L of logsumexp, or 0.

    In fp64: one rounding of H, 5e-7 at 9 nats, moves all columns of a row the same way, and their sum in dHidden by up
    to 5 times eager's error.
    """
    z = transform(z0, o.vocab_size, *o.transform).double()
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    E, L = (g.to(z.dtype).unsqueeze(1) if isinstance(g, Tensor) else g for g in (E, L))
    dz = torch.where(p == 0.0, 0.0, p * (L - E * (logp + row_entropy(z).unsqueeze(1))))
    slope = 1.0 - torch.tanh(z0.to(z.dtype) / o.softcap).square() if o.softcap else 1.0
    return (dz * slope / o.temperature).to(torch.promote_types(z0.dtype, torch.float32))


def _column(temperatures: Tensor | None) -> Tensor | None:
    return None if temperatures is None else temperatures.unsqueeze(1)


def row_sums(values: Tensor, plan: PlanTensors) -> Tensor:
    """(N,) -> (R,), padding left out."""
    scored = spread_rows((plan.rows >= 0).to(values.dtype), plan)
    return torch.segment_reduce(values * scored, "sum", offsets=plan.row_start, initial=0, unsafe=True)


def padded(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the first rows of `like` as that of all of it, in its dtype."""
    out = like.new_zeros(like.shape)
    out[: grad.shape[0]] = grad
    return out
