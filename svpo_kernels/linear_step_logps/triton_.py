"""`linear_step_logps` in Triton: the row kernels between the products of products.py.

What a chunk of products and rows of logits have in common is in step_logps/: its kernels run here on the plan with
`rows` replaced by the rows of h. The label columns of a chunk are rounded, so their logits are exact dots instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from .._triton import FEATURES, ROW_WARPS, ROWS, cdiv, kernel, launch, one_minus_exp, tl
from ..plan import PlanTensors, row_of_prediction
from ..step_logps.triton_ import Source, launch_gradient, launch_stats, reduce_steps, row_grads
from ..step_logps.triton_kernels import label_logit, likeliest
from . import products

supports = _triton.supports


# -- kernels ------------------------------------------------------------------------------------------------------


@kernel
def label_dots_kernel(
    h, weight, bias, row_start, labels, rows, label_z0, D: tl.int64, stride_h: tl.int64, stride_w: tl.int64,
    vocab_size: tl.int64, BIAS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, LIMIT_ALIGN: tl.constexpr,
):
    """Grid (R,). label_z0[n] = h[r] . W[l_n] + b[l_n] in fp32, for the labels that exist."""
    r = tl.program_id(0).to(tl.int64)
    if tl.load(rows + r) >= 0:
        offsets = tl.arange(0, BLOCK)
        for n in range(tl.load(row_start + r), tl.load(row_start + r + 1)):
            label = tl.load(labels + n)
            if (label >= 0) & (label < vocab_size):
                total = tl.zeros([BLOCK], tl.float32)
                own = h + r * stride_h // ALIGN * ALIGN
                head = weight + label * stride_w // ALIGN * ALIGN
                for d in range(0, D, BLOCK):
                    mask = offsets < tl.minimum(D - d, BLOCK).to(tl.int32) // LIMIT_ALIGN * LIMIT_ALIGN
                    x = tl.load(own + d + offsets, mask=mask, other=0.0).to(tl.float32)
                    total = tl.fma(x, tl.load(head + d + offsets, mask=mask, other=0.0).to(tl.float32), total)
                dot = tl.sum(total, 0)
                if BIAS:
                    dot += tl.load(bias + label).to(tl.float32)
                tl.store(label_z0 + n, dot)


@kernel
def rows_unit_kernel(
    rows, row_start, labels, first, label_z0, logp, row_logsum, targets, factors, first_row: tl.int64, count: tl.int64,
    vocab_size: tl.int64, scale_high, scale_low, inverse_high, inverse_low, inverse_temperature,
    MODE: tl.constexpr, ROWS: tl.constexpr,
):
    """Grid (cdiv(count, ROWS),). U of a row is factors[r] exp(z - m) slope, and targets[n] at its labels' columns."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = first_row + i
    scored = tl.load(rows + r, mask=i < count, other=-1) >= 0
    start = tl.load(row_start + r, mask=scored, other=0)
    end = tl.load(row_start + r + 1, mask=scored, other=0)
    most = tl.max(end - start, 0)
    top_n = likeliest(logp, labels, first, start, end, most, scored, vocab_size, ROWS)
    factor = -tl.exp(-tl.load(row_logsum + r, mask=scored, other=0.0).to(tl.float64)) * inverse_temperature
    for j in range(0, most):
        n = start + j
        own = scored & (n < end)
        label = tl.load(labels + n, mask=own, other=0)
        factor = tl.where((label >= 0) & (label < vocab_size), factor, float("nan"))
        _z, slope = label_logit(label_z0, label, label_z0, n, label, own, scale_high, scale_low, inverse_high,
                                inverse_low, MODE, True)
        value = tl.load(logp + n, mask=own, other=0.0)
        p = tl.exp(value).to(tl.float64)
        unit = tl.where(tl.load(first + n, mask=own, other=-1) == top_n, one_minus_exp(value.to(tl.float64), p), -p)
        tl.store(targets + n, (unit * slope.to(tl.float64) * inverse_temperature).to(tl.float32), mask=own)
    tl.store(factors + r, factor.to(tl.float32), mask=scored)


