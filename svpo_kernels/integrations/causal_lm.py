"""The loss of a Hugging Face causal LM without logits, on one model: for `Trainer` and for what is built on it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from svpo_kernels import head, linear_step_logps

from .._checks import fail
from ..models import text_config, unwrap


def use_fused_loss(model: nn.Module, *, logits_budget_mb: float = 512) -> Callable[[], None]:
    """A causal LM that, given labels, returns its loss and no logits; every other call is the model's own.

    model: also inside PEFT, before a data-parallel wrapper. The loss is transformers' own: the mean over the labels
    that are not -100, or their sum over num_items_in_batch; rows without a label never reach the head. Returns what
    undoes it. Raises ValueError as `head`, and for a model with a router loss, which is not part of this one.
    """
    inner = unwrap(model)
    head(inner)
    if getattr(text_config(inner), "output_router_logits", False):
        fail("use_fused_loss", "model", "one without a router loss (output_router_logits=False)", type(inner).__name__)
    theirs, own = inner.forward, "forward" in vars(inner)

    @functools.wraps(theirs.__func__)
    def forward(self: nn.Module, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None,
                num_items_in_batch: Any = None, logits_to_keep: Any = 0, **inputs: Any) -> Any:
        if labels is None and shift_labels is None:
            return theirs(*args, logits_to_keep=logits_to_keep, **inputs)
        inputs.pop("return_dict", None)
        hidden = self.base_model(*args, **inputs).last_hidden_state
        given = labels if shift_labels is None else shift_labels
        parts = head(self)
        parts |= {name: parts[name].to(hidden.dtype) for name in ("weight", "bias") if parts[name] is not None}
        logps = linear_step_logps(hidden, labels=given.to(hidden.device), shift=int(shift_labels is None),
                                  logits_budget_mb=logits_budget_mb, **parts)
        scored = (given[..., 1:] if shift_labels is None else given) != -100
        return CausalLMOutputWithPast(loss=-logps.sum() / (scored.sum() if num_items_in_batch is None
                                                           else num_items_in_batch))

    inner.forward = types.MethodType(forward, inner)

    def undo() -> None:
        if own:
            inner.forward = theirs
        else:
            del inner.forward

    return undo
