"""What a run trains on: trees, their pairs with weights, their SFT nodes, and questions asked of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from svpo_kernels.trees.request import valued_nodes, with_ancestors
from svpo_kernels.trees.tree import StepTree


@dataclass
class TrainData:
    """Trees and what is trained on them.

    trees: the step trees. pairs: per tree (P, 2) int64, (chosen, rejected) node indices. sft: per tree the indices of
    its SFT nodes. weights: per tree (P,) float32, the weight of each pair. paths: a step is scored as the whole path to
    its end (implicit rewards), and so are the references. alone_too: references of labelled steps are read without a
    pair too (dvo). correct: per tree whether its solution is right, None: not known; empty: of none. rollouts: the
    `policy.Rollouts` of objective policy, whose references are log-probs of tokens.
    """

    trees: list[StepTree]
    pairs: list[np.ndarray]
    sft: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    paths: bool = False
    alone_too: bool = False
    correct: list[bool | None] = field(default_factory=list)
    rollouts: Any = None

    def __post_init__(self) -> None:
        self.pairs = [np.asarray(pairs, dtype=np.int64).reshape(-1, 2) for pairs in self.pairs]
        if len(self.pairs) != len(self.trees):
            raise ValueError(f"TrainData: pairs must hold one (P, 2) array per tree, got {len(self.pairs)} arrays "
                             f"for {len(self.trees)} trees")
        self.sft = [np.asarray(nodes, np.int64).reshape(-1) for nodes in self.sft or [()] * len(self.trees)]
        if not self.weights:
            self.weights = pair_weights(self.trees, self.pairs, "pair")
        self._path_references: dict[tuple[int, int], float] = {}

    per_token = False  # a reference is one number a step

    @property
    def num_pairs(self) -> int:
        return sum(len(pairs) for pairs in self.pairs)

    def referenced(self) -> list[np.ndarray]:
        """Per tree the distinct nodes whose reference log-prob is read, ascending: in pairs; of paths, labelled."""
        if not (self.paths or self.alone_too):
            return [np.unique(pairs) for pairs in self.pairs]
        return [np.array([i for i, node in enumerate(tree.nodes) if node.q_value is not None], np.int64)
                for tree in self.trees]

    def reference(self, tree: int, node: int) -> float | None:
        return self._path_references.get((tree, node)) if self.paths else self.trees[tree].nodes[node].ref_logp

    def set_reference(self, tree: int, node: int, logp: float) -> None:
        if self.paths:
            self._path_references[tree, node] = logp
        else:
            self.trees[tree].nodes[node].ref_logp = logp

    def size(self, tree: int, node: int) -> int:
        """Numbers of a reference."""
        return 1

    def num_targets(self, values: str) -> int:
        """Steps whose value is trained under this rule ("pairs", "path" or "labelled"), once each."""
        return sum(len(valued_nodes(tree, pairs, values)) for tree, pairs in zip(self.trees, self.pairs, strict=True))

    def alone(self, index: int, values: str) -> np.ndarray:
        """Nodes of a tree that are run without a pair too: its SFT steps, under "labelled" those with a value, under
        "all" every one."""
        if values == "all":
            return np.arange(len(self.trees[index]))
        labelled = [node for node, step in enumerate(self.trees[index].nodes) if step.q_value is not None]
        return np.union1d(self.sft[index], labelled if values == "labelled" else []).astype(np.int64)

    def largest_id(self) -> int:
        """The largest token id of all prompts and steps."""
        return max((int(tree.paths.ids.max()) for tree in self.trees), default=0)

    def fingerprint(self) -> str:
        """Hash of all that decides a plan: pairs, parents, ids and values."""
        digest = hashlib.blake2b(digest_size=16)
        for tree, pairs, sft, weights in zip(self.trees, self.pairs, self.sft, self.weights, strict=True):
            values = [np.nan if node.q_value is None else node.q_value for node in tree.nodes]
            ends = [(node.terminal, tree.value_end(i)) for i, node in enumerate(tree.nodes)]
            for numbers in (values, ends, tree.paths.parent, tree.start, tree.length):
                digest.update(np.array(numbers, np.float64).tobytes())
            digest.update(tree.paths.ids.tobytes())
            for array in (pairs, np.asarray(sft, np.int64), np.asarray(weights, np.float32)):
                digest.update(np.ascontiguousarray(array).tobytes())
        if self.rollouts is not None:
            digest.update(self.rollouts.fingerprint.encode())
        return digest.hexdigest()


def pair_weights(trees: list[StepTree], pairs: list[np.ndarray], rule: str) -> list[np.ndarray]:
    """Weights (P,) per tree whose mean over all pairs is 1: every pair, every parent or every tree counts the same."""
    if rule == "pair":
        return [np.ones(len(rows), np.float32) for rows in pairs]
    groups: dict[tuple[int, int], int] = {}
    keys = []
    for index, (tree, rows) in enumerate(zip(trees, pairs, strict=True)):
        keys.append([(index, tree.nodes[row[0]].parent if rule == "parent" else 0) for row in rows])
        for key in keys[-1]:
            groups[key] = groups.get(key, 0) + 1
    total = sum(groups.values())
    return [np.array([total / (len(groups) * groups[key]) for key in row], np.float32) for row in keys]


def longest_alone(data: TrainData, values: str) -> tuple[int, int, int]:
    """(tokens, tree, node) of the longest path that is run for its values or as SFT; (0, 0, 0) without any."""
    return max(((tree.length[node], index, node) for index, tree in enumerate(data.trees)
                for node in data.alone(index, values).tolist()), default=(0, 0, 0))


def neighbours(tree: StepTree) -> np.ndarray:
    """(P, 2) siblings next to each other: what `max_tokens: auto` is chosen by where no term is over pairs."""
    rows = [pair for group in (tree.roots, *tree.children) for pair in zip(group, group[1:], strict=False)]
    return np.array(rows, np.int64).reshape(-1, 2)


def pruned(tree: StepTree, pairs: np.ndarray, valued: np.ndarray, sft: np.ndarray) -> tuple[StepTree, np.ndarray]:
    """The tree with these nodes and those above them only, and q_values of the valued ones only; and which nodes of the
    tree its nodes are, ascending."""
    kept = np.array(sorted(with_ancestors(tree, [*pairs.ravel().tolist(), *valued.tolist(), *sft.tolist()])), np.int64)
    place = {-1: -1} | {i: at for at, i in enumerate(kept.tolist())}
    counts = set(valued.tolist())
    nodes = [replace(node, parent=place[node.parent], q_value=node.q_value if i in counts else None)
             for i, node in ((i, tree.nodes[i]) for i in kept.tolist())]
    return StepTree(tree.paths.prompt, nodes), kept
