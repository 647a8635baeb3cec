"""The same pairs run three ways, side by side: naive pairs, each distinct sequence once, packed trees.

Loss and gradients must agree; tokens, FLOPs and seconds are what was run, padding counted, not an estimate.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from .metrics import Sums
from .sampler import EpochPlanner, TrainData
from .trainer import SVPOTrainer

WAYS = ("pairs", "distinct", "tree")


@dataclass
class Measured:
    """One way of running some pairs, forward and backward. gradient_error: largest difference from the naive gradient,
    relative to its largest element; tokens and flops of one pass; seconds: median over the rounds."""

    way: str
    tokens: int
    flops: float
    seconds: float
    loss: float
    gradient_error: float


def compare(trainer: SVPOTrainer, data: TrainData, max_tokens: int, rounds: int = 3) -> list[Measured]:
    """Forward and backward of all pairs in `data` in every way, the ways interleaved, on an otherwise idle trainer.

    max_tokens: most tokens of one batch, the same for every way. Raises RuntimeError when gradients differ by more than
    a thousandth: figures of runs that compute different things are worth nothing.
    """
    trainer.prepare_reference(data)
    plans = {}
    for way in WAYS:
        settings = replace(trainer.settings, packing=way, max_tokens=max_tokens, world_size=1, min_packs=1,
                           pairs_per_step=data.num_pairs + len(data.trees))
        plans[way] = EpochPlanner(data, settings, None).share(0, 0, 0)
    found: dict[str, tuple[float, Sums, torch.Tensor]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            start = time.perf_counter()
            found[way] = _run(trainer, plans[way])
            seconds[way].append(time.perf_counter() - start)
    naive = found["pairs"][2]
    rows = []
    for way in WAYS:
        loss, sums, gradient = found[way]
        error = ((gradient - naive).abs().max() / naive.abs().max().clamp_min(1e-30)).item()
        if not error < 1e-3:
            raise RuntimeError(f"svpo: gradients of packing={way} differ from the naive run's by {error:.2g}")
        values = sums.values
        rows.append(Measured(way, int(values["tokens"]), values["flops"], statistics.median(seconds[way]), loss, error))
    return rows


def _run(trainer: SVPOTrainer, share: dict[str, Any]) -> tuple[float, Sums, torch.Tensor]:
    """(loss, sums, gradient flattened on the CPU) of one optimizer step without the update."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.train()
    model.zero_grad(set_to_none=True)
    sums, loss = Sums(), 0.0
    for pack in share["packs"]:
        out, _ = trainer.pack_loss(model, pack, share["counts"], sums)
        out.loss.backward()
        loss += out.loss.item()
    gradient = torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters()
                          if parameter.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss, sums, gradient
