"""Metrics as sums and counts, so that their means are exact over micro-batches, processes and logging windows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import prm_metrics

# name -> the sum it is divided by; `steps` is the number of optimizer steps
MEANS = {
    "loss": "steps",
    "rewards/chosen": "scored_pairs",
    "rewards/rejected": "scored_pairs",
    "rewards/margins": "scored_pairs",
    "rewards/accuracies": "scored_pairs",
    "logps/chosen": "scored_pairs",
    "logps/rejected": "scored_pairs",
    "loss/preference": "steps",
    "loss/value": "steps",
    "loss/rank": "steps",
    "loss/sft": "steps",
    "value/mse": "labelled",
    "value/accuracy": "value_pairs",
    "loss/policy": "steps",
    "policy/kl": "steps",
    "policy/entropy": "steps",
    "policy/ratio": "policy_members",
    "policy/clip_fraction": "policy_members",
    "policy/approx_kl": "policy_tokens",
}
SVPO_TERMS = ("loss/preference", "loss/value", "loss/rank", "loss/sft")
COUNTS = ("pairs", "scored_pairs", "labelled", "value_pairs", "steps", "tokens", "pairwise_tokens", "flops",
          "pairwise_flops", "policy_members", "policy_tokens",
          "policy_references", "policy_entropies")
# name -> how many numbers: one each, and the histograms of step scores
SIZES = {**dict.fromkeys((*MEANS, *COUNTS), 1), **dict.fromkeys(prm_metrics.HISTOGRAMS, prm_metrics.BINS)}
LENGTH = sum(SIZES.values())


class Sums:
    """A vector of fp64 sums by name; it lives on the CPU unless tensors from elsewhere are added."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor | float] = {}

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            value = value.detach().double() if isinstance(value, Tensor) else float(value)
            self.values[name] = self.values.get(name, 0.0) + value

    def restore(self, windows: list[dict[str, float | list[float]]], rank: int, world_size: int) -> None:
        """This process' own sums of a checkpoint; where it has another number of processes, the first takes all."""
        own = windows[rank:rank + 1] if len(windows) == world_size else windows if rank == 0 else []
        for window in own:
            self.add(**{name: torch.tensor(value, dtype=torch.float64) for name, value in window.items()})

    def vector(self) -> Tensor:
        """(LENGTH,) float64 on the CPU, every name's numbers behind each other."""
        given = {name: value for name, value in self.values.items() if isinstance(value, Tensor)}
        read = torch.cat([value.reshape(-1) for value in given.values()]).cpu() if given else torch.zeros(0)
        parts = dict(zip(given, read.split([value.numel() for value in given.values()]), strict=True))
        parts |= {name: torch.tensor([value], dtype=torch.float64) for name, value in self.values.items()
                  if name not in given}
        return torch.cat([parts.get(name, torch.zeros(size, dtype=torch.float64)) for name, size in SIZES.items()])

    def clear(self) -> None:
        self.values = {}


def by_name(vector: Tensor) -> dict[str, float | list[float]]:
    """The sums of a vector, as a checkpoint keeps them; histograms without an entry are left out."""
    parts = zip(SIZES, vector.split(list(SIZES.values())), strict=True)
    return {name: part.item() if part.numel() == 1 else part.tolist() for name, part in parts
            if part.numel() == 1 or bool(part.any())}


def as_vector(sums: dict[str, float | list[float]]) -> Tensor:
    return torch.cat([torch.tensor(sums.get(name, [0.0] * size), dtype=torch.float64).reshape(size)
                      for name, size in SIZES.items()])


def means(vector: Tensor) -> dict[str, float]:
    """Metrics from a vector of sums over all processes; a metric without members is left out."""
    sums = by_name(vector)
    found = {name: sums[name] / sums[count] for name, count in MEANS.items() if sums[count] > 0}
    if sums["pairwise_tokens"] > 0:
        found["compute/saved"] = 1 - sums["tokens"] / sums["pairwise_tokens"]
    if sums["pairwise_flops"] > 0:
        found["compute/saved_flops"] = 1 - sums["flops"] / sums["pairwise_flops"]
    histograms = (np.array(sums.get(name, [0.0] * prm_metrics.BINS)) for name in prm_metrics.HISTOGRAMS)
    scored = prm_metrics.step_metrics(*histograms)
    theirs = SVPO_TERMS if sums["policy_members"] else ("policy/", "loss/policy")
    theirs += tuple(name for name, count in (("policy/kl", "policy_references"), ("policy/entropy", "policy_entropies"))
                    if not sums[count])
    found = {name: value for name, value in found.items() if not name.startswith(theirs)}
    if scored:  # an objective on step scores has none of svpo_loss's terms
        found = {name: value for name, value in found.items() if not name.startswith("loss/")}
    return found | scored


def add_pack(sums: Sums, pack: dict, out, step_logps: Tensor | None, values: Tensor | None) -> None:
    """Add one pack's part. out: its SVPOLoss, whose terms are already over the whole step's counts."""
    batch = pack["batch"]
    pairs = batch.pairs
    P = len(pairs)
    sums.add(loss=out.loss, **{f"loss/{name}": getattr(out, name) for name in ("preference", "value", "rank", "sft")})
    sums.add(pairs=P)
    if P and step_logps is not None:
        sums.add(scored_pairs=P, **{
            "rewards/chosen": out.chosen_rewards.sum(),
            "rewards/rejected": out.rejected_rewards.sum(),
            "rewards/margins": (out.chosen_rewards - out.rejected_rewards).sum(),
            "rewards/accuracies": out.accuracy * P,
            "logps/chosen": step_logps[pairs[:, 0]].sum(),
            "logps/rejected": step_logps[pairs[:, 1]].sum(),
        })
    if values is not None:
        targets = batch.value_targets
        labelled = ~torch.isnan(targets)
        error = torch.where(labelled, values - torch.nan_to_num(targets), 0.0)
        sums.add(labelled=pack["counts"][1], **{"value/mse": error.square().sum()})
        if P:
            sums.add(value_pairs=P, **{"value/accuracy": out.value_accuracy * P})


def add_policy(sums: Sums, out, advantages: Tensor, plan, by_token: bool, has_kl: bool, has_entropy: bool) -> None:
    """Add one pack's part. out: its StepPolicyLoss over the whole step's totals; advantages (S,), NaN for no member."""
    sums.add(loss=out.loss, **{"loss/policy": out.policy, "policy/kl": out.kl, "policy/entropy": out.entropy},
             policy_references=has_kl, policy_entropies=has_entropy)
    member = ~advantages.isnan()
    tokens = (plan.counts * member).sum()
    members = tokens if by_token else (member & (plan.counts > 0)).sum()
    if bool(members):
        sums.add(policy_members=members, policy_tokens=tokens, **{
            "policy/ratio": out.ratio_mean * members, "policy/clip_fraction": out.clip_fraction * members,
            "policy/approx_kl": out.approx_kl * tokens})
