"""The formulas of the row ops once more, written only for the tests: plain PyTorch over lists of predictions."""

from __future__ import annotations

import torch
from cases import Predictions, RowCase
from torch import Tensor


def step_logps(logits: Tensor, given: Predictions, case: RowCase) -> Tensor:
    """logits (B, L, V) or (T, V) -> (S,) or (N,), fp64 for fp64, else fp32 after the logits, as eager code has it."""
    flat = logits.reshape(-1, case.V)[given.rows]
    z = flat[:, : case.vocab_size or case.V]
    z = z if z.dtype == torch.float64 else z.float()
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    z = z / case.temperature
    if z.shape[0] == 0:
        logp = z.sum(-1)
    else:
        logp = torch.log_softmax(z, -1).gather(1, given.labels.to(z.device).unsqueeze(1)).squeeze(1)
    if case.reduction == "none":
        return logp
    step_ids = given.step_ids.to(logp.device)
    out = logp.new_zeros(case.S).index_add(0, step_ids, logp)
    if case.reduction == "mean":
        out = out / torch.bincount(step_ids, minlength=case.S).clamp_min(1)
    return out


def linear_step_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, given: Predictions, case: RowCase) -> Tensor:
    return step_logps(torch.nn.functional.linear(hidden, weight, bias), given, case)
