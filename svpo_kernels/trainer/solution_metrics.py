"""Metrics of whole solutions in evaluation: first errors, ProcessBench's F1, the best of N.

A solution is a path from the prompt to a leaf. Its scores come from packs and processes; here they meet again.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from svpo_kernels.trees.tree import StepTree, node_path

from . import prm_metrics
from .train_data import TrainData


class StepScores:
    """Scores by (tree, node), as packs come."""

    def __init__(self) -> None:
        self.packs: list[tuple[Tensor, Tensor]] = []

    def add(self, node_of_step: Tensor, scores: Tensor) -> None:
        """node_of_step (S, 2), scores (S,)."""
        self.packs.append((node_of_step, scores.detach()))

    def rows(self) -> list[tuple[int, int, float]]:
        """(tree, node, score), to be gathered over processes."""
        return [(tree, node, score) for places, scores in self.packs
                for (tree, node), score in zip(places.tolist(), scores.float().tolist(), strict=True)]


def paths(tree: StepTree) -> list[list[int]]:
    """The nodes of every path from the prompt to a leaf."""
    return [node_path(tree.nodes, leaf) for leaf in tree.order if not tree.children[leaf]]


def solution_metrics(data: TrainData, scores: Mapping[tuple[int, int], float],
                     threshold: float | None = None) -> dict[str, float]:
    """First-error metrics over solutions whose first error is known, `prm/best_of/*` over problems with several.

    threshold: labels in [0, 1] at or below it are wrong; None: those below 0.5. A solution is right where its row says
    so, else where its last step is labelled so. Rows of one prompt are one problem. A first error is found, or not, on
    the steps up to it alone, so steps without a label behind it need no score.
    """
    known, groups = [], {}
    for number, tree in enumerate(data.trees):
        for path in paths(tree):
            labels = [None if (q := tree.nodes[i].q_value) is None else (q + 1) / 2 for i in path]
            if threshold is not None:
                labels = [None if label is None else float(label > threshold) for label in labels]
            own = [scores.get((number, i)) for i in path]
            wrong = prm_metrics.first_error(labels)
            judged = own if wrong is None or wrong < 0 else own[:wrong + 1]
            if wrong is not None and None not in judged:
                known.append((judged, wrong))
            said = data.correct[number] if data.correct else None
            correct = said if said is not None or labels[-1] is None else labels[-1] >= 0.5
            if None not in own:
                groups.setdefault(tuple(tree.prompt_ids), []).append((prm_metrics.aggregates(own), correct))
    found = prm_metrics.first_error_metrics(known)
    return found | {f"prm/best_of/{how}": share for how, share in prm_metrics.best_of_accuracy(groups.values()).items()}
