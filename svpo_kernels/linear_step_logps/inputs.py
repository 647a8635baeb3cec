"""What the public functions of `linear_step_logps` make of their arguments: checks, casts, plans, shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import can_look, fail, require_float, require_no_grad, require_same_device, require_shape
from ..plan import PlanTensors, StepPlan, sequences
from .modes import STATS


def autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The casts that `F.linear` makes under autocast."""
    kind = hidden.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, *others
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), *(None if t is None else t.to(dtype) for t in others)


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() not in (2, 3):
        fail(op, "hidden", "(B, L, D) or (T, D)", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        fail(op, "weight", f"(V, D) with D = {hidden.shape[-1]} like hidden", weight)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            if value.dtype != hidden.dtype:
                fail(op, name, f"{hidden.dtype} like hidden (cast one of them, or use autocast)", value, TypeError)
            require_same_device(op, name, value, "hidden", hidden)
    if bias is not None:
        require_shape(op, "bias", bias, (weight.shape[0],), "(V,)")


def check_lora(op: str, hidden: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None) -> None:
    for name, value, other in (("lora_a", lora_a, lora_b), ("lora_b", lora_b, lora_a)):
        if value is None and other is not None:
            fail(op, name, "given: lora_a and lora_b come together", value)
    if lora_a is None:
        return
    dtypes = (hidden.dtype, torch.promote_types(hidden.dtype, torch.float32))
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        require_float(op, name, value)
        if value.dtype not in dtypes or value.dtype != lora_a.dtype:
            fail(op, name, f"{hidden.dtype} like hidden, or float32, the same for both factors", value, TypeError)
        require_same_device(op, name, value, "hidden", hidden)
    rank = lora_a.shape[0] if lora_a.dim() else 0
    if not rank:
        fail(op, "lora_a", "(r, D) with r >= 1", lora_a)
    require_shape(op, "lora_a", lora_a, (rank, hidden.shape[-1]), "(r, D)")
    require_shape(op, "lora_b", lora_b, (weight.shape[0], rank), "(V, r)")


def compact(
    labels: Tensor, step_ids: Tensor | None, shift: int, num_steps: int | None, device: torch.device
) -> PlanTensors:
    """The tensor form without its unscored rows, so that no product is spent on them; made where the labels are."""
    *plan, bounds = torch.ops.svpo.compact_plan(labels, step_ids, shift, num_steps)
    return PlanTensors(*(index.to(device) for index in plan), bounds)


def spread(out: Tensor, scored: Tensor, shape: torch.Size, fill: float = 0) -> Tensor:
    """(N, ...) by ascending position -> (*shape, ...), `fill` where unscored. scored (T,): `plan.flatten`'s last."""
    tail = out.shape[1:]
    scored = scored.to(out.device).view(-1, *(1 for _ in tail)).expand(-1, *tail)
    return out.new_full(scored.shape, fill).masked_scatter(scored, out).view(*shape, *tail)


def check_stats(op: str, stats: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stats, str) or not all(name in STATS for name in stats):
        fail(op, "stats", f"a sequence of names among {', '.join(map(repr, STATS))}", stats)
    return tuple(dict.fromkeys(stats))


def row_temperatures(
    op: str, temperature: Tensor, plan: PlanTensors, labels: Tensor | StepPlan | None, shift: int | None, hidden: Tensor
) -> Tensor:
    """(R,) temperatures of a plan's rows from the forms that a user has. Values are looked at in the raw op."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    require_no_grad(op, temperature=temperature)
    if temperature.dtype != dtype:
        fail(op, "temperature", f"a number, or a {str(dtype).removeprefix('torch.')} tensor", temperature, TypeError)
    rows = plan.rows
    if labels is None:
        require_shape(op, "temperature", temperature, hidden.shape[:-1], "one of each row")
        return temperature.reshape(-1).to(rows.device)
    if isinstance(labels, StepPlan):
        require_shape(op, "temperature", temperature, rows.shape, "one of each distinct row, (R,)")
        return temperature.to(rows.device)
    if temperature.shape != labels.shape:
        if temperature.shape != (sequences(labels),):
            fail(op, "temperature", f"shaped like labels {tuple(labels.shape)}, or one of each sequence, "
                 f"({sequences(labels)},)", temperature)
        temperature = temperature.unsqueeze(-1).expand(sequences(labels), labels.shape[-1])
    # a temperature is of the label at its place, which the row `shift` before it predicts
    return temperature.reshape(-1).to(rows.device)[rows.clamp_min(0) + shift]


def require_temperatures(op: str, temperatures: Tensor | None, rows: Tensor) -> None:
    """Values of the rows' temperatures, inside a raw op: on the CPU, and on a device under SVPO_CHECK=1."""
    if temperatures is not None and can_look(temperatures):
        wrong = temperatures[~(temperatures > 0) & (rows >= 0)]
        if wrong.numel():
            fail(op, "temperature", "> 0", float(wrong[0]))
