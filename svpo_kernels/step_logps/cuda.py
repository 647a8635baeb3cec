"""`step_logps` on CUDA: tensors to pointers, then csrc/cuda/step_logps.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..plan import PlanTensors


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return _native.supports_cuda(op, device, dtype)


def scratch(like: Tensor, size: int) -> Tensor:
    """Memory for one op; the stream's order lets the allocator hand it out again behind it."""
    return like.new_empty(size, dtype=torch.uint8)


def panel_bytes(rows: int, V: int) -> int:
    """Scratch of the statistics of `rows` rows: three numbers for each panel, which has 4096 columns at least."""
    return 12 * rows * (V // 4096 + 2)


def step_logps_fwd(
    logits: Tensor, plan: list[Tensor], vocab_size: int, temperature: float, softcap: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (B, L, V). Returns out (S,) or (N,), logp (N,), row_max (R,) and row_logsum (R,), fp32."""
    view = PlanTensors(*(index.contiguous() for index in plan))
    B, L, _ = logits.shape
    R, N, S = view.rows.shape[0], view.labels.shape[0], view.step_start.shape[0] - 1
    out, logp, row_max, row_logsum = (
        logits.new_empty(size, dtype=torch.float32) for size in (N if reduction == "none" else S, N, R, R)
    )
    room = scratch(logits, panel_bytes(R, vocab_size))
    _native.cuda().step_logps_fwd(
        logits.data_ptr(), _native.DTYPES[logits.dtype], B, L, *logits.stride()[:2], view.rows.data_ptr(),
        view.row_start.data_ptr(), view.labels.data_ptr(), view.first.data_ptr(), view.step_ids.data_ptr(),
        view.step_order.data_ptr(), view.step_start.data_ptr(), R, N, S, vocab_size, temperature, softcap,
        _native.REDUCTIONS[reduction], out.data_ptr(), logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(),
        room.data_ptr(), room.numel(), *_native.device_and_stream(logits))
    return out, logp, row_max, row_logsum


def step_logps_bwd(
    grad_out: Tensor, logits: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor, plan: list[Tensor],
    vocab_size: int, temperature: float, softcap: float, reduction: str, inplace: bool = False,
) -> Tensor:
    """The gradient of logits (B, L, V): a new contiguous tensor, or the logits themselves when `inplace`."""
    view = PlanTensors(*(index.contiguous() for index in plan))
    B, L, V = logits.shape
    R, N, S = view.rows.shape[0], view.labels.shape[0], view.step_start.shape[0] - 1
    grad = logits if inplace else logits.new_empty((B, L, V))
    grad_out = grad_out.contiguous()
    room = scratch(logits, 8 * B * L + 4 * (R + N))
    _native.cuda().step_logps_bwd(
        grad_out.data_ptr(), logits.data_ptr(), grad.data_ptr(), _native.DTYPES[logits.dtype], B, L, V,
        *logits.stride()[:2], *grad.stride()[:2], logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(),
        view.rows.data_ptr(), view.row_start.data_ptr(), view.labels.data_ptr(), view.first.data_ptr(),
        view.step_ids.data_ptr(), view.step_start.data_ptr(), R, N, S, vocab_size, temperature, softcap,
        _native.REDUCTIONS[reduction], room.data_ptr(), room.numel(), *_native.device_and_stream(logits))
    return grad
