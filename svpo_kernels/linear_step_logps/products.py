"""`linear_step_logps` between the row kernels: which products run, on which chunk, into which buffer.

The same loop serves every fused backend; a backend brings its `RowKernels`. Products go through torch (oneDNN, cuBLAS)
in the input dtype. One (chunk, V) buffer is reused over all chunks and nothing else of that size is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _memory
from ..plan import PlanTensors, gather_rows, row_of_prediction, scatter_rows
from . import modes

FEW_COLUMNS = 1024  # up to here db is summed in fp64; beyond, many entries average its rounding


class RowKernels(NamedTuple):
    """What a backend brings. `h` is (R, D), the gathered hidden rows; `z` a chunk (c, V) of products from first_row.

    Every float vector is fp32. `logp` and `label_z0` are (N,), `row_max` and `row_logsum` (R,): whole, not per chunk.
    l* of a row is its most probable distinct label (ties: the first). Options are (temperature, softcap).
    """

    # (h, weight, bias, plan) -> (N,) exact fp32 dots h . W[l] + b[l], once per distinct (row, label); 0 for padding
    label_dots: Callable[..., Tensor]
    # (z, first_row, label_z0, logp, row_max, row_logsum, plan, temperature, softcap, write_unit) -> None
    #   fills logp, row_max, row_logsum of these rows; with write_unit z becomes U; a padding row: logp 0 and U 0
    rows_fwd: Callable[..., None]
    # (z, first_row, label_z0, logp, row_max, row_logsum, plan, temperature, softcap) -> None
    #   z becomes U, bitwise as above
    rows_unit: Callable[..., None]
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


def raw_ops(kernels: RowKernels) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """A backend's linear_step_logps_fwd and linear_step_logps_bwd: arguments and results of the reference's."""

    def linear_step_logps_fwd(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: list[Tensor], *options: Any
    ) -> tuple[Tensor, ...]:
        return forward(kernels, hidden, weight, bias, [index.contiguous() for index in plan], *options)

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
        *options: Any,
    ) -> tuple[Tensor, ...]:
        kept = (logp, row_max, row_logsum, label_z0, saved)
        plan = [index.contiguous() for index in plan]
        return backward(kernels, grad_out, hidden, weight, bias, *kept, plan, *options)

    return linear_step_logps_fwd, linear_step_logps_bwd


def forward(
    kernels: RowKernels,
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
    """Returns out (S,) or (N,), logp (N,), row_max (R,), row_logsum (R,), label_z0 (N,) and what the mode keeps."""
    view = PlanTensors(*plan)
    h = gather_rows(hidden, view.rows)
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    R, D = h.shape
    limit = modes.budget(vocab_size, h.element_size(), logits_budget_mb, h.device.type, mode)
    label_z0 = kernels.label_dots(h, weight, bias, view)
    logp = label_z0.new_zeros(view.labels.shape[0])
    row_max, row_logsum = label_z0.new_zeros(R), label_z0.new_zeros(R)
    saved = _memory.empty(h, modes.saved_shape(mode, R, D, vocab_size, limit.kept)).tensor
    kept = saved.shape[0] if mode == "store" else 0
    buffer = scratch(h, R - kept, limit.chunk, vocab_size)
    rest = modes.chunks(kept, R, limit.chunk)
    for start, stop in [*modes.chunks(0, kept, modes.MOST_ROWS), *rest]:
        z = saved[start:stop] if stop <= kept else buffer[: stop - start]
        product(h[start:stop], weight, bias, out=z)
        write_unit = mode == "frozen" or stop <= kept
        kernels.rows_fwd(z, start, label_z0, logp, row_max, row_logsum, view, temperature, softcap, write_unit)
        if mode == "frozen":
            torch.mm(z, weight, out=saved[start:stop])
    return kernels.reduce_steps(logp, view, reduction), logp, row_max, row_logsum, label_z0, saved


def backward(
    kernels: RowKernels,
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
    """Gradients of hidden, weight and bias; a tensor of size 0 for one that is not needed."""
    view = PlanTensors(*plan)
    used, used_bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    h = gather_rows(hidden, view.rows)
    g, G = kernels.row_grads(grad_out, view, reduction)
    R, D = h.shape
    limit = modes.budget(vocab_size, h.element_size(), logits_budget_mb, h.device.type, mode)
    kept = saved.shape[0] if mode == "store" else 0
    scaled = (h * G.unsqueeze(1)).to(h.dtype) if needs_weight else h
    head = HeadGradient(weight, bias, vocab_size, needs_weight, needs_bias, single=kept == R)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0)
    options = (temperature, softcap)
    terms = branch_terms(label_z0, logp, g, view, vocab_size, *options)

    if mode == "frozen":
        scatter_rows(dhidden, view.rows, kernels.branch_hidden(saved, used, terms, G, view, 0))
        return dhidden, *head.finish()
    buffer = scratch(h, R - kept, limit.chunk, vocab_size)
    uw = h.new_empty(R, D) if needs_hidden else None
    # What was kept is one product; what was not is made again, chunk by chunk.
    parts = ([(0, kept)] if kept else []) + modes.chunks(kept, R, limit.chunk)
    for start, stop in parts:
        unit = saved[start:stop] if stop <= kept else buffer[: stop - start]
        if stop > kept:
            product(h[start:stop], used, used_bias, out=unit)
            kernels.rows_unit(unit, start, label_z0, logp, row_max, row_logsum, view, *options)
        if needs_hidden:
            torch.mm(unit, used, out=uw[start:stop])
        head.add(unit, scaled[start:stop], G[start:stop])
    if needs_hidden:
        scatter_rows(dhidden, view.rows, kernels.branch_hidden(uw, used, terms, G, view, 0))
    if needs_weight or needs_bias:
        head.branch(kernels, h, terms, view)
    return dhidden, *head.finish()


class HeadGradient:
    """dW (V, D) and db (V,): written by one product when all U is held, else summed over chunks in fp32."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, vocab_size: int, needs_weight: bool, needs_bias: bool, single: bool
    ) -> None:
        self.weight, self.bias, self.V = weight, bias, vocab_size
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dtype = weight.dtype if single else wide
        # One product writes every row below vocab_size, so only the padding of the head needs its zeros.
        self.dweight = _memory.empty(weight, weight.shape, dtype).tensor if needs_weight else None
        # V = 8: 1.6 times eager's error when db is summed in fp32, 0.7 times in fp64.
        wide_bias = torch.float64 if vocab_size <= FEW_COLUMNS else wide
        self.dbias = weight.new_zeros(weight.shape[0], dtype=wide_bias) if needs_bias else None
        self.untouched = True
        if needs_weight:
            self.dweight[vocab_size:].zero_()

    def add(self, unit: Tensor, scaled: Tensor, G: Tensor) -> None:
        """unit (c, V), scaled = G h (c, D), G (c,)."""
        if self.dweight is not None:
            target = self.dweight[: self.V]
            if target.dtype != unit.dtype:
                part = torch.mm(unit.t(), scaled)
                target.copy_(part) if self.untouched else target.add_(part)
            elif self.untouched:
                torch.mm(unit.t(), scaled, out=target)
            else:
                target.addmm_(unit.t(), scaled)
            self.untouched = False
        if self.dbias is not None:
            for start, stop in modes.chunks(0, self.V, 8192):  # without a whole copy of a low-precision U
                self.dbias[start:stop] += torch.mv(unit[:, start:stop].to(self.dbias.dtype).t(), G.to(self.dbias.dtype))

    def branch(self, kernels: RowKernels, h: Tensor, terms: Tensor, plan: PlanTensors) -> None:
        if self.dweight is not None and self.untouched:
            self.dweight.zero_()
        dbias = None if self.dbias is None else torch.zeros_like(self.dbias, dtype=terms.dtype)
        kernels.branch_weight(self.dweight, dbias, h, terms, plan)
        if dbias is not None:
            self.dbias += dbias

    def finish(self) -> tuple[Tensor, Tensor]:
        return (
            self.weight.new_empty(0) if self.dweight is None else self.dweight.to(self.weight.dtype),
            self.weight.new_empty(0) if self.dbias is None else self.dbias.to(self.bias.dtype),
        )


