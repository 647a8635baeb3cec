"""The spec of the process-reward ops, in plain PyTorch.

    z = hidden[positions] @ weight[good or bad] + bias,  softcap * tanh(z / softcap) if there is a softcap
    d = z_good - z_bad with two classes, z with one
    prm_scores        sigmoid(d) for two classes; d, sigmoid(d) or tanh(d) for one
    prm_loss          -(y logsigmoid(d) + (1 - y) logsigmoid(-d)): cross-entropy with two classes, binary with one
    aggregate_scores  one number per sequence of scores

Outputs are fp32 (fp64 for fp64). Dots and losses are summed in fp64 where the device has it: a loss is one number and
shows every error. Rows of hidden that no position names are never looked at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import can_look, fail


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


# -- prm_scores and prm_loss ------------------------------------------------------------------------------------------


def prm_scores_fwd(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, good: int, bad: int,
                   activation: str, softcap: float) -> tuple[Tensor, Tensor]:
    """hidden (B, L, D), positions (S,), weight (C or V, D), bias (C,) or None; bad = -1: one class.

    Returns scores (S,) and logits (S, 2) before the softcap, column 1 zero with one class.
    """
    check_positions("prm_scores", hidden, positions)
    z = head_logits(hidden, positions, weight, bias, good, bad)
    out = _accumulator(hidden)
    return activate(decision(z, bad, softcap), bad, activation).to(out), z.to(out)


def prm_scores_bwd(grad: Tensor, hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None,
                   logits: Tensor, good: int, bad: int, activation: str, softcap: float, need_hidden: bool,
                   need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (B, L, D), weight and bias, (0,) where not needed."""
    z = logits.to(_compute(hidden))
    d = decision(z, bad, softcap)
    if bad >= 0 or activation == "sigmoid":
        slope = torch.sigmoid(d) * torch.sigmoid(-d)
    else:
        slope = 4.0 * torch.sigmoid(2.0 * d) * torch.sigmoid(-2.0 * d) if activation == "tanh" else torch.ones_like(d)
    return _gradients(grad * slope, z, hidden, positions, weight, bias, good, bad, softcap,
                      (need_hidden, need_weight, need_bias))


def prm_loss_fwd(hidden: Tensor, positions: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, good: int,
                 bad: int, reduction: str) -> tuple[Tensor, Tensor]:
    """labels (S,) in [0, 1], NaN = unlabelled. Returns the loss, () or (S,), and logits (S, 2)."""
    check_positions("prm_loss", hidden, positions)
    check_labels(labels)
    z = head_logits(hidden, positions, weight, bias, good, bad)
    d = decision(z, bad, 0.0)
    labelled, y = _targets(labels, d.dtype)
    losses = torch.where(labelled, -(y * F.logsigmoid(d) + (1.0 - y) * F.logsigmoid(-d)), 0.0)
    out = losses if reduction == "none" else losses.sum()
    out = out / labelled.sum().clamp_min(1) if reduction == "mean" else out
    return out.to(_accumulator(hidden)), z.to(_accumulator(hidden))


