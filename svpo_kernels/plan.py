"""StepPlan: which row predicts which label for which step, made once and used by every op.

A plan is seven index arrays, all int64 and all views of one buffer, so that it moves to a device in one copy:

    rows        (R,)    distinct rows that predict something; -1 is padding: no row, never read
    row_start   (R + 1,) predictions of row r are row_start[r] ... row_start[r + 1] - 1
    labels      (N,)    the predicted ids, by ascending position
    first       (N,)    the first prediction with the same (row, label): equal targets are computed once
    step_ids    (N,)    the step each prediction counts for
    step_order  (N,)    predictions sorted by step; step s owns step_order[step_start[s] ... step_start[s + 1] - 1]
    step_start  (S + 1,)

Predictions from row_start[R] on belong to no row: padding. Sizes are shapes, never attributes, so that a compiled
graph does not specialise on them. `bounds` is a CPU tensor (smallest and largest label, largest row, largest step):
the raw ops compare it with the shapes they are given, without reading anything from the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._checks import INTEGERS, fail, require_size
from .dispatch import library

IGNORE = -100  # torch's ignore_index: a label that is not scored


class PlanTensors(NamedTuple):
    """A plan as the raw ops see it."""

    rows: Tensor
    row_start: Tensor
    labels: Tensor
    first: Tensor
    step_ids: Tensor
    step_order: Tensor
    step_start: Tensor
    bounds: Tensor

    def labels_from(self, column: int) -> Tensor:
        """(N,) labels counted from a column."""
        return self.labels - column if column else self.labels


def _sizes(R: int, N: int, S: int) -> list[int]:
    return [R, R + 1, N, N, N, N, S + 1]


class StepPlan:
    """Scored rows, their labels and steps. Build one with `from_step_ids` or `from_predictions`, on the CPU."""

    def __init__(self, buffer: Tensor, bounds: Tensor, R: int, N: int, S: int) -> None:
        self.buffer, self.bounds = buffer, bounds
        parts = torch.split(buffer, _sizes(R, N, S))
        self.rows, self.row_start, self.labels, self.first, self.step_ids, self.step_order, self.step_start = parts

    # -- building ---------------------------------------------------------------------------------------------

    @classmethod
    def from_step_ids(cls, labels: Any, step_ids: Any, *, shift: int, num_steps: int | None = None) -> StepPlan:
        """A plan from per-token labels and step ids, as a collator has them.

        labels: (B, L) or (T,) integers, -100 = not scored. step_ids: same shape, < 0 = not scored, global over the
        batch; None: one step per sequence. shift: 1 when labels[t] is token t itself (Hugging Face), 0 when labels[t]
        is what row t predicts. num_steps: S, by default the largest step id + 1, scored or not (without step_ids the
        number of sequences). Rows are indices into the flattened (B * L) rows.

        Raises ValueError or TypeError for shapes, dtypes or a missing shift, IndexError for a step id >= num_steps or
        a negative label other than -100.
        """
        op = "StepPlan.from_step_ids"
        labels = as_index(op, "labels", labels)
        step_ids = None if step_ids is None else as_index(op, "step_ids", step_ids)
        check_layout(op, labels, step_ids, shift)
        if num_steps is None:
            num_steps = sequences(labels) if step_ids is None else largest_step(step_ids) + 1
        rows, labels, step_ids, scored = flatten(labels, step_ids, shift)
        position = torch.nonzero(scored).squeeze(1)
        rows, labels, step_ids = rows[position], labels[position], step_ids[position]
        S = check_num_steps(op, num_steps, step_ids)
        R = N = position.numel()
        each = torch.arange(N + 1, device="cpu")
        return cls._assemble(rows, each, labels, each[:N], step_ids, *step_csr(step_ids, S), R=R, N=N, S=S)

    @classmethod
    def from_predictions(cls, rows: Any, labels: Any, step_ids: Any, num_steps: int) -> StepPlan:
        """A plan from a list of predictions: row rows[n] predicts labels[n] for step step_ids[n].

        rows, labels, step_ids: (N,) integers on the CPU. One row may predict several labels and one (row, label) may
        count for several steps. A label of -100 or a step id < 0 is not scored and left out. Predictions are kept by
        ascending row, ties in the order given. num_steps: S.

        Raises ValueError or TypeError for shapes and dtypes, IndexError for a negative row, a negative label other
        than -100, or a step id >= num_steps.
        """
        op = "StepPlan.from_predictions"
        rows, labels, step_ids = (
            as_index(op, name, value) for name, value in (("rows", rows), ("labels", labels), ("step_ids", step_ids))
        )
        for name, value in (("labels", labels), ("step_ids", step_ids)):
            if value.shape != rows.shape or value.dim() != 1:
                fail(op, name, f"(N,) like rows {tuple(rows.shape)}", value)
        rows, labels, step_ids = (values.numpy() for values in (rows, labels, step_ids))  # torch's threads cost more
        scored = (labels != IGNORE) & (step_ids >= 0)
        if not scored.all():
            rows, labels, step_ids = rows[scored], labels[scored], step_ids[scored]
        if len(rows) and int(rows.min()) < 0:
            fail(op, "rows", ">= 0", f"a row of {int(rows.min())}", IndexError)
        S = check_num_steps(op, num_steps, torch.from_numpy(step_ids))
        order = np.argsort(rows, kind="stable")
        rows, labels, step_ids = rows[order], labels[order], step_ids[order]
        distinct, per_row = np.unique(rows, return_counts=True)
        row_start = np.concatenate([[0], np.cumsum(per_row)])
        step_order = np.argsort(step_ids, kind="stable")
        step_start = np.concatenate([[0], np.cumsum(np.bincount(step_ids, minlength=S))])
        parts = (distinct, row_start, labels, first_of_equal(rows, labels, per_row), step_ids, step_order, step_start)
        return cls._assemble(*map(torch.from_numpy, parts), R=len(distinct), N=len(labels), S=S)

    @classmethod
    def from_tensors(cls, labels: Tensor, step_ids: Tensor | None, *, shift: int, num_steps: int) -> StepPlan:
        """The tensor form as a plan, on the tensors' own device and without a host read.

        Every position is a prediction (R = N = T); those that are not scored have row -1. Used by the ops; a collator
        wants `from_step_ids`, which leaves them out.
        """
        rows, labels, step_ids, scored = flatten(labels, step_ids, shift)
        T = rows.shape[0]
        rows = torch.where(scored, rows, -1)
        each = torch.arange(T + 1, device=rows.device)
        key = torch.where(scored, step_ids, num_steps)
        order = torch.argsort(key, stable=True)
        start = torch.searchsorted(key[order], torch.arange(num_steps + 1, device=rows.device))
        kept = torch.where(scored, labels, 0)
        step_ids = torch.where(scored, step_ids, 0)
        seen = torch.where(scored, labels, -1), torch.where(scored, step_ids, -1)
        bounds = value_bounds(rows, kept, *seen) if rows.device.type == "cpu" else no_bounds()
        return cls(torch.cat([rows, each, kept, each[:T], step_ids, order, start]), bounds, T, T, num_steps)

    @classmethod
    def _assemble(
        cls,
        rows: Tensor,
        row_start: Tensor,
        labels: Tensor,
        first: Tensor,
        step_ids: Tensor,
        step_order: Tensor,
        step_start: Tensor,
        *,
        R: int,
        N: int,
        S: int,
    ) -> StepPlan:
        bounds = value_bounds(rows, labels, labels, step_ids)
        if int(bounds[0]) < 0:
            fail("StepPlan", "labels", ">= 0, or -100 for not scored", f"a label of {int(bounds[0])}", IndexError)
        buffer = torch.cat([rows, row_start, labels, first, step_ids, step_order, step_start])
        return cls(buffer, bounds, R, N, S)

    # -- what a user asks of it -------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return self.step_start.shape[0] - 1

    @property
    def num_predictions(self) -> int:
        return self.labels.shape[0]

    @property
    def counts(self) -> Tensor:
        """(S,) int64: predictions of each step."""
        return self.step_start[1:] - self.step_start[:-1]

    @property
    def tensors(self) -> PlanTensors:
        return PlanTensors(
            self.rows,
            self.row_start,
            self.labels,
            self.first,
            self.step_ids,
            self.step_order,
            self.step_start,
            self.bounds,
        )

    def to(self, device: Any, non_blocking: bool = False) -> StepPlan:
        """The same plan on another device: one copy."""
        return self._with(self.buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StepPlan:
        return self._with(self.buffer.pin_memory())

    def pad_to(self, rows: int, predictions: int, steps: int) -> StepPlan:
        """A plan of exactly R = rows, N = predictions, S = steps, for CUDA-graph replay with fixed shapes.

        Padding is computed nowhere and counts nowhere; padded steps give 0. Raises ValueError when the plan is larger.
        """
        R, N, S = self.rows.shape[0], self.num_predictions, self.num_steps
        for name, size, new in (("rows", R, rows), ("predictions", N, predictions), ("steps", S, steps)):
            if new < size:
                fail("StepPlan.pad_to", name, f">= {size}, the plan's own", new)

        def grow(values: Tensor, size: int, fill: int | Tensor) -> Tensor:
            more = values.new_zeros(size - values.shape[0]) + fill
            return torch.cat([values, more])

        tail = torch.arange(N, predictions, device=self.buffer.device)
        buffer = torch.cat(
            [
                grow(self.rows, rows, -1),
                grow(self.row_start, rows + 1, self.row_start[-1]),
                grow(self.labels, predictions, 0),
                torch.cat([self.first, tail]),
                grow(self.step_ids, predictions, 0),
                torch.cat([self.step_order, tail]),
                grow(self.step_start, steps + 1, self.step_start[-1]),
            ]
        )
        return StepPlan(buffer, self.bounds, rows, predictions, steps)

    def _with(self, buffer: Tensor) -> StepPlan:
        return StepPlan(buffer, self.bounds, self.rows.shape[0], self.num_predictions, self.num_steps)

    def __reduce__(self) -> tuple[Any, ...]:
        sizes = (self.rows.shape[0], self.num_predictions, self.num_steps)
        return StepPlan, (self.buffer, self.bounds, *sizes)

    def __repr__(self) -> str:
        return (
            f"StepPlan(rows={self.rows.shape[0]}, predictions={self.num_predictions}, steps={self.num_steps}, "
            f"device={self.buffer.device})"
        )


# -- pieces shared by the builders ----------------------------------------------------------------------------------


def as_index(op: str, argument: str, value: Any) -> Tensor:
    """Tensor, array or sequence of integers -> int64 CPU tensor."""
    if not isinstance(value, Tensor):
        try:
            value = np.asarray(value)
        except ValueError:
            fail(op, argument, "integers in rows of one length", "a ragged list")
        if value.dtype.kind not in "iu" and value.size:
            fail(op, argument, "integers", f"{value.shape} {value.dtype}", TypeError)
        value = torch.from_numpy(value.astype(np.int64, order="C"))
    if value.dtype not in INTEGERS:
        fail(op, argument, "integers", value, TypeError)
    return value.detach().to("cpu", torch.int64)


def check_layout(op: str, labels: Tensor, step_ids: Tensor | None, shift: int | None) -> None:
    """Shapes and shift of the tensor form; no value is read."""
    if shift is None:
        raise TypeError(
            f"{op}: shift must be given with labels: shift=1 when labels[t] is token t itself (Hugging Face labels: "
            "row t - 1 predicts it), shift=0 when labels[t] is already what row t predicts. The wrong one gives a "
            "finite loss and no error, so there is no default"
        )
    if shift not in (0, 1):
        fail(op, "shift", "0 or 1", shift)
    if labels.dim() not in (1, 2):
        fail(op, "labels", "(B, L) or (T,)", labels)
    if step_ids is not None and (step_ids.shape != labels.shape or step_ids.device != labels.device):
        fail(op, "step_ids", f"shaped like labels {tuple(labels.shape)} and on {labels.device}", step_ids)


def check_num_steps(op: str, num_steps: int, step_ids: Tensor) -> int:
    require_size(op, "num_steps", num_steps)
    largest = largest_step(step_ids)
    if largest >= num_steps:
        fail(op, "step_ids", f"below num_steps = {num_steps}", f"a step id of {largest}", IndexError)
    return int(num_steps)


def sequences(labels: Tensor) -> int:
    """The steps of the tensor form without step ids."""
    return labels.shape[0] if labels.dim() == 2 else 1


def largest_step(step_ids: Tensor) -> int:
    """-1 where there is none."""
    return max(int(step_ids.max()), -1) if step_ids.numel() else -1


def flatten(labels: Tensor, step_ids: Tensor | None, shift: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, L) or (T,) -> flat rows, labels, step ids and the mask of what is scored, all (T,) int64 / bool.

    A label never leaves its sequence: with shift = 1 the first token of each sequence has no row that predicts it.
    """
    B, L = labels.shape if labels.dim() == 2 else (1, labels.shape[0])
    device = labels.device
    position = torch.arange(B * L, device=device)
    if step_ids is None:
        step_ids = position // max(L, 1)
    labels, step_ids = labels.reshape(-1).to(torch.int64), step_ids.reshape(-1).to(torch.int64)
    scored = (labels != IGNORE) & (step_ids >= 0)
    if shift:
        scored = scored & (position % max(L, 1) >= shift)
    return position - shift, labels, step_ids, scored


