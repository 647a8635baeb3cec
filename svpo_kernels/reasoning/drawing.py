"""Where the nodes of a step tree stand when it is drawn: depth to the right, leaves below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

COLUMN, ROW, MARGIN = 130, 34, 24  # pixels between parent and child, between leaves, around the drawing


@dataclass
class TreeNode:
    """A step in a tree. parent: -1 under the prompt. score in [0, 1], None: not known. visits, prior: of the search."""

    parent: int
    text: str
    score: float | None = None
    visits: float | None = None
    prior: float | None = None
    terminal: bool = False
    chosen: bool = False
    x: float = 0.0
    y: float = 0.0


@dataclass
class Drawing:
    """Nodes with their places, the prompt's own place, and the size of the whole, in pixels."""

    nodes: list[TreeNode]
    x: float = MARGIN
    y: float = MARGIN
    width: float = 0.0
    height: float = 0.0
    order: list[int] = field(default_factory=list)  # depth first

    def edge(self, i: int) -> str:
        """The path of the line from a node's parent to it, as SVG writes it."""
        node = self.nodes[i]
        x, y = (self.x, self.y) if node.parent < 0 else (self.nodes[node.parent].x, self.nodes[node.parent].y)
        middle = (x + node.x) / 2
        return f"M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {node.y:g} {node.x:g} {node.y:g}"


def draw(nodes: Sequence[TreeNode]) -> Drawing:
    """Place every node, a parent in the middle of its children; trees of any depth, nodes in any order."""
    children: list[list[int]] = [[] for _ in range(len(nodes) + 1)]  # the last is the prompt's
    for i, node in enumerate(nodes):
        children[node.parent].append(i)
    drawing = Drawing(list(nodes))
    stack = [(i, 1) for i in reversed(children[-1])]
    leaves = 0
    while stack:
        i, depth = stack.pop()
        drawing.order.append(i)
        nodes[i].x = MARGIN + depth * COLUMN
        if not children[i]:
            nodes[i].y, leaves = MARGIN + leaves * ROW, leaves + 1
        stack.extend((child, depth + 1) for child in reversed(children[i]))
    for i in reversed(drawing.order):
        if children[i]:
            nodes[i].y = (nodes[children[i][0]].y + nodes[children[i][-1]].y) / 2
    if children[-1]:
        drawing.y = (nodes[children[-1][0]].y + nodes[children[-1][-1]].y) / 2
    drawing.width = 2 * MARGIN + COLUMN + max((node.x for node in nodes), default=MARGIN)
    drawing.height = 2 * MARGIN + max(leaves - 1, 0) * ROW
    return drawing


def choose(nodes: Sequence[TreeNode]) -> None:
    """Mark the path that the search would answer with: from the prompt on the most visited child, without visits the
    one of the highest score; ties to the first."""
    children: list[list[int]] = [[] for _ in range(len(nodes) + 1)]
    for i, node in enumerate(nodes):
        children[node.parent].append(i)

    def worth(i: int) -> tuple[float, float]:
        node = nodes[i]
        return (-1.0 if node.visits is None else node.visits, -1.0 if node.score is None else node.score)

    at = -1
    while known := [i for i in children[at] if worth(i) > (-1.0, -1.0)]:
        at = max(known, key=worth)
        nodes[at].chosen = True
