"""Log-probs of steps from hidden states and lm_head: reference -> modes -> products -> cpu -> this file.

The (T, V) logits are never made: scored rows are gathered, the products run in chunks, and all that lies between them
is one pass of a kernel over the chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .._autograd import once_differentiable
from .._checks import fail, require_float, require_positive, require_same_device, require_shape
from ..plan import PlanTensors, StepPlan, flatten
from ..step_logps import accumulator, as_plan, check_bounds, check_options, fake_rows
from . import modes


class Options(NamedTuple):
    """The scalars of the raw ops, in their order. softcap 0.0 means none."""

    vocab_size: int
    temperature: float
    softcap: float
    reduction: str
    logits_budget_mb: float
    mode: str


# -- raw ops ----------------------------------------------------------------------------------------------------------


def _check_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: list[Tensor], vocab_size: int, *_: Any
) -> None:
    check_bounds("linear_step_logps", PlanTensors(*plan), hidden.shape[0] * hidden.shape[1], vocab_size, "hidden")


def _fake_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: list[Tensor],
    vocab_size: int,
    temperature: float,
    softcap: float,
    reduction: str,
    logits_budget_mb: float,
    mode: str,
) -> tuple[Tensor, ...]:
    rows, labels = PlanTensors(*plan).rows, PlanTensors(*plan).labels
    kept = modes.budget(vocab_size, hidden.element_size(), logits_budget_mb, hidden.device.type, mode).kept
    saved = modes.saved_shape(mode, rows.shape[0], hidden.shape[-1], vocab_size, kept)
    label_z0 = hidden.new_empty(labels.shape[0], dtype=accumulator(hidden.dtype))
    return *fake_rows(hidden, plan, reduction), label_z0, hidden.new_empty(saved)


def _fake_bwd(grad_out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-3:]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for t, needed in zip((hidden, weight, bias), needs, strict=True)
    )


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, "
_OPTIONS = (
    "Tensor[] plan, SymInt vocab_size, float temperature, float softcap, str reduction, "
    "float logits_budget_mb, str mode, "
)
dispatch.define(
    __name__,
    f"linear_step_logps_fwd({_INPUTS}{_OPTIONS}str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    check=_check_fwd,
)
dispatch.define(
    __name__,
    f"linear_step_logps_bwd(Tensor grad_out, {_INPUTS}Tensor logp, Tensor row_max, Tensor row_logsum, Tensor label_z0, "
    f"Tensor saved, {_OPTIONS}bool needs_hidden, bool needs_weight, bool needs_bias, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class _LinearStepLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options, backend: str, *plan: Tensor
    ) -> Tensor:
        out, *kept = torch.ops.svpo.linear_step_logps_fwd(hidden, weight, bias, list(plan), *options, backend)
        ctx.save_for_backward(hidden, weight, bias, *kept, *plan)
        ctx.options, ctx.backend = options, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, logp, row_max, row_logsum, label_z0, saved, *plan = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.svpo.linear_step_logps_bwd(
            grad_out.contiguous(),
            hidden,
            weight,
            bias,
            logp,
            row_max,
            row_logsum,
            label_z0,
            saved,
            plan,
            *ctx.options,
            *needs,
            ctx.backend,
        )
        given = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return *given, None, None, *(None for _ in plan)


# -- public function --------------------------------------------------------------------------------------------------


def linear_step_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | StepPlan,
    step_ids: Tensor | None = None,
    *,
    shift: int | None = None,
    num_steps: int | None = None,
    bias: Tensor | None = None,
    reduction: str = "sum",
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    logits_budget_mb: float = 512,
    process_group: Any = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each step from hidden states and the lm_head, without the (T, V) logits.

    Equivalent to:

        logits = torch.nn.functional.linear(hidden, weight, bias)
        out = step_logps(logits, labels, step_ids, shift=shift, ...)

    Only the scored rows are gathered and multiplied. Differentiable in hidden, weight and bias, exactly, for any
    upstream gradient: 2 matrix products forward + backward when only hidden needs a gradient (frozen head), 3 when the
    head trains and U fits the budget, 4 for the rows beyond it.

    Args:
        hidden: (B, L, D) or (T, D), fp32, bf16, fp16 (fp64 on the reference); last dimension contiguous.
        weight: (V, D), hidden's dtype (under autocast both are cast, as `F.linear` does).
        labels, step_ids, shift, num_steps, reduction, temperature, softcap, vocab_size, backend: as in `step_logps`.
            The tensor form reads two numbers (N and S) from the device to leave unscored rows out; a `StepPlan` reads
            none. Old versions of torch.compile (2.6; not 2.11) take the tensor form only with
            torch._dynamo.config.capture_dynamic_output_shape_ops = True.
        bias: (V,) or None.
        logits_budget_mb: MiB; bounds all (rows, V) memory of the op, kept and scratch together. A chunk has at least 64
            rows on the CPU and 256 on CUDA even when the budget is smaller.
        process_group, lora_a, lora_b, lora_scaling, return_entropy: not in this version; anything but the default
            raises.

    Returns:
        (S,), (N,) or labels' shape, fp32 (fp64 for fp64). A step without predictions gives 0 and takes no gradient.

    Raises:
        TypeError, ValueError, IndexError as `step_logps`.

    Source: the products follow dL/dz = G (onehot - softmax(z)), as in Cut Your Losses (arXiv 2411.09009), with the
    upstream factored out of the unit gradient so that it can be applied after the product.
    """
    op = "linear_step_logps"
    for name, value, default in (
        ("process_group", process_group, None),
        ("lora_a", lora_a, None),
        ("lora_b", lora_b, None),
        ("lora_scaling", lora_scaling, 1.0),
        ("return_entropy", return_entropy, False),
    ):
        if value is not default and value != default:
            fail(op, name, f"{default} (this version does not support it yet)", value)
    require_float(op, "hidden", hidden)
    require_float(op, "weight", weight)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head(op, hidden, weight, bias)
    require_positive(op, "logits_budget_mb", logits_budget_mb)
    base = check_options(op, weight.shape[0], vocab_size, temperature, softcap, reduction)
    plan = as_plan(op, hidden, labels, step_ids, shift, num_steps, _compact)
    needs = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    mode = modes.mode(*needs, torch.is_grad_enabled())
    options = Options(*base, float(logits_budget_mb), mode)
    batched = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
    out = _LinearStepLogps.apply(batched, weight, bias, options, backend, *plan)
    if reduction == "none" and isinstance(labels, Tensor):
        return _spread(out, labels, step_ids, shift)
    return out


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The casts that `F.linear` makes under autocast."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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


def _compact(
    labels: Tensor, step_ids: Tensor | None, shift: int, num_steps: int | None, device: torch.device
) -> PlanTensors:
    """The tensor form without its unscored rows, so that no product is spent on them; made where the labels are."""
    *plan, bounds = torch.ops.svpo.compact_plan(labels, step_ids, shift, num_steps)
    return PlanTensors(*(index.to(device) for index in plan), bounds)


def _spread(out: Tensor, labels: Tensor, step_ids: Tensor | None, shift: int) -> Tensor:
    """(N,) by ascending position -> labels' shape, 0 where unscored."""
    scored = flatten(labels, step_ids, shift)[-1].to(out.device)
    return out.new_zeros(scored.shape).masked_scatter(scored, out).view(labels.shape)
