"""Process reward heads at the step ends, aggregates of step scores: reference -> cpu -> triton_ -> cuda -> this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._autograd import once_differentiable
from .._checks import (
    FLOATS,
    can_look,
    describe,
    fail,
    require_choice,
    require_float,
    require_integer,
    require_no_grad,
    require_positive,
    require_same_device,
)

__all__ = ["aggregate_scores", "prm_loss", "prm_scores", "prm_scores_from_lm_head"]

ACTIVATIONS = (None, "sigmoid", "tanh")
REDUCTIONS = ("mean", "sum", "none")
AGGREGATES = ("min", "prod", "geomean", "mean", "last", "max")


# -- raw ops ----------------------------------------------------------------------------------------------------------


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_bwd(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    none = hidden.new_empty(0)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else none
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


dispatch.define(
    __name__,
    "prm_scores_fwd(Tensor hidden, Tensor positions, Tensor weight, Tensor? bias, SymInt good, SymInt bad, "
    "str activation, float softcap, str backend) -> (Tensor, Tensor)",
    lambda hidden, positions, *_: tuple(
        hidden.new_empty((positions.shape[0], *tail), dtype=_accumulator(hidden)) for tail in ((), (2,))),
)
dispatch.define(
    __name__,
    "prm_scores_bwd(Tensor grad, Tensor hidden, Tensor positions, Tensor weight, Tensor? bias, Tensor logits, "
    "SymInt good, SymInt bad, str activation, float softcap, bool need_hidden, bool need_weight, bool need_bias, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    lambda grad, hidden, positions, weight, bias, *rest: _fake_bwd(hidden, weight, bias, rest[-3:]),
)
dispatch.define(
    __name__,
    "prm_loss_fwd(Tensor hidden, Tensor positions, Tensor labels, Tensor weight, Tensor? bias, SymInt good, "
    "SymInt bad, str reduction, str backend) -> (Tensor, Tensor)",
    lambda hidden, positions, labels, weight, bias, good, bad, reduction: tuple(
        hidden.new_empty(size, dtype=_accumulator(hidden))
        for size in (positions.shape if reduction == "none" else (), (positions.shape[0], 2))),
)
dispatch.define(
    __name__,
    "prm_loss_bwd(Tensor grad, Tensor hidden, Tensor positions, Tensor labels, Tensor weight, Tensor? bias, "
    "Tensor logits, SymInt good, SymInt bad, str reduction, bool need_hidden, bool need_weight, bool need_bias, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    lambda grad, hidden, positions, labels, weight, bias, *rest: _fake_bwd(hidden, weight, bias, rest[-3:]),
)


dispatch.define(
    __name__,
    "aggregate_scores_fwd(Tensor scores, Tensor offsets, str how, str backend) -> (Tensor, Tensor)",
    lambda scores, offsets, how: (
        scores.new_empty(offsets.shape[0] - 1, dtype=_accumulator(scores)),
        offsets.new_empty(offsets.shape[0] - 1, dtype=torch.int64)),
)
dispatch.define(
    __name__,
    "aggregate_scores_bwd(Tensor grad, Tensor scores, Tensor offsets, Tensor out, Tensor chosen, str how, str backend) "
    "-> Tensor",
    lambda grad, scores, *_: torch.empty_like(scores, memory_format=torch.contiguous_format),
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class _PrmScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, good: int, bad: int,
                activation: str, softcap: float, backend: str) -> Tensor:
        options = (good, bad, activation, softcap)
        scores, logits = dispatch.call("prm_scores_fwd", backend, hidden, (hidden, positions, weight, bias, *options))
        ctx.save_for_backward(hidden, positions, weight, bias, logits)
        ctx.options, ctx.backend = options, backend
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        args = (grad, *ctx.saved_tensors, *ctx.options, *needs)
        found = dispatch.call("prm_scores_bwd", ctx.backend, grad, args)
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 6


class _PrmLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, labels: Tensor,
                good: int, bad: int, reduction: str, backend: str) -> Tensor:
        options = (good, bad, reduction)
        args = (hidden, positions, labels, weight, bias, *options)
        loss, logits = dispatch.call("prm_loss_fwd", backend, hidden, args)
        ctx.save_for_backward(hidden, positions, labels, weight, bias, logits)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        args = (grad, *ctx.saved_tensors, *ctx.options, *needs)
        found = dispatch.call("prm_loss_bwd", ctx.backend, grad, args)
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 6


class _AggregateScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, offsets: Tensor, how: str, backend: str) -> Tensor:
        out, chosen = dispatch.call("aggregate_scores_fwd", backend, scores, (scores, offsets, how))
        ctx.save_for_backward(scores, offsets, out, chosen)
        ctx.how, ctx.backend = how, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = (grad, *ctx.saved_tensors, ctx.how)
        return dispatch.call("aggregate_scores_bwd", ctx.backend, grad, args), None, None, None


# -- public functions -------------------------------------------------------------------------------------------------


def prm_scores(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None = None, *,
               activation: str | None = None, good: int = 1, backend: str = "auto") -> Tensor:
    """Score of each step from a reward or value head, read at the step's last token only.

    Equivalent to:

    ```python
    z = hidden.flatten(0, -2)[positions].float() @ weight.float().T + bias
    scores = activation(z).squeeze(-1)           # C = 1
    scores = z.softmax(-1)[:, good]              # C = 2
    ```

    Args:
        hidden: (B, L, D) or (T, D), fp32, bf16, fp16 (fp64 on the reference), contiguous in its last dimension.
        positions: (S,) integers, rows of the flattened hidden, in any order, repeats allowed. Others are not read.
        weight: (C, D), C = 1 or 2, any of these dtypes (a bf16 model with an fp32 head is the usual case).
        bias: (C,) or None.
        activation: "sigmoid", "tanh" or None, for C = 1.
        good: the class whose probability is the score, for C = 2.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (S,) fp32 (fp64 for fp64), computed in fp32. Differentiable once in hidden, weight and bias, each gradient in
        its own dtype; that of hidden is zero outside the positions.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, device, layout or option that does not fit.
        IndexError: a position out of range (CPU positions; on a device the score is NaN).
    """
    op = "prm_scores"
    good, bad = _check_head(op, hidden, positions, weight, bias, good)
    require_choice(op, "activation", activation, ACTIVATIONS)
    if bad >= 0 and activation is not None:
        fail(op, "activation", "None with two classes (the score is the softmax probability of `good`)", activation)
    return _scores(hidden, positions, weight, bias, good, bad, activation or "none", 0.0, backend)


def prm_scores_from_lm_head(hidden: Tensor, positions: Tensor, lm_head_weight: Tensor, good_token: int, bad_token: int,
                            *, softcap: float | None = None, backend: str = "auto") -> Tensor:
    """Probability of the good token against the bad one at each step's end, from two rows of the language-model head.

    Equivalent to:

    ```python
    logits = hidden.flatten(0, -2)[positions].float() @ lm_head_weight[[good_token, bad_token]].float().T
    scores = (softcap * tanh(logits / softcap)).softmax(-1)[:, 0]
    ```

    but the other rows of lm_head_weight are never read and there is no (T, V).

    Args:
        hidden, positions: as in `prm_scores`.
        lm_head_weight: (V, D).
        good_token, bad_token: two different ids in [0, V), such as those of "+" and "-".
        softcap: final_logit_softcapping of the model, None = none.

    Returns:
        (S,) fp32 (fp64 for fp64). Differentiable once in hidden and, when it requires grad, in lm_head_weight, whose
        gradient is dense: zero but for two rows.

    Raises:
        As `prm_scores`; IndexError: a token outside the vocabulary.
    """
    op = "prm_scores_from_lm_head"
    _check_rows(op, hidden, positions, lm_head_weight, "lm_head_weight", "(V, D)")
    V = lm_head_weight.shape[0]
    for name, token in (("good_token", good_token), ("bad_token", bad_token)):
        if isinstance(token, bool) or not isinstance(token, int):
            fail(op, name, "an int", describe(token), TypeError)
        if not 0 <= token < V:
            fail(op, name, f"in [0, V) with V = {V}", token, IndexError)
    dispatch.check_backend(op, backend, hidden)
    if good_token == bad_token:
        fail(op, "bad_token", "another token than good_token", bad_token)
    if softcap is not None:
        require_positive(op, "softcap", softcap)
    return _scores(hidden, positions, lm_head_weight, None, good_token, bad_token, "none", float(softcap or 0.0),
                   backend)


def prm_loss(hidden: Tensor, positions: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, *,
             good: int = 1, reduction: str = "mean", trials: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Training loss of a process reward head at the step ends, for hard and soft labels.

    Equivalent to (C = 1, then C = 2):

        z = hidden.flatten(0, -2)[positions].float() @ weight.float().T + bias
        loss = binary_cross_entropy_with_logits(z.squeeze(-1), labels)
        loss = -(labels * z.log_softmax(-1)[:, good] + (1 - labels) * z.log_softmax(-1)[:, 1 - good]).mean()

    Args:
        hidden, positions, weight, bias, good: as in `prm_scores`.
        labels: (S,) bool, int or float: the probability, in [0, 1], that the step is good; NaN = unlabelled.
        reduction: "mean" over the labelled steps, "sum" or "none" (then 0 where unlabelled).
        trials: (S,) integers or floats >= 0: labels are k / n, the share of n = trials rollouts that came out right.
            Each step's loss is then the negative log-likelihood of its k of n, n times the above (without the binomial
            coefficient, which no parameter moves), and "mean" is over all trials of the labelled steps together.

    Returns:
        () or (S,) fp32 (fp64 for fp64); "mean" without a labelled step is 0 with zero gradient. Differentiable once in
        hidden, weight and bias.

    Raises:
        As `prm_scores`; ValueError: a label outside [0, 1], or trials below 0 or not finite (CPU tensors; on a device
        the loss is NaN).
    """
    op = "prm_loss"
    good, bad = _check_head(op, hidden, positions, weight, bias, good)
    require_choice(op, "reduction", reduction, REDUCTIONS)
    if not isinstance(labels, Tensor) or labels.dtype.is_complex:
        fail(op, "labels", "a bool, integer or float tensor", labels, TypeError)
    if labels.shape != positions.shape or labels.device != hidden.device:
        fail(op, "labels", f"(S,) = {tuple(positions.shape)} on {hidden.device}", labels)
    require_no_grad(op, labels=labels)
    labels = labels.to(_accumulator(hidden))
    if trials is not None:
        trials = _check_trials(op, trials, labels)
    each = _PrmLoss.apply(_batched(hidden), weight, bias, positions, labels, good, bad,
                          reduction if trials is None else "none", backend)
    if trials is None:
        return each
    each = each * trials
    if reduction == "none":
        return each
    total = trials.masked_fill(labels.isnan(), 0.0).sum()
    return each.sum() if reduction == "sum" else each.sum() / torch.where(total > 0, total, 1.0)


