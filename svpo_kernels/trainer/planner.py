"""The plan of an epoch: which pairs make an optimizer step, and how a step is cut into packs for every process.

A step is `pairs_per_step` pairs, whatever the number of processes and micro-batches. It is cut into packs of at most
`max_tokens` tokens, and every process gets the same number of them: empty packs fill up and weigh nothing. The
denominators of the loss are the whole step's counts, so neither loss nor gradient depends on the cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from svpo_kernels.trees.packing import packs_of
from svpo_kernels.trees.request import pair_tokens

from .batches import build_batches
from .packs import (
    Planned,
    add_gains,
    add_trials,
    balance,
    count_targets_once,
    described,
    empty_pack,
    gain,
    score_paths,
    trials,
    visit_smoothing,
)
from .policy import add_rollouts
from .targets import Targets
from .train_data import TrainData, longest_alone, pruned

PAIRLESS = -1  # in a plan: this tree comes along for its values or SFT steps, without a pair
NEVER_CUT = 1 << 62  # tokens


@dataclass(frozen=True)
class PackSettings:
    """How a step is cut: see the keys of the same names in SVPOConfig."""

    packing: str = "tree"
    max_tokens: int = 8192
    values: str = "pairs"
    pairs_per_step: int = 64
    min_packs: int = 1
    world_size: int = 1
    visit_smoothing: bool = False
    gains: bool = False  # labelled steps come with the gain in value that they make
    trials: bool = False  # labelled steps count as often as they were visited
    padded: bool = True  # distinct sequences and pairs are padded, not chains in one row
    once: bool = False  # a node's value counts in one step of the epoch only, not in every step that has its pairs


Item = tuple[int, int]  # (tree, index of one of its pairs, or PAIRLESS)


class EpochPlanner:
    """Cuts data into optimizer steps and steps into packs, the same on every process."""

    def __init__(self, data: TrainData, settings: PackSettings, seed: int | None) -> None:
        """seed None keeps the order of the data, as for evaluation."""
        self.data, self.settings, self.seed = data, settings, seed
        self._orders = [self._pair_order(index) for index in range(len(data.trees))]
        self.num_items = sum(len(order) for order in self._orders)
        self._targets = Targets(data, settings.values, settings.once)
        self._epoch: tuple[int, list[list[Item]]] | None = None
        if settings.packing == "tree":
            self._check_lengths()
        if self.num_items == 0:
            raise ValueError(
                f"svpo train: no pairs and no labelled steps in {len(data.trees)} trees; lower min_gap, or see what "
                "`svpo data FILE` finds in the file"
            )

    def _check_lengths(self) -> None:
        """Every pair and every path fits into one pack: said before training, not in the middle of it."""
        most = self.settings.max_tokens
        longest, index, node = longest_alone(self.data, self.settings.values)
        if longest > most:
            raise ValueError(f"svpo train: max_tokens must be at least {longest}, the tokens of node {node} of tree "
                             f"{index}, got {most}; raise it, or leave out long paths with max_path_tokens")
        for index, (tree, pairs) in enumerate(zip(self.data.trees, self.data.pairs, strict=True)):
            for w, l in pairs.tolist():
                tokens = pair_tokens(tree, w, l, most)
                if tokens > most:
                    raise ValueError(
                        f"svpo train: max_tokens must be at least {tokens}, the tokens of pair ({w}, {l}) of tree "
                        f"{index}, got {most}; raise it, or leave out long paths with max_path_tokens"
                    )

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.num_items // self.settings.pairs_per_step)

    def _pair_order(self, index: int) -> list[Item]:
        """The items of one tree, pairs that share most of their path next to each other."""
        tree, pairs = self.data.trees[index], self.data.pairs[index]
        if len(pairs):
            keys = [(tree.place[chosen], tree.place[rejected]) for chosen, rejected in pairs.tolist()]
            return [(index, pair) for pair in sorted(range(len(pairs)), key=keys.__getitem__)]
        return [(index, PAIRLESS)] if len(self.data.alone(index, self.settings.values)) else []

    def steps(self, epoch: int) -> list[list[Item]]:
        """The items of every optimizer step of an epoch: a function of data, seed and epoch only."""
        if self._epoch is None or self._epoch[0] != epoch:
            trees = np.arange(len(self._orders))
            if self.seed is not None:
                trees = np.random.default_rng([self.seed, epoch]).permutation(len(self._orders))
            items = [item for tree in trees for item in self._orders[tree]]
            size = self.settings.pairs_per_step
            self._epoch = (epoch, [items[start : start + size] for start in range(0, len(items), size)])
        return self._epoch[1]

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that wrote the checkpoint, for an identical result."""
        return {
            "data": self.data.fingerprint(),
            "seed": self.seed,
            "pairs_per_step": self.settings.pairs_per_step,
            "values": self.settings.values,
            "steps_per_epoch": len(self),
        }

    def planned(self, epoch: int, step: int) -> list[Planned]:
        """All packs of a step, over all processes: cut, and made by those that run them."""
        items = self.steps(epoch)[step]
        parts = min(self.settings.world_size * self.settings.min_packs, len(items))
        if self.settings.packing == "stream":
            parts = 1  # trees are never cut: they are dealt whole
        valued: set[tuple[int, int]] = set()  # every value counts once a step
        return [pack for part in self._cut(items, parts) for pack in self._plan(part, valued)]

    def packs(self, epoch: int, step: int) -> list[dict[str, Any]]:
        """All packs of a step, over all processes: dicts with `batch` (StepBatch), `weights` (P,) and `cost`."""
        return [pack.make() for pack in self.planned(epoch, step)]

    def share(self, epoch: int, step: int, rank: int) -> dict[str, Any]:
        """What one process runs of a step; it makes no other packs.

        Returns packs (the same number on every process) and counts = (pairs, labelled steps, SFT steps) of the whole
        step.
        """
        packs = self.planned(epoch, step)
        counts = tuple(int(sum(pack.counts[kind] for pack in packs)) for kind in range(3))
        mine = balance([pack.cost for pack in packs], self.settings.world_size)[rank]
        most = -(-len(packs) // self.settings.world_size)
        own = [packs[index].make() for index in mine]
        own += [empty_pack(self.settings.packing, self.settings.max_tokens) for _ in range(most - len(mine))]
        return {"packs": own, "counts": counts}

    def totals(self) -> tuple[int, int, int]:
        """The counts of all steps of an epoch together, where every value counts once."""
        data = self.data
        labelled = {index: [i for i in self._targets.of_tree(index).tolist() if tree.nodes[i].q_value is not None]
                    for index, tree in enumerate(data.trees)}
        return self._counts(data.num_pairs, labelled, sum(map(len, data.sft)))

    def _counts(self, pairs: int, labelled: dict[int, list[int]], sft: int) -> tuple[int, int, int]:
        """(pairs, labelled steps, SFT steps), for the labelled nodes by tree; of rollouts (0, members, tokens)."""
        if self.data.rollouts is not None:
            return 0, *self.data.rollouts.totals(labelled)
        return pairs, int(sum(self._count(tree, nodes) for tree, nodes in labelled.items())), sft

    def _cut(self, items: list[Item], parts: int) -> list[list[Item]]:
        """Contiguous parts, none of them empty, of about equal lengths in tokens."""
        if parts == 1:
            return [items]
        ends = np.cumsum([self._length(item) for item in items], dtype=np.float64)
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, parts) / parts)
        bounds = [0]
        for part, cut in enumerate(cuts, start=1):
            least, most = bounds[-1] + 1, len(items) - (parts - part)
            bounds.append(int(min(max(cut + 1, least), most)))
        bounds.append(len(items))
        return [items[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]

    def _length(self, item: Item) -> int:
        tree, pair = item
        length = self.data.trees[tree].length
        return sum(length if pair == PAIRLESS else (length[node] for node in self.data.pairs[tree][pair]))

    def _plan(self, items: list[Item], valued: set[tuple[int, int]]) -> Iterator[Planned]:
        """Packs of some items; their trees are numbered as in the data. valued: (tree, node) whose values have been
        counted in this step, which grows."""
        chosen: dict[int, list[int]] = {}
        for tree, pair in items:
            chosen.setdefault(tree, []).append(pair)
        numbers, pairs, weight = list(chosen), [], {}
        targets, sft = [], []
        for tree, rows in chosen.items():
            rows = [row for row in rows if row != PAIRLESS]
            pairs.append(self.data.pairs[tree][rows])
            weight.update(((tree, w, l), each) for (w, l), each in zip(
                pairs[-1].tolist(), self.data.weights[tree][rows].tolist(), strict=True))
            nodes, own = self._targets.of_pairs(tree, rows)
            targets.append(np.array([i for i in nodes.tolist() if (tree, i) not in valued], np.int64))
            valued.update((tree, i) for i in targets[-1].tolist())
            sft.append(own)
        make = {"tree": self._tree_packs, "stream": self._whole_trees}.get(self.settings.packing, self._padded_packs)
        yield from make(numbers, pairs, targets, sft, weight)

    def _whole_trees(self, numbers: list[int], pairs: list[np.ndarray], targets: list[np.ndarray],
                     sft: list[np.ndarray], weight: dict) -> Iterator[Planned]:
        """A pack a tree, however large: to be streamed."""
        for place in range(len(numbers)):
            own = slice(place, place + 1)
            yield from self._tree_packs(numbers[own], pairs[own], targets[own], sft[own], weight, NEVER_CUT)

    def _tree_packs(self, numbers: list[int], pairs: list[np.ndarray], targets: list[np.ndarray],
                    sft: list[np.ndarray], weight: dict, max_tokens: int | None = None) -> Iterator[Planned]:
        max_tokens = self.settings.max_tokens if max_tokens is None else max_tokens
        trees = [self.data.trees[tree] for tree in numbers]
        index = np.asarray(numbers, np.int64)
        for pack in packs_of(trees, pairs, max_tokens=max_tokens, values=targets, sft=sft):
            labelled: dict[int, list[int]] = {}
            for tree, node in pack.valued_nodes():
                labelled.setdefault(numbers[tree], []).append(node)
            counts = self._counts(pack.counts[0], labelled, pack.counts[2])

            def make(pack: Any = pack, counts: tuple = counts) -> dict[str, Any]:
                return self._finished(described(pack.batch(), index, weight), counts)

            yield Planned(pack.tokens, counts, make)

    def _padded_packs(self, numbers: list[int], pairs: list[np.ndarray], targets: list[np.ndarray],
                      sft: list[np.ndarray], weight: dict) -> Iterator[Planned]:
        settings = self.settings
        cut = [pruned(self.data.trees[tree], rows, values, own)
               for tree, rows, values, own in zip(numbers, pairs, targets, sft, strict=True)]
        batches = build_batches(settings.packing, [tree for tree, _ in cut],
                                [np.searchsorted(kept, rows) for (_, kept), rows in zip(cut, pairs, strict=True)],
                                [np.searchsorted(kept, own) for (_, kept), own in zip(cut, sft, strict=True)],
                                settings.max_tokens, settings.values, settings.padded)
        for batch in batches:
            nodes = batch["node_of_step"]
            for place, (_, kept) in enumerate(cut):
                rows = nodes[:, 0] == place
                nodes[rows, 1] = torch.from_numpy(kept)[nodes[rows, 1]]
        packs = [described(batch, np.asarray(numbers), weight) for batch in batches]
        count_targets_once(packs)
        for pack in packs:
            batch = pack["batch"]
            labelled = {}
            for tree, node in batch.node_of_step[~batch.value_targets.isnan()].tolist():
                labelled.setdefault(tree, []).append(node)
            counts = self._counts(pack["counts"][0], labelled, pack["counts"][2])

            def make(pack: dict[str, Any] = pack, counts: tuple = counts) -> dict[str, Any]:
                return self._finished(pack, counts)

            yield Planned(pack["cost"], counts, make)

    def _count(self, tree: int, nodes: list[int]) -> int:
        """For how many the values of these nodes count in the denominator: one each, with gains those that have one,
        with trials their visits."""
        tree_ = self.data.trees[tree]
        if self.settings.trials:
            return int(sum(trials(tree_, tree, node) for node in nodes))
        if self.settings.gains:
            return sum(not math.isnan(gain(tree_, node)) for node in nodes)
        return len(nodes)

    def _finished(self, pack: dict[str, Any], counts: tuple[int, int, int]) -> dict[str, Any]:
        """A pack with all that the settings add to it."""
        trees, settings = self.data.trees, self.settings
        pack.update(packing=settings.packing, counts=counts)
        if settings.packing == "stream":
            pack["batch"]["streamed"] = settings.max_tokens
        if settings.visit_smoothing:
            pack["smoothing"] = visit_smoothing(trees, pack["batch"])
        if self.data.paths:
            score_paths(self.data, pack["batch"])
        if settings.gains:
            add_gains(trees, pack)
        if settings.trials:
            add_trials(trees, pack)
        if self.data.rollouts is not None:
            add_rollouts(self.data, pack)
        return pack
