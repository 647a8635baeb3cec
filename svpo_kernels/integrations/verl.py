"""verl with step-level losses: importing this registers them, and verl imports it itself (entry points verl.plugins).

    algorithm.adv_estimator: svpo_group_norm | svpo_group_mean | svpo_rloo | svpo_gain
    actor_rollout_ref.actor.policy_loss.loss_mode: svpo_token | svpo_step | svpo_step_mean

Steps come with the rewards: `step_rewards` puts a step's score at its last token. What follows reads them from there:
an estimator gives every token its step's advantage, and a loss takes a run of tokens with one advantage as one step
(two neighbours with the same advantage are one). Written against verl 0.9.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

from svpo_kernels import linear_step_logps, step_advantages

from .._checks import fail
from .runs import run_policy_loss

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")

# -- rewards and advantages -------------------------------------------------------------------------------------------


def step_rewards(scores: Sequence[Sequence[float]], ends: Sequence[Sequence[int]], response_mask: Tensor) -> Tensor:
    """Step scores as verl's token rewards: (B, L) fp32, a step's score at its last token, 0 elsewhere.

    scores, ends: B sequences of S_b scores and of as many token indices into the response, ascending. response_mask:
    (B, L). A score of exactly 0 is written as the smallest normal number, so that a step is never lost as padding.
    Raises ValueError where the lengths differ, IndexError for an end outside the response.
    """
    rewards = torch.zeros(response_mask.shape, dtype=torch.float32, device=response_mask.device)
    if not len(scores) == len(ends) == len(response_mask):
        fail("step_rewards", "scores, ends", f"B = {len(response_mask)} sequences", f"{len(scores)}, {len(ends)}")
    for b, (values, places) in enumerate(zip(scores, ends, strict=True)):
        if len(values) != len(places) or list(places) != sorted(set(places)):
            fail("step_rewards", f"ends[{b}]", f"{len(values)} ascending indices", list(places))
        if any(not 0 <= t < response_mask.shape[1] or not response_mask[b, t] for t in places):
            fail("step_rewards", f"ends[{b}]", "tokens of the response", list(places), IndexError)
        rewards[b, list(places)] = rewards.new_tensor([v or torch.finfo(torch.float32).tiny for v in values])
    return rewards


def _estimator(how: str) -> Any:
    def estimate(token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None,
                 **_: Any) -> tuple[Tensor, Tensor]:
        """(advantages, returns), (B, L): each token its step's, groups are those of `index` (uid); 0 behind the last
        step and where a group has one member. Rewards must be `step_rewards`: no KL in them."""
        ends = (token_level_rewards != 0) & response_mask.bool()
        row, column = ends.nonzero(as_tuple=True)
        rewards = token_level_rewards[row, column].float()
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        if how == "gain":  # rewards are values of the states after the steps
            parents = torch.where(first, -1, torch.arange(len(row), device=row.device) - 1)
            found = step_advantages(None, "gain", values=rewards, parents=parents)
        else:
            if index is None:
                fail(f"svpo_{how}", "index", "the uid of each response's prompt", None)
            names = {uid: n for n, uid in enumerate(dict.fromkeys(list(index)))}
            groups = torch.tensor([names[uid] for uid in index], device=row.device)[row]
            found = step_advantages(rewards, how, groups=groups)
        found = torch.cat([found.nan_to_num(0.0), found.new_zeros(1)])
        L = ends.shape[1]  # a token's step: the first end at or behind it in its row
        flat = row * L + column
        step = torch.searchsorted(flat, torch.arange(ends.numel(), device=flat.device))
        own = torch.cat([row, row.new_full((1,), -1)])[step] == torch.arange(ends.numel(), device=flat.device) // L
        advantages = torch.where(own, found[step], 0.0).view(ends.shape) * response_mask
        return advantages, advantages

    return estimate


# -- policy losses ----------------------------------------------------------------------------------------------------


def _coefficients(mask: Tensor, mode: str, dp_size: int = 1, batch_num_tokens: Any = None,
                  global_batch_size: Any = None, loss_scale_factor: Any = None) -> Tensor:
    """(B, L): what verl's `agg_loss` multiplies each token's loss with."""
    if mode not in AGGREGATIONS:
        fail("svpo policy loss", "loss_agg_mode", f"one of {', '.join(AGGREGATIONS)}", mode)
    needed = {"token-mean": batch_num_tokens, "token-sum": 1}.get(mode, global_batch_size)
    if needed is None and dp_size > 1:
        fail("svpo policy loss", "config.global_batch_info", "batch_num_tokens and global_batch_size (dp_size > 1)",
             None)
    mask = mask.float()
    if mode in ("token-mean", "token-sum"):
        total = 1 if mode == "token-sum" else mask.sum() if batch_num_tokens is None else batch_num_tokens
        return mask / total * dp_size
    lengths = mask.sum(-1, keepdim=True)
    sequences = (lengths > 0).sum() if global_batch_size is None else global_batch_size
    each = mask / sequences * dp_size
    if mode == "seq-mean-token-mean":
        return each / (lengths + 1e-8)
    scale = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
    return each / (scale if mode.endswith("norm") else 1)


def _policy_loss(ratio: str) -> Any:
    def loss(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
             loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
             ) -> tuple[Tensor, dict[str, Any]]:
        """verl's signature, all (B, L). A step's loss counts as those of its tokens would, rollout_is_weights by their
        mean; clip_ratio_c bounds token ratios only, as in verl's vanilla and gspo."""
        counts = response_mask.bool()
        weights = _coefficients(counts, loss_agg_mode, **config.global_batch_info)
        if rollout_is_weights is not None:
            weights = weights * rollout_is_weights
        low, high = (config.clip_ratio if bound is None else bound
                     for bound in (config.clip_ratio_low, config.clip_ratio_high))
        rows = torch.arange(len(counts), device=counts.device)[:, None].expand_as(counts)
        out = run_policy_loss(*(x.reshape(-1) for x in (log_prob, old_log_prob, advantages, counts, rows, weights)),
                              ratio=ratio, clip=(low, high),
                              dual_clip=config.get("clip_ratio_c", 3.0) if ratio == "token" else None)
        metrics = {"actor/pg_clipfrac": out.clip_fraction, "actor/ppo_kl": out.approx_kl,
                   "actor/ratio_mean": out.ratio_mean, "actor/ratio_max": out.ratio_max}
        return out.loss, {name: value.item() for name, value in metrics.items()}

    return loss


