"""LLaMA-Factory v1: kernel_config: {name: svpo}, once this module is imported (it registers the name)."""

from __future__ import annotations

from typing import Any

from llamafactory.v1.core.base_trainer import BaseTrainer
from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin
from torch import Tensor

from svpo_kernels import head, linear_step_logps

from ..models import decoder, unwrap

_MARK = "_svpo_head"
_theirs = BaseTrainer.compute_log_probs


@KernelPlugin("svpo").register()
def apply(model: Any, **_: Any) -> Any:
    """The model, marked: its trainers take log-probs from `linear_step_logps`. Raises ValueError as `head`."""
    head(model)
    setattr(unwrap(model), _MARK, True)
    return model


def compute_log_probs(self: Any, model: Any, batch: dict[str, Any]) -> Tensor:
    """BaseTrainer's method, (B, L - 1) fp32; of a model without the mark it is LLaMA-Factory's own.

    Rows whose labels are not scored are 0, and never reach the head.
    """
    inner = unwrap(model)
    if not getattr(inner, _MARK, False):
        return _theirs(self, model, batch)
    inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()
              if name in ("input_ids", "attention_mask", "position_ids")}
    hidden = decoder(inner)(**inputs, use_cache=False).last_hidden_state
    labels = batch["labels"].to(self.device, non_blocking=True)
    return linear_step_logps(hidden, labels=labels, shift=1, reduction="none", **head(inner))[:, 1:]


# v1 hands its kernels the model alone and computes log-probs from logits in this method: no narrower place is offered.
BaseTrainer.compute_log_probs = compute_log_probs
