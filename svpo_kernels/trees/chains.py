"""Sequences without padding: a chain is a tree, so that one row of tokens holds any number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import StepPlan
from .packing import StepBatch


def without_padding(batch: StepBatch) -> StepBatch:
    """A padded batch, (B, L), as one row of T = its tokens, each sequence a chain: the same steps, loss and gradients.

    subtree_end is the end of each token's own chain, position_ids begin anew with each. `chains` says that nothing
    branches, so that attention over positions that begin anew (flash_attention_2) can run it too.
    """
    if batch.lengths is None:
        return batch
    lengths, L = batch.lengths, batch.input_ids.shape[1]
    held = (torch.arange(L) < lengths[:, None]).reshape(-1)
    row = held.cumsum(0) - 1  # of each padded row that is held

    def chained(x: Tensor) -> Tensor:
        return x.reshape(-1)[held][None]

    plan = batch.plan
    return StepBatch(
        batch, input_ids=chained(batch.input_ids), position_ids=chained(batch.position_ids),
        subtree_end=lengths.cumsum(0).repeat_interleave(lengths), lengths=None, chains=True,
        value_positions=row[batch.value_positions], step_ends=row[batch.step_ends],
        plan=StepPlan.from_predictions(row[plan.rows.repeat_interleave(plan.row_start.diff())], plan.labels,
                                       plan.step_ids, plan.num_steps))
