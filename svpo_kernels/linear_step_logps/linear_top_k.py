"""`linear_top_k`: schema and public function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .._checks import fail, require_float, require_number, require_positive, require_size
from ..plan import PlanTensors, StepPlan, flatten, no_bounds
from ..step_logps import accumulator, as_plan, check_bounds, check_options
from .inputs import autocast, check_head, check_lora, compact, require_temperatures, row_temperatures, spread
from .top_k import unlabelled


class TopK(NamedTuple):
    """ids int64 and their log-probs, by descending log-prob."""

    ids: Tensor
    logps: Tensor


def _check(hidden: Tensor, *args: Any) -> None:
    temperatures, plan, vocab_size = args[4], PlanTensors(*args[5]), args[7]
    check_bounds("linear_top_k", plan, hidden.shape[0] * hidden.shape[1], vocab_size, "hidden")
    require_temperatures("linear_top_k", temperatures, plan.rows)


def _fake(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = args[5][0].shape[0], args[6]
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=accumulator(hidden.dtype))


dispatch.define(
    __name__.rpartition(".")[0],
    "linear_top_k(Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? temperatures, "
    "Tensor[] plan, SymInt k, SymInt vocab_size, float temperature, float softcap, float logits_budget_mb, "
    "float lora_scaling, str backend) -> (Tensor, Tensor)",
    _fake,
    check=_check,
)


@torch.no_grad()
def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    labels: Tensor | StepPlan | None = None,
    step_ids: Tensor | None = None,
    *,
    shift: int | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    logits_budget_mb: float = 512,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    backend: str = "auto",
) -> TopK:
    """The k likeliest columns of each scored row and their log-probs, without the (T, V) logits and without gradient.

    Equivalent to torch.log_softmax(z, -1).topk(k) with z as in `linear_step_logps`, ties to the lower id. For
    distillation: a student's log-probs at a teacher's ids are `linear_step_logps` of a plan in which each row predicts
    them all (`StepPlan.from_predictions`).

    Args:
        hidden, weight, step_ids, shift, bias, temperature, softcap, logit_scale, vocab_size, logits_budget_mb, lora_a,
            lora_b, lora_scaling, backend: as in `linear_step_logps`.
        k: columns of each row, 1 ... vocab_size.
        labels: which rows: those of a `StepPlan`, those that predict what a tensor scores, or None: all.

    Returns:
        TopK(ids, logps): int64 and fp32 (fp64 for fp64), (R, k) by plan.rows with a plan; labels' shape + (k,) with ids
        -1 and log-probs 0 where unscored; (B, L, k) or (T, k) without labels. By descending log-prob, of logits rounded
        to hidden's dtype as `F.linear` gives them.

    Raises:
        TypeError, ValueError, IndexError as `linear_step_logps`; ValueError for a k that is not in 1 ... vocab_size.
    """
    op = "linear_top_k"
    require_float(op, "hidden", hidden)
    require_float(op, "weight", weight)
    hidden, weight, bias, lora_a, lora_b = autocast(hidden, weight, bias, lora_a, lora_b)
    check_head(op, hidden, weight, bias)
    check_lora(op, hidden, weight, lora_a, lora_b)
    require_positive(op, "logits_budget_mb", logits_budget_mb)
    require_number(op, "lora_scaling", lora_scaling)
    require_positive(op, "logit_scale", logit_scale)
    own = temperature if isinstance(temperature, Tensor) else None
    o = check_options(op, weight.shape[0], vocab_size, 1.0 if isinstance(temperature, Tensor) else temperature, softcap,
                      "none", backend)
    require_size(op, "k", k)
    if not 1 <= k <= o.vocab_size:
        fail(op, "k", f"in 1 ... {o.vocab_size}, the columns that count", k)
    rows = hidden.shape[:-1]
    if labels is None:
        for name, value in (("step_ids", step_ids), ("shift", shift)):
            if value is not None:
                fail(op, name, "left out without labels", value)
        plan = unlabelled(torch.arange(rows.numel(), device=hidden.device))._replace(bounds=no_bounds())
    else:
        plan = as_plan(op, hidden, labels, step_ids, shift, None, compact)
    scale = float(logit_scale)
    temperatures = None if own is None else row_temperatures(op, own, plan, labels, shift, hidden) / scale
    batched = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
    ids, logps = torch.ops.svpo.linear_top_k(
        batched, weight, bias, lora_a, lora_b, temperatures, list(plan), k, o.vocab_size, o.temperature / scale,
        o.softcap / scale, float(logits_budget_mb), float(lora_scaling), backend,
    )
    if labels is None:
        return TopK(ids.view(*rows, k), logps.view(*rows, k))
    if isinstance(labels, StepPlan):
        return TopK(ids, logps)
    *_, scored = flatten(labels, step_ids, shift)
    return TopK(spread(ids, scored, labels.shape, -1), spread(logps, scored, labels.shape))
