"""`linear_step_logps` between the row kernels: which products run, on which chunk, into which buffer.

The same loop serves every fused backend; a backend brings its `RowKernels`. Products go through torch (oneDNN, cuBLAS)
in the input dtype. One buffer is reused over all tiles and nothing else of that size is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _memory
from ..plan import PlanTensors, gather_rows, scatter_rows
from . import modes, shards, walks
from .head import Head, HeadGradients, RowGradient, product
from .row_kernels import MoreStats, RowKernels, Stats, per_prediction
from .upstream import Upstream


def raw_ops(kernels: RowKernels) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """A backend's linear_step_logps_fwd and linear_step_logps_bwd: arguments and results of the reference's."""

    def linear_step_logps_fwd(*args: Any) -> tuple[Tensor, ...]:
        return forward(kernels, *args)

    def linear_step_logps_bwd(*args: Any, main_grad: Tensor | None = None) -> tuple[Tensor, ...]:
        return backward(kernels, *args, main_grad=main_grad)

    return linear_step_logps_fwd, linear_step_logps_bwd


# -- forward --------------------------------------------------------------------------------------------------------


def forward(
    kernels: RowKernels,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    plan: list[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    """Returns out (S,) or (N,), the five of modes.STATS (N,), logp (N,), row_max (R,), row_logsum (R,), the rows'
    entropy (R,), label_z0 (N,) and what the mode keeps. Statistics that are not asked for have size 0."""
    o, view = modes.Options(*options).of_rows(temperatures), PlanTensors(*(index.contiguous() for index in plan))
    h = gather_rows(hidden, view.rows)
    share = shards.share(o)
    kernels = shards.Shard(kernels, view, o).row_kernels() if o.group else kernels
    head = Head(weight, bias, lora_a, lora_b, o.lora_scaling).cut(share.columns)
    V, (R, D) = head.weight.shape[0], h.shape
    low = head.low(h)
    label_z0 = head.label_logits(kernels, h, low, view)
    stats = Stats(
        label_z0, label_z0.new_zeros(view.labels.shape[0]), *(label_z0.new_zeros(R) for _ in range(2)),
        label_z0.new_zeros(R) if o.entropy else None,
    )
    more = MoreStats.like(stats.row_max) if o.more_stats else None
    limit = modes.limits(share.widest, h, o)
    kept = limit.kept(R)
    saved = _memory.empty(h, modes.saved_shape(o.mode, R, D + head.rank, V, kept)).tensor
    one = Forward(kernels, head, h, low, stats, more, view, o)
    one.score_rest(kept, saved)
    for start, stop in walks.chunks(0, kept, modes.MOST_ROWS):
        one.score_rows(saved[start:stop], start, unit=o.mode == "store")
    if more is not None and o.group:
        more = shards.join_stats(more, o)
    out, asked = kernels.reduce_steps(stats.logp, view, o.reduction), per_prediction(stats, more, view, o)
    entropy = stats.logp.new_empty(0) if stats.entropy is None else stats.entropy
    return out, *asked, *stats[1:4], entropy, label_z0, saved


class Forward(NamedTuple):
    """What every tile of a forward needs, and where its statistics go."""

    kernels: RowKernels
    head: Head
    h: Tensor
    low: Tensor | None
    stats: Stats
    more: MoreStats | None
    plan: PlanTensors
    o: modes.Options

    def score_rest(self, kept: int, saved: Tensor) -> None:
        """The rows from `kept` on: only their statistics stay, and in frozen mode U W and U B. What the kept rows will
        fill is scratch until then."""
        D, V, frozen = self.h.shape[1], self.head.weight.shape[0], self.o.mode == "frozen"
        walk = walk_of(self.kernels, self.h, V, kept, self.o, forward=True)
        walk = walk._replace(rows=[part for part in walk.rows if part[0] >= kept])
        size = walk.most()
        room = saved.view(-1) if 0 < size <= kept * V else _memory.empty(self.h, (size,)).tensor
        if len(walk.columns) > 1:
            return self._scan(kept, walk, room)
        for start, stop in walk.rows:
            z = tile(room, stop - start, V)
            self.score_rows(z, start, unit=frozen)
            if frozen:
                product(z, self.head.weight, out=saved[start:stop, :D])
                if self.head.rank:
                    saved[start:stop, D:] = product(z, self.head.lora_b)

    def score_rows(self, z: Tensor, start: int, unit: bool) -> None:
        """z (c, V), rows from `start` on: their logits, and U if `unit`."""
        V, more = z.shape[1], self.more
        self._product(self.head, z, start)
        self.kernels.rows_fwd(z, start, *self.stats, self.plan, *self.o.transform, unit and more is None)
        if more is not None:
            row_max = self.stats.row_max
            self.kernels.rows_stats(z, start, self.stats.label_z0, row_max, *more, self.plan, *self.o.transform)
            if unit:
                self.kernels.rows_unit(z, start, 0, *self.stats[:4], self.plan, V, *self.o.transform)

    def _scan(self, kept: int, walk: walks.Walk, room: Tensor) -> None:
        """Statistics column by column: what each run adds to a row waits in `found`."""
        R, V, entropy = self.h.shape[0], self.head.weight.shape[0], self.stats.entropy is not None
        found = torch.empty(R, 3, dtype=torch.float64, device=self.h.device)
        for first, last in walk.columns:
            head = self.head.columns(first, last)
            for start, stop in walk.rows:
                z = tile(room, stop - start, last - first)
                self._product(head, z, start)
                self.kernels.rows_scan(z, start, first, found, self.plan, V, *self.o.transform, entropy)
        self.kernels.rows_finish(found, kept, R, *self.stats, self.plan, V, *self.o.transform)

    def _product(self, head: Head, z: Tensor, start: int) -> None:
        stop = start + z.shape[0]
        head.product(self.h[start:stop], None if self.low is None else self.low[start:stop], out=z)


# -- backward -------------------------------------------------------------------------------------------------------


def backward(
    kernels: RowKernels,
    grad_out: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    temperatures: Tensor | None,
    logp: Tensor,
    row_max: Tensor,
    row_logsum: Tensor,
    entropy: Tensor,
    label_z0: Tensor,
    saved: Tensor,
    plan: list[Tensor],
    needs: list[bool],
    *options: Any,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of hidden, weight, bias, lora_a and lora_b; a tensor of size 0 for one that is not needed,
    and for weight's when main_grad, fp32 like weight, has taken it."""
    o, view = modes.Options(*options).of_rows(temperatures), PlanTensors(*(index.contiguous() for index in plan))
    h = gather_rows(hidden, view.rows)
    kernels = shards.Shard(kernels, view, o).row_kernels() if o.group else kernels
    whole = Head(weight, bias, lora_a, lora_b, o.lora_scaling)
    head = whole.cut(shards.share(o).columns)
    head = head.wide() if o.group else head
    stats = Stats(label_z0, logp, row_max, row_logsum, entropy if o.entropy else torch.zeros_like(row_max))
    upstream = Upstream.of(kernels, grad_out, grad_entropy, grad_logsumexp, stats, view, o)
    grads = HeadGradients(whole, head, needs, main_grad)
    if o.mode == "frozen":
        uw, ub = saved[:, : h.shape[1]], saved[:, h.shape[1] :]
    else:
        uw, ub = _unit_products(kernels, head, h, stats, upstream, saved, grads, view, o)
    needs_hidden, _, _, needs_a, _ = needs
    dlow = upstream.apply(kernels, ub, head.lora_b, view) if head.rank and (needs_hidden or needs_a) else None
    drows = upstream.apply(kernels, uw, head.weight, view) if needs_hidden else hidden.new_empty(0)
    if o.group:
        drows, dlow = shards.sum_(o, drows, dlow)
    if needs_hidden and dlow is not None:
        head.add_low(drows, dlow)
    da = head.grad_a(h, dlow) if needs_a else hidden.new_empty(0)
    dhidden = scatter_rows(hidden, view.rows, drows) if needs_hidden else hidden.new_empty(0)
    dweight, dbias, db = grads.finish(kernels, h, upstream.terms, view)
    return dhidden, dweight, dbias, da.to(lora_a.dtype) if needs_a else da, db