def step_csr(step_ids: Tensor, S: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(step_ids, stable=True)
    counts = torch.bincount(step_ids, minlength=S)
    return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def first_of_equal(rows: np.ndarray, labels: np.ndarray, per_row: np.ndarray) -> np.ndarray:
    """(N,) index of the first prediction with the same (row, label); rows ascending, per_row: predictions of each."""
    first = np.arange(len(rows))
    several = np.nonzero(np.repeat(per_row > 1, per_row))[0]  # only rows that branch can say the same twice
    if len(several):
        order = several[np.lexsort((labels[several], rows[several]))]
        key = np.stack([rows[order], labels[order]])
        new = np.ones(len(order), dtype=bool)
        new[1:] = (key[:, 1:] != key[:, :-1]).any(0)
        first[order] = order[new][np.cumsum(new) - 1]
    return first


def value_bounds(rows: Tensor, low: Tensor, high: Tensor, step_ids: Tensor) -> Tensor:
    """(4,) smallest of `low` and largest of `high` (both labels), largest row and step; of nothing: 0, -1, -1, -1."""
    if rows.shape[0] == 0:
        return torch.tensor([0, -1, -1, -1], device="cpu")
    return torch.stack([low.min(), high.max(), rows.max(), step_ids.max()])


def scored_bounds(plan: PlanTensors) -> Tensor:
    """The `bounds` of a plan that came without, from the predictions that a row owns. Reads the plan's device."""
    row_of = torch.repeat_interleave(plan.rows, plan.row_start.diff())
    scored = row_of >= 0
    labels, step_ids = (values[: row_of.shape[0]][scored] for values in (plan.labels, plan.step_ids))
    return value_bounds(row_of[scored], labels, labels, step_ids).cpu()


def no_bounds() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


# -- the rows of a plan, taken and put back ----------------------------------------------------------------------------


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """(B, L, X) of any strides -> (R, X); zeros for padding. Rows that are not scored are never read."""
    B, L, X = source.shape
    if B * L == 0:
        return source.new_zeros(rows.shape[0], X)
    index = rows.clamp_min(0)
    picked = source.view(B * L, X).index_select(0, index) if source.is_contiguous() else source[index // L, index % L]
    return picked.masked_fill_((rows < 0).unsqueeze(1), 0.0)


def scatter_rows(like: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """(R, X) values at the distinct rows of a tensor of zeros like (B, L, X), in values' dtype.

    Every row is written once, padding into one that is cut off: there is no order in which a sum could run.
    """
    B, L, X = like.shape
    flat = values.new_zeros(B * L + 1, X)
    if flat.numel():
        flat.index_copy_(0, torch.where(rows < 0, B * L, rows), values)
    return flat[: B * L].view(B, L, X)


def row_of_prediction(plan: PlanTensors) -> tuple[Tensor, Tensor]:
    """(N,) index into rows, and the mask of predictions that have a row."""
    R, N = plan.rows.shape[0], plan.labels.shape[0]
    n = torch.arange(N, device=plan.rows.device)
    row = torch.searchsorted(plan.row_start, n, right=True) - 1
    if R == 0:
        return row, torch.zeros_like(row, dtype=torch.bool)
    kept = row.clamp_max(R - 1)
    return kept, (row < R) & (plan.rows[kept] >= 0)


def spread_rows(values: Tensor, plan: PlanTensors) -> Tensor:
    """(R,) -> (N,), each prediction its row's value; 0 for padding."""
    row, scored = row_of_prediction(plan)
    return torch.where(scored, values[row], 0.0) if values.shape[0] else values.new_zeros(row.shape[0])


# -- the tensor form without its unscored rows, as a raw op: its sizes are known only when it has run ------------------


def compact_plan(labels: Tensor, step_ids: Tensor | None, shift: int, num_steps: int | None) -> PlanTensors:
    """`StepPlan.from_step_ids` on the tensors' own device, with one host read (N, and S unless it is given)."""
    rows, labels, step_ids, scored = flatten(labels, step_ids, shift)
    largest = step_ids.max() if step_ids.numel() else step_ids.new_full((), -1)
    N, top = torch.stack([scored.sum(), largest]).tolist()
    S = max(top + 1, 0) if num_steps is None else num_steps
    position = torch.argsort(~scored, stable=True)[:N]
    rows, labels, step_ids = rows[position], labels[position], step_ids[position]
    each = torch.arange(N + 1, device=rows.device)
    order = torch.argsort(step_ids, stable=True)
    start = torch.searchsorted(step_ids[order], torch.arange(S + 1, device=rows.device))
    bounds = value_bounds(rows, labels, labels, step_ids) if rows.device.type == "cpu" else no_bounds()
    return PlanTensors(rows, each, labels, each[:N].clone(), step_ids, order, start, bounds)


def _fake_compact_plan(labels: Tensor, step_ids: Tensor | None, shift: int, num_steps: Any) -> tuple[Tensor, ...]:
    context = torch.library.get_ctx()
    N = context.new_dynamic_size()
    edges = context.new_dynamic_size() if num_steps is None else num_steps + 1  # S + 1: a size of its own
    sizes = (N, N + 1, N, N, N, N, edges)
    bounds = torch.empty(4 if labels.device.type == "cpu" else 0, dtype=torch.int64, device="cpu")
    return *(labels.new_empty((size,), dtype=torch.int64) for size in sizes), bounds


library.define(
    "compact_plan(Tensor labels, Tensor? step_ids, int shift, SymInt? num_steps) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("compact_plan", compact_plan, "CompositeExplicitAutograd")
torch.library.register_fake("svpo::compact_plan", _fake_compact_plan, lib=library)
