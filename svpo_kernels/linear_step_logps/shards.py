"""A vocabulary that the processes of a group share: each holds some rows of the head, all else is the same.

A shard is a backend of its own: the row kernels of another on the labels that live here, and between them, for every
chunk, MAX(m) and SUM(s) of the rows; the label logits ride along with the first. In the backward SUM(dHidden), in fp32.
Every process cuts its rows by the widest shard, so that all run the same collectives.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._checks import fail
from ..plan import PlanTensors, row_of_prediction
from . import ties
from .branching import capped, likeliest, of_predictions
from .modes import Options
from .row_kernels import MoreStats, RowKernels

# -- who holds what -------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Columns [first, first + columns) of the vocabulary; widest: how many the largest share has."""

    first: int
    columns: int
    widest: int


def share(o: Options) -> Share:
    """What this process scores: all below vocab_size without a group."""
    if not o.group:
        return Share(0, o.vocab_size, o.vocab_size)
    starts = list(accumulate(o.shards, initial=0))
    columns = [max(0, min(size, o.vocab_size - start)) for start, size in zip(starts, o.shards, strict=False)]
    rank = dist.get_rank(group_of(o))
    return Share(starts[rank], columns[rank], max(columns))


def group_of(o: Options) -> Any:
    return dist.distributed_c10d._resolve_process_group(o.group)


def local(op: str, process_group: Any, **tensors: Tensor | None) -> tuple[Any, list[Tensor | None]]:
    """The group and the tensors as this process holds them: a DTensor brings its group and gives up its own rows."""
    if not dist.is_available():
        return process_group, list(tensors.values())
    from torch.distributed.tensor import DTensor, Replicate, Shard

    found = []
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            wanted = Replicate() if name == "lora_a" else Shard(0)
            if tuple(tensor.placements) != (wanted,):
                fail(op, name, f"a DTensor on a mesh of one dimension, placed {wanted}", f"{tensor.placements}")
            process_group = process_group or tensor.device_mesh.get_group()
            tensor = tensor.to_local()
        found.append(tensor)
    return process_group, found


_layouts: Any = WeakTensorKeyDictionary()  # weight -> the group's name and its processes' rows


def layout(op: str, weight: Tensor, rows: int, process_group: Any, same: dict[str, object]) -> tuple[int, ...]:
    """Rows of the head on every process, in rank order. Asked for at the first call with a weight, then remembered.

    `same` must agree on all processes, for what they do together depends on it; it is compared in that exchange.
    """
    known = _layouts.get(weight)
    if known is not None and known[0] == process_group.group_name:
        return known[1]
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, (rows, {name: str(value) for name, value in same.items()}), group=process_group)
    for name in same:
        values = {one[1][name] for one in found}
        if len(values) > 1:
            fail(op, name, "the same on every process of process_group", " and ".join(sorted(values)))
    sizes = tuple(one[0] for one in found)
    _layouts[weight] = process_group.group_name, sizes
    return sizes


# -- collectives ----------------------------------------------------------------------------------------------------