def _unit_products(
    kernels: RowKernels,
    head: Head,
    h: Tensor,
    stats: Stats,
    upstream: Upstream,
    saved: Tensor,
    grads: HeadGradients,
    plan: PlanTensors,
    o: modes.Options,
) -> tuple[Tensor | None, Tensor | None]:
    """U W (R, D) and U B (R, r) as far as they are needed, and every tile of U to the head's gradients.

    In logits mode U is the whole gradient. What was not kept is multiplied again, tile by tile.
    """
    R, V, kept, in_place = h.shape[0], head.weight.shape[0], saved.shape[0], o.mode == "store"
    walk = walk_of(kernels, h, V, kept, o)
    room = _memory.empty(h, (walk.most(kept if in_place else 0),)).tensor
    uw = RowGradient(R, head.weight, walk) if grads.needs_hidden else None
    ub = RowGradient(R, head.lora_b, walk) if grads.needs_low else None
    low = head.low(h)
    grads.begin(walk, h, low, upstream)
    for first, last in walk.columns:
        run = head.columns(first, last)
        grads.begin_run(first, last)
        for start, stop in walk.rows:
            z = saved[start:stop, first:last] if stop <= kept else tile(room, stop - start, last - first)
            if stop > kept:
                run.product(h[start:stop], None if low is None else low[start:stop], out=z)
            unit, at = z, (start, first)
            if o.mode == "logits":
                if stop <= kept:  # it stays as it is, for another backward
                    unit = tile(room, stop - start, last - first)
                kernels.rows_grad(z, unit, *at, *stats, *upstream[:3], plan, V, *o.transform)
            elif stop > kept:
                kernels.rows_unit(unit, *at, *stats[:4], plan, V, *o.transform)
            if uw is not None:
                uw.add(unit, run.weight, start, stop, first=first == 0)
            if ub is not None:
                ub.add(unit, run.lora_b, start, stop, first=first == 0)
            grads.add(unit, start, stop)
        grads.end_run()
    return None if uw is None else uw.whole(), None if ub is None else ub.whole()


def walk_of(
    kernels: RowKernels, h: Tensor, V: int, kept: int, o: modes.Options, forward: bool = False
) -> walks.Walk:
    """The walk of a forward or of its backward over rows h (R, D) and V columns.

    A product of another shape adds up in another order. Where z is as wide as its sums are, a backward that saw other z
    than the statistics were made of had up to 4 times eager's error: both take one walk. 16-bit z round to the same.
    """
    R, scans = h.shape[0], kernels.rows_scan is not None and not o.more_stats
    by_columns = o.mode != "frozen" and (scans or (h.element_size() == 2 and not forward))
    scratch = modes.limits(shards.share(o).widest, h, o).scratch(R)
    return walks.choose(R, V, kept, scratch, h.device.type, in_place=o.mode != "logits", by_columns=by_columns)


def tile(room: Tensor, rows: int, columns: int) -> Tensor:
    """The first entries of `room` as a tile."""
    return room[: rows * columns].view(rows, columns)
