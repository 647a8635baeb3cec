"""The spec of `svpo_loss`, in plain PyTorch.

    D = (lp - ref)[w] - (lp - ref)[l],  x = beta D - margin                               for every pair (w, l)
    preference  sum weight * pair_loss(x or D) / pairs
    value       sum (v - t)^2 over the labelled steps / labelled steps
    rank        sum weight * rank_loss(v[w] - v[l]) / pairs
    sft         sum -lp[sft_steps] / SFT steps
    loss        preference_weight * preference + value_weight * value + rank_weight * rank + sft_weight * sft

fp32 compute for fp32, bf16 and fp16; fp64 as soon as one of lp, ref and v is fp64. Every term is twice differentiable
in lp, ref and v; hinges pass the gradient at their kink, so that a value head that starts at zero can learn to rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import can_look, fail


class Inputs(NamedTuple):
    """The tensors of a call, as the op takes them. lp, ref, v, t (S,); pairs (P, 2); sft_steps (K,); counts (3,)."""

    step_logps: Tensor | None
    ref_step_logps: Tensor | None
    values: Tensor | None
    value_targets: Tensor | None
    pairs: Tensor
    sft_steps: Tensor | None = None
    pair_weights: Tensor | None = None
    label_smoothings: Tensor | None = None
    margins: Tensor | None = None
    rank_margins: Tensor | None = None
    counts: Tensor | None = None


class Options(NamedTuple):
    """The numbers of a call. A (P,) tensor of `Inputs` goes before the float of its name; count < 0: own count."""

    beta: float
    preference: str
    preference_weight: float
    label_smoothing: float
    margin: float
    value_weight: float
    rank: str
    rank_margin: float
    rank_scale: float
    rank_weight: float
    sft_weight: float
    pair_count: float = -1.0
    value_count: float = -1.0
    sft_count: float = -1.0


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def svpo_loss_fwd(*args: object) -> tuple[Tensor, ...]:
    """loss, preference, value, rank, sft, accuracy, value_accuracy (), chosen and rejected rewards (P,), and the slopes
    (4, S) of the unweighted terms: d preference / d lp, d sft / d lp, d value / d v, d rank / d v."""
    tensors, options = args[: len(Inputs._fields)], Options(*args[len(Inputs._fields) :])
    inputs = Inputs(*(None if x is None else x.detach() for x in tensors))
    check_values(inputs, options)
    terms = svpo_loss_terms(inputs, options)
    return (weighted_sum(terms, options), *terms, *_metrics(inputs, options.beta), _slopes(inputs, options))


def svpo_loss_bwd(
    slopes: Tensor, grad_loss: Tensor | None, grad_preference: Tensor | None, grad_value: Tensor | None,
    grad_rank: Tensor | None, grad_sft: Tensor | None, preference_weight: float, value_weight: float,
    rank_weight: float, sft_weight: float, need_logps: bool, need_ref: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lp, ref and v, (S,) or (0,) where not needed, from the upstream of the loss and of each term."""

    def scaled(slope: Tensor, grad: Tensor | None, weight: float) -> Tensor:
        # A term of weight 0 is left out, so that a NaN in it does not spread.
        parts = [g for g in (None if grad_loss is None or not weight else grad_loss * weight, grad) if g is not None]
        return sum(parts[1:], parts[0]) * slope if parts else torch.zeros_like(slope)

    preference = scaled(slopes[0], grad_preference, preference_weight)
    return (
        preference + scaled(slopes[1], grad_sft, sft_weight) if need_logps else slopes.new_empty(0),
        -preference if need_ref else slopes.new_empty(0),
        scaled(slopes[2], grad_value, value_weight) + scaled(slopes[3], grad_rank, rank_weight)
        if need_values else slopes.new_empty(0),
    )


