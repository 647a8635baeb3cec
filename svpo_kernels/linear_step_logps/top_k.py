"""The loop of `linear_top_k`: products in chunks, their normaliser, and the k largest columns of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _memory
from ..plan import PlanTensors, gather_rows
from . import modes, ties, walks
from .branching import capped
from .head import Head
from .row_kernels import RowKernels

SLICE = 4096  # columns whose int64 keys are looked through at a time


def raw_op(kernels: RowKernels) -> Callable[..., tuple[Tensor, Tensor]]:
    """A backend's linear_top_k: arguments and results of the reference's."""

    def linear_top_k(*args: Any) -> tuple[Tensor, Tensor]:
        return top_k(kernels, *args)

    return linear_top_k


def top_k(
    kernels: RowKernels,
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
    """ids (R, k) int64, log-probs (R, k) fp32. A row of padding has ids -1 and log-probs 0."""
    options = modes.Options(vocab_size, temperature, softcap, "none", logits_budget_mb, "forward", (), lora_scaling)
    o, rows = options.of_rows(temperatures), PlanTensors(*plan).rows.contiguous()
    h = gather_rows(hidden, rows)
    head = Head(weight, bias, lora_a, lora_b, lora_scaling).cut(vocab_size)
    low, R = head.low(h), h.shape[0]
    view = unlabelled(rows)
    spare = torch.zeros(1, dtype=torch.float32, device=h.device)
    row_max, row_logsum = (torch.zeros(R, dtype=torch.float32, device=h.device) for _ in range(2))
    # beside a row of z, the keys of a slice and what topk makes of them: at most four times 8 bytes a column
    width = vocab_size + 32 * min(SLICE, vocab_size) // h.element_size()
    chunk = modes.budget(width, h.element_size(), logits_budget_mb, h.device.type, o.mode).scratch(R)
    buffer = _memory.empty(h, (min(R, chunk), vocab_size)).tensor
    best = torch.zeros(R, k, dtype=torch.int64, device=h.device)
    for start, stop in walks.chunks(0, R, chunk):
        z = buffer[: stop - start]
        head.product(h[start:stop], None if low is None else low[start:stop], out=z)
        kernels.rows_fwd(z, start, spare, spare.clone(), row_max, row_logsum, None, view, *o.transform, False)
        best[start:stop] = largest(z, k)
    own = o.temperature.unsqueeze(1) if isinstance(o.temperature, Tensor) else o.temperature
    z, _ = capped(ties.values_of(best).double(), own, softcap)
    logps = (z - row_max.double().unsqueeze(1) - row_logsum.double().unsqueeze(1)).clamp_max(0.0).float()
    padding = (rows < 0).unsqueeze(1)
    return ties.ids_of(best).masked_fill(padding, -1), logps.masked_fill(padding, 0.0)


def largest(z: Tensor, k: int) -> Tensor:
    """(c, V) -> (c, k) keys of the largest, in descending order."""
    best = None
    for first, last in walks.chunks(0, z.shape[1], SLICE):
        found = ties.keys(z[:, first:last], torch.arange(first, last, device=z.device))
        found = found.topk(min(k, last - first), -1).values
        best = found if best is None else torch.cat([best, found], -1)
        best = best.topk(min(k, best.shape[1]), -1).values
    return best


def unlabelled(rows: Tensor) -> PlanTensors:
    """A plan of these rows that scores nothing; one prediction is padding."""
    none = rows.new_zeros(1)
    return PlanTensors(rows, rows.new_zeros(rows.shape[0] + 1), none, none, none, none, none, none)
