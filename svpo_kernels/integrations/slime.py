"""slime: --loss-type custom_loss --custom-loss-function-path svpo_kernels.integrations.slime.step_loss"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .runs import metrics, run_policy_loss

RATIO = "step_mean"


def step_loss(args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> tuple[Tensor, dict]:
    """slime's signature; steps are runs of one advantage, bounds args.eps_clip and args.eps_clip_high, ratio `RATIO`.

    batch: lists of one tensor a sample: log_probs (of the policy that sampled), advantages, loss_masks, and what
    slime's own log-probs read. sum_of_sample_mean is linear in its tokens, whatever the reduction: its gradient is the
    weights.
    """
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    _, found = get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"], with_entropy=False)
    logps = torch.cat(found["log_probs"])
    old, advantages = (torch.cat(list(batch[name])) for name in ("log_probs", "advantages"))
    keep = torch.cat(list(batch["loss_masks"])).to(logps.device)
    lengths = torch.tensor([len(x) for x in found["log_probs"]], device=logps.device)
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=logps.device), lengths)
    with torch.enable_grad():
        tokens = torch.zeros_like(logps, requires_grad=True)
        (weights,) = torch.autograd.grad(sum_of_sample_mean(tokens), tokens)
    high = getattr(args, "eps_clip_high", None)
    out = run_policy_loss(logps, old, advantages, keep, rows, weights, ratio=RATIO,
                          clip=(args.eps_clip, args.eps_clip if high is None else high))
    loss = out.loss + 0.0 * logits.sum() if not len(logps) else out.loss  # a rank without tokens stays in the graph
    return loss, {"loss": loss.detach(), "pg_loss": out.policy.detach(), **metrics(out)}
