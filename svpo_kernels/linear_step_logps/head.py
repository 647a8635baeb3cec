"""The vocabulary head in the product loop: z0 = h W^T + b, with low-rank factors + s (h A^T) B^T, and its gradients.

The factors never meet W: their product is added to z, rank r at a time, and their gradients are those of a second head
B (V, r) on the rows low = s h A^T (R, r).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _memory
from ..plan import PlanTensors
from . import walks
from .row_kernels import RowKernels
from .upstream import Upstream

FEW_ROWS = 4  # a CPU product of fewer adds up its V terms one by one: 10 times the error at V = 32001
FEW_COLUMNS = 1024  # up to here db is summed in fp64; beyond, many entries average its rounding
WIDE_ROWS = 2048  # rows of h that are widened at a time for dA
SLICE = 8192  # columns of V (or rows of h) that are widened to fp32 at a time


class Head(NamedTuple):
    """The columns that this process scores. weight (V, D), bias (V,), lora_a (r, D), lora_b (V, r), or None."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float

    def cut(self, V: int) -> Head:
        """The first V columns."""
        return self.columns(0, V)

    def columns(self, first: int, last: int) -> Head:
        """Columns [first, last) as a head of their own."""
        bias, lora_b = (None if t is None else t[first:last] for t in (self.bias, self.lora_b))
        return self._replace(weight=self.weight[first:last], bias=bias, lora_b=lora_b)

    def wide(self) -> Head:
        """With B in fp32: in bf16 the shares of dA, added up, had 1.4 times eager's error."""
        if self.lora_b is None:
            return self
        return self._replace(lora_b=self.lora_b.to(torch.promote_types(self.lora_b.dtype, torch.float32)))

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    def low(self, h: Tensor) -> Tensor | None:
        """(R, r) s h A^T in fp32 (fp64 for fp64): exact for the label logits."""
        if self.lora_a is None:
            return None
        wide = torch.promote_types(h.dtype, torch.float32)
        low, a = h.new_empty(h.shape[0], self.rank, dtype=wide), self.lora_a.to(wide).t() * self.scaling
        for start, stop in walks.chunks(0, h.shape[0], SLICE):
            torch.mm(h[start:stop].to(wide), a, out=low[start:stop])
        return low

    def product(self, h: Tensor, low: Tensor | None, out: Tensor) -> None:
        """out = z0 in the input dtype, rounded as `F.linear` and an adapter on it round."""
        if self.bias is None:
            torch.mm(h, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=out)
        if low is not None:
            out.addmm_(low.to(out.dtype), self.lora_b.to(out.dtype).t())

    def label_logits(self, kernels: RowKernels, h: Tensor, low: Tensor | None, plan: PlanTensors) -> Tensor:
        """(N,) z0 at the labels as exact fp32 dots, low-rank part included."""
        dots = kernels.label_dots(h, self.weight, self.bias, plan)
        return dots if low is None else dots + kernels.label_dots(low, self.lora_b.to(low.dtype), None, plan)

    def add_low(self, dhidden: Tensor, dlow: Tensor) -> None:
        """dhidden (R, D) += s dlow A."""
        dhidden.addmm_(dlow.to(dhidden.dtype), self.lora_a.to(dhidden.dtype), alpha=self.scaling)

    def grad_a(self, h: Tensor, dlow: Tensor) -> Tensor:
        """(r, D) s dlow^T h in A's dtype or wider.

        fp32 is added up in fp64: r x D numbers of many rows, whose error was up to 1.26 times eager's (540 rows under
        MKL's AVX-512) and is 0.64 times.
        """
        wide = torch.float64 if h.dtype == dlow.dtype == torch.float32 else dlow.dtype
        if h.dtype == wide:
            return torch.addmm(h.new_empty(self.rank, h.shape[1]), dlow.t(), h, beta=0, alpha=self.scaling)
        out = torch.zeros_like(self.lora_a, memory_format=torch.contiguous_format, dtype=wide)
        for start, stop in walks.chunks(0, h.shape[0], WIDE_ROWS):
            out.addmm_(dlow[start:stop].to(wide).t(), h[start:stop].to(wide), alpha=self.scaling)
        return out


