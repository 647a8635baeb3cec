"""`svpo_loss` in Triton: one launch forward, one backward, whatever the number of pairs and steps.

Forward, grid (1 + tiles of steps,): the first program sums the terms and the metrics over the pairs; every other one
owns 32 steps and adds up, in the order of the pairs, the slopes of those pairs that name one of them. So a step shared
by many pairs needs neither atomics nor a sort, at the price of every program reading the index of every pair (P = 4096,
S = 8192: 257 programs, 16.8 MB of int64 from the L2 cache). A tile of 128 pairs that names none of a program's steps is
left at that: no log-prob is read and nothing compared. Pairs come packed, siblings together, so nearly all tiles are.

All in fp64 but the rewards, which are what a comparison in fp32 sees. A step that does not exist gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from .._triton import cdiv, count_known, helper, kernel, launch, logistic_loss, tl
from .reference import Inputs, Options, check_values

supports = _triton.supports

PREFERENCES = {"sigmoid": 0, "ipo": 1, "hinge": 2}
RANKS = {"hinge": 0, "logistic": 1, "implicit": 2}


# -- what a pair costs --------------------------------------------------------------------------------------------


@helper
def pair_steps(pairs, p, P):
    """The chosen and the rejected step of pairs p; -1 behind the last pair."""
    w = tl.load(pairs + 2 * p, mask=p < P, other=-1).to(tl.int64)
    return w, tl.load(pairs + 2 * p + 1, mask=p < P, other=-1).to(tl.int64)


@helper
def at_step(x, step, S):
    """x[step], NaN for a step that does not exist."""
    inside = (step >= 0) & (step < S)
    return tl.where(inside, tl.load(x + step, mask=inside, other=0.0).to(tl.float64), float("nan"))


@helper
def log_ratio(step_logps, ref_step_logps, step, S):
    ratio = at_step(step_logps, step, S)
    if ref_step_logps is not None:
        ratio = ratio - at_step(ref_step_logps, step, S)
    return ratio


@helper
def per_pair(x, number, p, P):
    """A number of each pair, or one for all."""
    if x is None:
        return number
    else:
        return tl.load(x + p, mask=p < P, other=0.0).to(tl.float64)


@helper
def hinge(y):
    """max(0, y) and its slope: 1 at the kink, so that a value head of zeros can learn; NaN stays NaN."""
    return tl.where(y < 0.0, 0.0, y), tl.where(y >= 0.0, 1.0, 0.0)


@helper
def preference_loss(D, beta, margin, e, KIND: tl.constexpr):
    """The loss of pairs and its slope in D."""
    if KIND == 1:
        error = D - 1.0 / (2.0 * beta)
        return error * error, 2.0 * error
    else:
        x = beta * D - margin
        if KIND == 2:
            value, slope = hinge(1.0 - x)
            slope = -slope
        else:
            value, slope = logistic_loss(x, e)
        return value, beta * slope


@helper
def rank_loss(gap, margin, implicit, KIND: tl.constexpr):
    """The loss of pairs and its slope in the gap v_w - v_l. Without an implicit reward there is no implicit term."""
    if KIND == 0:
        value, slope = hinge(margin - gap)
        return value, -slope
    else:
        if KIND == 1:
            return logistic_loss(gap, 0.0)
        else:
            error = gap - implicit
            return error * error, 2.0 * error


@helper
def share(counts, which: tl.constexpr, number, members):
    """1 / the count of a term: the given one, the members' own when it is below 0, 1 without members. Multiplied by
    later: an fp64 division is a call."""
    own = members.to(tl.float64)
    if counts is not None:
        given = tl.load(counts + which).to(tl.float64)
    else:
        given = tl.where(number < 0.0, own, number)
    return 1.0 / tl.where(members > 0, given, 1.0)


# -- forward ------------------------------------------------------------------------------------------------------


@helper
def pair_sums(
    step_logps, ref_step_logps, values, pairs, pair_weights, label_smoothings, margins, rank_margins, S, P, beta,
    label_smoothing, margin, rank_margin, rank_scale, chosen_rewards, rejected_rewards, PREFERENCE: tl.constexpr,
    RANK: tl.constexpr, LANES: tl.constexpr,
):
    """Sums of the preference and the rank losses, pairs whose reward and whose value is larger; writes the rewards."""
    preference_sum = tl.zeros([LANES], tl.float64)
    rank_sum = tl.zeros([LANES], tl.float64)
    right = tl.zeros([LANES], tl.int32)
    value_right = tl.zeros([LANES], tl.int32)
    for start in range(0, P, LANES):
        p = start + tl.arange(0, LANES)
        w, l = pair_steps(pairs, p, P)
        weight = per_pair(pair_weights, 1.0, p, P)
        D = tl.zeros([LANES], tl.float64)
        chosen = tl.full([LANES], float("nan"), tl.float32)
        rejected = chosen
        if step_logps is not None:
            ratio_w = log_ratio(step_logps, ref_step_logps, w, S)
            ratio_l = log_ratio(step_logps, ref_step_logps, l, S)
            D = ratio_w - ratio_l
            chosen = tl.cast(beta, tl.float32) * ratio_w.to(tl.float32)
            rejected = tl.cast(beta, tl.float32) * ratio_l.to(tl.float32)
            m, e = per_pair(margins, margin, p, P), per_pair(label_smoothings, label_smoothing, p, P)
            value, _slope = preference_loss(D, beta, m, e, PREFERENCE)
            preference_sum += tl.where(p < P, weight * value, 0.0)
            right += (chosen > rejected).to(tl.int32)
        tl.store(chosen_rewards + p, chosen, mask=p < P)
        tl.store(rejected_rewards + p, rejected, mask=p < P)
        if values is not None:
            v_w = at_step(values, w, S)
            v_l = at_step(values, l, S)
            value_right += (v_w > v_l).to(tl.int32)
            if RANK != 2 or step_logps is not None:
                m = per_pair(rank_margins, rank_margin, p, P)
                value, _slope = rank_loss(v_w - v_l, m, rank_scale * (beta * D), RANK)
                rank_sum += tl.where(p < P, weight * value, 0.0)
    return tl.sum(preference_sum, 0), tl.sum(rank_sum, 0), tl.sum(right, 0), tl.sum(value_right, 0)


@helper
def step_sums(step_logps, values, value_targets, sft_steps, S, K, LANES: tl.constexpr):
    """Sums of the squared value errors and of the SFT losses, and the number of labelled steps."""
    value_sum = tl.zeros([LANES], tl.float64)
    labelled = tl.zeros([LANES], tl.int32)
    sft_sum = tl.zeros([LANES], tl.float64)
    if value_targets is not None:
        for start in range(0, S, LANES):
            s = start + tl.arange(0, LANES)
            t = tl.load(value_targets + s, mask=s < S, other=float("nan")).to(tl.float64)
            error = tl.load(values + s, mask=s < S, other=0.0).to(tl.float64) - t
            value_sum += tl.where(t == t, error * error, 0.0)
            labelled += (t == t).to(tl.int32)
    if sft_steps is not None:
        for start in range(0, K, LANES):
            k = start + tl.arange(0, LANES)
            step = tl.load(sft_steps + k, mask=k < K, other=-1).to(tl.int64)
            sft_sum -= tl.where(k < K, at_step(step_logps, step, S), 0.0)
    return tl.sum(value_sum, 0), tl.sum(sft_sum, 0), tl.sum(labelled, 0)


@helper
def pair_slopes(
    step_logps, ref_step_logps, values, pairs, pair_weights, label_smoothings, margins, rank_margins, S, P, first, beta,
    label_smoothing, margin, rank_margin, rank_scale, PREFERENCE: tl.constexpr, RANK: tl.constexpr,
    PAIRS: tl.constexpr, STEPS: tl.constexpr,
):
    """Slopes of the preference sum in lp and of the rank sum in v, of steps first ... + STEPS."""
    in_preference = tl.zeros([STEPS], tl.float64)
    in_rank = tl.zeros([STEPS], tl.float64)
    own = tl.arange(0, STEPS)
    for start in range(0, P, PAIRS):
        p = start + tl.arange(0, PAIRS)
        w, l = pair_steps(pairs, p, P)
        chosen = tl.where((w >= first) & (w < first + STEPS), w - first, -1).to(tl.int32)
        rejected = tl.where((l >= first) & (l < first + STEPS), l - first, -1).to(tl.int32)
        if tl.max(tl.maximum(chosen, rejected), 0) >= 0:
            is_chosen = chosen[:, None] == own[None, :]
            is_rejected = rejected[:, None] == own[None, :]
            weight = per_pair(pair_weights, 1.0, p, P)
            D = tl.zeros([PAIRS], tl.float64)
            if step_logps is not None:
                D = log_ratio(step_logps, ref_step_logps, w, S) - log_ratio(step_logps, ref_step_logps, l, S)
                m, e = per_pair(margins, margin, p, P), per_pair(label_smoothings, label_smoothing, p, P)
                _value, slope = preference_loss(D, beta, m, e, PREFERENCE)
                slope = (weight * slope)[:, None]
                in_preference += tl.sum(tl.where(is_chosen, slope, 0.0) - tl.where(is_rejected, slope, 0.0), 0)
            if values is not None:
                if RANK != 2 or step_logps is not None:
                    gap = at_step(values, w, S) - at_step(values, l, S)
                    m = per_pair(rank_margins, rank_margin, p, P)
                    _value, slope = rank_loss(gap, m, rank_scale * (beta * D), RANK)
                    slope = (weight * slope)[:, None]
                    in_rank += tl.sum(tl.where(is_chosen, slope, 0.0) - tl.where(is_rejected, slope, 0.0), 0)
    return in_preference, in_rank


@helper
def times_named(steps, K, first, PAIRS: tl.constexpr, STEPS: tl.constexpr):
    """How often each of steps first ... + STEPS stands in `steps`."""
    found = tl.zeros([STEPS], tl.int32)
    for start in range(0, K, PAIRS):
        k = start + tl.arange(0, PAIRS)
        step = tl.load(steps + k, mask=k < K, other=-1).to(tl.int64)
        at = tl.where((step >= first) & (step < first + STEPS), step - first, -1).to(tl.int32)
        found += tl.sum((at[:, None] == tl.arange(0, STEPS)[None, :]).to(tl.int32), 0)
    return found


@kernel
def svpo_loss_fwd_kernel(
    step_logps, ref_step_logps, values, value_targets, pairs, sft_steps, pair_weights, label_smoothings, margins,
    rank_margins, counts, S: tl.int64, P: tl.int64, K: tl.int64, beta: tl.float64, preference_weight: tl.float64,
    label_smoothing: tl.float64, margin: tl.float64, value_weight: tl.float64, rank_margin: tl.float64,
    rank_scale: tl.float64, rank_weight: tl.float64, sft_weight: tl.float64, pair_count: tl.float64,
    value_count: tl.float64, sft_count: tl.float64, loss, preference_term, value_term, rank_term, sft_term, accuracy,
    value_accuracy, chosen_rewards, rejected_rewards, slopes,
    PREFERENCE: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):
    """Grid (1 + cdiv(S, STEPS),). Program 0: terms, metrics and rewards; the others: slopes (4, S) of their steps."""
    if tl.program_id(0) == 0:
        preference_sum, rank_sum, right, value_right = pair_sums(
            step_logps, ref_step_logps, values, pairs, pair_weights, label_smoothings, margins, rank_margins, S, P,
            beta, label_smoothing, margin, rank_margin, rank_scale, chosen_rewards, rejected_rewards, PREFERENCE, RANK,
            LANES)
        value_sum, sft_sum, labelled = step_sums(step_logps, values, value_targets, sft_steps, S, K, LANES)
        of_pairs = share(counts, 0, pair_count, P)
        of_values = share(counts, 1, value_count, labelled)
        of_sft = share(counts, 2, sft_count, K)
        preference = preference_sum * of_pairs
        value = value_sum * of_values
        rank = rank_sum * of_pairs
        sft = sft_sum * of_sft
        # A weight of 0 leaves its term out, NaN included.
        total = tl.where(preference_weight != 0.0, preference_weight * preference, 0.0)
        total += tl.where(value_weight != 0.0, value_weight * value, 0.0)
        total += tl.where(rank_weight != 0.0, rank_weight * rank, 0.0)
        total += tl.where(sft_weight != 0.0, sft_weight * sft, 0.0)
        tl.store(loss, total.to(tl.float32))
        tl.store(preference_term, preference.to(tl.float32))
        tl.store(value_term, value.to(tl.float32))
        tl.store(rank_term, rank.to(tl.float32))
        tl.store(sft_term, sft.to(tl.float32))
        of_all = 1.0 / tl.where(P > 0, P.to(tl.float64), float("nan"))
        tl.store(accuracy, (right.to(tl.float64) * of_all).to(tl.float32) if step_logps is not None else float("nan"))
        tl.store(value_accuracy, (value_right.to(tl.float64) * of_all).to(tl.float32) if values is not None else
                 float("nan"))
    else:
        first = (tl.program_id(0).to(tl.int64) - 1) * STEPS
        s = first + tl.arange(0, STEPS)
        in_preference, in_rank = pair_slopes(
            step_logps, ref_step_logps, values, pairs, pair_weights, label_smoothings, margins, rank_margins, S, P,
            first, beta, label_smoothing, margin, rank_margin, rank_scale, PREFERENCE, RANK, PAIRS, STEPS)
        of_pairs = share(counts, 0, pair_count, P)
        tl.store(slopes + s, (in_preference * of_pairs).to(tl.float32), mask=s < S)
        tl.store(slopes + 3 * S + s, (in_rank * of_pairs).to(tl.float32), mask=s < S)
        in_sft = tl.zeros([STEPS], tl.float64)
        if sft_steps is not None:
            in_sft -= times_named(sft_steps, K, first, PAIRS, STEPS).to(tl.float64) * share(counts, 2, sft_count, K)
        tl.store(slopes + S + s, in_sft.to(tl.float32), mask=s < S)
        in_value = tl.zeros([STEPS], tl.float64)
        if value_targets is not None:
            of_values = share(counts, 1, value_count, count_known(value_targets, S, LANES))
            t = tl.load(value_targets + s, mask=s < S, other=float("nan")).to(tl.float64)
            error = tl.load(values + s, mask=s < S, other=0.0).to(tl.float64) - t
            in_value = tl.where(t == t, 2.0 * error * of_values, 0.0)
        tl.store(slopes + 2 * S + s, in_value.to(tl.float32), mask=s < S)


def svpo_loss_fwd(*args: object) -> tuple[Tensor, ...]:
    """As the reference."""
    inputs, options = Inputs(*args[: len(Inputs._fields)]), Options(*args[len(Inputs._fields) :])
    check_values(inputs, options)
    dense = Inputs(*(None if x is None else _dense(x) for x in inputs))
    if inputs.step_logps is None:
        dense = dense._replace(ref_step_logps=None, sft_steps=None)
    if inputs.values is None:
        dense = dense._replace(value_targets=None)
    like = inputs.step_logps if inputs.step_logps is not None else inputs.values
    S, P, K = like.shape[0], dense.pairs.shape[0], 0 if dense.sft_steps is None else dense.sft_steps.shape[0]
    new = like.new_empty
    outputs = [new(size, dtype=torch.float32) for size in (*[()] * 7, (P,), (P,), (4, S))]
    numbers = [float(x) for x in options if not isinstance(x, str)]
    launch(
        svpo_loss_fwd_kernel, (1 + cdiv(S, _triton.STEP_TILE),), like, *dense, S, P, K, *numbers, *outputs,
        PREFERENCE=PREFERENCES[options.preference], RANK=RANKS[options.rank], PAIRS=_triton.PAIR_TILE,
        STEPS=_triton.STEP_TILE, LANES=_triton.LOSS_LANES, warps=_triton.LOSS_WARPS, maxnreg=_triton.LOSS_REGISTERS,
    )
    return tuple(outputs)


def _dense(x: Tensor) -> Tensor:
    """What the kernel reads: fp64 extras (targets, weights, margins) go in as fp32, as in the reference."""
    return (x.float() if x.dtype == torch.float64 else x.detach()).contiguous()


# -- backward -----------------------------------------------------------------------------------------------------


@helper
def upstream(grad_loss, weight, own, slope):
    """What reaches a slope from the loss and from its own term; 0 where nothing does, so that its NaN stays there."""
    g = tl.zeros(slope.shape, tl.float64)
    if grad_loss is not None:
        g = tl.where(weight != 0.0, (weight * tl.load(grad_loss).to(tl.float64)) * slope, 0.0)
    if own is not None:
        g = g + tl.load(own).to(tl.float64) * slope
    return g


@kernel
def svpo_loss_bwd_kernel(
    slopes, grad_loss, grad_preference, grad_value, grad_rank, grad_sft, preference_weight: tl.float64,
    value_weight: tl.float64, rank_weight: tl.float64, sft_weight: tl.float64, S: tl.int64, grad_logps, grad_ref,
    grad_values, BLOCK: tl.constexpr,
):
    """Grid (cdiv(S, BLOCK),). Slopes (4, S) times their upstreams; a gradient that is not needed is None."""
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = s < S
    if grad_logps is not None or grad_ref is not None:
        slope = tl.load(slopes + s, mask=inside, other=0.0).to(tl.float64)
        in_preference = upstream(grad_loss, preference_weight, grad_preference, slope)
        if grad_logps is not None:
            slope = tl.load(slopes + S + s, mask=inside, other=0.0).to(tl.float64)
            total = in_preference + upstream(grad_loss, sft_weight, grad_sft, slope)
            tl.store(grad_logps + s, total.to(tl.float32), mask=inside)
        if grad_ref is not None:
            tl.store(grad_ref + s, (-in_preference).to(tl.float32), mask=inside)
    if grad_values is not None:
        slope = tl.load(slopes + 2 * S + s, mask=inside, other=0.0).to(tl.float64)
        total = upstream(grad_loss, value_weight, grad_value, slope)
        slope = tl.load(slopes + 3 * S + s, mask=inside, other=0.0).to(tl.float64)
        total += upstream(grad_loss, rank_weight, grad_rank, slope)
        tl.store(grad_values + s, total.to(tl.float32), mask=inside)


def svpo_loss_bwd(
    slopes: Tensor, grad_loss: Tensor | None, grad_preference: Tensor | None, grad_value: Tensor | None,
    grad_rank: Tensor | None, grad_sft: Tensor | None, preference_weight: float, value_weight: float,
    rank_weight: float, sft_weight: float, need_logps: bool, need_ref: bool, need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    S = slopes.shape[1]
    found = [slopes.new_empty(S) if need else None for need in (need_logps, need_ref, need_values)]
    launch(
        svpo_loss_bwd_kernel, (cdiv(S, _triton.SLOPES.columns),), slopes, slopes, grad_loss, grad_preference,
        grad_value, grad_rank, grad_sft, preference_weight, value_weight, rank_weight, sft_weight, S, *found,
        BLOCK=_triton.SLOPES.columns, warps=_triton.SLOPES.warps,
    )
    return tuple(slopes.new_empty(0) if grad is None else grad for grad in found)
