"""The segments of a pack: maximal runs without a branch, the calls of the model they make, and what each call scores.

A segment begins where a token does not continue the one before it alone: subtree_end[k] != subtree_end[k - 1]. A
prediction belongs to the segment of the row that makes it; a parent's last row predicts every child's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import fail
from ..plan import StepPlan, row_of_prediction


class Segment(NamedTuple):
    """Rows start ... stop - 1 of the pack. parent: index of the segment it goes on from, -1: it begins a tree."""

    start: int
    stop: int
    parent: int


class Unit(NamedTuple):
    """One call of the model: a segment that others go on from, or b leaves of one parent, of equal length.

    parent: index of the unit whose cache it goes on from, -1: none. rows: (b, L) int64 on the CPU. own: (b, L) bool,
    the rows that it scores: False where a row is here once more. inner: others go on from it (then b = 1).
    """

    parent: int
    rows: Tensor
    own: Tensor
    inner: bool


class Part(NamedTuple):
    """What a unit scores. plan: over its flattened rows, one prediction a place; places: (n,) predictions of the pack.

    heads: {name: (rows, places)}: flattened rows of the unit, and places in that head's positions.
    """

    plan: StepPlan
    places: Tensor
    heads: dict[str, tuple[Tensor, Tensor]]


def segments(op: str, batch: Any) -> list[Segment]:
    """Segments of a pack in depth-first order. Raises ValueError, as op, for a batch that is no pack of whole trees."""
    if batch.lengths is not None:
        fail(op, "batch", "a pack of trees, from pack_trees", "a batch of padded sequences")
    end, depth = batch.subtree_end.cpu(), batch.position_ids.reshape(-1).cpu()
    T = end.shape[0]
    begins = torch.ones(T, dtype=torch.bool)
    begins[1:] = end[1:] != end[:-1]
    starts = begins.nonzero().flatten().tolist()
    found: list[Segment] = []
    above: list[int] = []  # the segments whose subtree is open, the innermost last
    ends, depths = end.tolist(), depth.tolist()
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        while above and ends[found[above[-1]].start] <= start:
            above.pop()
        parent = above[-1] if above else -1
        first = depths[found[parent].stop - 1] + 1 if above else 0
        if depths[start] != first or depths[stop - 1] - first != stop - 1 - start:
            fail(op, "batch", "a pack of whole trees, position_ids counted along each path from 0",
                 f"positions {depths[start]} to {depths[stop - 1]} at rows {start} to {stop - 1} behind {first - 1}")
        above.append(len(found))
        found.append(Segment(start, stop, parent))
    return found


def units(found: list[Segment], *, stateful: bool, max_tokens: int | None) -> list[Unit]:
    """Calls of the model, depth first: the leaves of a unit come before what goes deeper.

    max_tokens: leaves of one parent and one length share a call up to so many tokens, None: one segment a call; no
    token of padding. stateful: no call that goes on from a state is one token long, as length 1 takes the decode path
    of hybrids, which has no backward on a GPU. A segment of one token that others go on from is no call of its own:
    each of those repeats it from the state before it. A leaf of one token is followed by itself: nothing reads the
    state behind a leaf.
    """
    children: list[list[int]] = [[] for _ in found]
    for index, segment in enumerate(found):
        if segment.parent >= 0:
            children[segment.parent].append(index)

    def calls(below: Iterable[int], has_state: bool) -> list[tuple[list[int], int, int]]:
        """(rows, number of repeated rows before its own, segment) of the segments below one, one-token ones merged."""
        made = []
        for index in below:
            rows = list(range(found[index].start, found[index].stop))
            if stateful and has_state and len(rows) == 1 and children[index]:
                under = children[index]  # two tokens and more: no merging further down
                for place, child in enumerate(under):
                    own = range(found[child].start, found[child].stop)
                    made.append(([*rows, *own], 0 if place == 0 else 1, child))
            else:
                made.append((rows, 0, index))
        return made

    result: list[Unit] = []
    waiting: list[tuple[int, tuple[list[int], int, int]]] = []
    roots = [index for index, segment in enumerate(found) if segment.parent < 0]
    _place(result, waiting, -1, calls(roots, False), children, stateful, max_tokens)
    while waiting:
        parent, (rows, repeated, index) = waiting.pop()
        result.append(_unit(parent, [(rows, repeated)], inner=True))
        _place(result, waiting, len(result) - 1, calls(children[index], True), children, stateful, max_tokens)
    return result


def _place(result: list[Unit], waiting: list, parent: int, made: list, children: list[list[int]], stateful: bool,
           max_tokens: int | None) -> None:
    """Leaves among the calls below a unit become units at once, by length; the others wait, the first on top."""
    leaves: dict[int, list[tuple[list[int], int]]] = {}
    for rows, repeated, index in made:
        if not children[index]:
            lone = stateful and parent >= 0 and len(rows) == 1
            leaves.setdefault(2 if lone else len(rows), []).append((rows, repeated))
    for length, alike in leaves.items():
        most = 1 if max_tokens is None else max(1, max_tokens // length)
        for first in range(0, len(alike), most):
            result.append(_unit(parent, alike[first : first + most], length=length))
    waiting.extend((parent, call) for call in reversed(made) if children[call[2]])


def _unit(parent: int, alike: list[tuple[list[int], int]], length: int = 0, inner: bool = False) -> Unit:
    length = length or len(alike[0][0])
    rows = torch.tensor([rows if len(rows) == length else rows * 2 for rows, _ in alike])
    own = torch.ones(rows.shape, dtype=torch.bool)
    for b, (given, repeated) in enumerate(alike):
        own[b, :repeated] = False
        own[b, len(given) :] = False
    return Unit(parent, rows, own, inner)


def parts(made: list[Unit], T: int, plan: StepPlan, positions: Mapping[str, Tensor]) -> list[Part]:
    """What each unit scores of a plan over T rows and of heads at positions {name: (K,) rows}; all on the CPU."""
    unit_of, local = torch.full((2, T), -1, dtype=torch.int64)
    for index, unit in enumerate(made):
        unit_of[unit.rows[unit.own]] = index
        local[unit.rows[unit.own]] = unit.own.flatten().nonzero().flatten()
    tensors = plan.to("cpu")
    row, scored = row_of_prediction(tensors.tensors)
    rows = tensors.rows[row] if len(row) and len(tensors.rows) else row.new_zeros(0)
    owned = _by_unit(unit_of, local, rows, scored.nonzero().flatten(), len(made))
    heads = {name: _by_unit(unit_of, local, at, torch.arange(len(at)), len(made)) for name, at in positions.items()}
    result = []
    for index in range(len(made)):
        own, places = owned(index)
        labels = tensors.labels[places]
        result.append(Part(StepPlan.from_predictions(own, labels, torch.zeros_like(own), 1), places,
                           {name: at(index) for name, at in heads.items()}))
    return result


def _by_unit(unit_of: Tensor, local: Tensor, rows: Tensor, places: Tensor,
             count: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """unit -> (its flattened rows, places) of what reads rows[place], by ascending row of the unit."""
    rows = rows[places] if len(rows) else rows
    order = torch.argsort(local[rows], stable=True)
    order = order[torch.argsort(unit_of[rows[order]], stable=True)]
    bounds = torch.searchsorted(unit_of[rows[order]], torch.arange(count + 1)).tolist()

    def of(index: int) -> tuple[Tensor, Tensor]:
        taken = order[bounds[index] : bounds[index + 1]]
        return local[rows[taken]], places[taken]

    return of
