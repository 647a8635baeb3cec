"""The Triton kernels of the process reward ops; triton_.py launches them.

A program a step reads its one row of hidden, a program a sequence aggregates its scores. Sums run in fp64: rows come
from memory, which leaves the time, and a loss is one number, which shows every error. The head's rows are read by every
program, from the L1 cache. A position that comes several times is written by the first step that names it, with the sum
of their coefficients by ascending step: no atomics. A position that does not exist is not read, and its score is NaN.
"""

from __future__ import annotations

from .._triton import count_known, helper, kernel, logistic_loss, sigmoid_, tanh_slope, tl

# -- a head's logits ----------------------------------------------------------------------------------------------


@helper
def tanh_(x):
    """tanh in fp64: near 0 a series, as 1 - 2 / (exp(2x) + 1) cancels there."""
    w = x * x
    near = x * (1.0 - w * (1.0 / 3.0) * (1.0 - w * 0.4 * (1.0 - w * (17.0 / 42.0))))
    return tl.where(w < 1e-4, near, 2.0 * sigmoid_(2.0 * x) - 1.0)


@helper
def decision(z_good, z_bad, softcap, TWO: tl.constexpr, CAPPED: tl.constexpr):
    """d from the logits."""
    if CAPPED:
        z_good = softcap * tanh_(z_good / softcap)
        z_bad = softcap * tanh_(z_bad / softcap)
    if TWO:
        return z_good - z_bad
    else:
        return z_good