def prm_loss_bwd(grad: Tensor, hidden: Tensor, positions: Tensor, labels: Tensor, weight: Tensor,
                 bias: Tensor | None, logits: Tensor, good: int, bad: int, reduction: str, need_hidden: bool,
                 need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `prm_scores_bwd`, for grad () or (S,)."""
    z = logits.to(_compute(hidden))
    d = decision(z, bad, 0.0)
    labelled, y = _targets(labels, d.dtype)
    slope = torch.where(labelled, (1.0 - y) * torch.sigmoid(d) - y * torch.sigmoid(-d), 0.0)
    grad = grad / labelled.sum().clamp_min(1) if reduction == "mean" else grad
    return _gradients(grad * slope, z, hidden, positions, weight, bias, good, bad, 0.0,
                      (need_hidden, need_weight, need_bias))


def _targets(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which steps are labelled, and the probabilities, 0 where they are not; NaN for what is not a probability."""
    labelled = ~torch.isnan(labels)
    y = torch.where((labels >= 0) & (labels <= 1), labels, torch.nan)
    return labelled, torch.where(labelled, y, 0.0).to(dtype)


def head_logits(hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None, good: int,
                bad: int) -> Tensor:
    """(S, 2) in the compute dtype; NaN on a device where the position does not exist."""
    rows, inside = _rows(hidden, positions)
    classes = [good, bad] if bad >= 0 else [good]
    with torch.autocast(hidden.device.type, enabled=False):
        z = rows @ torch.stack([weight[c] for c in classes]).to(rows.dtype).T
    z = z if bias is None else z + torch.stack([bias[c] for c in classes]).to(rows.dtype)
    z = z if bad >= 0 else F.pad(z, (0, 1))
    return torch.where(inside.unsqueeze(1), z, torch.nan)


def _rows(hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """hidden at the positions (S, D) in the compute dtype, and which of them exist."""
    flat = hidden.flatten(0, -2)
    inside = (positions >= 0) & (positions < flat.shape[0])
    if flat.shape[0] == 0:
        return flat.new_zeros((positions.shape[0], flat.shape[1]), dtype=_compute(hidden)), inside
    return flat.index_select(0, torch.where(inside, positions, 0)).to(_compute(hidden)), inside


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _compute(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.device.type == "mps" else torch.float64


def decision(z: Tensor, bad: int, softcap: float) -> Tensor:
    """d (S,) from the logits (S, 2)."""
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z[:, 0] - z[:, 1] if bad >= 0 else z[:, 0]


def activate(d: Tensor, bad: int, activation: str) -> Tensor:
    if bad >= 0 or activation == "sigmoid":
        return torch.sigmoid(d)
    return torch.tanh(d) if activation == "tanh" else d.clone()


def _gradients(grad_d: Tensor, z: Tensor, hidden: Tensor, positions: Tensor, weight: Tensor, bias: Tensor | None,
               good: int, bad: int, softcap: float, needs: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """From d upstream (S,): through the softcap to the logits, then to hidden, weight and bias."""
    signs = grad_d.new_tensor([1.0, -1.0])[: 2 if bad >= 0 else 1]
    cap = 1.0 - torch.tanh(z / softcap).square() if softcap else torch.ones_like(z)
    dz = grad_d.unsqueeze(1) * signs * cap[:, : len(signs)]
    classes = [good, bad] if bad >= 0 else [good]
    grads = [hidden.new_empty(0) for _ in range(3)]
    with torch.autocast(hidden.device.type, enabled=False):
        if needs[0]:
            rows = dz @ torch.stack([weight[c] for c in classes]).to(dz.dtype)
            inside = (positions >= 0) & (positions < hidden.shape[0] * hidden.shape[1])
            at = torch.where(inside, positions, 0).long()
            # Summed before they are rounded, and in a fixed order: a position may come twice.
            full = rows.new_zeros((hidden.shape[0] * hidden.shape[1], hidden.shape[2]))
            if at.numel() and full.shape[0]:
                rows = torch.where(inside.unsqueeze(1), rows, 0.0)
                # index_add_ has a fixed order on the CPU only, index_put_ on CUDA only.
                full.index_add_(0, at, rows) if rows.is_cpu else full.index_put_((at,), rows, accumulate=True)
            grads[0] = full.to(hidden.dtype).view(hidden.shape)
        if needs[1]:
            grads[1] = weight.new_zeros(weight.shape)
            grads[1][classes] = (dz.T @ _rows(hidden, positions)[0]).to(weight.dtype)
        if needs[2]:
            grads[2] = bias.new_zeros(bias.shape)
            grads[2][classes] = dz.sum(0).to(bias.dtype)
    return tuple(grads)


# -- value checks -----------------------------------------------------------------------------------------------------


def check_positions(op: str, hidden: Tensor, positions: Tensor) -> None:
    """Positions that exist, where they may be read."""
    if can_look(positions) and positions.numel():
        rows = hidden.shape[0] * hidden.shape[1]
        low, high = (int(x) for x in torch.aminmax(positions))
        if low < 0 or high >= rows:
            fail(op, "positions", f"rows of hidden in [0, {rows})", f"position {low if low < 0 else high}", IndexError)


def check_labels(labels: Tensor) -> None:
    """Labels that are probabilities, where they may be read."""
    if can_look(labels) and labels.numel():
        outside = labels[(labels < 0) | (labels > 1)]
        if outside.numel():
            fail("prm_loss", "labels", "in [0, 1] (NaN = unlabelled)", f"a label of {float(outside[0]):g}")


# -- aggregate_scores -------------------------------------------------------------------------------------------------


def aggregate_scores_fwd(scores: Tensor, offsets: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """scores (S,), offsets (B + 1,). Returns out (B,) and the score each of min, max and last took, (B,), -1 = none."""
    check_offsets(scores, offsets)
    lengths = offsets.diff()
    fill = {"min": torch.inf, "max": -torch.inf, "prod": 1.0, "geomean": 1.0}.get(how, 0.0)
    rows = _padded(scores, offsets, fill)
    chosen = torch.full_like(lengths, -1)
    if how in ("min", "max"):
        # torch promises the first index among equals.
        out, index = rows.min(1) if how == "min" else rows.max(1)
        chosen = torch.where(lengths > 0, offsets[:-1] + index, -1)
    elif how == "last":
        chosen = torch.where(lengths > 0, offsets[1:] - 1, -1)
        out = rows.gather(1, (lengths - 1).clamp(0, rows.shape[1] - 1).long().unsqueeze(1)).squeeze(1)
    elif how == "prod":
        out = rows.prod(1)
    elif how == "mean":
        out = rows.sum(1) / lengths
    else:
        out = torch.exp(torch.log(torch.where(rows <= 0, 1.0, rows)).sum(1) / lengths)
        out = torch.where((rows == 0).any(1) & ~out.isnan(), 0.0, out)
        out = torch.where((rows < 0).any(1), torch.nan, out)
    sound = (offsets[0] == 0) & (offsets[-1] == scores.shape[0]) & (lengths >= 0).all()
    return torch.where(sound & (lengths > 0), out, torch.nan), chosen.clamp(-1, scores.shape[0] - 1).long()


def aggregate_scores_bwd(grad: Tensor, scores: Tensor, offsets: Tensor, out: Tensor, chosen: Tensor,
                         how: str) -> Tensor:
    """The gradient of scores (S,)."""
    S, B = scores.shape[0], out.shape[0]
    if S == 0 or B == 0:
        return torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if how in ("min", "max", "last"):
        found = grad.new_zeros(S + 1).scatter_(0, torch.where(chosen >= 0, chosen, S), grad)[:S]
        return found.to(scores.dtype)
    k = torch.arange(S, device=scores.device)
    sequence = (torch.searchsorted(offsets.long(), k, right=True) - 1).clamp(0, B - 1)
    upstream, length = grad[sequence], offsets.diff()[sequence]
    if how == "mean":
        return (upstream / length).to(scores.dtype)
    if how == "geomean":
        result = out[sequence]
        return torch.where(result == 0, 0.0, upstream * result / (length * scores.to(out.dtype))).to(scores.dtype)
    rows = F.pad(_padded(scores, offsets, 1.0), (1, 1), value=1.0)
    others = rows.cumprod(1)[:, :-2] * rows.flip(1).cumprod(1).flip(1)[:, 2:]
    at = (k - offsets[sequence]).clamp(0, others.shape[1] - 1)
    return (upstream * others[sequence, at]).to(scores.dtype)


def _padded(scores: Tensor, offsets: Tensor, fill: float) -> Tensor:
    """(B, longest) in fp32 (fp64 for fp64), `fill` behind the end of a sequence."""
    scores = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    S, starts, lengths = scores.shape[0], offsets[:-1], offsets.diff()
    longest = max(1, min(S, int(lengths.max()))) if lengths.numel() else 1
    step = torch.arange(longest, device=scores.device)
    at = torch.where(step < lengths.unsqueeze(1), starts.unsqueeze(1) + step, S).clamp(0, S)
    return torch.cat([scores, scores.new_full((1,), fill)])[at]


def check_offsets(scores: Tensor, offsets: Tensor) -> None:
    """Offsets that run from 0 to S, where they may be read."""
    if not can_look(offsets):
        return
    S = scores.shape[0]
    if int(offsets[0]) != 0 or int(offsets[-1]) != S:
        fail("aggregate_scores", "offsets", f"from 0 to S = {S}", f"from {int(offsets[0])} to {int(offsets[-1])}")
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0])
        fail("aggregate_scores", "offsets", "non-decreasing", f"{int(offsets[at])} before {int(offsets[at + 1])}")
