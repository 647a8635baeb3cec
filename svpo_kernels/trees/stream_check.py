"""Is a model's streamed run the same as separate runs? Asked of the model itself, before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import text_config, unwrap
from .cache import empty, holds_state
from .check import PackingCheck, Runs, hidden_states, judged, separate_runs, telling_path
from .passes import Stream, walk

OP = "check_streaming"
# Models with a state whose streamed runs are tested; the code of others may take a cache and leave the state in it
# unread (Mamba, Jamba, RecurrentGemma of transformers 5.24), so they are checked once.
TESTED = ("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "mamba2", "nemotron_h", "olmo_hybrid",
          "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba2")
CHECKED = "_svpo_streaming_checked"  # a model's own attribute
LEAST = 1e-5  # scans and delta rules keep fp32 in fp64 models too, and their chunks end where segments end


def check_once(op: str, model: nn.Module, batch: Any) -> None:
    """`check_streaming`, at the first call with a model that carries a state and is no tested one."""
    inner = unwrap(model)
    config = text_config(inner)
    if config.model_type in TESTED or getattr(inner, CHECKED, False) or not holds_state(empty(config)):
        return
    check_streaming(model, batch, op)
    setattr(inner, CHECKED, True)


@torch.no_grad()
def check_streaming(model: nn.Module, batch: Any, op: str = OP) -> PackingCheck:
    """One path of a pack, run segment by segment, against its separate run: as `check_packing`, for `stream_backward`.

    The noise is that of the path alone against itself padded to twice its length, and 1e-5 at least. Raises what
    `stream_backward` raises for a model that it refuses, and PackingError with the figures and the layer type where the
    runs differ.
    """
    stream = Stream(op, model, batch)
    path = telling_path(batch)
    inputs = separate_runs(batch, path, 2 * len(path))

    def layers(every: bool = True) -> list[Runs]:
        alone, padded = (hidden_states(stream.model, each, every) for each in inputs)
        ours = _along(stream, path, every)
        return [Runs(a, b[0], c[0, : len(path)]) for a, b, c in zip(ours, alone, padded, strict=True)]

    with stream.uncheckpointed():
        last = layers(every=False)[-1]
        return judged(op, "streamed", stream.model, batch, path, last, layers, LEAST)


def _along(stream: Stream, path: Tensor, every: bool) -> list[Tensor]:
    """Hidden states (L, D) of a path's rows from the units that own them; of every layer, or the last alone."""
    wanted = set(path.tolist())
    on = [bool(wanted & set(unit.rows[unit.own].tolist())) for unit in stream.units]
    kept: dict[int, Any] = {}
    found: list[tuple[Tensor, list[Tensor]]] = []

    def enter(index: int) -> None:
        unit = stream.units[index]
        if not on[index] or (unit.parent >= 0 and unit.parent not in kept):
            return
        output, made, _ = stream.call(unit, kept.get(unit.parent), leaves=False, output_hidden_states=every)
        states = output.hidden_states if every else (output.last_hidden_state,)
        found.append((unit.rows[unit.own], [hidden[unit.own.to(hidden.device)] for hidden in states]))
        if unit.inner:
            kept[index] = made

    walk(stream.units, enter, lambda index: kept.pop(index, None))
    rows = torch.cat([own for own, _ in found])
    place = torch.empty(int(rows.max()) + 1, dtype=torch.int64)
    place[rows] = torch.arange(len(rows))
    picked = place[path.cpu()]
    layers = zip(*(states for _, states in found), strict=True)
    return [torch.cat(parts)[picked.to(parts[0].device)] for parts in layers]
