"""`stream_backward`: a tree's loss and gradients segment by segment, with the model's own cache, for any architecture.

Two passes replace one graph. The first, without gradients, walks the tree depth first and keeps every prediction's
numbers; the loss and its gradient in those numbers follow. The second walks again: on the way down a segment runs from
its parent's cache, detached; on the way up its backward takes its own predictions' upstreams and its children's
gradients of its cache, and hands its parent the gradient of the parent's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import fail, require_choice, require_number
from .passes import HeadCall, Stream, StreamOutputs
from .processes import all_reduce_gradients, held_back, require_whole, without_ddp
from .stream_check import check_once

OP = "stream_backward"


def stream_backward(model: nn.Module, batch: Any, loss_fn: Callable[[StreamOutputs], Any], *,
                    heads: Mapping[str, tuple[nn.Module, Tensor]] | None = None, reduction: str = "sum",
                    stats: Sequence[str] = (), max_tokens: int | None = None, recompute: bool = False,
                    loss_scale: float | Tensor = 1.0) -> Any:
    """Loss and gradients of a pack, computed segment by segment: exact for models that carry a state, too.

    Equivalent to a packed run, for models that take one:

        hidden = decoder(**batch.model_inputs(model)).last_hidden_state
        logps = linear_step_logps(hidden, labels=batch.plan, reduction=reduction, **head(model))
        loss_fn(StreamOutputs(logps, ...)).loss.mul(loss_scale).backward()

    Every token is computed twice (`recompute`: three times where others go on from it), whatever max_tokens; models
    with a state compute one more token where a segment of one token branches or ends. Memory holds one path's
    activations and one call of leaves, however many branches there are.

    Args:
        model: a Hugging Face causal LM, also inside PEFT, DistributedDataParallel or torch.compile. Its decoder is
            called with a cache of our own; no other part of it runs. Gradient checkpointing is off during the call.
        batch: a StepBatch from `pack_trees`, whole trees: T tokens, S steps, N predictions.
        loss_fn: StreamOutputs -> a scalar, or a NamedTuple with a scalar .loss; called once.
        heads: {name: (module, positions)}: module takes rows of hidden states (k, D) and gives (k, ...), row by row;
            positions (K,) int64, rows of the pack, in any order.
        reduction: "sum" | "mean" per step, or "none", as in `linear_step_logps`.
        stats: as in `linear_step_logps`; "entropy" and "logsumexp" are differentiable.
        max_tokens: leaves of one parent and one length share a call up to so many tokens; None: one segment a call, the
            least memory.
        recompute: keep caches only on the way down and run each segment again on the way up.
        loss_scale: multiplies the loss's gradient, not what is returned.

    Returns what loss_fn returned, detached. Gradients are added to .grad: of the model's parameters, of the heads', of
    whatever loss_fn reads. Under DistributedDataParallel (and not inside its no_sync()) .grad is averaged over the
    processes once, at the end, as DDP does.

    Raises ValueError, TypeError or IndexError for bad arguments, PackingError naming the layer for a model that cannot
    be streamed (dropout and noise on embeddings included; one with a state that is not among those tested is compared
    with a separate run at its first call, see `check_streaming`), and ValueError naming the parameter for one that is
    sharded and not gathered, for prompt-tuning adapters, and for a loss without a gradient.
    """
    require_choice(OP, "reduction", reduction, ("sum", "mean", "none"))
    if not isinstance(loss_scale, Tensor):
        require_number(OP, "loss_scale", loss_scale)
    rows = _checked_heads(heads)
    modules = {name: module for name, (module, _) in rows.items()}
    calls = {name: (_row_wise(without_ddp(modules[name])), positions) for name, (_, positions) in rows.items()}
    require_whole(OP, model, modules)
    run = Stream(OP, model, batch, calls, stats=stats, max_tokens=max_tokens)
    check_once(OP, model, batch)
    with held_back(model):
        result = run.backward(loss_fn, reduction=reduction, recompute=recompute, loss_scale=loss_scale)
    all_reduce_gradients(OP, model, modules.values())
    return result


def _row_wise(module: Callable[[Tensor], Tensor]) -> HeadCall:
    return lambda rows, places: module(rows)


def _checked_heads(heads: Any) -> Mapping[str, tuple[nn.Module, Tensor]]:
    for name, entry in (heads or {}).items():
        if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[0], nn.Module):
            fail(OP, f"heads[{name!r}]", "a pair (module, positions)", entry, TypeError)
        at = entry[1]
        if not isinstance(at, Tensor) or at.dim() != 1 or at.is_floating_point() or at.dtype == torch.bool:
            fail(OP, f"heads[{name!r}]", "positions (K,) of integers", at, TypeError)
    return heads or {}
