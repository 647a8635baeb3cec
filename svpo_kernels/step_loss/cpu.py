"""`svpo_loss` on the CPU: tensors to pointers, then csrc/cpu/svpo_loss.cpp.

At P = 64 the kernel takes microseconds and Python the rest: no temporaries, one native call each way.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import _native
from .reference import Inputs, Options, check_values

PREFERENCES = {"sigmoid": 0, "ipo": 1, "hinge": 2}
RANKS = {"hinge": 0, "logistic": 1, "implicit": 2}
_SCALAR = torch.empty((), dtype=torch.float32)  # empty_like of it is the cheapest way to a new scalar


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return _native.supports_cpu(op, device, dtype)


def svpo_loss_fwd(
    step_logps: Tensor | None, ref_step_logps: Tensor | None, values: Tensor | None, value_targets: Tensor | None,
    pairs: Tensor, sft_steps: Tensor | None, pair_weights: Tensor | None, label_smoothings: Tensor | None,
    margins: Tensor | None, rank_margins: Tensor | None, counts: Tensor | None, beta: float, preference: str,
    preference_weight: float, label_smoothing: float, margin: float, value_weight: float, rank: str,
    rank_margin: float, rank_scale: float, rank_weight: float, sft_weight: float, pair_count: float,
    value_count: float, sft_count: float,
) -> tuple[Tensor, ...]:
    """As the reference."""
    lp, ref, v = _dense(step_logps), _dense(ref_step_logps), _dense(values)
    t, weights, smoothings, m, rank_m, n = (
        _fp32(value_targets), _fp32(pair_weights), _fp32(label_smoothings), _fp32(margins), _fp32(rank_margins),
        _fp32(counts))
    index, sft = _index(pairs), _index(sft_steps)
    like, P = v if lp is None else lp, index.shape[0]
    S = like.shape[0]
    loss, preference_term, value_term, rank_term, sft_term, accuracy, value_accuracy = scalars = [
        torch.empty_like(_SCALAR) for _ in range(7)]
    chosen, rejected, slopes = _SCALAR.new_empty(P), _SCALAR.new_empty(P), _SCALAR.new_empty((4, S))
    try:
        _native.cpu().svpo_loss_fwd(
            _at(lp), _code(lp), _at(ref), _code(ref), _at(v), _code(v), _at(t), index.data_ptr(),
            index.dtype == torch.int64, _at(sft), sft is not None and sft.dtype == torch.int64, _at(weights),
            _at(smoothings), _at(m), _at(rank_m), _at(n), S, P, 0 if sft is None else sft.shape[0], beta,
            PREFERENCES[preference], preference_weight, label_smoothing, margin, value_weight, RANKS[rank],
            rank_margin, rank_scale, rank_weight, sft_weight, pair_count, value_count, sft_count, loss.data_ptr(),
            preference_term.data_ptr(), value_term.data_ptr(), rank_term.data_ptr(), sft_term.data_ptr(),
            accuracy.data_ptr(), value_accuracy.data_ptr(), chosen.data_ptr(), rejected.data_ptr(),
            slopes.data_ptr())
    except (IndexError, ValueError):
        _explain(
            Inputs(step_logps, ref_step_logps, values, value_targets, pairs, sft_steps, counts=counts),
            Options(beta, preference, preference_weight, label_smoothing, margin, value_weight, rank, rank_margin,
                    rank_scale, rank_weight, sft_weight, pair_count, value_count, sft_count))
    return *scalars, chosen, rejected, slopes


def svpo_loss_bwd(
    slopes: Tensor, grad_loss: Tensor | None, grad_preference: Tensor | None, grad_value: Tensor | None,
    grad_rank: Tensor | None, grad_sft: Tensor | None, preference_weight: float, value_weight: float,
    rank_weight: float, sft_weight: float, need_logps: bool, need_ref: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    S = slopes.shape[1]
    logps, ref, values = (
        slopes.new_empty(S if need_logps else 0), slopes.new_empty(S if need_ref else 0),
        slopes.new_empty(S if need_values else 0))
    _native.cpu().svpo_loss_bwd(
        slopes.data_ptr(), _at(grad_loss), _at(grad_preference), _at(grad_value), _at(grad_rank), _at(grad_sft),
        preference_weight, value_weight, rank_weight, sft_weight, S, logps.data_ptr() if need_logps else 0,
        ref.data_ptr() if need_ref else 0, values.data_ptr() if need_values else 0)
    return logps, ref, values


def _explain(inputs: Inputs, options: Options) -> NoReturn:
    """The kernel says that a value is wrong; the reference's check says which."""
    check_values(inputs, options)
    raise RuntimeError("svpo_loss: the CPU kernel refused values that the reference accepts; please report this")


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _fp32(x: Tensor | None) -> Tensor | None:
    return x if x is None or (x.dtype is torch.float32 and x.is_contiguous()) else x.float().contiguous()


def _index(x: Tensor | None) -> Tensor | None:
    if x is None or (x.dtype in (torch.int64, torch.int32) and x.is_contiguous()):
        return x
    return (x if x.dtype == torch.int32 else x.long()).contiguous()


_at = _native.pointer


def _code(x: Tensor | None) -> int:
    return 0 if x is None else _native.DTYPES[x.dtype]