def svpo_loss_terms(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """preference, value, rank and sft, each over its count and before its weight; differentiable in lp, ref and v."""
    x = _prepare(inputs, options)
    pairs, sft_steps = inputs.pairs, inputs.sft_steps
    preference, value, rank, sft = (x.zero.clone() for _ in range(4))
    if x.D is not None:
        losses = _preference_losses(x.D, options.preference, options.beta, x.margin, x.e) * x.weights
        preference = _over_count(losses.sum(), pairs.shape[0], x.counts[0])
        if sft_steps is not None:
            sft = _over_count(-_gather(x.lp, sft_steps).sum(), sft_steps.shape[0], x.counts[2])
    if x.gap is not None:
        losses = _rank_losses(x.gap, options.rank, x.rank_margin, x.implicit) * x.weights
        rank = _over_count(losses.sum(), pairs.shape[0], x.counts[0])
        if x.error is not None:
            value = _over_count(x.error.square().sum(), x.labelled.sum(), x.counts[1])
    return preference, value, rank, sft


def _slopes(inputs: Inputs, options: Options) -> Tensor:
    """(4, S): the derivatives of `svpo_loss_terms` once more, written out."""
    x = _prepare(inputs, options)
    pairs, sft_steps = inputs.pairs, inputs.sft_steps
    S = (inputs.step_logps if inputs.step_logps is not None else inputs.values).shape[0]
    slopes = x.zero.new_zeros((4, S))
    if x.D is not None:
        slope = _preference_slopes(x.D, options.preference, options.beta, x.margin, x.e) * x.weights
        slopes[0] = _scatter_pairs(_over_count(slope, pairs.shape[0], x.counts[0]), pairs, S)
        if sft_steps is not None:
            ones = x.lp.new_full(sft_steps.shape, -1.0)
            slopes[1] = _scatter(_over_count(ones, sft_steps.shape[0], x.counts[2]), sft_steps, S)
    if x.gap is not None:
        slope = _rank_slopes(x.gap, options.rank, x.rank_margin, x.implicit) * x.weights
        slopes[3] = _scatter_pairs(_over_count(slope, pairs.shape[0], x.counts[0]), pairs, S)
        if x.error is not None:
            slopes[2] = _over_count(2.0 * x.error, x.labelled.sum(), x.counts[1])
    return slopes


class _Prepared(NamedTuple):
    zero: Tensor
    lp: Tensor | None
    D: Tensor | None  # (P,) without step_logps None
    gap: Tensor | None  # v_w - v_l (P,), without values None
    implicit: Tensor | None  # rank_scale * beta D, detached (P,)
    error: Tensor | None  # v - t (S,), 0 where unlabelled
    labelled: Tensor | None
    weights: Tensor | float
    e: Tensor | float
    margin: Tensor | float
    rank_margin: Tensor | float
    counts: Tensor | tuple[float, ...]


def _prepare(inputs: Inputs, options: Options) -> _Prepared:
    """Everything in the compute dtype, and what terms and slopes start from."""
    dtype, pairs = compute_dtype(inputs), inputs.pairs
    lp, ref, v, t, weights, e, margin, rank_margin, counts = (
        x if x is None else x.to(dtype)
        for x in (inputs.step_logps, inputs.ref_step_logps, inputs.values, inputs.value_targets, inputs.pair_weights,
                  inputs.label_smoothings, inputs.margins, inputs.rank_margins, inputs.counts)
    )
    D = gap = implicit = error = labelled = None
    if lp is not None:
        ratio = lp if ref is None else lp - ref
        D = _gather(ratio, pairs[:, 0]) - _gather(ratio, pairs[:, 1])
        implicit = options.rank_scale * (options.beta * D.detach())
    if v is not None:
        gap = _gather(v, pairs[:, 0]) - _gather(v, pairs[:, 1])
    if v is not None and t is not None:
        labelled = ~torch.isnan(t)
        error = torch.where(labelled, v, 0.0) - torch.where(labelled, t, 0.0)
    return _Prepared(
        (lp if lp is not None else v).new_zeros(()), lp, D, gap, implicit, error, labelled,
        1.0 if weights is None else weights,
        options.label_smoothing if e is None else e,
        options.margin if margin is None else margin,
        options.rank_margin if rank_margin is None else rank_margin,
        (options.pair_count, options.value_count, options.sft_count) if counts is None else counts)


def weighted_sum(terms: tuple[Tensor, ...], options: Options) -> Tensor:
    """The loss from preference, value, rank and sft. A weight of 0 leaves its term out, NaN or infinity included."""
    weights = (options.preference_weight, options.value_weight, options.rank_weight, options.sft_weight)
    parts = [weight * term for weight, term in zip(weights, terms, strict=True) if weight]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(terms[0])


def compute_dtype(inputs: Inputs) -> torch.dtype:
    tensors = (inputs.step_logps, inputs.ref_step_logps, inputs.values)
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _preference_losses(D: Tensor, kind: str, beta: float, margin: Tensor | float, e: Tensor | float) -> Tensor:
    if kind == "ipo":
        return (D - 1.0 / (2.0 * beta)).square()
    x = beta * D - margin
    if kind == "hinge":
        return (1.0 - x).clamp_min(0.0)
    if isinstance(e, float) and e == 0.0:
        return -F.logsigmoid(x)
    return -(1.0 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


def _preference_slopes(D: Tensor, kind: str, beta: float, margin: Tensor | float, e: Tensor | float) -> Tensor:
    if kind == "ipo":
        return 2.0 * (D - 1.0 / (2.0 * beta))
    x = beta * D - margin
    if kind == "hinge":
        return -beta * (1.0 - x >= 0)
    return beta * (e * torch.sigmoid(x) - (1.0 - e) * torch.sigmoid(-x))


def _rank_losses(gap: Tensor, kind: str, margin: Tensor | float, implicit: Tensor | None) -> Tensor:
    if kind == "hinge":
        return (margin - gap).clamp_min(0.0)
    if kind == "logistic":
        return -F.logsigmoid(gap)
    # Without step log-probs there is no implicit reward; the public function refuses that unless rank_weight is 0.
    return torch.zeros_like(gap) if implicit is None else (gap - implicit).square()


def _rank_slopes(gap: Tensor, kind: str, margin: Tensor | float, implicit: Tensor | None) -> Tensor:
    if kind == "hinge":
        return -(margin - gap >= 0).to(gap.dtype)
    if kind == "logistic":
        return -torch.sigmoid(-gap)
    return torch.zeros_like(gap) if implicit is None else 2.0 * (gap - implicit)


def _over_count(total: Tensor, members: Tensor | int, count: Tensor | float) -> Tensor:
    """total / count (own count when below 0), and 0 rather than 0 / 0 when there are no members."""
    if isinstance(count, float):
        count = members if count < 0 else count
    if isinstance(members, Tensor) or isinstance(count, Tensor):
        members, count = (torch.as_tensor(x, dtype=total.dtype, device=total.device) for x in (members, count))
        return total / torch.where(members > 0, count, 1.0)
    return total / (count if members else 1.0)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index], whose backward adds in a fixed order on every device; NaN for a step that does not exist."""
    if x.is_cpu:
        return x.index_select(0, index)
    inside = (index >= 0) & (index < x.shape[0])
    return torch.where(inside, x[torch.where(inside, index, 0).long()], torch.nan)


def _scatter(x: Tensor, index: Tensor, S: int) -> Tensor:
    """(S,) sums of x by step, in a fixed order on every device; a step that does not exist is left out."""
    out = x.new_zeros(S)
    if x.is_cpu:
        return out.index_add_(0, index, x)
    inside = (index >= 0) & (index < S)
    return out.index_put_((torch.where(inside, index, 0).long(),), torch.where(inside, x, 0.0), accumulate=True)


def _scatter_pairs(x: Tensor, pairs: Tensor, S: int) -> Tensor:
    return _scatter(torch.stack([x, -x], 1).flatten(), pairs.flatten(), S)


def _metrics(inputs: Inputs, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """accuracy, value_accuracy, chosen and rejected rewards. Ties are wrong; NaN where there is nothing to say."""
    dtype, pairs = compute_dtype(inputs), inputs.pairs
    accuracy, value_accuracy, chosen, rejected = (
        pairs.new_full(size, torch.nan, dtype=dtype) for size in ((), (), pairs.shape[:1], pairs.shape[:1]))
    if inputs.step_logps is not None:
        ratio = inputs.step_logps.detach().to(dtype)
        ratio = ratio if inputs.ref_step_logps is None else ratio - inputs.ref_step_logps.detach().to(dtype)
        chosen, rejected = (beta * _gather(ratio, pairs[:, side]) for side in (0, 1))
        accuracy = (chosen > rejected).to(dtype).mean()
    if inputs.values is not None:
        v = inputs.values.detach().to(dtype)
        value_accuracy = (_gather(v, pairs[:, 0]) > _gather(v, pairs[:, 1])).to(dtype).mean()
    return accuracy, value_accuracy, chosen, rejected


def check_values(inputs: Inputs, options: Options) -> None:
    """Steps that exist, and a count where a term has members, where the values may be read."""
    like = inputs.step_logps if inputs.step_logps is not None else inputs.values
    if not can_look(inputs.pairs):
        return
    S = like.shape[0]
    for name, index in (("pairs", inputs.pairs), ("sft_steps", inputs.sft_steps)):
        if index is not None and index.numel():
            low, high = (int(x) for x in torch.aminmax(index))
            if low < 0 or high >= S:
                fail_step(name, S, low if low < 0 else high)
    smoothings = inputs.label_smoothings
    if smoothings is not None and (outside := ~((smoothings >= 0) & (smoothings <= 1))).any():
        fail("svpo_loss", "label_smoothing", "in [0, 1]", f"{smoothings[outside][0].item():g}")
    counts = inputs.counts.tolist() if inputs.counts is not None else options[-3:]
    labelled = 0 if inputs.values is None or inputs.value_targets is None else int(
        (~torch.isnan(inputs.value_targets)).sum())
    members = (inputs.pairs.shape[0], labelled, 0 if inputs.sft_steps is None else inputs.sft_steps.shape[0])
    for index, (count, here) in enumerate(zip(counts, members, strict=True)):
        if here and (count == 0 or count != count or (count < 0 and inputs.counts is not None)):
            fail_count(index, here, count)


def fail_step(argument: str, S: int, step: int) -> None:
    fail("svpo_loss", argument, f"steps in [0, S) with S = {S}", f"step {step}", IndexError)


def fail_count(index: int, members: int, count: float) -> None:
    what = ("pairs", "labelled steps", "SFT steps")[index]
    fail("svpo_loss", f"counts[{index}]", f"> 0 (there are {members} {what} in this call)", f"{count:g}")