@helper
def head_logits(
    h, L, stride_b, stride_l, rows, at, weight, stride_w, bias, good, bad, D, TWO: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The logits of row `at` of hidden in fp64, before the softcap; NaN for a row that does not exist."""
    z_good = tl.zeros([BLOCK], tl.float64)
    z_bad = tl.zeros([BLOCK], tl.float64)
    inside = (at >= 0) & (at < rows)
    if inside:
        own = (at // L * stride_b + at % L * stride_l) // ALIGN * ALIGN  # says that it is a multiple: 16-byte loads
        offsets = tl.arange(0, BLOCK)
        for d in range(0, D, BLOCK):
            mask = offsets < tl.minimum(D - d, BLOCK).to(tl.int32) // ALIGN * ALIGN
            x = tl.load(h + own + d + offsets, mask=mask, other=0.0).to(tl.float64)
            row = tl.load(weight + good * stride_w // ALIGN * ALIGN + d + offsets, mask=mask, other=0.0)
            z_good = tl.fma(x, row.to(tl.float64), z_good)
            if TWO:
                row = tl.load(weight + bad * stride_w // ALIGN * ALIGN + d + offsets, mask=mask, other=0.0)
                z_bad = tl.fma(x, row.to(tl.float64), z_bad)
    good_total = tl.where(inside, tl.sum(z_good, 0), float("nan"))
    bad_total = tl.sum(z_bad, 0)
    if bias is not None:
        good_total += tl.load(bias + good).to(tl.float64)
        if TWO:
            bad_total += tl.load(bias + bad).to(tl.float64)
    return good_total, bad_total


# -- forward ------------------------------------------------------------------------------------------------------


@kernel
def prm_scores_fwd_kernel(
    h, L: tl.int64, stride_b: tl.int64, stride_l: tl.int64, rows: tl.int64, D: tl.int64, weight, stride_w: tl.int64,
    bias, positions, good: tl.int64, bad: tl.int64, softcap: tl.float64, scores, logits, TWO: tl.constexpr,
    ACTIVATION: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):
    """Grid (S,). scores (S,), or the decisions in fp64 that `prm_loss` goes on with, and logits (S, 2)."""
    s = tl.program_id(0).to(tl.int64)
    at = tl.load(positions + s).to(tl.int64)
    z_good, z_bad = head_logits(h, L, stride_b, stride_l, rows, at, weight, stride_w, bias, good, bad, D, TWO, BLOCK,
                                ALIGN)
    score = decision(z_good, z_bad, softcap, TWO, CAPPED)
    # In fp32: all 512 threads compute this one number, and in fp64 it took 47 multiply-adds of each.
    if ACTIVATION == 1:
        score = sigmoid_(score.to(tl.float32))
    elif ACTIVATION == 2:
        score, _slope = tanh_slope(score.to(tl.float32), 1.0, 1e-37)
    tl.store(scores + s, score.to(scores.dtype.element_ty))
    tl.store(logits + 2 * s, z_good.to(tl.float32))
    tl.store(logits + 2 * s + 1, z_bad.to(tl.float32))


@helper
def targets(labels, s, mask):
    """Labels in fp64 and which are known; one that is no probability is known and NaN."""
    y = tl.load(labels + s, mask=mask, other=float("nan")).to(tl.float64)
    return tl.where((y >= 0.0) & (y <= 1.0), y, float("nan")), y == y


@kernel
def prm_loss_fwd_kernel(
    decisions, labels, loss, S: tl.int64, EACH: tl.constexpr, MEAN: tl.constexpr, LANES: tl.constexpr
):
    """Grid (1,): the sum of the losses, or their mean over the labelled steps. EACH: grid (cdiv(S, LANES),), (S,)."""
    sums = tl.zeros([LANES], tl.float64)
    for start in range(tl.program_id(0) * LANES, S, tl.num_programs(0) * LANES):
        s = start + tl.arange(0, LANES)
        y, known = targets(labels, s, s < S)
        value, _slope = logistic_loss(tl.load(decisions + s, mask=s < S, other=0.0), 1.0 - y)
        sums += tl.where(known, value, 0.0)
        if EACH:
            tl.store(loss + s, sums.to(tl.float32), mask=s < S)
    if not EACH:
        total = tl.sum(sums, 0)
        if MEAN:
            total = total / tl.maximum(count_known(labels, S, LANES), 1).to(tl.float64)
        tl.store(loss, total.to(tl.float32))


# -- backward -----------------------------------------------------------------------------------------------------


@kernel
def prm_scores_bwd_kernel(
    grad_out, stride_g: tl.int64, logits, dz, S: tl.int64, softcap: tl.float64, TWO: tl.constexpr,
    ACTIVATION: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
):
    """Grid (cdiv(S, ROWS),). dz (S, 2): the gradients of the logits; slopes from the logits, never from a rounded p."""
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    z_good = tl.load(logits + 2 * s, mask=s < S, other=0.0).to(tl.float64)
    z_bad = tl.load(logits + 2 * s + 1, mask=s < S, other=0.0).to(tl.float64)
    d = decision(z_good, z_bad, softcap, TWO, CAPPED)
    g = tl.load(grad_out + s * stride_g, mask=s < S, other=0.0).to(tl.float64)
    if ACTIVATION == 1:
        g = g * (sigmoid_(d) * sigmoid_(-d))
    elif ACTIVATION == 2:
        g = g * (4.0 * sigmoid_(2.0 * d) * sigmoid_(-2.0 * d))
    in_good = g
    in_bad = -g
    if CAPPED:
        in_good = g * (4.0 * sigmoid_(2.0 * z_good / softcap) * sigmoid_(-2.0 * z_good / softcap))
        in_bad = -g * (4.0 * sigmoid_(2.0 * z_bad / softcap) * sigmoid_(-2.0 * z_bad / softcap))
    tl.store(dz + 2 * s, in_good, mask=s < S)
    tl.store(dz + 2 * s + 1, in_bad, mask=s < S)


@kernel
def prm_loss_bwd_kernel(
    grad_out, stride_g: tl.int64, labels, logits, dz, S: tl.int64, TWO: tl.constexpr, MEAN: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):
    """Grid (cdiv(S, ROWS),). As `prm_scores_bwd_kernel`; one upstream for all steps has stride_g 0."""
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    z_good = tl.load(logits + 2 * s, mask=s < S, other=0.0).to(tl.float64)
    z_bad = tl.load(logits + 2 * s + 1, mask=s < S, other=0.0).to(tl.float64)
    y, known = targets(labels, s, s < S)
    _loss, slope = logistic_loss(decision(z_good, z_bad, 0.0, TWO, False), 1.0 - y)
    g = tl.load(grad_out + s * stride_g, mask=s < S, other=0.0).to(tl.float64)
    if MEAN:
        g = g / tl.maximum(count_known(labels, S, LANES), 1).to(tl.float64)
    g = tl.where(known, g * slope, 0.0)
    tl.store(dz + 2 * s, g, mask=s < S)
    tl.store(dz + 2 * s + 1, -g, mask=s < S)


@kernel
def head_hidden_kernel(
    positions, dz, weight, stride_w: tl.int64, out_rows, rows: tl.int64, S: tl.int64, D: tl.int64, good: tl.int64,
    bad: tl.int64, TWO: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr,
):
    """Grid (S,). The first step of each position writes its row: the sum of dz over the position's steps, times W."""
    s = tl.program_id(0).to(tl.int64)
    at = tl.load(positions + s).to(tl.int64)
    if (at >= 0) & (at < rows):
        in_good = tl.zeros([LANES], tl.float64)
        in_bad = tl.zeros([LANES], tl.float64)
        earlier = tl.zeros([LANES], tl.int32)
        for start in range(0, S, LANES):
            t = start + tl.arange(0, LANES)
            same = tl.load(positions + t, mask=t < S, other=-1).to(tl.int64) == at
            earlier += (same & (t < s)).to(tl.int32)
            in_good += tl.load(dz + 2 * t, mask=same, other=0.0)
            in_bad += tl.load(dz + 2 * t + 1, mask=same, other=0.0)
        if tl.sum(earlier, 0) == 0:
            c_good = tl.sum(in_good, 0).to(tl.float32)
            c_bad = tl.sum(in_bad, 0).to(tl.float32)
            to = out_rows + at * D // ALIGN * ALIGN
            offsets = tl.arange(0, BLOCK)
            for d in range(0, D, BLOCK):
                mask = offsets < tl.minimum(D - d, BLOCK).to(tl.int32) // ALIGN * ALIGN
                row = tl.load(weight + good * stride_w // ALIGN * ALIGN + d + offsets, mask=mask, other=0.0)
                x = row.to(tl.float32) * c_good
                if TWO:
                    row = tl.load(weight + bad * stride_w // ALIGN * ALIGN + d + offsets, mask=mask, other=0.0)
                    x = tl.fma(row.to(tl.float32), c_bad, x)
                tl.store(to + d + offsets, x.to(out_rows.dtype.element_ty), mask=mask)


@kernel
def head_weight_kernel(
    h, L: tl.int64, stride_b: tl.int64, stride_l: tl.int64, rows: tl.int64, D: tl.int64, positions, dz, dweight, dbias,
    S: tl.int64, good: tl.int64, bad: tl.int64, good_at: tl.int64, bad_at: tl.int64, part: tl.int64,
    stride_part: tl.int64, TWO: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):
    """Grid (cdiv(D, COLUMNS), parts). Sums of dz h over the `part` steps of a part, at good_at and bad_at of dweight;
    program (0, 0) sums dz over all steps into dbias."""
    if dweight is not None:
        columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        mask = tl.arange(0, COLUMNS) < tl.minimum(D - tl.program_id(0) * COLUMNS, COLUMNS).to(tl.int32) // ALIGN * ALIGN
        begin = tl.program_id(1).to(tl.int64) * part
        in_good = tl.zeros([STEPS, COLUMNS], tl.float64)
        in_bad = tl.zeros([STEPS, COLUMNS], tl.float64)
        for start in range(begin, tl.minimum(begin + part, S), STEPS):
            s = start + tl.arange(0, STEPS)
            at = tl.load(positions + s, mask=s < S, other=-1).to(tl.int64)
            inside = (at >= 0) & (at < rows)
            own = (at // L * stride_b + at % L * stride_l) // ALIGN * ALIGN
            x = tl.load(h + own[:, None] + columns[None, :], mask=inside[:, None] & mask[None, :], other=0.0)
            x = x.to(tl.float64)
            in_good = tl.fma(x, tl.load(dz + 2 * s, mask=s < S, other=0.0)[:, None], in_good)
            if TWO:
                in_bad = tl.fma(x, tl.load(dz + 2 * s + 1, mask=s < S, other=0.0)[:, None], in_bad)
        to = dweight + tl.program_id(1).to(tl.int64) * stride_part + columns
        tl.store(to + good_at, tl.sum(in_good, 0).to(tl.float32).to(dweight.dtype.element_ty), mask=mask)
        if TWO:
            tl.store(to + bad_at, tl.sum(in_bad, 0).to(tl.float32).to(dweight.dtype.element_ty), mask=mask)
    if dbias is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            good_sum = tl.zeros([COLUMNS], tl.float64)
            bad_sum = tl.zeros([COLUMNS], tl.float64)
            for start in range(0, S, COLUMNS):
                t = start + tl.arange(0, COLUMNS)
                good_sum += tl.load(dz + 2 * t, mask=t < S, other=0.0)
                bad_sum += tl.load(dz + 2 * t + 1, mask=t < S, other=0.0)
            tl.store(dbias + good, tl.sum(good_sum, 0).to(tl.float32).to(dbias.dtype.element_ty))
            if TWO:
                tl.store(dbias + bad, tl.sum(bad_sum, 0).to(tl.float32).to(dbias.dtype.element_ty))


@kernel
def head_weight_sum_kernel(
    partial, dweight, parts: tl.int64, D: tl.int64, good_at: tl.int64, bad_at: tl.int64, BLOCK: tl.constexpr
):
    """Grid (cdiv(D, BLOCK), classes). The sum of partial (parts, 2, D) over its parts, in order."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, parts):
        total += tl.load(partial + (2 * i + tl.program_id(1)) * D + columns, mask=columns < D, other=0.0)
    to = dweight + tl.where(tl.program_id(1) == 0, good_at, bad_at) + columns
    tl.store(to, total.to(tl.float32).to(dweight.dtype.element_ty), mask=columns < D)


# -- aggregates: HOW 0 min, 1 prod, 2 geomean, 3 mean, 4 last, 5 max ----------------------------------------------


@helper
def sequence(offsets, b, S, B, BLOCK: tl.constexpr):
    """Where sequence b starts and ends, and whether all offsets are sound; if not, every sequence counts as empty."""
    falls = tl.zeros([BLOCK], tl.int32)
    for first in range(0, B, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = tl.load(offsets + at, mask=at < B, other=0)
        falls += (tl.load(offsets + at + 1, mask=at < B, other=0) < here).to(tl.int32)
    sound = (tl.sum(falls, 0) == 0) & (tl.load(offsets) == 0) & (tl.load(offsets + B) == S)
    start = tl.load(offsets + b).to(tl.int64)
    return start, tl.where(sound, tl.load(offsets + b + 1).to(tl.int64), start), sound


@helper
def extreme(scores, start, end, S, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Where the first smallest or largest score stands; the first NaN is taken before all."""
    best = tl.zeros([BLOCK], tl.float32)
    index = tl.full([BLOCK], -1, tl.int64)
    for i in range(start, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        x = tl.load(scores + at, mask=at < end, other=0.0).to(tl.float32)
        if LARGEST:
            x = -x
        better = (at < end) & ((index < 0) | ((best == best) & ((x != x) | (x < best))))
        best = tl.where(better, x, best)
        index = tl.where(better, at, index)
    nan = (index >= 0) & (best != best)
    m = tl.min(tl.where((index >= 0) & (best == best), best, float("inf")), 0)
    taken = tl.where(tl.max(nan.to(tl.int32), 0) > 0, nan, (index >= 0) & (best == m))
    return tl.min(tl.where(taken, index, S), 0)


@helper
def joined(scores, start, end, HOW: tl.constexpr, BLOCK: tl.constexpr):
    """The product, the geometric mean or the mean of a sequence."""
    lanes = tl.arange(0, BLOCK)
    length = tl.maximum(end - start, 1).to(tl.float64)
    total = tl.full([BLOCK], 1.0 if HOW == 1 else 0.0, tl.float64)
    zeros = tl.zeros([BLOCK], tl.int32)
    negatives = tl.zeros([BLOCK], tl.int32)
    for i in range(start, end, BLOCK):
        x = tl.load(scores + i + lanes, mask=i + lanes < end, other=0.0 if HOW == 3 else 1.0).to(tl.float64)
        if HOW == 1:
            total = total * x
        elif HOW == 2:
            total += tl.log(tl.where(x <= 0.0, 1.0, x))
            zeros += (x == 0.0).to(tl.int32)
            negatives += (x < 0.0).to(tl.int32)
        else:
            total += x
    if HOW == 1:
        return tl.sum(tl.where(lanes == BLOCK - 1, tl.cumprod(total, 0), 0.0), 0)
    elif HOW == 2:
        value = tl.exp(tl.sum(total, 0) / length)
        value = tl.where((tl.sum(zeros, 0) > 0) & (value == value), 0.0, value)
        return tl.where(tl.sum(negatives, 0) > 0, float("nan"), value)
    else:
        return tl.sum(total, 0) / length


@kernel
def aggregate_scores_fwd_kernel(
    scores, offsets, out, chosen, S: tl.int64, B: tl.int64, HOW: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (B,). out (B,), and the score that min, max and last took, else -1."""
    b = tl.program_id(0).to(tl.int64)
    start, end, _sound = sequence(offsets, b, S, B, BLOCK)
    if HOW == 0 or HOW == 4 or HOW == 5:
        if HOW == 4:
            index = end - 1
        else:
            index = extreme(scores, start, end, S, HOW == 5, BLOCK)
        value = tl.load(scores + index, mask=start < end, other=0.0).to(tl.float32)
        tl.store(chosen + b, tl.where(start < end, index, -1))
    else:
        value = joined(scores, start, end, HOW, BLOCK).to(tl.float32)
        tl.store(chosen + b, end * 0 - 1)
    tl.store(out + b, tl.where(start < end, value, float("nan")))


@helper
def prod_gradient(scores, behind, grad_scores, g, start, end, BLOCK: tl.constexpr):
    """Upstream times the product of the others, what comes before times what comes behind: exact with zeros.

    A tile scans the scores one to the side, so that a lane has its own left out; `behind` (S,) holds the first half.
    """
    lanes = tl.arange(0, BLOCK)
    tiles = (end - start + BLOCK - 1) // BLOCK
    carry = tl.full([], 1.0, tl.float64)
    for k in range(0, tiles):
        at = start + (tiles - 1 - k) * BLOCK + lanes
        x = tl.load(scores + at + 1, mask=at + 1 < end, other=1.0).to(tl.float64)
        product = carry * tl.cumprod(x, 0, reverse=True)
        tl.store(behind + at, product, mask=at < end)
        carry = tl.sum(tl.where(lanes == 0, product, 0.0), 0)
    tl.debug_barrier()
    carry = tl.full([], 1.0, tl.float64)
    for k in range(0, tiles):
        at = start + k * BLOCK + lanes
        x = tl.load(scores + at - 1, mask=(at > start) & (at <= end), other=1.0).to(tl.float64)
        product = carry * tl.cumprod(x, 0)
        others = product * tl.load(behind + at, mask=at < end, other=0.0)
        tl.store(grad_scores + at, (g * others).to(tl.float32).to(grad_scores.dtype.element_ty), mask=at < end)
        carry = tl.sum(tl.where(lanes == BLOCK - 1, product, 0.0), 0)


@kernel
def aggregate_scores_bwd_kernel(
    grad_out, stride_g: tl.int64, scores, offsets, out, chosen, behind, grad_scores, S: tl.int64, B: tl.int64,
    HOW: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (B,). The gradient of every score; all NaN when the offsets are not sound."""
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    start, end, sound = sequence(offsets, b, S, B, BLOCK)
    if not sound:
        for i in range(b * BLOCK, S, B * BLOCK):
            nan = tl.full([BLOCK], float("nan"), tl.float32).to(grad_scores.dtype.element_ty)
            tl.store(grad_scores + i + lanes, nan, mask=i + lanes < S)
    g = tl.load(grad_out + b * stride_g).to(tl.float64)
    if HOW == 1:
        prod_gradient(scores, behind, grad_scores, g, start, end, BLOCK)
    else:
        length = (end - start).to(tl.float64)
        for i in range(start, end, BLOCK):
            at = i + lanes
            if HOW == 3:
                value = tl.zeros([BLOCK], tl.float64) + g / length
            elif HOW == 2:
                result = tl.load(out + b).to(tl.float64)
                x = tl.load(scores + at, mask=at < end, other=1.0).to(tl.float64)
                value = tl.where(result == 0.0, 0.0, g * (result / (length * x)))
            else:
                value = tl.where(at == tl.load(chosen + b), g, 0.0)
            tl.store(grad_scores + at, value.to(tl.float32).to(grad_scores.dtype.element_ty), mask=at < end)
