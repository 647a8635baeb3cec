"""Log-probs of steps from hidden states and lm_head: reference -> modes -> walks -> inputs -> row_kernels ->
branching -> upstream -> head -> shards -> products -> cpu -> (triton_ -> cuda) -> this file.

The (T, V) logits are never made: scored rows are gathered, the products run in chunks, and all that lies between them
is one pass of a kernel over the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .._autograd import once_differentiable
from .._checks import fail, require_float, require_number, require_positive
from ..plan import PlanTensors, StepPlan, flatten
from ..step_logps import as_plan, check_bounds, check_options, fake_rows
from . import modes, shards
from .inputs import (
    autocast,
    check_head,
    check_lora,
    check_stats,
    compact,
    require_temperatures,
    row_temperatures,
    spread,
)
from .linear_top_k import TopK, linear_top_k
from .modes import Options

__all__ = ["TopK", "linear_step_logps", "linear_top_k"]

# -- raw ops ----------------------------------------------------------------------------------------------------------


def _check_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    plan: list[Tensor],
    vocab_size: int,
    *_: Any,
) -> None:
    op, view = "linear_step_logps", PlanTensors(*plan)
    check_bounds(op, view, hidden.shape[0] * hidden.shape[1], vocab_size, "hidden")
    require_temperatures(op, temperatures, view.rows)


def _fake_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    plan: list[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # 0.7 s that eager mode does not need

    o, view = Options(*options), PlanTensors(*plan)
    R, N = view.rows.shape[0], view.labels.shape[0]
    D = hidden.shape[-1] + (0 if lora_a is None else lora_a.shape[0])
    share = shards.share(o)
    limit = modes.limits(share.widest, hidden, o)
    if free_unbacked_symbols(R):
        limit = modes.Budget(*map(int, limit))
    saved = modes.saved_shape(o.mode, R, D, share.columns, limit.kept(R))
    out, *kept_rows = fake_rows(hidden, plan, o.reduction)
    dtypes = {"top1": torch.bool}
    asked = (out.new_empty(N if name in o.stats else 0, dtype=dtypes.get(name, out.dtype)) for name in modes.STATS)
    entropy = out.new_empty(R if o.entropy else 0)
    return out, *asked, *kept_rows, entropy, out.new_empty(N), hidden.new_empty(saved)


def _fake_bwd(
    grad_out: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *rest: Any,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    needs = list(rest[8])
    needs[1] = needs[1] and main_grad is None
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for t, needed in zip((hidden, weight, bias, lora_a, lora_b), needs, strict=True)
    )


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? temperatures, "
_OPTIONS = (
    "SymInt vocab_size, float temperature, float softcap, str reduction, float logits_budget_mb, str keep, "
    "str[] stats, float lora_scaling, str group, int[] shards, "
)
dispatch.define(
    __name__,
    f"linear_step_logps_fwd({_INPUTS}Tensor[] plan, {_OPTIONS}str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    check=_check_fwd,
)
_BWD = (
    f"Tensor grad_out, Tensor grad_entropy, Tensor grad_logsumexp, {_INPUTS}Tensor logp, Tensor row_max, "
    f"Tensor row_logsum, Tensor row_entropy, Tensor label_z0, Tensor saved, Tensor[] plan, bool[] needs, "
    f"{_OPTIONS}str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
dispatch.define(__name__, f"linear_step_logps_bwd({_BWD}", _fake_bwd)
# The same, with dW added to main_grad instead of returned.
dispatch.define(
    __name__,
    f"linear_step_logps_bwd_(Tensor(a!) main_grad, {_BWD}",
    lambda main_grad, *args: _fake_bwd(*args, main_grad=main_grad),
    call=lambda backend, main_grad, *args: backend.linear_step_logps_bwd(*args, main_grad=main_grad),
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class MainGrad(NamedTuple):
    """A parameter and the fp32 tensor in which its gradient is added up over micro-batches."""

    weight: Tensor
    grad: Tensor

    @classmethod
    def of(cls, op: str, weight: Tensor) -> MainGrad | None:
        """Of `weight.main_grad`, where there is one."""
        grad = None if torch.compiler.is_compiling() else getattr(weight, "main_grad", None)
        if grad is None or not weight.requires_grad:
            return None
        wide = torch.promote_types(weight.dtype, torch.float32)
        if grad.shape != weight.shape or grad.dtype != wide or grad.stride(-1) != 1:
            fail(op, "weight.main_grad", f"{tuple(weight.shape)} {wide}, rows contiguous", grad)
        return cls(weight, grad)


class _LinearStepLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        temperatures: Tensor | None,
        main: MainGrad | None,
        options: Options,
        backend: str,
        *plan: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (hidden, weight, bias, lora_a, lora_b, temperatures)
        out, *found = torch.ops.svpo.linear_step_logps_fwd(*inputs, list(plan), *options, backend)
        stats, kept = dict(zip(modes.STATS, found, strict=False)), found[len(modes.STATS) :]
        ctx.save_for_backward(*inputs, *kept, *plan)
        ctx.main, ctx.options, ctx.backend = main, options, backend
        ctx.mark_non_differentiable(*(stats[name] for name in options.stats if name not in modes.DIFFERENTIABLE))
        return out, *(stats[name] for name in options.stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:5])
        inputs, kept, plan = saved[:6], saved[6:12], list(saved[12:])
        given = dict(zip(ctx.options.stats, grad_stats, strict=True))
        none = grad_out.new_empty(0)
        upstreams = (given[name].contiguous() if name in given else none for name in modes.DIFFERENTIABLE)
        args = (grad_out.contiguous(), *upstreams, *inputs, *kept, plan, list(needs), *ctx.options, ctx.backend)
        if ctx.main is None or not needs[1]:
            grads = torch.ops.svpo.linear_step_logps_bwd(*args)
        else:
            grads = torch.ops.svpo.linear_step_logps_bwd_(ctx.main.grad, *args)
            needs[1] = False
            if hasattr(ctx.main.weight, "grad_added_to_main_grad"):
                ctx.main.weight.grad_added_to_main_grad = True
        grads = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return *grads, None, None, None, None, *(None for _ in plan)


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
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    logits_budget_mb: float = 512,
    process_group: Any = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    stats: Sequence[str] = (),
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each step from hidden states and the lm_head, without the (T, V) logits.

    Equivalent to:

    ```python
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits + lora_scaling * (hidden @ lora_a.T) @ lora_b.T             # with low-rank factors
    out = step_logps(logits, labels, step_ids, shift=shift, ...)
    ```

    Only the scored rows are gathered and multiplied. Differentiable in hidden, weight, bias, lora_a and lora_b,
    exactly, for any upstream gradient: 2 matrix products forward + backward when only hidden needs a gradient (frozen
    head) or hidden and the low-rank factors, 3 when weight trains, one more for the rows that the budget cannot keep.

    Args:
        hidden: (B, L, D) or (T, D), fp32, bf16, fp16 (fp64 on the reference); last dimension contiguous.
        weight: (V, D), hidden's dtype (under autocast both are cast, as `F.linear` does). Where it has an fp32
            `main_grad`, as Megatron gives its parameters, the backward adds the gradient there instead of returning
            it: weight.grad stays as it was, and `grad_added_to_main_grad` is set where the attribute exists.
        labels, step_ids, shift, num_steps, reduction, softcap, vocab_size, backend: as in `step_logps`.
            The tensor form reads two numbers (N and S) from the device to leave unscored rows out; a `StepPlan` reads
            none. Old versions of torch.compile (2.6; not 2.11) take the tensor form only with
            torch._dynamo.config.capture_dynamic_output_shape_ops = True, and with num_steps where there are step_ids.
        bias: (V,) or None.
        temperature: a number, or an fp32 tensor (fp64 for fp64) without gradient: with a plan one of each distinct row,
            (R,) like plan.rows; in tensor form shaped like labels, that of labels[t] at t, or (B,), one of each
            sequence. On the CPU a scored row's that is not > 0 is an error; on a device its results are NaN.
        logit_scale: z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature, > 0.
        logits_budget_mb: MiB; bounds all (rows, V) memory of the op, kept and scratch together. A chunk has at least 64
            rows on the CPU and 256 on CUDA even when the budget is smaller.
        process_group: the processes that share the vocabulary: weight, bias and lora_b are this one's rows of them, in
            rank order, as many as it likes (none, or padding alone, too); a DTensor sharded on dim 0 brings its group.
            All else is the same on every process, hidden's gradient too, which is complete everywhere; labels and
            vocab_size count over all shards. The first call with a weight exchanges sizes on the host;
            calls with a group are tested outside of torch.compile only.
        lora_a, lora_b, lora_scaling: (r, D), (V, r): low-rank factors on the head as `peft` puts them there (without
            dropout), in hidden's dtype or fp32, never merged into weight.
        stats: names of what to return beside it, per prediction, of z over the vocab_size columns, p = softmax(z):
            "entropy" -sum p log p and "logsumexp", both differentiable; without gradient "log_sum_sq_probs" log sum
            p^2, "mean_logit" sum z / vocab_size, "top1" (bool) whether the label is the first column with the largest z
            (of logits in hidden's dtype, as `F.linear` gives them). No product more, but for one: entropy's gradient is
            no multiple of the unit gradient, so a frozen head with it takes 3. The last three read z once more.

    Returns:
        (S,), (N,) or labels' shape, fp32 (fp64 for fp64). A step without predictions gives 0 and takes no gradient.
        With stats a pair of it and a dict of them by name, (N,) with a plan, labels' shape with 0 or False where
        unscored in tensor form.

    Raises:
        TypeError, ValueError, IndexError as `step_logps`.

    A reference policy under the same head is a call of its own under `torch.no_grad()`: one product and nothing kept.
    Its rows stacked under the policy's would take part in every product of the backward.

    Source: the products follow dL/dz = G (onehot - softmax(z)), as in Cut Your Losses (arXiv 2411.09009), with the
    upstream factored out of the unit gradient so that it can be applied after the product.
    """
    op = "linear_step_logps"
    given = weight
    process_group, (weight, bias, lora_a, lora_b) = shards.local(
        op, process_group, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b
    )
    require_float(op, "hidden", hidden)
    require_float(op, "weight", weight)
    if bias is not None:
        require_float(op, "bias", bias)
    hidden, weight, bias, lora_a, lora_b = autocast(hidden, weight, bias, lora_a, lora_b)
    check_head(op, hidden, weight, bias)
    check_lora(op, hidden, weight, lora_a, lora_b)
    require_positive(op, "logits_budget_mb", logits_budget_mb)
    require_number(op, "lora_scaling", lora_scaling)
    plan = as_plan(op, hidden, labels, step_ids, shift, num_steps, compact)
    needs, needs_lora = _requires_grad(hidden, weight, bias), any(_requires_grad(lora_a, lora_b))
    stats = check_stats(op, stats)
    hidden_needs, weight_needs, bias_needs = needs
    mode = modes.mode(hidden_needs, weight_needs, bias_needs, torch.is_grad_enabled(), "entropy" in stats, needs_lora,
                      logsumexp="logsumexp" in stats)
    group = ""
    sizes: tuple[int, ...] = ()
    if process_group is not None:
        group = process_group.group_name
        same = {"hidden": (hidden.dtype, *hidden.shape), "weight": weight.shape[1], "vocab_size": vocab_size,
                "labels": [index.shape[0] for index in plan[:-1]], "logits_budget_mb": logits_budget_mb,
                "lora_a": None if lora_a is None else tuple(lora_a.shape), "mode": mode, "stats": stats}
        sizes = shards.layout(op, given, weight.shape[0], process_group, same)
    own = temperature if isinstance(temperature, Tensor) else None
    base = check_options(op, sum(sizes) if group else weight.shape[0], vocab_size,
                         1.0 if isinstance(temperature, Tensor) else temperature, softcap, reduction, backend)
    require_positive(op, "logit_scale", logit_scale)
    scale = float(logit_scale)  # a c in front of z0 is temperature / c and softcap / c
    base = base._replace(temperature=base.temperature / scale, softcap=base.softcap / scale)
    temperatures = None if own is None else row_temperatures(op, own, plan, labels, shift, hidden)
    temperatures = temperatures / scale if own is not None and scale != 1.0 else temperatures
    more: Any = (float(logits_budget_mb), mode, stats, float(lora_scaling), group, sizes)
    options = Options(*base, *more)
    batched = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
    main = MainGrad.of(op, given)
    out, *found = _LinearStepLogps.apply(
        batched, weight, bias, lora_a, lora_b, temperatures, main, options, backend, *plan
    )
    if isinstance(labels, Tensor) and (found or reduction == "none"):
        *_, scored = flatten(labels, step_ids, shift)
        out = spread(out, scored, labels.shape) if reduction == "none" else out
        found = [spread(values, scored, labels.shape) for values in found]
    return (out, dict(zip(stats, found, strict=True))) if stats else out


def _requires_grad(*tensors: Tensor | None) -> list[bool]:
    return [t is not None and t.requires_grad for t in tensors]
