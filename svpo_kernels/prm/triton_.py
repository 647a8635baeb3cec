"""Process reward ops in Triton: launches of triton_kernels.py.

    forward    one launch for scores; two for `prm_loss`, which goes on from the same decisions in fp64
    backward   coefficients dz (S, 2) of the head's logits, then the gradients of hidden and of the head that are needed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton import HEAD, ROW_WARPS, ROWS, SEQUENCE, SEQUENCE_WARPS, SWEEP, cdiv, launch
from .reference import check_labels, check_offsets, check_positions
from .triton_kernels import (
    aggregate_scores_bwd_kernel,
    aggregate_scores_fwd_kernel,
    head_hidden_kernel,
    head_weight_kernel,
    head_weight_sum_kernel,
    prm_loss_bwd_kernel,
    prm_loss_fwd_kernel,
    prm_scores_bwd_kernel,
    prm_scores_fwd_kernel,
)

supports = _triton.supports

ACTIVATIONS = {"none": 0, "sigmoid": 1, "tanh": 2}
AGGREGATES = {"min": 0, "prod": 1, "geomean": 2, "mean": 3, "last": 4, "max": 5}


# -- prm_scores and prm_loss --------------------------------------------------------------------------------------


def prm_scores_fwd(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, good: int, bad: int,
                   activation: str, softcap: float) -> tuple[Tensor, Tensor]:
    """As the reference. Only the rows of hidden at positions and two rows of weight are read."""
    check_positions("prm_scores", hidden, positions)
    scores = hidden.new_empty(positions.shape, dtype=torch.float32)
    activation = _activation(bad, activation)
    return scores, _head_logits(hidden, positions, weight, bias, good, bad, activation, softcap, scores)


def prm_scores_bwd(grad: Tensor, hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None,
                   logits: Tensor, good: int, bad: int, activation: str, softcap: float, need_hidden: bool,
                   need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    S = positions.shape[0]
    dz = logits.new_empty((S, 2), dtype=torch.float64)
    launch(
        prm_scores_bwd_kernel, (cdiv(S, ROWS),), logits, grad, grad.stride(0), logits, dz, S, softcap, TWO=bad >= 0,
        ACTIVATION=_activation(bad, activation), CAPPED=softcap > 0.0, ROWS=ROWS, warps=ROW_WARPS,
    )
    return _gradients(dz, hidden, positions, weight, bias, good, bad, need_hidden, need_weight, need_bias)


def prm_loss_fwd(hidden: Tensor, positions: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, good: int,
                 bad: int, reduction: str) -> tuple[Tensor, Tensor]:
    """As the reference."""
    check_positions("prm_loss", hidden, positions)
    check_labels(labels)
    S, each = positions.shape[0], reduction == "none"
    decisions = hidden.new_empty(S, dtype=torch.float64)
    logits = _head_logits(hidden, positions, weight, bias, good, bad, ACTIVATIONS["none"], 0.0, decisions)
    loss = hidden.new_empty(S if each else (), dtype=torch.float32)
    launch(
        prm_loss_fwd_kernel, (cdiv(S, SWEEP) if each else 1,), hidden, decisions, labels.contiguous(), loss, S,
        EACH=each, MEAN=reduction == "mean", LANES=SWEEP, warps=HEAD.warps,
    )
    return loss, logits


def prm_loss_bwd(grad: Tensor, hidden: Tensor, positions: Tensor, labels: Tensor, weight: Tensor,
                 bias: Tensor | None, logits: Tensor, good: int, bad: int, reduction: str, need_hidden: bool,
                 need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    S = positions.shape[0]
    dz = logits.new_empty((S, 2), dtype=torch.float64)
    launch(
        prm_loss_bwd_kernel, (cdiv(S, ROWS),), logits, grad, grad.stride(0) if reduction == "none" else 0,
        labels.contiguous(), logits, dz, S, TWO=bad >= 0, MEAN=reduction == "mean", LANES=SWEEP, ROWS=ROWS,
        warps=ROW_WARPS,
    )
    return _gradients(dz, hidden, positions, weight, bias, good, bad, need_hidden, need_weight, need_bias)


def _activation(bad: int, activation: str) -> int:
    """Two classes have a probability, whatever the activation is called."""
    return ACTIVATIONS["sigmoid" if bad >= 0 else activation]


def _head_logits(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, good: int, bad: int,
                 activation: int, softcap: float, scores: Tensor) -> Tensor:
    """logits (S, 2); fills scores (S,)."""
    logits = hidden.new_empty((positions.shape[0], 2), dtype=torch.float32)
    launch(
        prm_scores_fwd_kernel, (positions.shape[0],), hidden, *_rows(hidden), weight, weight.stride(0), bias,
        _index(positions), good, bad, softcap, scores, logits, TWO=bad >= 0, ACTIVATION=activation,
        CAPPED=softcap > 0.0, BLOCK=HEAD.columns, ALIGN=_align(hidden, weight), warps=HEAD.warps,
    )
    return logits


def _gradients(dz: Tensor, hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, good: int,
               bad: int, need_hidden: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """From dz (S, 2) to hidden (B, L, D), weight and bias; zeros first where a few rows only are written."""
    index, (S, _), two = _index(positions), dz.shape, bad >= 0
    none = hidden.new_empty(0)
    grads = [none, none, none]
    if need_hidden:
        grads[0] = hidden.new_zeros(hidden.shape)
        rows, D = grads[0].shape[:2].numel(), hidden.shape[2]
        launch(
            head_hidden_kernel, (S,), hidden, index, dz, weight, weight.stride(0), grads[0], rows, S, D, good, bad,
            TWO=two, BLOCK=HEAD.columns, ALIGN=_align(grads[0], weight), LANES=SWEEP, warps=HEAD.warps,
        )
    if need_weight:
        grads[1] = (weight.new_empty if weight.shape[0] == 1 + two else weight.new_zeros)(weight.shape)
    if need_bias:
        grads[2] = bias.new_empty(bias.shape)
    if need_weight or need_bias:
        _head_gradient(dz, hidden, index, grads[1] if need_weight else None, grads[2] if need_bias else None, good, bad)
    return tuple(grads)


def _head_gradient(dz: Tensor, hidden: Tensor, index: Tensor, dweight: Tensor | None, dbias: Tensor | None, good: int,
                   bad: int) -> None:
    """Rows good and bad of dweight, in one launch for the steps of one part, else by way of partial sums."""
    S, D, two = index.shape[0], hidden.shape[2], bad >= 0
    parts = max(1, cdiv(S, _triton.HEAD_PART)) if dweight is not None else 1
    at = good * D, max(bad, 0) * D
    split = parts > 1
    target = dz.new_empty((parts, 2, D)) if split else dweight
    launch(
        head_weight_kernel, (1 if dweight is None else max(1, cdiv(D, _triton.HEAD_COLUMNS)), parts), hidden,
        *_rows(hidden), index, dz, target, dbias, S, good, bad, *((0, D) if split else at), _triton.HEAD_PART,
        2 * D, TWO=two, STEPS=_triton.HEAD_STEPS, COLUMNS=_triton.HEAD_COLUMNS, ALIGN=_align(hidden),
        warps=_triton.HEAD_WARPS,
    )
    if split:
        launch(
            head_weight_sum_kernel, (cdiv(D, _triton.SLOPES.columns), 1 + two), hidden, target, dweight, parts, D, *at,
            BLOCK=_triton.SLOPES.columns, warps=_triton.SLOPES.warps,
        )


def _rows(hidden: Tensor) -> tuple[Any, ...]:
    """hidden (B, L, D) as the kernels take it."""
    B, L, D = hidden.shape
    return hidden, max(L, 1), *hidden.stride()[:2], B * L, D


def _align(*tensors: Tensor) -> int:
    """8 when the rows of all tensors start on 16 bytes and end on 8 columns: 16-byte loads for 16-bit rows, two for
    fp32; else 1."""
    strides = [stride for x in tensors for stride in (*x.stride()[:-1], x.shape[-1])]
    return 8 if all(stride % 8 == 0 for stride in strides) and all(_triton.aligned(x) for x in tensors) else 1


def _index(positions: Tensor) -> Tensor:
    return (positions if positions.dtype in (torch.int64, torch.int32) else positions.long()).contiguous()


# -- aggregate_scores ---------------------------------------------------------------------------------------------


def aggregate_scores_fwd(scores: Tensor, offsets: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """As the reference."""
    check_offsets(scores, offsets)
    x, start = scores.contiguous(), offsets.contiguous()
    B = start.shape[0] - 1
    out, chosen = (scores.new_empty(B, dtype=dtype) for dtype in (torch.float32, torch.int64))
    launch(aggregate_scores_fwd_kernel, (B,), x, x, start, out, chosen, x.shape[0], B, HOW=AGGREGATES[how],
           BLOCK=SEQUENCE, warps=SEQUENCE_WARPS)
    return out, chosen


def aggregate_scores_bwd(grad: Tensor, scores: Tensor, offsets: Tensor, out: Tensor, chosen: Tensor,
                         how: str) -> Tensor:
    """As the reference."""
    x, start = scores.contiguous(), offsets.contiguous()
    S, B = x.shape[0], out.shape[0]
    # No sequence, no program: all scores go without a gradient.
    found = scores.new_empty(scores.shape) if B else scores.new_zeros(scores.shape)
    behind = scores.new_empty(S if how == "prod" else 0, dtype=torch.float64)
    launch(aggregate_scores_bwd_kernel, (B,), x, grad, grad.stride(0), x, start, out, chosen, behind, found, S, B,
           HOW=AGGREGATES[how], BLOCK=SEQUENCE, warps=SEQUENCE_WARPS)
    return found