class HeadGradients:
    """dW (V, D) and db (V,), dB (V, r): what a backward adds up over tiles of U. main_grad: takes dW in fp32."""

    def __init__(self, whole: Head, head: Head, needs: list[bool], main_grad: Tensor | None) -> None:
        self.whole, self.V, self.main_grad = whole, head.weight.shape[0], main_grad
        self.needs_hidden, self.needs_weight, self.needs_bias, self.needs_a, self.needs_b = needs
        self.needs_low = head.rank > 0 and (self.needs_hidden or self.needs_a)
        self.dweight = self.dbias = self.db = None

    def begin(self, walk: walks.Walk, h: Tensor, low: Tensor | None, upstream: Upstream) -> None:
        """walk: the tiles that come. Their rows are scaled once, whatever the number of runs."""
        self.G = upstream.G if upstream.E is None else torch.ones_like(upstream.G)
        if self.needs_weight:
            self.h = upstream.scaled(h)
            self.dweight = MatrixGradient(self.whole.weight, self.V, walk, self.main_grad)
        if self.needs_bias:
            # V = 8: 1.6 times eager's error when db is summed in fp32, 0.7 times in fp64.
            wide = torch.float64 if self.V <= FEW_COLUMNS else torch.promote_types(h.dtype, torch.float32)
            self.dbias = h.new_zeros(self.whole.bias.shape, dtype=wide)
        if self.needs_b:
            self.low = upstream.scaled(low.to(self.whole.lora_b.dtype))
            self.db = MatrixGradient(self.whole.lora_b, self.V, walk)

    def begin_run(self, first: int, last: int) -> None:
        """The tiles that come next are of columns [first, last)."""
        self.first = first
        for gradient in (self.dweight, self.db):
            if gradient is not None:
                gradient.begin_run(first, last)

    def add(self, unit: Tensor, start: int, stop: int) -> None:
        """unit: rows [start, stop) of U in the columns of the run."""
        if self.dweight is not None:
            self.dweight.add(unit, self.h[start:stop])
        if self.db is not None:
            self.db.add(unit, self.low[start:stop])
        if self.dbias is not None:
            to = self.dbias[self.first : self.first + unit.shape[1]]
            for first, last in walks.chunks(0, unit.shape[1], SLICE):  # without a whole copy of a low-precision U
                to[first:last] += torch.mv(unit[:, first:last].to(to.dtype).t(), self.G[start:stop].to(to.dtype))

    def end_run(self) -> None:
        for gradient in (self.dweight, self.db):
            if gradient is not None:
                gradient.end_run()

    def finish(
        self, kernels: RowKernels, h: Tensor, terms: Tensor | None, plan: PlanTensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dW, db and dB in the dtypes of weight, bias and lora_b; size 0 where not needed, and where main_grad has dW.

        terms: those of branching rows, where U is not the whole gradient.
        """
        dweight = h.new_empty(0) if self.dweight is None else self.dweight.target
        if terms is not None and (self.needs_weight or self.needs_bias):
            dbias = torch.zeros_like(self.dbias, dtype=terms.dtype) if self.needs_bias else None
            kernels.branch_weight(dweight if self.needs_weight else None, dbias, h, terms, plan)
            self.dbias = self.dbias + dbias if self.needs_bias else None
        return (
            h.new_empty(0) if self.main_grad is not None else dweight.to(self.whole.weight.dtype),
            h.new_empty(0) if self.dbias is None else self.dbias.to(self.whole.bias.dtype),
            h.new_empty(0) if self.db is None else self.db.target.to(self.whole.lora_b.dtype),
        )


class MatrixGradient:
    """The gradient of a (V, D) matrix, one run of its rows after the other: one product, or parts summed in fp32.

    main_grad: an fp32 tensor that takes it on top of what it holds. Rows from V on are padding: 0.
    """

    def __init__(self, matrix: Tensor, V: int, walk: walks.Walk, main_grad: Tensor | None = None) -> None:
        self.on_top, self.target = main_grad is not None, main_grad
        self.wide = torch.promote_types(matrix.dtype, torch.float32)
        self.parts = len(walk.rows)
        if main_grad is None:
            # A run alone stays in fp32 until the terms of branching rows are on it.
            dtype = self.wide if len(walk.columns) == 1 and self.parts > 1 else matrix.dtype
            self.target = _memory.empty(matrix, matrix.shape, dtype).tensor
            self.target[V:].zero_()

    def begin_run(self, first: int, last: int) -> None:
        self.run = self.to = self.target[first:last]
        self.untouched = not self.on_top
        if self.parts > 1 and self.run.dtype != self.wide:
            self.to = _memory.empty(self.run, self.run.shape, self.wide).tensor

    def add(self, unit: Tensor, scaled: Tensor) -> None:
        """unit (c, columns of the run), scaled = G h (c, D)."""
        if scaled.dtype != unit.dtype:  # low-rank factors wider than hidden
            for start, stop in walks.chunks(0, unit.shape[1], SLICE):
                self._put(self.to[start:stop], torch.mm(unit[:, start:stop].to(scaled.dtype).t(), scaled))
        elif self.to.dtype != unit.dtype:
            self._put(self.to, torch.mm(unit.t(), scaled))
        elif self.untouched:
            torch.mm(unit.t(), scaled, out=self.to)
        else:
            self.to.addmm_(unit.t(), scaled)
        self.untouched = False

    def _put(self, target: Tensor, part: Tensor) -> None:
        target.copy_(part) if self.untouched else target.add_(part)

    def end_run(self) -> None:
        if self.untouched:
            self.to.zero_()
        if self.to is not self.run:
            self.run.copy_(self.to)


class RowGradient:
    """U M (R, X) of a matrix M (V, X), in M's dtype: one product a row, or summed in fp32 over runs of columns."""

    def __init__(self, R: int, matrix: Tensor, walk: walks.Walk) -> None:
        self.dtype = matrix.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.out = matrix.new_empty((R, matrix.shape[1]), dtype=wide if len(walk.columns) > 1 else self.dtype)

    def add(self, unit: Tensor, matrix: Tensor, start: int, stop: int, first: bool) -> None:
        """unit: rows [start, stop) of U in some columns, matrix: its rows for them. first: of these rows."""
        to = self.out[start:stop]
        if to.dtype == unit.dtype == matrix.dtype and (first or to.shape[0] >= FEW_ROWS):
            product(unit, matrix, out=to) if first else to.addmm_(unit, matrix)
            return
        part = product(unit, matrix)
        to.copy_(part) if first else to.add_(part)

    def whole(self) -> Tensor:
        return self.out.to(self.dtype)


def product(unit: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """(c, V) x (V, X) in the dtype of the matrix, which may be the wider one."""
    rows = unit.shape[0]
    if unit.is_cpu and 0 < rows < FEW_ROWS:
        unit = torch.cat([unit, unit.new_zeros(FEW_ROWS - rows, unit.shape[1])])
        found = product(unit, matrix)[:rows]
        return found if out is None else out.copy_(found)
    if unit.dtype == matrix.dtype:
        return torch.mm(unit, matrix, out=out)
    out = unit.new_zeros(rows, matrix.shape[1], dtype=matrix.dtype)
    for start, stop in walks.chunks(0, unit.shape[1], SLICE):
        out.addmm_(unit[:, start:stop].to(out.dtype), matrix[start:stop])
    return out
