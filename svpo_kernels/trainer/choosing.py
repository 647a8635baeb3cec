"""`packing: auto`: every way that the model can run is planned for some steps, its FLOPs counted, the least taken.

Counted as `compute/*` counts them: trees as they are cut and attended to (T * T under a dense mask), each distinct
sequence without padding, streaming at 4/3. A new way is one more name in `ways` and in `_flops`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from svpo_kernels.models import unwrap
from svpo_kernels.trees import flops
from svpo_kernels.trees.attention import unpackable
from svpo_kernels.trees.streamable import unstreamable

from .planner import EpochPlanner, PackSettings
from .train_data import TrainData

AUTO = "auto"
STEPS = 8  # optimizer steps that are planned for the choice, spread over the epoch
NAMES = {"tree": "trees", "distinct": "each distinct sequence once", "stream": "streamed trees"}


def ways(config: Any, lm: nn.Module, data: TrainData) -> tuple[list[str], str | None]:
    """The ways that may be taken, the first where two cost the same, and why trees are not among them, if so.

    Streaming computes a tree's tokens at 4/3, so it is counted where trees cannot be packed, or where attention is
    exact and only a cut that repeats much can make a pack dearer; under a dense mask small calls would win on paper.
    """
    inner = unwrap(lm)
    reason = unpackable(inner)
    found = [] if reason else ["tree"]
    whole = not (config.fsdp or config.deepspeed) and config.disable_dropout and unstreamable(inner) is None
    if data.rollouts is None or reason:
        found.append("distinct")
    if whole and (reason or flops.attention_kind(inner.config) == "exact"):
        found.append("stream")
    return found, reason


def choose(config: Any, lm: nn.Module, data: TrainData, seed: int,
           sized: Callable[[str], PackSettings]) -> tuple[PackSettings, str]:
    """The settings of the way with the least FLOPs, and the line that says it. sized: the settings of a way."""
    names, reason = ways(config, lm, data)
    why = f" (no packed trees: {reason})" if reason else ""
    if len(names) == 1:
        return sized(names[0]), f"packing: {names[0]} (auto: the only way for this model and these data){why}"
    settings, cost, steps = {}, {}, 0
    for name in names:
        settings[name] = sized(name)
        planner = EpochPlanner(data, settings[name], seed)
        sample = np.unique(np.linspace(0, len(planner) - 1, STEPS).astype(int)).tolist()
        steps = len(sample)
        packs = [pack for step in sample for pack in planner.packs(0, step)]
        cost[name] = _flops(unwrap(lm).config, name, [pack["batch"] for pack in packs], config.gradient_checkpointing)
    least = min(names, key=cost.__getitem__)
    others = ", ".join(f"{cost[name] / steps:.3g} {NAMES[name]}" for name in names if name != least)
    return settings[least], (f"packing: {least} (auto: {cost[least] / steps:.3g} FLOPs a step as {NAMES[least]}, "
                             f"against {others}; counted over {steps} step{'s' if steps > 1 else ''}){why}")


def _flops(config: Any, name: str, batches: list[Any], recompute: bool) -> int:
    if name == "stream":
        return sum(flops.stream_flops(config, batch, recompute) for batch in batches)
    return flops.count_flops(config, batches, flops.attention_kind(config)).packed