# -- branching rows ---------------------------------------------------------------------------------------------------


def branch_terms(
    label_z0: Tensor, logp: Tensor, g: Tensor, plan: PlanTensors, vocab_size: int, temperature: float, softcap: float
) -> Tensor:
    """(N,) what dz0 holds beside G U: at a label that is not l* g_n J, at l* -(the others' g) J; elsewhere 0.

    A row with one distinct label has none. In fp64 on (N,) vectors, on every backend.
    """
    row, _ = row_of_prediction(plan)
    likely = likeliest(logp, plan, vocab_size)
    is_likely = torch.arange(logp.shape[0], device=logp.device) == (likely[row] if likely.numel() else -1)
    others = torch.segment_reduce(  # in order: no float atomics
        g.double().masked_fill(is_likely, 0.0), "sum", offsets=plan.row_start, initial=0, unsafe=True
    )
    inside = (plan.labels >= 0) & (plan.labels < vocab_size)
    own = torch.where(is_likely, -others[row] if others.numel() else 0.0, g.double())
    return torch.where(inside, own * slope(label_z0, temperature, softcap), 0.0).to(g.dtype)


def likeliest(logp: Tensor, plan: PlanTensors, vocab_size: int) -> Tensor:
    """(R,) l* of each row as a prediction: the most probable distinct label, ties: the first. N where there is none."""
    R, N = plan.rows.shape[0], logp.shape[0]
    row, scored = row_of_prediction(plan)
    n = torch.arange(N, device=logp.device)
    distinct = scored & (plan.first == n) & (plan.labels >= 0) & (plan.labels < vocab_size)
    best = logp.new_full((R,), -torch.inf).scatter_reduce(0, row, logp.masked_fill(~distinct, -torch.inf), "amax")
    at_best = distinct & (logp == (best[row] if R else logp))
    return row.new_full((R,), N).scatter_reduce(0, row, torch.where(at_best, n, N), "amin")


def slope(label_z0: Tensor, temperature: float, softcap: float) -> Tensor:
    """J = dz/dz0 at label logits, fp64."""
    tanh = torch.tanh(label_z0.double() / softcap) if softcap else torch.zeros_like(label_z0, dtype=torch.float64)
    return (1.0 - tanh) * (1.0 + tanh) / temperature


# -- pieces ---------------------------------------------------------------------------------------------------------


def product(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = h W^T + b, rounded once to the input dtype."""
    if bias is None:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.addmm(bias, h, weight.t(), out=out)


def scratch(h: Tensor, rows: int, chunk: int, V: int) -> Tensor:
    return _memory.empty(h, (min(max(rows, 0), chunk), V)).tensor