# -- heads ------------------------------------------------------------------------------------------------------------


class FusedLinearForPPO(nn.Module):
    """verl's module of that name: (hidden, vocab_weights, input_ids, temperature) -> (log_probs, entropy), fp32."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor,
                temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """(B, L, D) or (T, D); temperature a number, or fp32 of each sequence or label."""
        logps, found = linear_step_logps(hidden_states, vocab_weights, input_ids, shift=0, reduction="none",
                                         temperature=temperature, stats=("entropy",))
        return logps, found["entropy"]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor = 1.0,
                         reduction: str = "none", dist_process_group: Any = None) -> tuple[Tensor, Tensor]:
    """verl's function of that name: (log_probs, entropy), flat (T,); the group shares the vocabulary."""
    if reduction != "none":
        fail("linear_cross_entropy", "reduction", "'none'", reduction)
    logps, found = linear_step_logps(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), shift=0,
                                     reduction="none", temperature=temperature, stats=("entropy",),
                                     process_group=dist_process_group)
    return logps, found["entropy"]


@contextlib.contextmanager
def use_fused_heads() -> Iterator[None]:
    """verl's two fused heads are ours inside the block. verl offers no other place: its models import these two names
    when they run, so the names of two modules are exchanged, and put back on exit."""
    import verl.utils.experimental.torch_functional as torch_functional
    import verl.utils.kernel.linear_cross_entropy as kernel

    before = torch_functional.FusedLinearForPPO, kernel.linear_cross_entropy
    torch_functional.FusedLinearForPPO, kernel.linear_cross_entropy = FusedLinearForPPO, linear_cross_entropy
    try:
        yield
    finally:
        torch_functional.FusedLinearForPPO, kernel.linear_cross_entropy = before


for _how in ("group_norm", "group_mean", "rloo", "gain"):
    register_adv_est(f"svpo_{_how}")(_estimator(_how))
for _ratio in ("token", "step", "step_mean"):
    register_policy_loss(f"svpo_{_ratio}")(_policy_loss(_ratio))