@kernel
def branch_hidden_kernel(
    uw, weight, out_rows, row_start, labels, terms, G, first_row: tl.int64, D: tl.int64, stride_uw: tl.int64,
    stride_w: tl.int64, stride_out: tl.int64, BLOCK: tl.constexpr, ALIGN: tl.constexpr, LIMIT_ALIGN: tl.constexpr,
):
    """Grid (rows, cdiv(D, BLOCK)). out = G uw + sum of terms[n] W[l_n] over the row's predictions, in order."""
    i = tl.program_id(0).to(tl.int64)
    r = first_row + i
    d = tl.program_id(1).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.minimum(D - d, BLOCK).to(tl.int32) // LIMIT_ALIGN * LIMIT_ALIGN
    total = tl.load(uw + i * stride_uw // ALIGN * ALIGN + d + offsets, mask=mask, other=0.0).to(tl.float32)
    total = total * tl.load(G + r)
    start = tl.load(row_start + r)
    end = tl.load(row_start + r + 1)
    if end - start > 1:
        for n in range(start, end):
            term = tl.load(terms + n)
            if term != 0.0:
                head = weight + tl.load(labels + n) * stride_w // ALIGN * ALIGN
                total = tl.fma(tl.load(head + d + offsets, mask=mask, other=0.0).to(tl.float32), term, total)
    to = out_rows + i * stride_out // ALIGN * ALIGN
    tl.store(to + d + offsets, total.to(out_rows.dtype.element_ty), mask=mask)


@kernel
def branch_weight_kernel(
    h, dweight, dbias, keys, order, owner, terms, N: tl.int64, D: tl.int64, stride_h: tl.int64, stride_dw: tl.int64,
    vocab_size: tl.int64, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    LIMIT_ALIGN: tl.constexpr,
):
    """Grid (N, cdiv(D, BLOCK)). keys are sorted: the first of equal labels adds all their terms, by ascending row."""
    i = tl.program_id(0).to(tl.int64)
    label = tl.load(keys + i)
    before = tl.load(keys + i - 1, mask=i > 0, other=-1)
    if (label < vocab_size) & (before != label):
        d = tl.program_id(1).to(tl.int64) * BLOCK
        offsets = tl.arange(0, BLOCK)
        mask = offsets < tl.minimum(D - d, BLOCK).to(tl.int32) // LIMIT_ALIGN * LIMIT_ALIGN
        to = dweight + label * stride_dw // ALIGN * ALIGN + d + offsets
        total = tl.zeros([BLOCK], tl.float32)
        if WEIGHT:
            total = tl.load(to, mask=mask, other=0.0).to(tl.float32)
        bias_total = tl.program_id(1).to(tl.float64) * 0.0
        j = i
        same = label
        while same == label:
            n = tl.load(order + j)
            term = tl.load(terms + n)
            if WEIGHT:
                own = h + tl.load(owner + n) * stride_h // ALIGN * ALIGN
                total = tl.fma(tl.load(own + d + offsets, mask=mask, other=0.0).to(tl.float32), term, total)
            bias_total += term.to(tl.float64)
            j += 1
            same = tl.load(keys + j, mask=j < N, other=-1)
        if WEIGHT:
            tl.store(to, total.to(dweight.dtype.element_ty), mask=mask)
        if BIAS:
            if tl.program_id(1) == 0:
                tl.store(dbias + label, tl.load(dbias + label) + bias_total.to(tl.float32))


# -- row kernels: arguments and meanings in products.RowKernels ----------------------------------------------------


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
    z: Tensor, first_row: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor, plan: PlanTensors,
    temperature: float, softcap: float, write_unit: bool,
) -> None:
    options = (temperature, softcap)
    launch_stats(
        Source.of(z), _own(plan), label_z0, logp, row_max, row_logsum, first_row, *z.shape, *options, chunk=True
    )
    if write_unit:
        rows_unit(z, first_row, label_z0, logp, row_max, row_logsum, plan, *options)


def rows_unit(
    z: Tensor, first_row: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor, plan: PlanTensors,
    temperature: float, softcap: float,
) -> None:
    mode, *split = _triton.transform(temperature, softcap)
    count, V = z.shape
    targets, factors = torch.empty_like(logp), torch.empty_like(row_max)
    launch(
        rows_unit_kernel, (cdiv(count, ROWS),), z, plan.rows, plan.row_start, plan.labels, plan.first, label_z0, logp,
        row_logsum, targets, factors, first_row, count, V, *split, 1.0 / temperature, MODE=mode, ROWS=ROWS,
        warps=ROW_WARPS,
    )
    owner = _own(plan).rows[first_row : first_row + count]
    source = Source.of(z)
    launch_gradient(source, source, owner, plan, targets, factors, row_max, V, V, temperature, softcap)


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


KERNELS = products.RowKernels(
    label_dots=label_dots, rows_fwd=rows_fwd, rows_unit=rows_unit, reduce_steps=reduce_steps, row_grads=row_grads,
    branch_hidden=branch_hidden, branch_weight=branch_weight,
)
linear_step_logps_fwd, linear_step_logps_bwd = products.raw_ops(KERNELS)
