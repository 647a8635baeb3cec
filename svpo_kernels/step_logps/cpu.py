"""`step_logps` on the CPU: tensors to pointers, then csrc/cpu/step_logps.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _memory, _native
from ..plan import PlanTensors


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return _native.supports_cpu(op, device, dtype)


def step_logps_fwd(logits: Tensor, plan: list[Tensor], vocab_size: int, temperature: float, softcap: float,
                   reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (B, L, V). Returns out (S,) or (N,), logp (N,), row_max (R,) and row_logsum (R,), fp32."""
    view = PlanTensors(*(index.contiguous() for index in plan))
    B, L, _ = logits.shape
    R, N, S = view.rows.shape[0], view.labels.shape[0], view.step_start.shape[0] - 1
    out, logp, row_max, row_logsum = (
        logits.new_empty(size, dtype=torch.float32) for size in (N if reduction == "none" else S, N, R, R))
    _native.cpu().step_logps_fwd(
        logits.data_ptr(), _native.DTYPES[logits.dtype], B, L, *logits.stride()[:2], view.rows.data_ptr(),
        view.row_start.data_ptr(), view.labels.data_ptr(), view.first.data_ptr(), view.step_order.data_ptr(),
        view.step_start.data_ptr(), R, N, S, vocab_size, temperature, softcap, _native.REDUCTIONS[reduction],
        out.data_ptr(), logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(), _native.threads())
    return out, logp, row_max, row_logsum


def step_logps_bwd(grad_out: Tensor, logits: Tensor, logp: Tensor, row_max: Tensor, row_logsum: Tensor,
                   plan: list[Tensor], vocab_size: int, temperature: float, softcap: float, reduction: str,
                   inplace: bool = False) -> Tensor:
    """The gradient of logits (B, L, V): a new contiguous tensor, or the logits themselves when `inplace`."""
    view = PlanTensors(*(index.contiguous() for index in plan))
    B, L, V = logits.shape
    R, N, S = view.rows.shape[0], view.labels.shape[0], view.step_start.shape[0] - 1
    grad, written = (logits, True) if inplace else _memory.empty(logits, (B, L, V))
    grad_out = grad_out.contiguous()
    _native.cpu().step_logps_bwd(
        grad_out.data_ptr(), logits.data_ptr(), grad.data_ptr(), _native.DTYPES[logits.dtype], B, L, V,
        *logits.stride()[:2], *grad.stride()[:2], logp.data_ptr(), row_max.data_ptr(), row_logsum.data_ptr(),
        view.rows.data_ptr(), view.row_start.data_ptr(), view.labels.data_ptr(), view.first.data_ptr(),
        view.step_ids.data_ptr(), view.step_start.data_ptr(), R, N, S, vocab_size, temperature, softcap,
        _native.REDUCTIONS[reduction], int(not inplace), int(not written), _native.threads())
    return grad
