"""prime-rl: [trainer.loss] type = "custom", import_path = "svpo_kernels.integrations.prime_rl.step_loss"."""

from __future__ import annotations

from typing import Any

import torch

from .runs import metrics, run_policy_loss


def step_loss(inputs: Any, ratio: str = "step_mean", clip_low: float = 0.2, clip_high: float = 0.2,
              dual_clip: float | None = None) -> Any:
    """prime-rl's LossInputs of one sequence, all (seq,), to its LossOutputs; arguments: [trainer.loss.kwargs].

    Steps are runs of one advantage. The loss is a sum over tokens, which prime-rl divides by its own count;
    loss_weights multiply it.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    weights = getattr(inputs, "loss_weights", None)
    weights = torch.ones_like(inputs.trainer_logprobs) if weights is None else weights
    out = run_policy_loss(inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_mask,
                          torch.zeros_like(inputs.loss_mask, dtype=torch.int64), weights, ratio=ratio,
                          clip=(clip_low, clip_high), dual_clip=dual_clip)
    return LossOutputs(loss=out.loss, metrics=metrics(out))
