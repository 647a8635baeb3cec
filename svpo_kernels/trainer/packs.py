"""The packs of an optimizer step: batches with weights, counts and cost, and how they are dealt to processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from svpo_kernels.plan import StepPlan
from svpo_kernels.trees.packing import StepBatch, empty_batch
from svpo_kernels.trees.tree import StepTree, node_path

from .train_data import TrainData


@dataclass(frozen=True)
class Planned:
    """A pack that is cut and not yet made. cost: tokens. counts: (pairs, labelled steps, SFT steps)."""

    cost: int
    counts: tuple[int, int, int]
    make: Callable[[], dict[str, Any]]


def described(batch: StepBatch, numbers: np.ndarray, weight: dict) -> dict[str, Any]:
    """A pack: the batch with trees numbered as in the data, pair weights (P,), counts and cost in tokens."""
    nodes = batch.node_of_step.clone()
    if len(nodes):
        nodes[:, 0] = torch.as_tensor(numbers)[nodes[:, 0]]
    batch["node_of_step"] = nodes
    rows = torch.cat([nodes[batch.pairs[:, 0]], nodes[batch.pairs[:, 1], 1:]], dim=1).tolist()
    weights = torch.tensor([weight[tuple(row)] for row in rows], dtype=torch.float32)
    return {"batch": batch, "weights": weights, "cost": batch.input_ids.numel()}


def count_targets_once(packs: list[dict[str, Any]]) -> None:
    """Over padded packs every value target and SFT step counts in the first that holds its node."""
    valued: set[tuple[int, int]] = set()
    imitated: set[tuple[int, int]] = set()
    for pack in packs:
        batch = pack["batch"]
        nodes = [tuple(row) for row in batch.node_of_step.tolist()]
        targets = batch.value_targets.clone()
        for step in torch.nonzero(~torch.isnan(targets)).flatten().tolist():
            if nodes[step] in valued:
                targets[step] = float("nan")
            valued.add(nodes[step])
        sft = [] if batch.sft_steps is None else batch.sft_steps.tolist()
        kept = [step for index, step in enumerate(sft)
                if nodes[step] not in imitated and nodes[step] not in [nodes[other] for other in sft[:index]]]
        imitated.update(nodes[step] for step in sft)
        batch["value_targets"] = targets
        batch["sft_steps"] = torch.tensor(kept, dtype=torch.int64)
        pack["counts"] = (len(batch.pairs), int((~torch.isnan(targets)).sum()), len(kept))


def empty_pack(packing: str = "tree", max_tokens: int = 1) -> dict[str, Any]:
    """A pack of one token and no step: it joins the collectives of a step, and no more."""
    batch = empty_batch()
    if packing == "stream":
        batch["streamed"] = max_tokens
    return {"batch": batch, "weights": torch.zeros(0), "cost": 0, "counts": (0, 0, 0),
            "packing": packing if packing == "stream" else "tree"}


def visit_smoothing(trees: list[StepTree], batch: StepBatch) -> torch.Tensor:
    """(P,) rejected visits / visits of both steps of each pair. Raises ValueError for a step without a visit count."""
    counts = []
    for tree, node in batch.node_of_step[batch.pairs.flatten()].tolist():
        visits = trees[tree].nodes[node].visits
        if visits is None:
            raise ValueError(f"svpo train: visit_smoothing needs visit counts; node {node} of tree {tree} has none")
        counts.append(visits)
    visits = torch.tensor(counts, dtype=torch.float32).reshape(-1, 2)
    return torch.where(visits.sum(1) > 0, visits[:, 1] / visits.sum(1), 0.5)


def add_gains(trees: list[StepTree], pack: dict[str, Any]) -> None:
    """A pack's references, and its `gains` (S,): the value after a step less that before it, NaN: not known.

    Before a first step it is the mean of the tree's first steps, weighted by visits where each of them has some.
    """
    batch = pack["batch"]
    gains = torch.full((batch.plan.num_steps,), float("nan"))
    for step in (~torch.isnan(batch.value_targets)).nonzero().flatten().tolist():
        tree, node = batch.node_of_step[step].tolist()
        gains[step] = gain(trees[tree], node)
    pack["gains"] = gains
    references = [trees[tree].nodes[node].ref_logp for tree, node in batch.node_of_step.tolist()]
    known = bool(references) and None not in references
    batch["ref_step_logps"] = torch.tensor(references, dtype=torch.float32) if known else None


def gain(tree: StepTree, node: int) -> float:
    parent = tree.nodes[node].parent
    before = root_value(tree) if parent == -1 else tree.nodes[parent].q_value
    return float("nan") if before is None else tree.nodes[node].q_value - before


def root_value(tree: StepTree) -> float | None:
    """The mean value of the first steps, by visits where each of them has some; None where none has a value."""
    first = [tree.nodes[node] for node in tree.roots if tree.nodes[node].q_value is not None]
    if not first:
        return None
    visits = [node.visits for node in first] if all(node.visits for node in first) else None
    return float(np.average([node.q_value for node in first], weights=visits))


def add_trials(trees: list[StepTree], pack: dict[str, Any]) -> None:
    """A pack's `trials` (S,), visits of its labelled steps and 0 elsewhere."""
    batch = pack["batch"]
    found = torch.zeros(batch.plan.num_steps)
    for step in (~torch.isnan(batch.value_targets)).nonzero().flatten().tolist():
        tree, node = batch.node_of_step[step].tolist()
        found[step] = trials(trees[tree], tree, node)
    pack["trials"] = found


def trials(tree: StepTree, index: int, node: int) -> float:
    """The visits of a labelled step of tree `index`. Raises ValueError without a visit count."""
    visits = tree.nodes[node].visits
    if visits is None:
        raise ValueError(f"svpo train: label_trials needs visit counts; node {node} of tree {index} has none")
    return visits


def score_paths(data: TrainData, batch: StepBatch) -> None:
    """Make each step of a batch the whole path to its end, its reference that of the path.

    A row on several paths counts for several steps: one prediction each, no row more than before.
    """
    ids, ends = batch.input_ids.flatten(), batch.subtree_end
    rows, labels, steps, references = [], [], [], []
    for step, last in enumerate(batch.step_ends.tolist()):
        tree, node = batch.node_of_step[step].tolist()
        references.append(data.reference(tree, node))
        node = node_path(data.trees[tree].nodes, node)[0]
        begin = (last // batch.input_ids.shape[1]) * batch.input_ids.shape[1]  # of its own sequence
        path = torch.arange(begin, last + 1)
        path = path[ends[begin : last + 1] > last]
        scored = path[data.trees[tree].start[node] :]
        rows.append(path[len(path) - len(scored) - 1 : -1])
        labels.append(ids[scored])
        steps.append(torch.full((len(scored),), step))
    if rows:
        order = torch.cat(rows).argsort(stable=True)
        batch["plan"] = StepPlan.from_predictions(
            *(torch.cat(parts)[order] for parts in (rows, labels, steps)), len(rows))
    batch["ref_step_logps"] = None if None in references else torch.tensor(references, dtype=torch.float32)


def balance(costs: list[int], parts: int) -> list[list[int]]:
    """Indices of `costs` dealt to `parts` processes, sums about equal, no process with more than ceil(n / parts)."""
    most = -(-len(costs) // parts)
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        part = min((part for part in range(parts) if len(shares[part]) < most), key=lambda part: (sums[part], part))
        shares[part].append(index)
        sums[part] += costs[index]
    return [sorted(share) for share in shares]