def aggregate_scores(scores: Tensor, offsets: Tensor, how: str = "min", *, backend: str = "auto") -> Tensor:
    """One score per sequence from the scores of its steps, differentiable.

    Equivalent to `torch.stack([reduce(part) for part in scores.tensor_split(offsets[1:-1])])`.

    Args:
        scores: (S,), fp32, bf16, fp16 (fp64 on the reference).
        offsets: (B + 1,) integers, non-decreasing from 0 to S: sequence b has the scores offsets[b] to offsets[b + 1].
        how: "min" | "prod" | "geomean" (prod without the bias against long sequences) | "mean" | "last" | "max".

    Returns:
        (B,) fp32 (fp64 for fp64). Ties of min and max: the first takes the gradient. The gradient of prod is exact with
        zeros. geomean at 0: value 0, gradient 0; with a negative score: NaN. An empty sequence gives NaN and takes no
        gradient.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape or device that does not fit, offsets that do not run from 0 to S (CPU offsets).
    """
    op = "aggregate_scores"
    if not isinstance(scores, Tensor) or scores.dtype not in FLOATS:
        fail(op, "scores", "a float32, bfloat16, float16 or float64 tensor", scores, TypeError)
    if scores.dim() != 1:
        fail(op, "scores", "(S,)", scores)
    require_integer(op, "offsets", offsets)
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        fail(op, "offsets", "(B + 1,), at least (1,)", offsets)
    require_same_device(op, "offsets", offsets, "scores", scores)
    require_choice(op, "how", how, AGGREGATES)
    offsets = offsets if offsets.dtype in (torch.int64, torch.int32) else offsets.long()
    return _AggregateScores.apply(scores, offsets, how, backend)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_trials(op: str, trials: object, labels: Tensor) -> Tensor:
    """trials in the dtype of labels, NaN where they are no count."""
    if not isinstance(trials, Tensor) or trials.dtype.is_complex or trials.dtype == torch.bool:
        fail(op, "trials", "an integer or float tensor", trials, TypeError)
    if trials.shape != labels.shape or trials.device != labels.device:
        fail(op, "trials", f"(S,) = {tuple(labels.shape)} on {labels.device}", trials)
    require_no_grad(op, trials=trials)
    trials = trials.to(labels.dtype)
    valid = (trials >= 0) & (trials < torch.inf)
    if can_look(trials) and not torch.compiler.is_compiling() and not bool(valid.all()):
        fail(op, "trials", ">= 0 and finite", f"{trials[~valid][0].item():g}")
    return trials.masked_fill(~valid, torch.nan)


