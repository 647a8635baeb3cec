"""`packing: stream`: the packs of an optimizer step, whole trees, run segment by segment (see `trees/stream.py`).

A batch says by `streamed`, the most tokens of a call of leaves, that it is to be streamed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svpo_kernels.models import head
from svpo_kernels.plan import StepPlan
from svpo_kernels.trees import processes
from svpo_kernels.trees.packing import StepBatch
from svpo_kernels.trees.passes import Stream, StreamOutputs

from .heads import TokenHead

OP = "svpo train"


class StreamedPack:
    """A batch cut for a StepModel: log-probs (reduction and stats as in `StepModel.forward`), the values of its head,
    and with labels (S,) their losses."""

    def __init__(self, model: Any, batch: StepBatch, want_logps: bool, labels: Tensor | None, reduction: str = "sum",
                 stats: tuple[str, ...] = ()) -> None:
        self.model, self.labels, self.want_logps, self.reduction = model, labels, want_logps, reduction
        if not want_logps:
            none = torch.zeros(0, dtype=torch.int64)
            batch = StepBatch(batch, plan=StepPlan.from_predictions(none, none, none, 0).to(batch.input_ids.device))
        heads = {} if model.v_head is None else {"head": (self._head, batch.value_positions)}
        self.stream = Stream(OP, model.lm, batch, heads, stats=stats, max_tokens=batch.streamed, backend=model.backend,
                             logits_budget_mb=model.logits_budget_mb)

    def _head(self, rows: Tensor, places: Tensor) -> Tensor:
        """Rows (k, D) of some steps' ends -> (k, 1) scores, or (k, 2) scores and losses."""
        own = {}
        if isinstance(self.model.v_head, TokenHead):
            own = {"lm_head": head(self.model.causal_lm)}
        scores, losses = self.model.v_head(
            rows[None], torch.arange(len(rows), device=rows.device), None if self.labels is None else
            self.labels[places], backend=self.model.backend, **own)
        return torch.stack([scores] if losses is None else [scores, losses.to(scores.dtype)], dim=1)

    def named(self, found: StreamOutputs) -> dict[str, Tensor | None]:
        """What `StepModel.forward` returns."""
        columns = found.heads["head"].unbind(1) if found.heads else (None,)
        return {"step_logps": found.logps if self.want_logps else None, "values": columns[0],
                "step_losses": columns[1] if len(columns) > 1 else None, "entropy": found.stats.get("entropy")}

    def forward(self) -> dict[str, Tensor | None]:
        """Without gradients: the first pass alone."""
        return self.named(self.stream.outputs(self.reduction))


class StreamingMixin:
    """The part of the trainer that runs an optimizer step of streamed packs."""

    def stream_step(self, model: nn.Module, packs: list[dict[str, Any]], counts: tuple) -> list[Tensor]:
        """Losses of the packs, times the number of processes; gradients of all of them meet once, at the end.

        Gradient checkpointing, where it is on, means that segments are run again on the way up.
        """
        inner = self.accelerator.unwrap_model(model)
        processes.require_whole(OP, model, {})
        scaler = getattr(self.accelerator, "scaler", None)
        scale = torch.ones((), device=self.args.device)
        scale = (scale if scaler is None else scaler.scale(scale)) * self.args.world_size
        again = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
        losses = []
        self.accelerator.gradient_state._set_sync_gradients(True)
        with processes.held_back(model):
            for pack in packs:
                losses.append(self._stream_pack(inner, pack, counts, scale, again) * self.args.world_size)
        processes.all_reduce_gradients(OP, model)
        return losses

    def _stream_pack(self, model: Any, pack: dict[str, Any], counts: tuple, scale: Tensor, again: bool) -> Tensor:
        pack, add_counted = self.prepared(pack, self._sums)
        batch = pack["batch"]
        with self.accelerator.autocast():
            references = self._references_of(batch, self.wants_logps)
            run = StreamedPack(model, batch, self.wants_logps, self.objective.labels(batch), **self.objective.asked)
            out = run.stream.backward(
                lambda found: self.objective.loss(run.named(found), pack, references, counts, self._sums),
                reduction=run.reduction, recompute=again, loss_scale=scale)
        add_counted()
        return out.loss
