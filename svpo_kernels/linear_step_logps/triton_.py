"""`linear_step_logps` in Triton: tensors to launches of the row kernels between the products of products.py.

What a chunk of products and rows of logits have in common is in step_logps/: its kernels run here on the plan with
`rows` replaced by the rows of h. The label columns of a chunk are rounded, so their logits are exact dots instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from .._triton import FEATURES, ROW_WARPS, ROWS, cdiv, launch
from ..plan import PlanTensors, row_of_prediction
from ..step_logps.triton_ import Source, launch_gradient, launch_stats, reduce_steps, row_grads
from . import products, top_k
from .row_kernels import RowKernels
from .triton_kernels import (
    branch_hidden_kernel,
    branch_weight_kernel,
    label_dots_kernel,
    rows_entropy_kernel,
    rows_entropy_labels_kernel,
    rows_grad_kernel,
    rows_grad_labels_kernel,
    rows_stats_kernel,
    rows_stats_labels_kernel,
    rows_unit_kernel,
)

supports = _triton.supports


# -- row kernels: arguments and meanings in row_kernels.RowKernels ----------------------------------------------------


def _own(plan: PlanTensors) -> PlanTensors:
    """The plan over rows of h: plan row r is row r, padding stays -1."""
    each = torch.arange(plan.rows.shape[0], device=plan.rows.device)
    return plan._replace(rows=torch.where(plan.rows < 0, -1, each))


def label_dots(h: Tensor, weight: Tensor, bias: Tensor | None, plan: PlanTensors) -> Tensor:
    out = h.new_zeros(plan.labels.shape[0], dtype=torch.float32)
    R, D = h.shape
    align, limit = _common(D, h, weight)
    launch(
        label_dots_kernel, (R,), h, h, weight, h if bias is None else bias, plan.row_start, plan.labels, plan.rows, out,
        D, h.stride(0), weight.stride(0), weight.shape[0], BIAS=bias is not None, BLOCK=FEATURES.columns, ALIGN=align,
        LIMIT_ALIGN=limit, warps=FEATURES.warps,
    )
    return out


def rows_fwd(
    z: Tensor, first_row: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    entropy: Tensor | None, plan: PlanTensors, temperature: float | Tensor, softcap: float, write_unit: bool,
) -> None:
    options = (temperature, softcap)
    launch_stats(
        Source.of(z), _own(plan), label_z0, logp, row_max, row_logsum, first_row, *z.shape, *options, chunk=True
    )
    if entropy is not None:
        _rows_entropy(z, first_row, logp, row_max, row_logsum, entropy, plan, *options)
    if write_unit:
        rows_unit(z, first_row, 0, label_z0, logp, row_max, row_logsum, plan, z.shape[1], *options)


def rows_unit(
    z: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    plan: PlanTensors, V: int, temperature: float | Tensor, softcap: float,
) -> None:
    mode, split, inverse, scales, own = _triton.scaling(temperature, softcap, row_max)
    count, columns = z.shape
    targets, factors = torch.empty_like(logp), torch.empty_like(row_max)
    launch(
        rows_unit_kernel, (cdiv(count, ROWS),), z, plan.rows, plan.row_start, plan.labels, plan.first, label_z0, logp,
        row_logsum, scales, targets, factors, first_row, count, V, *split, inverse, MODE=mode, SCALES=own, ROWS=ROWS,
        warps=ROW_WARPS,
    )
    here = _own(plan)._replace(labels=plan.labels_from(first_column))
    source, owner = Source.of(z), here.rows[first_row : first_row + count]
    launch_gradient(source, source, owner, here, targets, factors, row_max, columns, columns, temperature, softcap)


def _rows_entropy(
    z: Tensor, first_row: int, logp: Tensor, row_max: Tensor, row_logsum: Tensor, entropy: Tensor, plan: PlanTensors,
    temperature: float | Tensor, softcap: float,
) -> None:
    mode, split, _, scales, own = _triton.scaling(temperature, softcap, row_max)
    source, (count, V) = Source.of(z), z.shape
    span = _triton.span(V, mode)
    spans = cdiv(V, span.columns)
    partial = z.new_empty((spans, count), dtype=torch.float32)
    programs = _triton.programs_per_row(count, spans, _triton.processors(z.device))
    launch(
        rows_entropy_kernel, (count, programs) if spans else (0,), z, z, source.stride_l, plan.rows, plan.row_start,
        plan.labels, row_max, scales, partial, first_row, V, spans, *split, MODE=mode, SCALES=own,
        BLOCK=span.columns, ALIGN=source.align, LIMIT_ALIGN=source.limit(V), warps=span.warps,
    )
    launch(
        rows_entropy_labels_kernel, (cdiv(count, ROWS),), z, plan.rows, plan.row_start, plan.labels, plan.first, logp,
        row_logsum, partial, entropy, first_row, count, V, spans, ROWS=ROWS, warps=ROW_WARPS,
    )


def rows_stats(
    z: Tensor, first_row: int, label_z0: Tensor, row_max: Tensor, sums: Tensor, squares: Tensor, total: Tensor,
    top: Tensor, top_at: Tensor, plan: PlanTensors, temperature: float | Tensor, softcap: float,
) -> None:
    mode, split, _, scales, own = _triton.scaling(temperature, softcap, row_max)
    source, (count, V) = Source.of(z), z.shape
    span = _triton.span(V, mode)
    spans = cdiv(V, span.columns)
    partial = z.new_empty((4, spans, count), dtype=torch.float32)
    partial_at = z.new_empty((spans, count), dtype=torch.int64)
    programs = _triton.programs_per_row(count, spans, _triton.processors(z.device))
    launch(
        rows_stats_kernel, (count, programs) if spans else (0,), z, z, source.stride_l, plan.rows, plan.row_start,
        plan.labels, row_max, scales, partial, partial_at, first_row, V, spans, *split, MODE=mode, SCALES=own,
        BLOCK=span.columns, ALIGN=source.align, LIMIT_ALIGN=source.limit(V), warps=span.warps,
    )
    launch(
        rows_stats_labels_kernel, (cdiv(count, ROWS),), z, plan.rows, plan.row_start, plan.labels, plan.first, label_z0,
        row_max, scales, partial, partial_at, sums, squares, total, top, top_at, first_row, count, V, spans, *split,
        MODE=mode, SCALES=own, ROWS=ROWS, warps=ROW_WARPS,
    )


def rows_grad(
    z: Tensor, out: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor,
    row_logsum: Tensor, entropy: Tensor, g: Tensor, G: Tensor, E: Tensor, plan: PlanTensors, V: int,
    temperature: float | Tensor, softcap: float,
) -> None:
    mode, split, inverse, scales, own = _triton.scaling(temperature, softcap, row_max)
    source, target, (count, columns) = Source.of(z), Source.of(out), z.shape
    span = _triton.span(columns, mode)
    spans = cdiv(columns, span.columns)
    targets = torch.empty_like(logp)
    launch(
        rows_grad_labels_kernel, (cdiv(count, ROWS),), z, plan.rows, plan.row_start, plan.labels, plan.first, label_z0,
        logp, entropy, g, G, E, scales, targets, first_row, count, V, *split, inverse, MODE=mode, SCALES=own, ROWS=ROWS,
        warps=ROW_WARPS,
    )
    programs = _triton.programs_per_row(count, spans, _triton.processors(z.device))
    launch(
        rows_grad_kernel, (count, programs) if spans else (0,), z, z, out, source.stride_l, target.stride_l, plan.rows,
        plan.row_start, plan.labels_from(first_column), targets, row_max, row_logsum, entropy, G, E, scales, first_row,
        columns, spans, *split, inverse, MODE=mode, SCALES=own, BLOCK=span.columns,
        ALIGN=min(source.align, target.align), LIMIT_ALIGN=min(source.limit(columns), target.limit(columns)),
        warps=span.warps, maxnreg=_triton.entropy_registers(span),
    )


def branch_hidden(
    uw: Tensor, weight: Tensor, terms: Tensor, G: Tensor, plan: PlanTensors, first_row: int
) -> Tensor:
    out = torch.empty_like(uw, memory_format=torch.contiguous_format)
    rows, D = uw.shape
    align, limit = _common(D, uw, weight, out)
    launch(
        branch_hidden_kernel, (rows, cdiv(D, FEATURES.columns)), uw, uw, weight, out, plan.row_start, plan.labels,
        terms, G, first_row, D, uw.stride(0), weight.stride(0), D, BLOCK=FEATURES.columns, ALIGN=align,
        LIMIT_ALIGN=limit, warps=FEATURES.warps,
    )
    return out


def branch_weight(
    dweight: Tensor | None, dbias: Tensor | None, h: Tensor, terms: Tensor, plan: PlanTensors
) -> None:
    """Terms sorted by label: what is not 0 comes first, each label's terms by ascending row."""
    V = next(t.shape[0] for t in (dweight, dbias) if t is not None)
    owner, _ = row_of_prediction(plan)
    keys, order = torch.sort(torch.where(terms == 0.0, V, plan.labels), stable=True)
    N, D = keys.shape[0], h.shape[1]
    align, limit = _common(D, h, *(() if dweight is None else (dweight,)))
    launch(
        branch_weight_kernel, (N, 1 if dweight is None else cdiv(D, FEATURES.columns)), h, h,
        h if dweight is None else dweight, terms if dbias is None else dbias, keys, order, owner, terms, N, D,
        h.stride(0), 0 if dweight is None else dweight.stride(0), V, WEIGHT=dweight is not None,
        BIAS=dbias is not None, BLOCK=FEATURES.columns, ALIGN=align, LIMIT_ALIGN=limit, warps=FEATURES.warps,
    )


def _common(columns: int, *tensors: Tensor) -> tuple[int, int]:
    """The alignment of rows and of their end that all tensors share."""
    sources = [Source.of(tensor) for tensor in tensors]
    return min(source.align for source in sources), min(source.limit(columns) for source in sources)


KERNELS = RowKernels(
    label_dots=label_dots, rows_fwd=rows_fwd, rows_stats=rows_stats, rows_unit=rows_unit, rows_grad=rows_grad,
    reduce_steps=reduce_steps, row_grads=row_grads, branch_hidden=branch_hidden, branch_weight=branch_weight,
)
linear_step_logps_fwd, linear_step_logps_bwd = products.raw_ops(KERNELS)
linear_top_k = top_k.raw_op(KERNELS)
