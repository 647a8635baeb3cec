"""Log-probs of steps from logits: reference -> cpu -> (triton_ -> cuda) -> this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .._autograd import once_differentiable
from .._checks import (
    checks_devices,
    fail,
    require_choice,
    require_float,
    require_integer,
    require_positive,
    require_size,
)
from ..plan import PlanTensors, StepPlan, check_layout, largest_step, scored_bounds, sequences

REDUCTIONS = ("sum", "mean", "none")


class Options(NamedTuple):
    """What turns logits into log-probs, as the raw ops take it. softcap 0.0 means none."""

    vocab_size: int
    temperature: float
    softcap: float
    reduction: str


# -- raw ops ----------------------------------------------------------------------------------------------------------


def check_bounds(op: str, plan: PlanTensors, num_rows: int, vocab_size: int, row_source: str) -> None:
    """Values against shapes. A plan made on a device has no bounds: it is read back under SVPO_CHECK=1 only."""
    if plan.bounds.numel():
        bounds = plan.bounds
    elif checks_devices():
        bounds = scored_bounds(plan)
    else:
        return
    low, label, row, step = bounds.tolist()
    S = plan.step_start.shape[0] - 1
    if low < 0:
        fail(op, "labels", "in [0, V), or -100 for not scored", f"a label of {low}", IndexError)
    if label >= vocab_size:
        fail(op, "labels", f"below the vocabulary of {vocab_size}", f"a label of {label}", IndexError)
    if row >= num_rows:
        fail(op, "plan", f"made for {row_source} with {num_rows} rows", f"row {row}", IndexError)
    if step >= S:
        fail(op, "step_ids", f"below num_steps = {S}", f"a step id of {step}", IndexError)


def _check_fwd(logits: Tensor, plan: list[Tensor], vocab_size: int, *_: Any) -> None:
    check_bounds("step_logps", PlanTensors(*plan), logits.shape[0] * logits.shape[1], vocab_size, "logits")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Outputs are fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_rows(source: Tensor, plan: list[Tensor], reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of out, logp, row_max and row_logsum; the statistics are kept in fp32 by kernels, not by the reference."""
    view, dtype = PlanTensors(*plan), accumulator(source.dtype)
    R, N, S = view.rows.shape[0], view.labels.shape[0], view.step_start.shape[0] - 1
    out, logp, row_max, row_logsum = (source.new_empty(size, dtype=dtype)
                                      for size in (N if reduction == "none" else S, N, R, R))
    return out, logp, row_max, row_logsum


