"""Streaming beside other processes: DDP's gradients met once at the end, sharded parameters refused by name.

Processes run different numbers of segments, so no collective may lie inside a segment's forward or backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._checks import fail
from ..models import wrappers

BUCKET = 25 << 20  # bytes of gradients that meet in one call, as in DDP


def require_whole(op: str, model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Raises ValueError naming the first parameter of model or heads that this process holds a shard of only."""
    for where, part in {"": model, **{f"heads[{name!r}] ": head for name, head in heads.items()}}.items():
        for name, parameter in part.named_parameters():
            if reason := _sharded(parameter):
                fail(op, "model", "whole on every process (gather its parameters once per optimizer step), because "
                     "processes run different numbers of segments", f"{where}{name}, {reason}")
        for name, module in part.named_modules():
            if type(module).__name__ == "FullyShardedDataParallel":
                fail(op, "model", "whole on every process, not wrapped", f"{where}{name or 'the model'}, wrapped in "
                     "FullyShardedDataParallel, which gathers in every forward")
            if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "unshard"):
                fail(op, "model", "whole on every process, not wrapped", f"{where}{name or 'the model'}, under "
                     "fully_shard, which gathers in every forward")


def _sharded(parameter: Tensor) -> str | None:
    status = getattr(parameter, "ds_status", None)  # DeepSpeed's ZeRO-3
    if status is not None and status.name != "AVAILABLE":
        return f"partitioned by ZeRO-3 ({status.name})"
    placements = tuple(getattr(parameter, "placements", ()))
    if any(placement.is_shard() for placement in placements):
        return f"a DTensor with placements {placements}"
    return None


def replicated(model: nn.Module) -> DistributedDataParallel | None:
    return next((part for part in wrappers(model) if isinstance(part, DistributedDataParallel)), None)


def without_ddp(module: nn.Module) -> nn.Module:
    """A module as its DDP calls it: DDP's own forward would make every segment's backward meet the others'."""
    ddp = replicated(module)
    return module if ddp is None else ddp.module


@contextlib.contextmanager
def held_back(model: nn.Module) -> Iterator[None]:
    """DDP's no_sync, where there is a DDP: gradients stay this process's own."""
    ddp = replicated(model)
    with ddp.no_sync() if ddp is not None else contextlib.nullcontext():
        yield


def all_reduce_gradients(op: str, model: nn.Module, heads: Iterable[nn.Module] = ()) -> None:
    """The mean over processes of all .grad of a DDP model and its heads, once; nothing inside the model's no_sync().

    Beside a model without DDP, heads with one meet. A parameter that no process has a gradient for keeps none. Raises
    ValueError for a DDP communication hook, which would not be called.
    """
    parts = [model, *heads] if replicated(model) is not None else [head for head in heads if replicated(head)]
    if not parts or not (first := replicated(parts[0])).require_backward_grad_sync:
        return
    own: dict[int, nn.Parameter] = {}
    for part in parts:
        ddp = replicated(part)
        if ddp is not None and getattr(ddp, "_comm_hooks", None):
            fail(op, "model", "a DistributedDataParallel without a communication hook", "one with a hook")
        ignored = ddp.parameters_to_ignore if ddp is not None else ()
        for name, parameter in (part if ddp is None else ddp.module).named_parameters():
            if parameter.requires_grad and name not in ignored:
                own[id(parameter)] = parameter
    _average(list(own.values()), first.process_group)


def _average(own: list[nn.Parameter], group: Any) -> None:
    if not own:
        return
    used = torch.tensor([p.grad is not None for p in own], dtype=torch.int32, device=own[0].device)
    torch.distributed.all_reduce(used, group=group)
    own = [p for p, count in zip(own, used.tolist(), strict=True) if count]
    for p in own:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    world = torch.distributed.get_world_size(group)
    for bucket in _buckets([p.grad for p in own]):
        flat = torch.cat([grad.reshape(-1) for grad in bucket]).div_(world)
        torch.distributed.all_reduce(flat, group=group)
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device, in order, about BUCKET bytes at a time."""
    alike: dict[Any, list[Tensor]] = {}
    for grad in grads:
        alike.setdefault((grad.dtype, grad.device), []).append(grad)
    for own in alike.values():
        bucket: list[Tensor] = []
        size = 0
        for grad in own:
            if bucket and size + grad.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        yield bucket
