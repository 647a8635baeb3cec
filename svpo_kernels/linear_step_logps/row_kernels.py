"""What a backend brings to the product loop of `linear_step_logps`, and what its forward finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import PlanTensors, row_of_prediction, spread_rows
from .modes import STATS, Options


class RowKernels(NamedTuple):
    """What a backend brings. `h` is (R, D), the gathered hidden rows; `z` a chunk (c, V) of products from first_row.

    Every float vector is fp32. `logp` and `label_z0` are (N,), `row_max` and `row_logsum` (R,): whole, not per chunk.
    l* of a row is its most probable distinct label (ties: the first). Options are (temperature,
    softcap); temperature is a float, or (R,) fp32.
    """

    # (h, weight, bias, plan) -> (N,) exact fp32 dots h . W[l] + b[l], once per distinct (row, label); 0 for padding
    label_dots: Callable[..., Tensor]
    # (z, first_row, label_z0, logp, row_max, row_logsum, entropy, plan, temperature, softcap, write_unit) -> None
    #   fills logp, row_max, row_logsum and, unless it is None, entropy (R,) of these rows; with write_unit z becomes U;
    #   a padding row: statistics 0 and U 0
    rows_fwd: Callable[..., None]
    # (z, first_row, label_z0, row_max, sums, squares, total, top, top_at, plan, temperature, softcap) -> None
    #   fills the MoreStats of these rows; row_max may be that of more columns; z is kept
    rows_stats: Callable[..., None]
    # (z, first_row, first_column, label_z0, logp, row_max, row_logsum, plan, V, temperature, softcap) -> None
    #   z, columns of all V from first_column on, becomes U, bitwise as above
    rows_unit: Callable[..., None]
    # (z, out, first_row, first_column, label_z0, logp, row_max, row_logsum, entropy, g, G, E, plan, V, temperature,
    #  softcap) -> None
    #   out, which may be z, = the whole gradient of such a tile, upstreams of the entropies E (R,) included:
    #   J (sum_n g_n onehot(l_n) - p (G + E (log p + entropy))); where p = 0 that is 0, -inf logits included
    rows_grad: Callable[..., None]
    # (logp, plan, reduction) -> (S,) or (N,)
    reduce_steps: Callable[..., Tensor]
    # (grad_out, plan, reduction) -> g (N,), G (R,)
    #   upstreams, equal (row, label) merged into the first (others 0), and their sum per row
    row_grads: Callable[..., tuple[Tensor, Tensor]]
    # (uw, weight, terms, G, plan, first_row) -> rows of dHidden in uw's dtype: G uw + sum_n terms[n] W[l_n]
    branch_hidden: Callable[..., Tensor]
    # (dweight or None, dbias or None, h, terms, plan) -> None, adds in fixed order
    #   dW[l_n] += terms[n] h (and db without h); terms of 0 are passed over
    branch_weight: Callable[..., None]
    # (z, first_row, first_column, found, plan, V, temperature, softcap, entropy) -> None
    #   adds the columns of such a tile to found (R, 3) fp64; that of column 0 comes first and starts anew
    rows_scan: Callable[..., None] | None = None
    # (found, first_row, last_row, label_z0, logp, row_max, row_logsum, entropy, plan, V, temperature, softcap) -> None
    #   fills the statistics of these rows as rows_fwd does. Where a backend has neither a forward goes by rows
    rows_finish: Callable[..., None] | None = None


class Stats(NamedTuple):
    """What the forward finds: label_z0, logp (N,), row_max, row_logsum and, if asked for, entropy (R,), fp32."""

    label_z0: Tensor
    logp: Tensor
    row_max: Tensor
    row_logsum: Tensor
    entropy: Tensor | None


class MoreStats(NamedTuple):
    """Of each row (R,): sums of exp(z - row_max), of its square and of z, fp32, labels as exact as in logp; the
    largest z as the product gave it, fp32, and the first column that has it, int64."""

    sums: Tensor
    squares: Tensor
    total: Tensor
    top: Tensor
    top_at: Tensor

    @classmethod
    def like(cls, row_max: Tensor) -> MoreStats:
        return cls(*(torch.zeros_like(row_max) for _ in range(4)), torch.zeros_like(row_max, dtype=torch.int64))


def per_prediction(stats: Stats, more: MoreStats | None, plan: PlanTensors, o: Options) -> tuple[Tensor, ...]:
    """What `modes.STATS` names, each (N,) if it is asked for, else of size 0. Padding is 0."""
    none, rows = stats.logp.new_empty(0), {"entropy": stats.entropy}
    if o.logsumexp:
        found = stats.row_max + stats.row_logsum
        rows["logsumexp"] = torch.where(stats.row_max == -torch.inf, stats.row_max, found)
    if more is not None:
        # from sums of its own: row_logsum is rounded, twice of that showed
        found = more.squares.double().log() - 2.0 * more.sums.double().log()
        rows["log_sum_sq_probs"] = found.to(stats.logp.dtype)
        rows["mean_logit"] = more.total / max(o.vocab_size, 1)
    results = [spread_rows(rows[name], plan) if name in o.stats else none.clone() for name in STATS[:4]]
    return *results, is_top(more.top_at, plan) if "top1" in o.stats else none.to(torch.bool)


def is_top(top_at: Tensor, plan: PlanTensors) -> Tensor:
    """(N,) whether a prediction's label is the first argmax of its row (R,)."""
    row, scored = row_of_prediction(plan)
    return scored & (top_at[row] == plan.labels) if top_at.numel() else torch.zeros_like(scored)
