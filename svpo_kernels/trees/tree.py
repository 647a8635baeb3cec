"""Step trees: a prompt with steps branching under it, and the choice of step pairs in one.

A plain preference pair is a tree with two leaves, a plain trajectory a tree with no branch. `packing.py` turns trees
into batches; `text.py` makes trees from text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import combinations
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import describe, fail, is_integer, require_choice
from ..plan import as_index
from .paths import Ids, PathIds, Paths
from .widest import widest_pairs

RULES = ("best_worst", "top_bottom", "all")
LARGEST_ID = 2**31 - 1  # ids are held in four bytes
GAP_ROUNDING = 1e-9  # 2 * 0.7 - 2 * 0.4 is 0.6 + 1e-16 in floats: a gap must be above min_gap by more than that


@dataclass(slots=True)
class StepNode:
    """One step of a tree.

    parent: index of the node it stands under, -1 for the prompt. token_ids: a model's own ids, appended to the
    parent's path. Or path_ids, the ids from the prompt's first token to this node's last, and start, where this
    node's scored ids begin: path_ids[:start] are the first tokens of the parent's path. A node with text only is what
    `tree_from_text` takes.
    q_value: in [-1, 1], None = unknown. terminal: the step ends a solution. visits, prior: as the search left them.
    ref_logp: log-probability of the step under the reference model, in nats. old_logps: log-probabilities of its scored
    ids under the model that generated them, in nats, one an id. value_end: the step's value is read at the
    token before this index of its path; None: at its last (`tree_from_text` leaves out what stands behind its text).

    Raises ValueError for a q_value outside [-1, 1], both forms of ids at once, or path_ids without start, TypeError
    for a parent or q_value that is no number.
    """

    parent: int
    token_ids: Any = None
    q_value: float | None = None
    _: KW_ONLY
    path_ids: Any = None
    start: int | None = None
    terminal: bool = False
    visits: float | None = None
    prior: float | None = None
    ref_logp: float | None = None
    old_logps: Any = None
    text: str | None = None
    value_end: int | None = None

    def __post_init__(self) -> None:
        if not is_integer(self.parent):
            fail("StepNode", "parent", "an integer, -1 for the prompt", describe(self.parent), TypeError)
        if self.q_value is not None and (isinstance(self.q_value, bool) or not isinstance(self.q_value, Real)):
            fail("StepNode", "q_value", "a number or None", describe(self.q_value), TypeError)
        if self.q_value is not None and not -1 <= self.q_value <= 1:  # NaN is outside too
            fail("StepNode", "q_value", "in [-1, 1] or None", self.q_value)
        if self.token_ids is not None and self.path_ids is not None:
            fail("StepNode", "token_ids", "None when path_ids is given", "both")
        if (self.path_ids is None) != (self.start is None):
            fail("StepNode", "start", "given together with path_ids", self.start)
        self.token_ids = as_ids("StepNode", "token_ids", self.token_ids)
        self.path_ids = as_ids("StepNode", "path_ids", self.path_ids)


def node_path(nodes: Sequence[StepNode], i: int) -> list[int]:
    """The nodes from the first step down to node i."""
    path = []
    while i >= 0:
        path.append(i)
        i = nodes[i].parent
    return path[::-1]


def as_ids(op: str, argument: str, ids: Any) -> Ids | None:
    """Sequence, array or tensor of token ids -> Ids, which read like a list; None and Ids stay."""
    if ids is None or isinstance(ids, Ids):
        return ids
    ids = as_index(op, argument, ids)
    if ids.dim() != 1:
        fail(op, argument, "one sequence of ids", ids)
    if ids.numel() and int(ids.min()) < 0:
        fail(op, argument, "token ids >= 0", f"an id of {int(ids.min())}", IndexError)
    if ids.numel() and int(ids.max()) > LARGEST_ID:
        fail(op, argument, f"token ids <= {LARGEST_ID}", f"an id of {int(ids.max())}", IndexError)
    return Ids(ids.numpy().astype(np.int32))


class StepTree:
    """A prompt and the steps under it.

    prompt_ids: the prompt's ids, at least one (its last token predicts the first step). nodes: StepNodes with ids, in
    any order, any depth. The tree holds every id once: the nodes' token_ids and path_ids become views of it.
    order: node indices, parents before children, depth first; place[i]: where node i stands in it. children[i]: the
    children of node i by index; roots: those of the prompt. start[i], length[i]: the scored ids of node i are ids
    start[i] ... length[i] - 1 of its path.

    Raises ValueError for a missing parent, a cycle, a node without ids, or path_ids that leave the parent's path
    before start.
    """

    def __init__(self, prompt_ids: Any, nodes: Iterable[StepNode]) -> None:
        prompt = as_ids("StepTree", "prompt_ids", prompt_ids)
        if not prompt:
            fail("StepTree", "prompt_ids", "at least one id (it predicts the first step's first token)", "none")
        self.nodes: list[StepNode] = list(nodes)
        self._link()
        self._measure(prompt.array())

    @classmethod
    def from_paths(cls, paths: Paths, nodes: list[StepNode]) -> StepTree:
        """The tree whose `paths` these are; nodes: without ids. Shape is checked, ids are not: they are a tree's."""
        tree = cls.__new__(cls)
        tree.nodes, tree.paths = nodes, paths
        tree.start, tree.length = paths.start, paths.length  # type: ignore[assignment]  # read only, like lists
        tree._link()
        for i, node in enumerate(nodes):
            node.path_ids, node.start = PathIds(paths, i), paths.start[i]
        return tree

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"StepTree({len(self.paths.prompt)} prompt tokens, {len(self.nodes)} nodes)"

    @property
    def prompt_ids(self) -> list[int]:
        return self.paths.prompt.tolist()

    def _link(self) -> None:
        self.children: list[list[int]] = [[] for _ in self.nodes]
        self.roots: list[int] = []
        for i, node in enumerate(self.nodes):
            if not isinstance(node, StepNode):
                fail("StepTree", f"nodes[{i}]", "a StepNode", node, TypeError)
            if not -1 <= node.parent < len(self.nodes):
                fail("StepTree", f"nodes[{i}].parent", f"-1 or a node below {len(self.nodes)}", node.parent)
            (self.roots if node.parent == -1 else self.children[node.parent]).append(i)
        self.order: list[int] = []
        stack = self.roots[::-1]
        while stack:
            i = stack.pop()
            self.order.append(i)
            stack.extend(reversed(self.children[i]))
        if len(self.order) < len(self.nodes):
            lost = min(set(range(len(self.nodes))) - set(self.order))
            fail("StepTree", f"nodes[{lost}].parent", "a way up to the prompt", "a cycle")
        self.place: list[int] = [0] * len(self.nodes)
        for at, i in enumerate(self.order):
            self.place[i] = at

    def _measure(self, prompt: np.ndarray) -> None:
        """start, length and the ids themselves, each once; the nodes' own ids become views of them."""
        nodes, parts = self.nodes, [prompt, *(np.zeros(0, np.int32) for _ in self.nodes)]
        self.start: list[int] = [0] * len(nodes)
        self.length: list[int] = [0] * len(nodes)
        for i in self.order:
            parts[i + 1] = self._own(i, parts)
        first = np.cumsum([0, *map(len, parts)])
        self.paths = Paths(np.concatenate(parts), first, [node.parent for node in nodes], self.start, self.length)
        for i, node in enumerate(nodes):
            if node.path_ids is None:
                node.token_ids = Ids(self.paths.own(i))
            else:
                node.path_ids = PathIds(self.paths, i)

    def _own(self, i: int, parts: list[np.ndarray]) -> np.ndarray:
        """The scored ids of a node whose parent's are in parts; start and length are set."""
        node = self.nodes[i]
        above = len(parts[0]) if node.parent == -1 else self.length[node.parent]
        if node.token_ids is not None:
            self.start[i], own = above, node.token_ids.array()
        elif node.path_ids is not None:
            path = node.path_ids.array()
            if not 1 <= node.start <= above:
                fail("StepTree", f"nodes[{i}].start", f"in 1 ... {above}, the length of its parent's path", node.start)
            if not self._keeps(path, node, parts):
                fail("StepTree", f"nodes[{i}].path_ids", f"its parent's path up to start = {node.start}", "other ids")
            self.start[i], own = node.start, path[node.start:]
        else:
            fail("StepTree", f"nodes[{i}]", "given token_ids or path_ids", "neither (text? see tree_from_text)")
        self.length[i] = self.start[i] + len(own)
        if node.old_logps is not None and len(node.old_logps) != len(own):
            fail("StepTree", f"nodes[{i}].old_logps", f"one number a scored id ({len(own)})", len(node.old_logps))
        if not len(own):
            fail("StepTree", f"nodes[{i}]", "a step of at least one token", "none")
        return own

    def _keeps(self, path: np.ndarray, node: StepNode, parts: list[np.ndarray]) -> bool:
        """Whether path[:node.start] are the first ids of the path of the node's parent."""
        i, left = node.parent, node.start
        if len(path) < left:
            return False
        while i != -1:
            begin = self.start[i]
            if begin < left:
                if not np.array_equal(path[begin:left], parts[i + 1][:left - begin]):
                    return False
                left = begin
            i = self.nodes[i].parent
        return np.array_equal(path[:left], parts[0][:left])

    def value_end(self, i: int) -> int:
        """The index just past the token of node i's path at which its value is read: within its scored ids."""
        end = self.nodes[i].value_end
        return self.length[i] if end is None else min(max(end, self.start[i] + 1), self.length[i])

    def path(self, i: int, stop: int | None = None) -> list[int]:
        """The ids from the prompt's first token to the last of node i (-1: the prompt), or the first `stop` of them."""
        return self.paths.path(i, stop).tolist()

    def step_ids(self, i: int) -> list[int]:
        """The scored ids of node i."""
        return self.paths.own(i).tolist()


