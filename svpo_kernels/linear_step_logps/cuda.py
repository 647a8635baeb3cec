"""`linear_step_logps` on CUDA: csrc/cuda/linear_rows.cu between the products of products.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._scales import row_scales
from ..plan import PlanTensors, row_of_prediction
from ..step_logps.cuda import panel_bytes, scratch
from . import products, top_k
from .row_kernels import RowKernels

# Whether rows may stay on chip between statistics and unit gradient (csrc/cuda/cluster_rows.cu): the same bits either
# way. Off until a GPU has decided. Estimated, not measured: two passes over z for three save at most 0.49 ms of 23 at
# 8192 x 128256 bf16, and k blocks an SM break even only where a row, with two barriers and its scalars, takes no more
# than 2.96 k us. benchmarks/gpu.py races both.
CLUSTERS = False


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return _native.supports_cuda(op, device, dtype)


# -- row kernels: arguments and meanings in row_kernels.RowKernels -----------------------------------------------------


def label_dots(h: Tensor, weight: Tensor, bias: Tensor | None, plan: PlanTensors) -> Tensor:
    out = h.new_empty(plan.labels.shape[0], dtype=torch.float32)
    _native.cuda().label_dots(
        h.data_ptr(), weight.data_ptr(), _native.pointer(bias), _native.DTYPES[h.dtype], h.shape[1], h.stride(0),
        weight.stride(0), *_rows(plan), weight.shape[0], out.data_ptr(), *_native.device_and_stream(h))
    return out


def rows_fwd(
    z: Tensor, first_row: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    entropy: Tensor | None, plan: PlanTensors, temperature: float | Tensor, softcap: float, write_unit: bool,
) -> None:
    count, V = z.shape
    scaling = _scaling(temperature, softcap)
    room = scratch(z, panel_bytes(count, V) + 4 * (plan.rows.shape[0] + plan.labels.shape[0]))
    _native.cuda().linear_rows(
        z.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), first_row, first_row + count, *_rows(plan),
        label_z0.data_ptr(), V, *scaling[:3], logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(),
        _native.pointer(entropy), int(write_unit), int(CLUSTERS), room.data_ptr(), room.numel(),
        *_native.device_and_stream(z))


def rows_stats(
    z: Tensor, first_row: int, label_z0: Tensor, row_max: Tensor, sums: Tensor, squares: Tensor, total: Tensor,
    top: Tensor, top_at: Tensor, plan: PlanTensors, temperature: float | Tensor, softcap: float,
) -> None:
    scaling = _scaling(temperature, softcap)
    _native.cuda().linear_row_stats(
        z.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), first_row, first_row + z.shape[0], *_rows(plan),
        label_z0.data_ptr(), z.shape[1], *scaling[:3], row_max.data_ptr(), sums.data_ptr(), squares.data_ptr(),
        total.data_ptr(), top.data_ptr(), top_at.data_ptr(), *_native.device_and_stream(z))


def rows_unit(
    z: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
    plan: PlanTensors, V: int, temperature: float | Tensor, softcap: float,
) -> None:
    scaling, here = _scaling(temperature, softcap), plan.labels_from(first_column)
    room = scratch(z, 4 * (plan.rows.shape[0] + plan.labels.shape[0]))
    _native.cuda().linear_rows_unit(
        z.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), first_row, first_row + z.shape[0], here.data_ptr(),
        z.shape[1], *_rows(plan), label_z0.data_ptr(), V, *scaling[:3], logp.data_ptr(), row_max.data_ptr(),
        row_logsum.data_ptr(), room.data_ptr(), room.numel(), *_native.device_and_stream(z))


def rows_grad(
    z: Tensor, out: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor,
    row_logsum: Tensor, entropy: Tensor, g: Tensor, G: Tensor, E: Tensor, plan: PlanTensors, V: int,
    temperature: float | Tensor, softcap: float,
) -> None:
    scaling, here = _scaling(temperature, softcap), plan.labels_from(first_column)
    room = scratch(z, 4 * (3 * plan.rows.shape[0] + plan.labels.shape[0]))
    _native.cuda().linear_rows_grad(
        z.data_ptr(), out.data_ptr(), _native.DTYPES[z.dtype], z.stride(0), out.stride(0), first_row,
        first_row + z.shape[0], here.data_ptr(), z.shape[1], *_rows(plan), label_z0.data_ptr(), V, *scaling[:3],
        logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(), entropy.data_ptr(), g.data_ptr(), G.data_ptr(),
        E.data_ptr(), room.data_ptr(), room.numel(), *_native.device_and_stream(z))


def reduce_steps(logp: Tensor, plan: PlanTensors, reduction: str) -> Tensor:
    N, S = plan.labels.shape[0], plan.step_start.shape[0] - 1
    out = logp.new_empty(N if reduction == "none" else S)
    _native.cuda().reduce_steps(
        logp.data_ptr(), plan.step_ids.data_ptr(), plan.step_order.data_ptr(), plan.step_start.data_ptr(), N, S,
        _native.REDUCTIONS[reduction], out.data_ptr(), *_native.device_and_stream(logp))
    return out


def row_grads(grad_out: Tensor, plan: PlanTensors, reduction: str) -> tuple[Tensor, Tensor]:
    R, N, S = plan.rows.shape[0], plan.labels.shape[0], plan.step_start.shape[0] - 1
    grad_out = grad_out.contiguous()
    g, G = grad_out.new_empty(N), grad_out.new_empty(R)
    arrays = (plan.rows, plan.row_start, plan.first, plan.step_ids, plan.step_start)
    _native.cuda().row_grads(
        grad_out.data_ptr(), *(index.data_ptr() for index in arrays), R, N, S, _native.REDUCTIONS[reduction],
        g.data_ptr(), G.data_ptr(), *_native.device_and_stream(g))
    return g, G


def branch_hidden(
    uw: Tensor, weight: Tensor, terms: Tensor, G: Tensor, plan: PlanTensors, first_row: int
) -> Tensor:
    out = torch.empty_like(uw, memory_format=torch.contiguous_format)
    _native.cuda().branch_hidden(
        uw.data_ptr(), weight.data_ptr(), out.data_ptr(), _native.DTYPES[uw.dtype], uw.shape[1], uw.stride(0),
        weight.stride(0), first_row, first_row + uw.shape[0], plan.row_start.data_ptr(), plan.labels.data_ptr(),
        terms.data_ptr(), G.data_ptr(), *_native.device_and_stream(uw))
    return out


def branch_weight(
    dweight: Tensor | None, dbias: Tensor | None, h: Tensor, terms: Tensor, plan: PlanTensors
) -> None:
    """Terms sorted by label: what is not 0 comes first, each label's terms by ascending row."""
    V = next(t.shape[0] for t in (dweight, dbias) if t is not None)
    keys, order = torch.sort(torch.where(terms == 0.0, V, plan.labels), stable=True)
    row_of, _ = row_of_prediction(plan)
    _native.cuda().branch_weight(
        _native.pointer(dweight), _native.pointer(dbias), h.data_ptr(),
        _native.DTYPES[h.dtype if dweight is None else dweight.dtype], _native.DTYPES[h.dtype], V, h.shape[1],
        0 if dweight is None else dweight.stride(0), h.stride(0), keys.data_ptr(), order.data_ptr(), row_of.data_ptr(),
        terms.data_ptr(), keys.shape[0], *_native.device_and_stream(h))


def _scaling(temperature: float | Tensor, softcap: float) -> tuple[float, float, int, Tensor | None]:
    """Temperature, softcap and the rows' own scales as the native code takes them, and the memory of the last."""
    if not isinstance(temperature, Tensor):
        return temperature, softcap, 0, None
    scales = row_scales(temperature, softcap)
    return 2.0, softcap, scales.data_ptr(), scales  # 2: any but 1


def _rows(plan: PlanTensors) -> tuple[int, ...]:
    """The arrays that say which row predicts what, as the native code takes them, and R and N."""
    arrays = (plan.rows, plan.row_start, plan.labels, plan.first)
    return *(index.data_ptr() for index in arrays), plan.rows.shape[0], plan.labels.shape[0]


KERNELS = RowKernels(
    label_dots=label_dots, rows_fwd=rows_fwd, rows_stats=rows_stats, rows_unit=rows_unit, rows_grad=rows_grad,
    reduce_steps=reduce_steps, row_grads=row_grads, branch_hidden=branch_hidden, branch_weight=branch_weight,
)
linear_step_logps_fwd, linear_step_logps_bwd = products.raw_ops(KERNELS)
linear_top_k = top_k.raw_op(KERNELS)
