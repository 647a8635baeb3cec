"""What is asked of `pack_trees`, checked: which nodes are wanted for what, and in which order they are looked at.

Nothing here grows with nodes that are not wanted. Nodes are numbered over all trees: first[t] + i is node i of tree t.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import fail, require_choice
from ..plan import as_index
from .paths import common
from .tree import StepTree, as_pairs
from .trie import Trie

Branch = tuple[int, list[Any] | None]
VALUES = ("pairs", "path", "labelled", "all")


class Request:
    """pairs: (P, 2) numbers, valued and sft: numbers. An item is what must be in one batch: the ends of a pair, or of
    one node that no pair's path passes (a carrier); riders[item] are nodes whose ids it passes though they are others.
    order: items by tree, trees of equal first ids side by side, depth first within."""

    def __init__(self, op: str, trees: Any, pairs: Any, values: str | Sequence[np.ndarray], sft: Any) -> None:
        """values: a rule of VALUES, or for every tree the nodes themselves."""
        self.op = op
        self.trees = _list_of_trees(op, trees)
        if isinstance(values, str):
            require_choice(op, "values", values, VALUES)
        _one_per_tree(op, "pairs", pairs, "one (P, 2) per tree", self.trees)
        each = [as_pairs(op, tree, own, t) for t, (tree, own) in enumerate(zip(self.trees, pairs, strict=True))]
        self.first = np.cumsum([0, *map(len, self.trees)])
        sft, valued = self._sft(sft), self._valued(values, each)
        self.pairs = self._numbers([own.ravel() for own in each]).reshape(-1, 2)
        self.carriers: list[int] = []
        self.riders: dict[int, list[int]] = {}
        self._carry(each, valued, sft)
        self.valued, self.sft = self._numbers(valued), np.sort(self._numbers(sft))
        self.sft_alone = ~np.isin(self.sft, self.pairs)  # in no pair
        self.order = self._order()

    def __len__(self) -> int:
        """Items."""
        return len(self.pairs) + len(self.carriers)

    def place(self, numbers: Any) -> tuple[np.ndarray, np.ndarray]:
        """(trees, nodes) of these numbers."""
        numbers = np.asarray(numbers, dtype=np.int64)
        trees = np.searchsorted(self.first, numbers, side="right") - 1
        return trees, numbers - self.first[trees]

    def item(self, n: int) -> list[int]:
        """The numbers whose ends item n needs together."""
        return self.pairs[n].tolist() if n < len(self.pairs) else [self.carriers[n - len(self.pairs)]]

    def name(self, n: int) -> str:
        trees, nodes = (found.tolist() for found in self.place(self.item(n)))
        return f"pair ({nodes[0]}, {nodes[1]}) of tree {trees[0]}" if len(nodes) == 2 else (
            f"node {nodes[0]} of tree {trees[0]}")

    def _sft(self, sft: Any) -> list[np.ndarray]:
        """Per tree its SFT nodes."""
        if sft is None:
            return [np.zeros(0, np.int64)] * len(self.trees)
        _one_per_tree(self.op, "sft", sft, "one list of nodes per tree", self.trees)
        found: list[np.ndarray] = []
        for t, nodes in enumerate(sft):
            if nodes is None:
                fail(self.op, f"sft[{t}]", "node indices, [] for none", "None", TypeError)
            nodes = as_index(self.op, f"sft[{t}]", nodes).reshape(-1).numpy()
            for i in nodes[(nodes < 0) | (nodes >= len(self.trees[t]))].tolist():
                fail(self.op, f"sft[{t}]", f"node indices below {len(self.trees[t])}", f"{i}", IndexError)
            if len(np.unique(nodes)) < len(nodes):
                fail(self.op, f"sft[{t}]", "each node once", f"{nodes.tolist()}")
            found.append(nodes)
        return found

    def _valued(self, values: str | Sequence[np.ndarray], pairs: list[np.ndarray]) -> list[np.ndarray]:
        """Per tree the nodes whose q_values are targets, ascending."""
        if not isinstance(values, str):
            return [np.unique(np.asarray(nodes, np.int64)) for nodes in values]
        return [valued_nodes(tree, own, values) for tree, own in zip(self.trees, pairs, strict=True)]

    def _numbers(self, nodes: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(own + first for own, first in zip(
            nodes, self.first.tolist(), strict=False) if len(own))])

    def _carry(self, pairs: list[np.ndarray], valued: list[np.ndarray], sft: list[np.ndarray]) -> None:
        """Valued and SFT nodes whose ids no pair's path passes, without those that another of them passes, become items
        of their own; the others ride with an item that passes their ids."""
        begin = 0
        for t, (tree, own) in enumerate(zip(self.trees, pairs, strict=True)):
            base = int(self.first[t])
            if len(valued[t]) or len(sft[t]):
                ends = np.unique(own).tolist()
                covered = with_ancestors(tree, ends)
                extra = [i for i in {*valued[t].tolist(), *sft[t].tolist()} if i not in covered]
                if extra:
                    passes = {i: begin + n for n, pair in enumerate(own.tolist()) for i in pair}
                    self._carry_tree(tree, base, passes, sorted(covered | with_ancestors(tree, extra),
                                                                key=tree.place.__getitem__), sorted(extra))
            begin += len(own)

    def _carry_tree(self, tree: StepTree, base: int, passes: dict[int, int], nodes: list[int],
                    extra: list[int]) -> None:
        """passes: an item for every node in a pair. nodes: all that are wanted, parents first."""
        trie = Trie([(tree, nodes)])
        end = dict(zip(nodes, trie.end.tolist(), strict=True))
        item_at = {end[i]: n for i, n in passes.items()}
        ends = np.unique(np.array([end[i] for i in (*passes, *extra)], dtype=np.int64))
        for i in extra:
            deepest = np.searchsorted(ends, trie.past[end[i]]) - np.searchsorted(ends, end[i]) == 1
            if deepest and end[i] not in item_at:  # nothing goes on behind it
                item_at[end[i]] = len(self)
                self.carriers.append(base + i)
        ends = np.array(sorted(item_at), dtype=np.int64)
        for i in extra:
            n = item_at[int(ends[np.searchsorted(ends, end[i])])]
            if n < len(self.pairs) or self.carriers[n - len(self.pairs)] != base + i:
                self.riders.setdefault(n, []).append(base + i)

    def _order(self) -> list[int]:
        ranks = np.empty(len(self.trees), dtype=np.int64)
        ranks[by_prompt(self.trees)] = np.arange(len(self.trees))
        ends = np.concatenate([self.pairs, np.repeat(np.array(self.carriers, np.int64)[:, None], 2, axis=1)])
        if not len(ends):
            return []
        trees, nodes = self.place(ends)
        places = np.array([(self.trees[t].place[a], self.trees[t].place[b])
                           for (t, _), (a, b) in zip(trees.tolist(), nodes.tolist(), strict=True)], dtype=np.int64)
        return np.lexsort((places.min(1), places.max(1), ranks[trees[:, 0]])).tolist()


def pair_tokens(tree: StepTree, chosen: int, rejected: int, least: int = 0) -> int:
    """Tokens of two siblings' paths together; no more than `least` may come out too large."""
    together = tree.length[chosen] + tree.length[rejected]
    tokens = together - min(tree.start[chosen], tree.start[rejected])
    if tokens <= least:
        return tokens
    return together - common(tree.paths.path(chosen), tree.paths.path(rejected))  # they may share more than that