def select_pairs(tree: StepTree, rule: str = "best_worst", min_gap: float = 0.0, max_pairs: int | None = None,
                 dedup: bool = True, same_kind: bool = True) -> Tensor:
    """Pairs (chosen, rejected) of sibling steps, by their q_values. Returns (P, 2) int64 node indices.

    rule: "best_worst", the best against the worst sibling; "top_bottom", two best against two worst (best against
    worst, second best against second worst), no node twice; "all", every two siblings. Ties go to the first node.
    min_gap: the difference of q_values must be strictly above it. max_pairs: keep the widest, widest first; without
    it pairs come in tree order. Nodes without q_value are skipped. dedup: siblings of equal text count once (the
    first), and so do equal pairs under parents of equal text; nodes without text are compared by ids. same_kind: the
    rule is applied to terminal and to inner siblings apart.

    Raises ValueError for an unknown rule, min_gap or max_pairs that are no numbers >= 0, TypeError for no StepTree.
    """
    require_choice("select_pairs", "rule", rule, RULES)
    if not isinstance(tree, StepTree):
        fail("select_pairs", "tree", "a StepTree", f"a {type(tree).__name__}", TypeError)
    if not isinstance(min_gap, Real) or not min_gap >= 0:
        fail("select_pairs", "min_gap", "a number >= 0", describe(min_gap))
    if max_pairs is not None and (not is_integer(max_pairs) or max_pairs < 0):
        fail("select_pairs", "max_pairs", "an int >= 0 or None", max_pairs)
    q = [node.q_value for node in tree.nodes]
    same = text_keys(tree)
    groups = [first_of_texts(group, same) if dedup else sorted(group) for group in sibling_groups(tree, same_kind)]
    if rule == "all" and max_pairs is not None:
        return _as_tensor(widest_pairs(groups, q, min_gap + GAP_ROUNDING, max_pairs, same if dedup else None))
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for group in groups:
        for pair in _apply_rule(rule, group, q):
            if q[pair[0]] - q[pair[1]] > min_gap + GAP_ROUNDING:
                found.setdefault((same[pair[0]], same[pair[1]]) if dedup else pair, pair)
    pairs = list(found.values())
    if max_pairs is not None:
        pairs = sorted(pairs, key=lambda pair: q[pair[1]] - q[pair[0]])[:max_pairs]
    return _as_tensor(pairs)


