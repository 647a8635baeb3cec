"""The trie of some id sequences of some trees, as runs without a branch, in depth-first order.

Equal first tokens are stored once, whichever node or tree they come from. A run ends where sequences part or one of
them ends, so whatever is asked of the trie is asked of whole runs: the work grows with nodes, and tokens are copied
and compared as arrays. Nothing here recurses, so depth is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from .paths import common
from .tree import StepTree

MASK = 2**64 - 1
BASE = 0x9E3779B97F4A7C15  # odd: its powers never vanish modulo 2^64


class Trie:
    """Runs of all paths to the nodes given, each distinct prefix once.

    length, depth, above, past: (E,) int64 by depth-first rank, children in the order they came: the tokens of a run,
    those in front of its first on every path, the run above (-1: none), and the rank just past the runs under it.
    ids: (E,) its tokens, int32 arrays. end: (nodes,) int64, the rank of the run that the path of each node given ends
    with, in the order given.
    """

    def __init__(self, groups: Iterable[tuple[StepTree, Sequence[int]]]) -> None:
        """groups: trees, and of each the nodes wanted, with all their ancestors, parents first."""
        self._ids: list[np.ndarray] = []
        self._depth: list[int] = []
        self._above: list[int] = []
        self._below: list[dict[int, int]] = [{}]  # runs under a run by their first token; the last: under none
        ends: list[int] = []
        for tree, nodes in groups:
            paths = tree.paths
            at = {-1: self._insert(-1, 0, paths.prompt)}
            for i in nodes:
                at[i] = self._insert(at[paths.parent[i]], paths.start[i], paths.own(i))
                ends.append(at[i])
        rank = self._layout()
        self.end = rank[np.array(ends, dtype=np.int64)]
        del self._ids, self._depth, self._above, self._below

    def _insert(self, at: int, kept: int, ids: np.ndarray) -> int:
        """Walk or grow the trie along ids behind the first `kept` tokens of the path that ends with run `at`; the run
        that ends where they do. A run that is cut keeps its number for its lower part."""
        depth, above = self._depth, self._above
        while at != -1 and depth[at] >= kept:
            at = above[at]
        inside = kept - depth[at] if at != -1 else 0
        if at != -1 and inside < len(self._ids[at]):
            met = common(self._ids[at][inside:], ids)
            if inside + met < len(self._ids[at]):
                at = self._cut(at, inside + met)
            ids, kept = ids[met:], kept + met
        while len(ids):
            first = int(ids[0])
            here = self._below[at].get(first)
            if here is None:
                return self._new(at, first, kept, ids)
            met = common(self._ids[here], ids)
            at = self._cut(here, met) if met < len(self._ids[here]) else here
            ids, kept = ids[met:], kept + met
        return at

    def _new(self, above: int, first: int, depth: int, ids: np.ndarray) -> int:
        run = len(self._ids)
        self._ids.append(ids)
        self._depth.append(depth)
        self._above.append(above)
        self._below[above][first] = run
        self._below.insert(run, {})
        return run

    def _cut(self, run: int, at: int) -> int:
        """Part a run in front of its token `at`; the upper part, a new run."""
        ids, above = self._ids[run], self._above[run]
        upper = self._new(above, int(ids[0]), self._depth[run], ids[:at])
        self._ids[run], self._depth[run], self._above[run] = ids[at:], self._depth[run] + at, upper
        self._below[upper][int(ids[at])] = run
        return upper

    def _layout(self) -> np.ndarray:
        """Depth-first ranks of the runs in the order they came; fills the arrays."""
        E = len(self._ids)
        order: list[int] = []
        rank, past = [0] * (E + 1), [0] * E
        stack = list(reversed(self._below[-1].values()))
        while stack:
            run = stack.pop()
            if run < 0:  # all under ~run have been met
                past[rank[~run]] = len(order)
                continue
            rank[run] = len(order)
            order.append(run)
            stack.append(~run)
            stack.extend(reversed(self._below[run].values()))
        rank[-1] = -1
        ranks = np.array(rank, dtype=np.int64)
        self.ids = [self._ids[run] for run in order]
        self.length = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        self.depth = np.array([self._depth[run] for run in order], dtype=np.int64)
        self.above = ranks[np.array([self._above[run] for run in order], dtype=np.int64)]
        self.past = np.array(past, dtype=np.int64)
        return ranks

    def needed(self, ends: Sequence[int] | np.ndarray) -> np.ndarray:
        """(E,) bool: the runs on the paths to the ends of these runs."""
        seen = np.zeros(len(self.ids) + 1, dtype=np.int64)
        seen[np.asarray(ends, dtype=np.int64) + 1] = 1
        seen = np.cumsum(seen)  # seen[k]: distinct ends before run k
        return seen[self.past] > seen[:-1]

    def tokens(self, runs: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64, the tokens of these runs, one after the other."""
        parts = [self.ids[run] for run in runs]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def path(self, run: int) -> list[int]:
        """The runs from the first token to the end of this one."""
        found = []
        while run != -1:
            found.append(run)
            run = int(self.above[run])
        return found[::-1]

    @cached_property
    def lists(self) -> tuple[list[int], list[int]]:
        """depth and above, for walks in Python."""
        return self.depth.tolist(), self.above.tolist()

    def pieces(self, run: int, begin: int, stop: int) -> list[tuple[int, int, int]]:
        """Tokens begin ... stop - 1 of the path that ends with a run: (run, first in it, how many), in order."""
        depth, above = self.lists
        found = []
        while stop > begin:
            if depth[run] < stop:
                first = max(begin, depth[run])
                found.append((run, first - depth[run], stop - first))
                stop = first
            run = above[run]
        return found[::-1]

    @cached_property
    def names(self) -> list[int]:
        """A number of 64 bits for the ids of the path to each run's end: equal ids have equal ones in every trie."""
        if not self.ids:
            return []
        token = self.tokens(range(len(self.ids))).astype(np.uint64) + np.uint64(1)
        token *= np.uint64(0xBF58476D1CE4E5B9)
        token ^= token >> np.uint64(31)
        powers = np.multiply.accumulate(np.full(int(self.length.max()) + 1, BASE, dtype=np.uint64))
        stop = np.cumsum(self.length)
        left = np.repeat(stop, self.length) - 1 - np.arange(len(token))
        sums = np.add.reduceat(token * powers[left], stop - self.length).tolist()
        names: list[int] = []
        for run, above in enumerate(self.above.tolist()):
            before = names[above] if above >= 0 else 0
            names.append((before * int(powers[self.length[run] - 1]) + sums[run]) & MASK)
        return names