def longest_pair(request: Request) -> int:
    """Tokens of the pair that needs most."""
    most = 0
    trees, nodes = request.place(request.pairs)
    for (t, _), (chosen, rejected) in zip(trees.tolist(), nodes.tolist(), strict=True):
        most = max(most, pair_tokens(request.trees[t], chosen, rejected, most))
    return most


def valued_nodes(tree: StepTree, pairs: np.ndarray, values: str) -> np.ndarray:
    """The nodes of a tree whose q_values are targets under a rule of VALUES, ascending. pairs: (P, 2) of its nodes."""
    if values == "all":
        return np.arange(len(tree))
    wanted = range(len(tree)) if values == "labelled" else np.unique(pairs).tolist()
    if values == "path":
        wanted = sorted(with_ancestors(tree, wanted))
    return np.array([i for i in wanted if tree.nodes[i].q_value is not None], dtype=np.int64)


def with_ancestors(tree: StepTree, nodes: Iterable[int]) -> set[int]:
    found: set[int] = set()
    parent = tree.paths.parent
    for i in nodes:
        while i != -1 and i not in found:
            found.add(i)
            i = parent[i]
    return found


def by_prompt(trees: Sequence[StepTree]) -> list[int]:
    """The trees in the order in which a trie of their prompts meets them depth first, branches as they came: trees
    that share more of their prompts stand closer together."""
    prompts = [tree.paths.prompt for tree in trees]
    order = sorted(range(len(trees)), key=[prompt.astype(">i4").tobytes() for prompt in prompts].__getitem__)
    found: list[int] = []
    waiting = [_branches(prompts, order)] if order else []
    while waiting:
        first, branches = waiting.pop()
        if branches is None:
            found.append(first)
        else:
            waiting.extend(sorted(branches, key=_first, reverse=True))
    return found


def _branches(prompts: Sequence[np.ndarray], order: Sequence[int]) -> Branch:
    """The trie of sorted prompts: a branch is (its first tree, the branches under it; None: that tree alone)."""
    stack: list[tuple[int, list[Branch]]] = []  # (tokens shared, branches), more and more shared
    branch: Branch = (order[0], None)
    for before, tree in itertools.pairwise(order):
        shared = common(prompts[before], prompts[tree])
        while stack and stack[-1][0] > shared:
            branch = _closed([*stack.pop()[1], branch])
        if not stack or stack[-1][0] < shared:
            stack.append((shared, []))
        stack[-1][1].append(branch)
        branch = (tree, None)
    while stack:
        branch = _closed([*stack.pop()[1], branch])
    return branch


def _closed(branches: list[Branch]) -> Branch:
    return min(map(_first, branches)), branches


def _first(branch: Branch) -> int:
    return branch[0]


def _list_of_trees(op: str, trees: Any) -> list[StepTree]:
    if isinstance(trees, StepTree | Mapping | str) or not isinstance(trees, Sequence):
        fail(op, "trees", "a sequence of StepTree", f"a {type(trees).__name__}", TypeError)
    for t, tree in enumerate(trees):
        if not isinstance(tree, StepTree):
            fail(op, f"trees[{t}]", "a StepTree", f"a {type(tree).__name__}", TypeError)
    return list(trees)


def _one_per_tree(op: str, argument: str, given: Any, what: str, trees: list[StepTree]) -> None:
    if not hasattr(given, "__len__"):
        fail(op, argument, f"{what}, {len(trees)}", f"a {type(given).__name__}", TypeError)
    if len(given) != len(trees):
        fail(op, argument, f"{what}, {len(trees)}", f"{len(given)}")