def sum_(o: Options, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both summed over the shards, in fp32 (fp64 for fp64) and in one collective, each in its own dtype."""
    given = [first] if second is None else [first, second]
    wide = torch.promote_types(first.dtype, torch.float32)
    packed = torch.cat([tensor.reshape(-1).to(wide) for tensor in given])
    dist.all_reduce(packed, group=group_of(o))
    parts = packed.split([tensor.numel() for tensor in given])
    sums = [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, given, strict=True)]
    return sums[0], None if second is None else sums[1]


def gather_columns(z0: Tensor, o: Options) -> Tensor:
    """(R, columns) of every process -> (R, vocab_size), for the reference."""
    starts = accumulate(o.shards, initial=0)
    columns = [max(0, min(size, o.vocab_size - start)) for start, size in zip(starts, o.shards, strict=False)]
    mine = z0.new_zeros(z0.shape[0], max(columns))
    mine[:, : z0.shape[1]] = z0
    all_ = [torch.empty_like(mine) for _ in columns]
    dist.all_gather(all_, mine, group=group_of(o))
    return torch.cat([part[:, :count] for part, count in zip(all_, columns, strict=True)], 1)


def join_stats(more: MoreStats, o: Options) -> MoreStats:
    """Of whole rows from those of the shards: one MAX for the first argmax, one SUM."""
    key = ties.keys(more.top, more.top_at + share(o).first)
    dist.all_reduce(key, dist.ReduceOp.MAX, group=group_of(o))
    added = torch.stack(more[:3])
    dist.all_reduce(added, group=group_of(o))
    return MoreStats(*added, more.top, top_at=ties.ids_of(key))


# -- row kernels of a shard -----------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """Some of a plan's predictions, the first of each (row, label): a plan of them, and where they stand in the whole.

    order (N,): those chosen first, by ascending position; the rest belongs to no row.
    """

    plan: PlanTensors
    order: Tensor

    @classmethod
    def choose(cls, plan: PlanTensors, labels: Tensor, chosen: Tensor) -> Labels:
        order = torch.argsort(~chosen, stable=True)
        before = torch.cat([order.new_zeros(1), chosen.cumsum(0)])
        n = torch.arange(chosen.shape[0], device=chosen.device)
        return cls(plan._replace(row_start=before[plan.row_start], labels=labels[order], first=n), order)

    def pick(self, values: Tensor) -> Tensor:
        """(N,) values of the whole plan in this one's order, 0 for the rest."""
        n = torch.arange(values.shape[0], device=values.device)
        return torch.where(n < self.plan.row_start[-1], values[self.order], 0.0)


class Shard:
    """`RowKernels` of another backend on this process's columns. Meanings as there, of whole rows."""

    def __init__(self, kernels: RowKernels, plan: PlanTensors, o: Options) -> None:
        self.kernels, self.plan, self.o, self.share = kernels, plan, o, share(o)
        self.labels = plan.labels - self.share.first
        self.row, self.scored = row_of_prediction(plan)
        self.n = torch.arange(plan.labels.shape[0], device=plan.labels.device)
        inside = (self.labels >= 0) & (self.labels < self.share.columns)
        self.is_here = self.scored & (plan.first == self.n) & inside
        self.here = Labels.choose(plan, self.labels, self.is_here)
        self.joined = False  # whether label_z0 is that of all shards

    def row_kernels(self) -> RowKernels:
        return self.kernels._replace(
            label_dots=self.label_dots, rows_fwd=self.rows_fwd, rows_stats=self.rows_stats,
            rows_unit=self.rows_unit, rows_grad=self.rows_grad, branch_hidden=self.branch_hidden,
            branch_weight=self.branch_weight, rows_scan=None, rows_finish=None,
        )

    def label_dots(self, h: Tensor, weight: Tensor, bias: Tensor | None, plan: PlanTensors) -> Tensor:
        """Of the labels that live here, 0 for the others until rows_fwd has summed them."""
        dots = self.kernels.label_dots(h, weight, bias, self.here.plan)
        return torch.zeros_like(dots).scatter_(0, self.here.order, dots)[plan.first]

    def rows_fwd(
        self,
        z: Tensor,
        first_row: int,
        label_z0: Tensor,
        logp: Tensor,
        row_max: Tensor,
        row_logsum: Tensor,
        entropy: Tensor | None,
        plan: PlanTensors,
        temperature: float | Tensor,
        softcap: float,
        write_unit: bool,
    ) -> None:
        m, log_s, H = (torch.zeros_like(row_max) for _ in range(3))
        if self.share.columns:
            given = (self.here.pick(label_z0), torch.zeros_like(logp), m, log_s, None if entropy is None else H)
            self.kernels.rows_fwd(z, first_row, *given, self.here.plan, temperature, softcap, False)
        else:
            m.fill_(-torch.inf)
        part = slice(first_row, first_row + z.shape[0])
        found = self._join(m[part], log_s[part], H[part], label_z0, with_labels=not self.joined)
        self.joined = True
        stats = (row_max, row_logsum) if entropy is None else (row_max, row_logsum, entropy)
        for to, values in zip(stats, found, strict=False):
            to[part] = values.masked_fill(plan.rows[part] < 0, 0.0)
        in_part = (self.row >= part.start) & (self.row < part.stop) & self.scored
        logp.copy_(torch.where(in_part, self._logps(label_z0, row_max, row_logsum), logp))
        if write_unit:
            tile = (z, first_row, 0, label_z0, logp, row_max, row_logsum)
            self.rows_unit(*tile, plan, z.shape[1], temperature, softcap)

    def _join(
        self, own_m: Tensor, own_log_s: Tensor, own_H: Tensor, label_z0: Tensor, with_labels: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, log sum and entropy of whole rows (c,) from those of the shards; fills label_z0 if asked to.

        In fp64: a row whose label has p = 1 - 1e-9 keeps what the others add to its sum.
        """
        m = own_m.double()
        dist.all_reduce(m, dist.ReduceOp.MAX, group=group_of(self.o))
        nothing = own_m == -torch.inf
        distance = torch.where(nothing, 0.0, own_m.double() - m + own_log_s.double())
        s = torch.where(nothing, 0.0, distance.exp())
        t = torch.where(s == 0.0, 0.0, s * (distance - own_H.double()))
        sums = torch.cat([s, t, label_z0.double()] if with_labels else [s, t])
        dist.all_reduce(sums, group=group_of(self.o))
        s, t = sums[: s.shape[0]], sums[s.shape[0] : 2 * s.shape[0]]
        if with_labels:
            label_z0.copy_(sums[2 * s.shape[0] :])
        log_s = torch.where(m == -torch.inf, torch.nan, s.log())
        return m.to(own_m.dtype), log_s.to(own_m.dtype), (log_s - t / s).clamp_min(0.0).to(own_m.dtype)

    def _logps(self, label_z0: Tensor, row_max: Tensor, row_logsum: Tensor) -> Tensor:
        """(N,) log-probs, never above 0; NaN for a label that no shard has."""
        z, _ = capped(label_z0.double(), of_predictions(self.o.temperature, self.row), self.o.softcap)
        m, log_s = row_max[self.row], row_logsum[self.row].double()
        shifted = torch.where(z.to(m.dtype) >= m, 0.0, z - m.double())
        inside = (self.plan.labels >= 0) & (self.plan.labels < self.o.vocab_size)
        return torch.where(inside, (shifted - log_s).clamp_max(0.0), torch.nan).to(m.dtype)

    def rows_stats(
        self, z: Tensor, first_row: int, label_z0: Tensor, row_max: Tensor, sums: Tensor, squares: Tensor,
        total: Tensor, top: Tensor, top_at: Tensor, plan: PlanTensors, *transform: Any,
    ) -> None:
        """Of the columns that live here; `join_stats` makes them those of whole rows."""
        if not self.share.columns:
            top[first_row : first_row + z.shape[0]] = -torch.inf
            return
        given = (self.here.pick(label_z0), row_max, sums, squares, total, top, top_at)
        self.kernels.rows_stats(z, first_row, *given, self.here.plan, *transform)

    def rows_unit(
        self, z: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor, row_max: Tensor,
        row_logsum: Tensor, plan: PlanTensors, V: int, *transform: Any,
    ) -> None:
        """Only l* stands out in U, and only where it lives: other labels are columns like any."""
        if self.share.columns:
            likely = likeliest(logp, plan, self.o.vocab_size)
            own = Labels.choose(plan, self.labels, self.is_here & (likely[self.row] == self.n))
            given = (own.pick(label_z0), own.pick(logp), row_max, row_logsum)
            self.kernels.rows_unit(z, first_row, first_column, *given, own.plan, V, *transform)

    def rows_grad(
        self, z: Tensor, out: Tensor, first_row: int, first_column: int, label_z0: Tensor, logp: Tensor,
        row_max: Tensor, row_logsum: Tensor, entropy: Tensor, g: Tensor, G: Tensor, E: Tensor, plan: PlanTensors,
        V: int, *transform: Any,
    ) -> None:
        if self.share.columns:
            pick = self.here.pick
            given = (pick(label_z0), pick(logp), row_max, row_logsum, entropy, pick(g), G, E)
            self.kernels.rows_grad(z, out, first_row, first_column, *given, self.here.plan, V, *transform)

    def branch_hidden(
        self, uw: Tensor, weight: Tensor, terms: Tensor, G: Tensor, plan: PlanTensors, first_row: int
    ) -> Tensor:
        return self.kernels.branch_hidden(uw, weight, self.here.pick(terms), G, self.here.plan, first_row)

    def branch_weight(
        self, dweight: Tensor | None, dbias: Tensor | None, h: Tensor, terms: Tensor, plan: PlanTensors
    ) -> None:
        if self.share.columns:
            self.kernels.branch_weight(dweight, dbias, h, self.here.pick(terms), self.here.plan)
