"""Which values and SFT steps of a tree are trained with which of its pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from svpo_kernels.trees.request import valued_nodes, with_ancestors
from svpo_kernels.trees.tree import StepTree

from .train_data import TrainData

KEPT = 64  # trees of which it is remembered: the steps of an epoch take a tree's pairs one after the other


class Homes(NamedTuple):
    """nodes: of a tree, by the pair they are at home with; those of pair p are nodes[begin[p]:begin[p + 1]].
    home: (nodes,) that pair. sft: (nodes,) bool. owner: (nodes,) the first pair, depth first, whose paths pass a node,
    -1: none."""

    nodes: np.ndarray
    begin: np.ndarray
    home: np.ndarray
    sft: np.ndarray
    owner: np.ndarray


class Targets:
    """values: "pairs", the nodes in some pair; "path", their ancestors too; "labelled", every node with a q_value, each
    with the pair it is at home with and with every pair that has it; "all", of trees without pairs, those without a
    q_value too. once: with one pair each, under every rule."""

    def __init__(self, data: TrainData, values: str, once: bool) -> None:
        self.data, self.values, self.once = data, values, once
        self._kept: dict[int, Homes] = {}

    def of_pairs(self, tree: int, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Nodes with a value and SFT nodes that are trained with these pairs of a tree, ascending; all that are trained
        without a pair if the tree has none."""
        pairs, nodes = self.data.pairs[tree], self.data.trees[tree].nodes
        if not len(pairs):
            return self.of_tree(tree), np.sort(self.data.sft[tree])
        plain = self.values != "labelled" and not self.once and not len(self.data.sft[tree])
        homes = None if plain else self._homes(tree)
        paired = np.unique(pairs[rows]).tolist()
        home = np.zeros(0, np.int64) if plain else np.concatenate(
            [homes.nodes[homes.begin[row]:homes.begin[row + 1]] for row in rows])
        if self.values == "labelled":
            found = {*home.tolist(), *(() if self.once else paired)}
        else:
            found = with_ancestors(self.data.trees[tree], paired) if self.values == "path" else set(paired)
            if self.once:
                own, first = set(rows), homes.owner if self.values == "path" else homes.home
                found = {i for i in found if first[i] in own}
        valued = np.array(sorted(i for i in found if nodes[i].q_value is not None), np.int64)
        return valued, home[:0] if plain else np.sort(home[homes.sft[home]])

    def of_tree(self, tree: int) -> np.ndarray:
        """All nodes of a tree whose value is trained, or scored, ascending."""
        return valued_nodes(self.data.trees[tree], self.data.pairs[tree], self.values)

    def _homes(self, tree: int) -> Homes:
        if tree not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[tree] = self._find(tree)
        return self._kept[tree]

    def _find(self, index: int) -> Homes:
        tree, pairs = self.data.trees[index], self.data.pairs[index]
        homes = node_homes(tree, pairs)
        nodes = np.argsort(homes, kind="stable")
        sft, owner = np.zeros(len(tree), dtype=bool), np.full(len(tree), -1, np.int64)
        sft[self.data.sft[index]] = True
        for row in sorted(range(len(pairs)), key=lambda row: [tree.place[i] for i in pairs[row].tolist()]):
            for i in pairs[row].tolist():
                while i != -1 and owner[i] < 0:
                    owner[i] = row
                    i = tree.paths.parent[i]
        return Homes(nodes, np.searchsorted(homes[nodes], np.arange(len(pairs) + 1)), homes, sft, owner)


def node_homes(tree: StepTree, pairs: np.ndarray) -> np.ndarray:
    """(nodes,) the pair with which each node is trained by its value or as an SFT step, once an epoch.

    It is the first pair that holds the node, else the last one before it in a depth-first walk; 0 without pairs.
    """
    homes = np.full(len(tree), -1, np.int64)
    for index, pair in reversed(list(enumerate(pairs.tolist()))):
        homes[pair] = index
    latest = 0
    for node in tree.order:
        latest = homes[node] if homes[node] >= 0 else latest
        homes[node] = latest
    return homes