dispatch.define(
    __name__,
    "step_logps_fwd(Tensor logits, Tensor[] plan, SymInt vocab_size, float temperature, float softcap, str reduction, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, plan, vocab_size, temperature, softcap, reduction: fake_rows(logits, plan, reduction),
    check=_check_fwd,
)
_BWD = (
    "(Tensor grad_out, {logits} logits, Tensor logp, Tensor row_max, Tensor row_logsum, Tensor[] plan, "
    "SymInt vocab_size, float temperature, float softcap, str reduction, str backend) -> "
)
dispatch.define(
    __name__,
    "step_logps_bwd" + _BWD.format(logits="Tensor") + "Tensor",
    lambda grad_out, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _bwd_inplace(backend: Any, *args: Any) -> None:
    backend.step_logps_bwd(*args, inplace=True)


dispatch.define(
    __name__, "step_logps_bwd_" + _BWD.format(logits="Tensor(a!)") + "()", lambda *_: None, call=_bwd_inplace
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class _StepLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, options: Options, inplace: bool, backend: str, *plan: Tensor) -> Tensor:
        out, logp, row_max, row_logsum = torch.ops.svpo.step_logps_fwd(logits, list(plan), *options, backend)
        ctx.save_for_backward(logits, logp, row_max, row_logsum, *plan)
        ctx.options, ctx.inplace, ctx.backend = options, inplace, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        logits, logp, row_max, row_logsum, *plan = ctx.saved_tensors
        args = (grad_out.contiguous(), logits, logp, row_max, row_logsum, plan, *ctx.options, ctx.backend)
        if ctx.inplace:
            # Torch's own version check does not see logits that saved_tensors_hooks hand through.
            if getattr(ctx, "spent", False):
                raise RuntimeError("step_logps: a second backward with inplace_backward=True: the logits are gone")
            ctx.spent = True
            torch.ops.svpo.step_logps_bwd_(*args)
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = torch.ops.svpo.step_logps_bwd(*args)
        return grad, None, None, None, *(None for _ in plan)


# -- public function --------------------------------------------------------------------------------------------------


def step_logps(
    logits: Tensor,
    labels: Tensor | StepPlan,
    step_ids: Tensor | None = None,
    *,
    shift: int | None = None,
    num_steps: int | None = None,
    reduction: str = "sum",
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each step under `logits`, differentiable in `logits`.

    Equivalent to (shift=1, reduction="sum"):

        logp = torch.log_softmax(logits[:, :-1].float() / temperature, -1)
        logp = logp.gather(-1, labels[:, 1:, None]).squeeze(-1)          # and 0 where labels are -100
        out = logp.new_zeros(S).index_add(0, step_ids[:, 1:].flatten(), logp.flatten())

    Each scored row is read once; rows that are not scored are never read.

    Args:
        logits: (B, L, V) or (T, V), fp32, bf16, fp16 (fp64 on the reference); the last dimension contiguous, any other
            strides.
        labels: (B, L) or (T,) integers, -100 = not scored; or a `StepPlan`, which stands for labels, step_ids, shift
            and num_steps.
        step_ids: shaped like labels: the step of labels[t], global over the batch, < 0 = not scored. None: one step
            per sequence.
        shift: 1 when labels[t] is token t (Hugging Face labels: row t - 1 predicts it), 0 when labels[t] is what row t
            predicts. No default with labels.
        num_steps: S. Without it the largest step id, scored or not, is read from the device; without step_ids it is the
            number of sequences.
        reduction: "sum" or "mean" over the predictions of a step; "none": per prediction, (N,) by ascending position
            with a plan, labels' shape with 0 where unscored in tensor form.
        temperature: z is divided by it.
        softcap: z = softcap * tanh(logits / softcap) before the temperature; None = none.
        vocab_size: columns from there on (padding of the head) never count. Default V.
        inplace_backward: write the gradient over the logits. They must be neither a leaf nor a view, and nothing else
            may need them: their version is bumped, so that a second backward or another consumer raises. Without
            effect under torch.compile, which plans memory itself.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        (S,), (N,) or labels' shape, fp32 (fp64 for fp64). A step without predictions gives 0 and takes no gradient.

    Raises:
        TypeError: no shift with labels, or a dtype that is not supported.
        ValueError: a shape, device, layout or option that does not fit.
        IndexError: a label, row or step out of range (CPU index tensors, and a device's under SVPO_CHECK=1; without it
            the result is NaN there).

    Source: autoregressive log-likelihood of a span, as DPO (arXiv 2305.18290, eq. 7) and Step-DPO (arXiv 2406.18629,
    eq. 2) use it.
    """
    op = "step_logps"
    require_float(op, "logits", logits)
    if logits.dim() not in (2, 3):
        fail(op, "logits", "(B, L, V) or (T, V)", logits)
    options = check_options(op, logits.shape[-1], vocab_size, temperature, softcap, reduction, backend)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward and logits.requires_grad and (logits.is_leaf or logits._is_view()):
        fail(
            op,
            "logits",
            "neither a leaf nor a view with inplace_backward=True (its memory is overwritten)",
            "a leaf" if logits.is_leaf else "a view",
        )
    plan = as_plan(op, logits, labels, step_ids, shift, num_steps, _dense)
    batched = logits if logits.dim() == 3 else logits.unsqueeze(0)
    out = _StepLogps.apply(batched, options, inplace_backward, backend, *plan)
    return out.view(labels.shape) if reduction == "none" and isinstance(labels, Tensor) else out


def check_options(
    op: str, V: int, vocab_size: int | None, temperature: float, softcap: float | None, reduction: str, backend: str
) -> Options:
    """What `step_logps` and `linear_step_logps` share."""
    require_choice(op, "backend", backend, dispatch.BACKENDS)
    require_choice(op, "reduction", reduction, REDUCTIONS)
    require_positive(op, "temperature", temperature)
    if softcap is not None:
        require_positive(op, "softcap", softcap)
    if vocab_size is None:
        vocab_size = V
    require_size(op, "vocab_size", vocab_size)
    if vocab_size > V:
        fail(op, "vocab_size", f"between 0 and V = {V}", vocab_size)
    return Options(vocab_size, float(temperature), float(softcap or 0.0), reduction)


def as_plan(
    op: str,
    source: Tensor,
    labels: Tensor | StepPlan,
    step_ids: Tensor | None,
    shift: int | None,
    num_steps: int | None,
    build: Callable[..., PlanTensors],
) -> PlanTensors:
    """The plan of a call: the one given, or what `build` makes of the tensor form, on the device of `source`."""
    if isinstance(labels, StepPlan):
        for name, value in (("step_ids", step_ids), ("shift", shift), ("num_steps", num_steps)):
            if value is not None:
                fail(op, name, "left out when a StepPlan is given", value)
        plan = labels if labels.buffer.device == source.device else labels.to(source.device, non_blocking=True)
        return plan.tensors
    require_integer(op, "labels", labels)
    if step_ids is not None:
        require_integer(op, "step_ids", step_ids)
    check_layout(op, labels, step_ids, shift)
    if labels.shape != source.shape[:-1]:
        fail(op, "labels", f"shaped like the rows {tuple(source.shape[:-1])}", labels)
    if num_steps is None and step_ids is None:
        num_steps = sequences(labels)
    elif num_steps is not None:
        require_size(op, "num_steps", num_steps)
    return build(labels, step_ids, shift, num_steps, source.device)


def _dense(
    labels: Tensor, step_ids: Tensor | None, shift: int, num_steps: int | None, device: torch.device
) -> PlanTensors:
    """The tensor form as it stands, unscored rows included: nothing is read when num_steps is known.

    Made where the labels are: index tensors on the CPU are checked before they are copied.
    """
    if num_steps is None:
        assert step_ids is not None  # without them `as_plan` counts the sequences
        num_steps = largest_step(step_ids) + 1
    return StepPlan.from_tensors(labels, step_ids, shift=shift, num_steps=num_steps).to(device).tensors
