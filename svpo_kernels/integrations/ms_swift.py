"""ms-swift: --external_plugins .../integrations/ms_swift.py: its preference trainers read the logits once."""

from __future__ import annotations

from typing import Any

import torch
from swift.rlhf_trainers.rlhf_mixin import RLHFTrainerMixin
from torch import Tensor

from svpo_kernels import step_logps

_theirs = RLHFTrainerMixin.get_per_token_logps


def get_per_token_logps(self: Any, logits: Tensor, labels: Tensor, label_pad_token_id: int = -100,
                        reduction: str = "mean") -> tuple[Tensor, Tensor, Tensor]:
    """RLHFTrainerMixin's method: (log-probs, mean or summed logits, mask), each (B, L), 0 where not scored.

    Under sequence parallelism, and for what it refuses, ms-swift's own.
    """
    ours = logits.shape[:-1] == labels.shape and reduction in ("mean", "sum")
    if self.template.sequence_parallel_size != 1 or not ours:
        return _theirs(self, logits, labels, label_pad_token_id, reduction)
    mask = labels != label_pad_token_id
    logps = step_logps(logits, labels.masked_fill(~mask, -100), shift=0, reduction="none")
    with torch.no_grad():
        reduced = getattr(logits, reduction)(-1).masked_fill(~mask, 0)
    return logps, reduced, mask


# The mixin is the place: the plugin file is imported before a trainer exists.
RLHFTrainerMixin.get_per_token_logps = get_per_token_logps
