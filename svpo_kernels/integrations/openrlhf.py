"""OpenRLHF's log-probs and a process-reward loss of logits: names to import in its place, and `use_step_logps`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from svpo_kernels import prm_loss, step_logps


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """openrlhf.models.utils.log_probs_from_logits: (B, L, V) or (T, V), labels of the same rows -> fp32.

    The logits are read once, in their own dtype, with fp32 sums; they are left as they are (OpenRLHF divides in place).
    """
    return step_logps(logits, labels, shift=0, reduction="none", temperature=temperature)


@contextlib.contextmanager
def use_step_logps() -> Iterator[None]:
    """OpenRLHF's actor takes its log-probs from here inside the block. It offers no other place: the name in
    openrlhf.models.actor is exchanged and put back on exit."""
    import openrlhf.models.actor as actor

    before = actor.log_probs_from_logits
    actor.log_probs_from_logits = log_probs_from_logits
    try:
        yield
    finally:
        actor.log_probs_from_logits = before


class PRMLoss(nn.Module):
    """Process rewards from two rows of the vocabulary, as OpenRLHF's PRM loss had them until 2026: soft labels too.

    Called with hidden (B, L, D), the head's weight (V, D), input_ids (B, L), labels (B, L) in [0, 1] at the placeholder
    token, elsewhere ignored: the mean cross-entropy of (good, bad) over the placeholders. Prompt rows are not read.
    """

    def __init__(self, placeholder_token_id: int, good_token_id: int, bad_token_id: int):
        super().__init__()
        self.placeholder, self.tokens = placeholder_token_id, (good_token_id, bad_token_id)

    def forward(self, hidden: Tensor, weight: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        positions = (input_ids.reshape(-1) == self.placeholder).nonzero().squeeze(1)
        rows = weight[torch.tensor(self.tokens, device=weight.device)]
        return prm_loss(hidden, positions, labels.reshape(-1)[positions].float(), rows, good=0)
