"""One step tree, grown by the search of AlphaZero over steps: select by PUCT, expand, judge, back up.

    Q(s) = W(s) / N(s)      U(s) = c P(s) sqrt(N(parent)) / (1 + N(s))      the child with the largest Q + U is taken

P is the softmax over siblings of a step's mean log-prob. A leaf is worth the verifier's +1 or -1 where its answer is
over, else the value head's or a second model's score, or the mean of rollouts to the end. Source: PUCT as in AlphaZero
(arXiv 1712.01815), over steps of reasoning as in AlphaMath (arXiv 2405.03553) and SVPO (arXiv 2406.10858).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from svpo_kernels.trainer.settings import key

from .engines import Prefix, Step

Judge = Callable[[Prefix], float]  # whole answers: +1 right, -1 wrong
LeafValue = Callable[[list[Prefix]], list[float]]  # of answers that go on, in [-1, 1]; None: the engine's own head


@dataclass
class Growth:
    """How a tree grows; a virtual loss keeps the leaves of a batch apart."""

    simulations: int = key(32, "Selections of a tree.")
    children: int = key(4, "Steps drawn where a leaf is expanded.")
    c_puct: float = key(1.5, "Weight of the prior against the value.")
    max_depth: int = key(16, "Most steps of an answer.")
    leaves: int = key(4, "Leaves expanded together, in one batch.")

    def __post_init__(self) -> None:
        for name in ("simulations", "children", "max_depth", "leaves"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout: {name} must be at least 1, got {getattr(self, name)}")
        if not self.c_puct >= 0:
            raise ValueError(f"rollout: c_puct must be at least 0, got {self.c_puct}")


@dataclass(eq=False)
class Node:
    """A step in the tree; the root is the prompt and has none. verdict: of the judge, where the answer is over."""

    prefix: Prefix
    parent: Node | None = None
    step: Step | None = None
    prior: float = 1.0
    depth: int = 0
    visits: int = 0
    total: float = 0.0
    closed: bool = False  # the answer is over, or as long as may be
    verdict: float | None = None
    children: list[Node] = field(default_factory=list)

    @property
    def value(self) -> float:
        """Q = W / N, 0 before the first visit."""
        return self.total / self.visits if self.visits else 0.0

    def child(self, c_puct: float) -> Node:
        """The child that PUCT takes; ties to the first."""
        explore = c_puct * math.sqrt(max(self.visits, 1))
        return max(self.children, key=lambda node: node.value + explore * node.prior / (1 + node.visits))


def grow(engine: Any, prompt: Any, judge: Judge, leaf_value: LeafValue | None, growth: Growth,
         generator: torch.Generator) -> Node:
    """The root of a tree of `simulations` selections. Siblings of equal ids (or text) are one; values: in [-1, 1]."""
    root = Node(engine.begin(prompt))
    done = 0
    while done < growth.simulations:
        chosen = _select(root, growth, min(growth.leaves, growth.simulations - done))
        fresh = [node for node in chosen if not node.closed]
        worth = dict(zip(fresh, _expand_all(fresh, engine, leaf_value, growth, generator), strict=True))
        for node in chosen:
            if node.closed and node.verdict is None:
                node.verdict = judge(node.prefix)
            value = node.verdict if node.closed else worth[node]
            if not -1 <= value <= 1:
                raise ValueError(f"rollout: the value of a leaf must be in [-1, 1], got {value}")
            _along(node, 1, value)
        done += len(chosen)
    return root


def _select(root: Node, growth: Growth, most: int) -> list[Node]:
    """Distinct leaves, found one after the other under a virtual loss of those before. A leaf that is closed may come
    again, in a batch of its own."""
    chosen: list[Node] = []
    for _ in range(most):
        node = root
        while node.children:
            node = node.child(growth.c_puct)
        if node in chosen:
            break
        chosen.append(node)
        _along(node, 1, -1.0)
    for node in chosen:
        _along(node, -1, 1.0)
    return chosen


def _expand_all(leaves: list[Node], engine: Any, leaf_value: LeafValue | None, growth: Growth,
                generator: torch.Generator) -> list[float]:
    """Give every leaf its children; the leaves' own values."""
    if not leaves:
        return []
    prefixes = [node.prefix for node in leaves]
    if leaf_value is None:
        scores, drawn = engine.advance(prefixes, growth.children, generator)
        values = [2 * score - 1 for score in scores]
    else:
        drawn = engine.go_on(prefixes, growth.children, generator)
        values = leaf_value(prefixes)
    for node, steps in zip(leaves, drawn, strict=True):
        _expand(node, steps, engine, growth)
    return values


def _expand(node: Node, steps: list[Step], engine: Any, growth: Growth) -> None:
    seen: dict[Any, Step] = {}
    for step in steps:
        if step.text.strip() or step.ended:
            seen.setdefault(tuple(step.ids) if step.ids is not None else step.text, step)
    priors = _priors(list(seen.values()))
    for step, prior in zip(seen.values(), priors, strict=True):
        prefix = node.prefix.then(step)
        depth = node.depth + 1
        over = step.ended or depth >= growth.max_depth or prefix.used >= engine.sampling.max_tokens
        node.children.append(Node(prefix, node, step, prior, depth, closed=over))
    node.closed = not node.children  # nothing but white space came: a dead end


def _priors(steps: list[Step]) -> list[float]:
    """Softmax over siblings of the mean log-prob of a step's tokens; equal shares where one has none."""
    if not steps or any(not step.logps for step in steps):
        return [1 / len(steps)] * len(steps) if steps else []
    means = torch.tensor([sum(step.logps) / len(step.logps) for step in steps], dtype=torch.float64)
    return torch.softmax(means, 0).tolist()


def _along(node: Node | None, visits: int, value: float) -> None:
    while node is not None:
        node.visits, node.total, node = node.visits + visits, node.total + value, node.parent
