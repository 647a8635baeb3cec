"""`linear_step_logps` on the CPU: csrc/cpu/linear_rows.cpp between the products of products.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..plan import PlanTensors
from . import products, top_k
from .row_kernels import RowKernels


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return _native.supports_cpu(op, device, dtype)


# -- row kernels: arguments and meanings in row_kernels.RowKernels -----------------------------------------------------


def label_dots(h: Tensor, weight: Tensor, bias: Tensor | None, plan: PlanTensors) -> Tensor:
    out = h.new_empty(plan.labels.shape[0], dtype=torch.float32)
    _native.cpu().label_dots(
        h.data_ptr(), weight.data_ptr(), _native.pointer(bias), _native.DTYPES[h.dtype], h.shape[1], h.stride(0),
        weight.stride(0), *_rows(plan), weight.shape[0], out.data_ptr(), _native.threads())
    return out


def rows_fwd(
    z: Tensor, first_row: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    entropy: Tensor | None, plan: PlanTensors, temperature: float | Tensor, softcap: float, write_unit: bool,
) -> None:
    _native.cpu().linear_rows(
        z.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), first_row, first_row + z.shape[0], *_rows(plan),
        label_z0.data_ptr(), z.shape[1], *_transform(temperature, softcap), logp.data_ptr(), row_max.data_ptr(),
        row_logsum.data_ptr(), _native.pointer(entropy), int(write_unit), _native.threads())


def rows_scan(
    z: Tensor, first_row: int, first_column: int, found: Tensor, plan: PlanTensors, V: int,
    temperature: float | Tensor, softcap: float, entropy: bool,
) -> None:
    _native.cpu().linear_rows_scan(
        *_tile(z, first_row, first_column), *_rows(plan), V, *_transform(temperature, softcap), int(entropy),
        found.data_ptr(), _native.threads())


def rows_finish(
    found: Tensor, first_row: int, last_row: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    entropy: Tensor | None, plan: PlanTensors, V: int, temperature: float | Tensor, softcap: float,
) -> None:
    _native.cpu().linear_rows_finish(
        found.data_ptr(), first_row, last_row, *_rows(plan), label_z0.data_ptr(), V, *_transform(temperature, softcap),
        logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(), _native.pointer(entropy), _native.threads())


def rows_stats(
    z: Tensor, first_row: int, label_z0: Tensor, row_max: Tensor, sums: Tensor, squares: Tensor, total: Tensor,
    top: Tensor, top_at: Tensor, plan: PlanTensors, temperature: float | Tensor, softcap: float,
) -> None:
    _native.cpu().linear_row_stats(
        z.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), first_row, first_row + z.shape[0], *_rows(plan),
        label_z0.data_ptr(), z.shape[1], *_transform(temperature, softcap), row_max.data_ptr(), sums.data_ptr(),
        squares.data_ptr(), total.data_ptr(), top.data_ptr(), top_at.data_ptr(), _native.threads())


def rows_unit(
    z: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    plan: PlanTensors, V: int, temperature: float | Tensor, softcap: float,
) -> None:
    _native.cpu().linear_rows_unit(
        *_tile(z, first_row, first_column), *_rows(plan), label_z0.data_ptr(), V, *_transform(temperature, softcap),
        logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(), _native.threads())


def rows_grad(
    z: Tensor, out: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor,
    row_logsum: Tensor, entropy: Tensor, g: Tensor, G: Tensor, E: Tensor, plan: PlanTensors, V: int,
    temperature: float | Tensor, softcap: float,
) -> None:
    pointer, dtype, *tile = _tile(z, first_row, first_column)
    _native.cpu().linear_rows_grad(
        pointer, out.data_ptr(), dtype, tile[0], out.stride(0), *tile[1:], *_rows(plan), label_z0.data_ptr(), V,
        *_transform(temperature, softcap), logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(),
        entropy.data_ptr(), g.data_ptr(), G.data_ptr(), E.data_ptr(), _native.threads())


def reduce_steps(logp: Tensor, plan: PlanTensors, reduction: str) -> Tensor:
    N, S = plan.labels.shape[0], plan.step_start.shape[0] - 1
    out = logp.new_empty(N if reduction == "none" else S)
    _native.cpu().reduce_steps(
        logp.data_ptr(), plan.step_order.data_ptr(), plan.step_start.data_ptr(), N, S, _native.REDUCTIONS[reduction],
        out.data_ptr(), _native.threads())
    return out


def row_grads(grad_out: Tensor, plan: PlanTensors, reduction: str) -> tuple[Tensor, Tensor]:
    R, N, S = plan.rows.shape[0], plan.labels.shape[0], plan.step_start.shape[0] - 1
    grad_out = grad_out.contiguous()
    g, G = grad_out.new_empty(N), grad_out.new_empty(R)
    _native.cpu().row_grads(
        grad_out.data_ptr(), *_rows(plan)[:4], plan.step_ids.data_ptr(), plan.step_start.data_ptr(), R, N, S,
        _native.REDUCTIONS[reduction], g.data_ptr(), G.data_ptr(), _native.threads())
    return g, G


def branch_hidden(
    uw: Tensor, weight: Tensor, terms: Tensor, G: Tensor, plan: PlanTensors, first_row: int
) -> Tensor:
    out = torch.empty_like(uw, memory_format=torch.contiguous_format)
    _native.cpu().branch_hidden(
        uw.data_ptr(), weight.data_ptr(), out.data_ptr(), _native.DTYPES[uw.dtype], uw.shape[1], uw.stride(0),
        weight.stride(0), first_row, first_row + uw.shape[0], plan.row_start.data_ptr(), plan.labels.data_ptr(),
        terms.data_ptr(), G.data_ptr(), _native.threads())
    return out


def branch_weight(
    dweight: Tensor | None, dbias: Tensor | None, h: Tensor, terms: Tensor, plan: PlanTensors
) -> None:
    _native.cpu().branch_weight(
        _native.pointer(dweight), _native.pointer(dbias), h.data_ptr(),
        _native.DTYPES[h.dtype if dweight is None else dweight.dtype], _native.DTYPES[h.dtype], h.shape[1],
        0 if dweight is None else dweight.stride(0), h.stride(0), plan.row_start.data_ptr(), plan.labels.data_ptr(),
        terms.data_ptr(), h.shape[0], terms.shape[0], _native.threads())


def _tile(z: Tensor, first_row: int, first_column: int) -> tuple[int, ...]:
    """z, columns of all V from first_column on, as the native code takes it."""
    count, columns = z.shape
    rows = first_row, first_row + count
    return z.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), *rows, first_column, columns


def _transform(temperature: float | Tensor, softcap: float) -> tuple[float, float, int]:
    """Temperature and softcap of all rows, and the rows' own temperatures, as the native code takes them."""
    return (1.0, softcap, temperature.data_ptr()) if isinstance(temperature, Tensor) else (temperature, softcap, 0)


def _rows(plan: PlanTensors) -> tuple[int, ...]:
    """The arrays that say which row predicts what, as the native code takes them, and R and N."""
    arrays = (plan.rows, plan.row_start, plan.labels, plan.first)
    return *(index.data_ptr() for index in arrays), plan.rows.shape[0], plan.labels.shape[0]


KERNELS = RowKernels(
    label_dots=label_dots, rows_fwd=rows_fwd, rows_stats=rows_stats, rows_unit=rows_unit, rows_grad=rows_grad,
    reduce_steps=reduce_steps, row_grads=row_grads, branch_hidden=branch_hidden, branch_weight=branch_weight,
    rows_scan=rows_scan, rows_finish=rows_finish,
)
linear_step_logps_fwd, linear_step_logps_bwd = products.raw_ops(KERNELS)
linear_top_k = top_k.raw_op(KERNELS)