def _check_rows(op: str, hidden: Tensor, positions: Tensor, weight: Tensor, name: str, letters: str) -> None:
    require_float(op, "hidden", hidden)
    require_float(op, name, weight)
    require_integer(op, "positions", positions)
    if hidden.dim() not in (2, 3):
        fail(op, "hidden", "(B, L, D) or (T, D)", hidden)
    if positions.dim() != 1:
        fail(op, "positions", "(S,)", positions)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        fail(op, name, f"{letters} with D = {hidden.shape[-1]}", weight)
    require_same_device(op, "positions", positions, "hidden", hidden)
    require_same_device(op, name, weight, "hidden", hidden)
    _require_same_width(op, name, weight, hidden)


def _require_same_width(op: str, name: str, x: Tensor, hidden: Tensor) -> None:
    if (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
        fail(op, name, f"{hidden.dtype} like hidden, as float64 goes with float64 only", x, TypeError)


def _check_head(op: str, hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None,
                good: int) -> tuple[int, int]:
    """The rows of the head that count for and against a step; -1: none."""
    _check_rows(op, hidden, positions, weight, "weight", "(C, D)")
    C = weight.shape[0]
    if C not in (1, 2):
        fail(op, "weight", "(C, D) with C = 1 or 2", weight)
    if bias is not None:
        require_float(op, "bias", bias)
        if bias.shape != (C,) or bias.device != hidden.device:
            fail(op, "bias", f"(C,) = ({C},) on {hidden.device}", bias)
        _require_same_width(op, "bias", bias, hidden)
    require_choice(op, "good", good, (0, 1))
    return (good, 1 - good) if C == 2 else (0, -1)


def _scores(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    hidden = _batched(hidden)
    needed = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needed and torch.is_grad_enabled():
        return _PrmScores.apply(hidden, weight, bias, positions, *rest)
    *options, backend = rest  # Scoring alone: an autograd function costs as much as the op.
    return dispatch.call("prm_scores_fwd", backend, hidden, (hidden, positions, weight, bias, *options))[0]


def _batched(hidden: Tensor) -> Tensor:
    return hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
