"""NeMo-RL: StepPolicyLossFn in the place of its ClippedPGLossFn (no registry there: pass it to the algorithm)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .runs import metrics, run_policy_loss


class StepPolicyLossFn:
    """NeMo-RL's LossFunction over next-token log-probs; steps are runs of one advantage.

    ratio, clip, dual_clip as in `step_policy_loss`. Normalised by the global count of tokens (token_level) or, a mean
    over sequences of means over tokens, by that of sequences.
    """

    def __init__(self, ratio: str = "step_mean", clip: tuple[float, float] = (0.2, 0.2), dual_clip: float | None = None,
                 token_level: bool = True):
        from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

        self.options = {"ratio": ratio, "clip": clip, "dual_clip": dual_clip}
        self.token_level = token_level
        self.loss_type = LossType.TOKEN_LEVEL if token_level else LossType.SEQUENCE_LEVEL
        self.input_type = LossInputType.LOGPROB

    def __call__(self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, *,
                 next_token_logprobs: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        """data: token_mask, advantages, prev_logprobs (B, L) and sample_mask (B,); next_token_logprobs (B, L - 1)."""
        keep = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        weights = keep.float()
        if not self.token_level:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
        weights = weights / (global_valid_toks if self.token_level else global_valid_seqs)
        rows = torch.arange(len(keep), device=keep.device)[:, None].expand_as(keep)
        own = (next_token_logprobs, data["prev_logprobs"][:, 1:], data["advantages"][:, 1:], keep, rows, weights)
        out = run_policy_loss(*(x.reshape(-1) for x in own), **self.options)
        said = {name: value.item() for name, value in metrics(out).items()}
        return out.loss, {"loss": out.loss.item(), "num_valid_samples": data["sample_mask"].sum().item(), **said}
