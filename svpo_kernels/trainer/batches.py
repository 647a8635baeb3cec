"""The three ways to run the pairs of an optimizer step: as packed trees, as distinct sequences, or naively as pairs.

All three give the same loss and gradients; the second and third are padded sequences under the model's own mask, or,
under an attention that is exact for trees, chains in one row without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from svpo_kernels.plan import StepPlan
from svpo_kernels.trees.chains import without_padding
from svpo_kernels.trees.packing import StepBatch, distinct_batch, pack_trees
from svpo_kernels.trees.tree import StepTree


def build_batches(packing: str, trees: Sequence[StepTree], pairs: Sequence[np.ndarray], sft: Sequence[np.ndarray],
                  max_tokens: int, values: str, padded: bool = True) -> list[StepBatch]:
    """Batches of at most max_tokens tokens, padding counted where it is made, over some trees.

    packing: "tree", "distinct" or "pairs". pairs: per tree (P, 2) node indices; sft: per tree node indices; values as
    in `pack_trees`. A tree without pairs is run for its values and SFT steps.
    """
    if packing == "tree":
        return pack_trees(trees, pairs, max_tokens=max_tokens, values=values, sft=sft)
    batches = []
    started: set[int] = set()
    for part in _parts(trees, pairs, max_tokens, packing == "distinct", padded):
        groups = _by_tree(part) if packing == "distinct" else [(tree, [row]) for tree, row in part]
        pieces = []
        for tree, rows in groups:
            # values="labelled" and SFT nodes bring sequences of their own: once a tree, not once a part of it
            first = tree not in started
            started.add(tree)
            own = pairs[tree][[row for row in rows if row >= 0]]
            piece = distinct_batch([trees[tree]], [own], values=values if first or values == "path" else "pairs",
                                   sft=[sft[tree] if first else []])
            piece["node_of_step"][:, 0] = tree
            pieces.append(piece)
        batches.append(join(pieces) if padded else without_padding(join(pieces)))
    return batches


def _parts(trees: Sequence[StepTree], pairs: Sequence[np.ndarray], max_tokens: int,
           distinct: bool, padded: bool) -> Iterator[list[tuple[int, int]]]:
    """Runs of (tree, pair or -1) whose sequences hold at most max_tokens tokens, at least one item each."""
    part: list[tuple[int, int]] = []
    held: list[tuple[int, int]] = []  # (tree, node) of the sequences
    longest = tokens = 0
    for tree, rows in enumerate(pairs):
        items = [(row, list(pair)) for row, pair in enumerate(rows.tolist())] or [(-1, list(range(len(trees[tree]))))]
        for row, nodes in items:
            ends = [(tree, node) for node in nodes]
            grown = list(dict.fromkeys(held + ends)) if distinct else held + ends
            own = [trees[tree].length[node] for node in nodes]
            reach = max(longest, *own)
            more = tokens + sum(trees[t].length[node] for t, node in grown[len(held):])
            if part and (len(grown) * reach if padded else more) > max_tokens:
                yield part
                part, grown, reach, more = [], ends, max(own), sum(own)
            part, held, longest, tokens = [*part, (tree, row)], grown, reach, more
    if part:
        yield part


def _by_tree(part: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for tree, row in part:
        groups.setdefault(tree, []).append(row)
    return list(groups.items())


def join(batches: Sequence[StepBatch]) -> StepBatch:
    """Padded batches (B, L) one under the other, padded to the longest; steps keep their order."""
    if len(batches) == 1:
        return batches[0]
    L = max(batch.input_ids.shape[1] for batch in batches)
    sequences = steps = 0
    merged: dict[str, list] = {}
    rows, labels, step_ids = [], [], []
    for batch in batches:
        B, own = batch.input_ids.shape
        S = batch.plan.num_steps
        for name in ("input_ids", "position_ids"):
            merged.setdefault(name, []).append(F.pad(batch[name], (0, L - own)))
        plan = batch.plan
        each = plan.row_start.diff()
        rows.append(_move(plan.rows.repeat_interleave(each), own, L, sequences))
        labels.append(plan.labels)
        step_ids.append(plan.step_ids + steps)
        for name in ("value_positions", "step_ends"):
            merged.setdefault(name, []).append(_move(batch[name], own, L, sequences))
        for name in ("pairs", "sft_steps"):
            merged.setdefault(name, []).append(batch[name] + steps)
        for name in ("value_targets", "node_of_step", "lengths"):
            merged.setdefault(name, []).append(batch[name])
        references = batch.ref_step_logps
        merged.setdefault("ref_step_logps", []).append(torch.zeros(S) if references is None else references)
        sequences, steps = sequences + B, steps + S
    joined = StepBatch({name: torch.cat(parts) for name, parts in merged.items()})
    if all(batch.ref_step_logps is None for batch in batches):
        joined["ref_step_logps"] = None
    joined["position_ids"] = torch.arange(L).expand(sequences, L).contiguous()
    joined["subtree_end"] = torch.arange(1, sequences + 1).repeat_interleave(L) * L
    joined["plan"] = StepPlan.from_predictions(torch.cat(rows), torch.cat(labels), torch.cat(step_ids), steps)
    joined["counts"] = tuple(sum(batch.counts[kind] for batch in batches) for kind in range(3))
    joined["path_lengths"] = (min(batch.path_lengths[0] for batch in batches),
                              max(batch.path_lengths[1] for batch in batches))
    for name in ("pairwise_lengths", "distinct_lengths"):
        joined[name] = tuple(length for batch in batches for length in batch[name])
    for name in ("pairwise_tokens", "distinct_tokens", "pairwise_rows", "distinct_rows"):
        joined[name] = sum(batch[name] for batch in batches)
    return joined


def _move(rows: torch.Tensor, own: int, L: int, sequences: int) -> torch.Tensor:
    """Flattened rows of a (B, own) batch as rows of the (sequences + B, L) batch it is put under."""
    return (rows // own + sequences) * L + rows % own