def _as_tensor(pairs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def sibling_groups(tree: StepTree, same_kind: bool) -> Iterable[list[int]]:
    """Siblings with a q_value, in tree order of their parents; terminal and inner ones apart when asked."""
    for siblings in (tree.roots, *(tree.children[i] for i in tree.order)):
        valued = [i for i in siblings if tree.nodes[i].q_value is not None]
        if not same_kind:
            yield valued
            continue
        for terminal in (False, True):
            yield [i for i in valued if tree.nodes[i].terminal == terminal]


def first_of_texts(group: Sequence[int], same: Sequence[int]) -> list[int]:
    """Of siblings with equal texts the first, ascending."""
    return sorted({same[i]: i for i in reversed(group)}.values())


def _apply_rule(rule: str, group: Sequence[int], q: Sequence[float | None]) -> Iterable[tuple[int, int]]:
    if rule == "all":
        return [(a, b) if q[a] > q[b] else (b, a) for a, b in combinations(group, 2)]
    each = min(len(group) // 2, 1 if rule == "best_worst" else 2)
    top = sorted(group, key=lambda i: -q[i])[:each]
    bottom = sorted((i for i in group if i not in top), key=lambda i: q[i])[:each]
    return zip(top, bottom, strict=True)


def text_keys(tree: StepTree) -> list[int]:
    """One number per node: equal when the texts from the prompt to the node's end are equal."""
    keys: dict[Any, int] = {}
    of = [0] * len(tree)
    for i in tree.order:
        node = tree.nodes[i]
        step = node.text if node.text is not None else tuple(tree.step_ids(i))
        above = -1 if node.parent == -1 else of[node.parent]
        of[i] = keys.setdefault((above, step), len(keys))
    return of


def as_pairs(op: str, tree: StepTree, pairs: Any, which: int = 0) -> np.ndarray:
    """One tree's pairs as (P, 2) int64, checked: nodes exist, are two, and stand under one prefix.

    Raises ValueError or TypeError for shape or dtype and for pairs that are none, IndexError for a missing node.
    """
    argument = f"pairs[{which}]"
    pairs = as_index(op, argument, pairs if pairs is not None else [])
    if pairs.numel() == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        fail(op, argument, "(P, 2) node indices", pairs)
    pairs = pairs.numpy()
    for chosen, rejected in pairs.tolist():
        if not (0 <= chosen < len(tree) and 0 <= rejected < len(tree)):
            fail(op, argument, f"node indices below {len(tree)}", f"pair ({chosen}, {rejected})", IndexError)
        if chosen == rejected or tree.nodes[chosen].parent != tree.nodes[rejected].parent:
            fail(op, argument, "two steps under one parent", f"pair ({chosen}, {rejected})")
    return pairs
