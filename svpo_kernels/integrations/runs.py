"""What the trainers of token advantages share: a run of tokens with one advantage is a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svpo_kernels import StepPolicyLoss, step_policy_loss


def run_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, keep: Tensor, rows: Tensor, weights: Tensor,
                    *, ratio: str, **options: Any) -> StepPolicyLoss:
    """`step_policy_loss` where steps are runs of neighbouring kept tokens with one advantage in one sequence.

    All (M,): log-probs, advantages, keep bool, rows the sequence of each token, weights what each token's loss is
    multiplied with in the sum (a step takes the sum of its tokens'). Two neighbouring steps of the same advantage are
    one. options: those of `step_policy_loss`.
    """
    keep = keep.bool()
    new = torch.ones_like(keep)
    new[1:] = (advantages[1:] != advantages[:-1]) | ~keep[:-1] | (rows[1:] != rows[:-1])
    steps = (new & keep).cumsum(0)[keep] - 1
    S = int(steps[-1]) + 1 if len(steps) else 0
    own, weights = advantages[keep].detach().float(), weights[keep].detach().float()
    of_step = own.new_zeros(S).index_copy(0, steps.flip(0), own.flip(0))
    if ratio != "token":
        weights = weights.new_zeros(S).index_add(0, steps, weights)[steps]
    return step_policy_loss(logps[keep], old_logps[keep].detach(), of_step, steps, ratio=ratio, weights=weights,
                            totals=(1.0, 1.0), **options)


def metrics(out: StepPolicyLoss) -> dict[str, Tensor]:
    return {"clip_fraction": out.clip_fraction, "approx_kl": out.approx_kl, "ratio_mean": out.ratio_mean,
            "ratio_max": out.ratio_max}
