"""Trees and pairs -> batches that compute a shared prefix once, with the loss and gradients of pairwise runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import fail, is_integer
from ..plan import StepPlan
from .cuts import WINDOW, Sizes, cut
from .request import Request, with_ancestors
from .tree import StepNode, StepTree
from .trie import Trie


class StepBatch(dict):
    """What one forward pass and one `svpo_loss` need; a dict with attribute access.

    From `pack_trees`, B = 1 and L = T; from `distinct_batch`, B sequences padded to L and T = B * L.
    input_ids, position_ids: (B, L) int64. subtree_end: (T,) int64, query q sees key k iff k <= q < subtree_end[k].
    plan: StepPlan of S steps over the T flattened rows. pairs: (P, 2) int64 into S. value_positions: (S,) int64, the
    row at which each step's value is read; step_ends: (S,) int64, the row of its last token. value_targets: (S,)
    float32, NaN = none here. ref_step_logps: (S,) float32 from the nodes' ref_logp (0 outside pairs), or None without
    any. sft_steps: (F,) int64 into S. node_of_step: (S, 2) int64, (tree, node). counts: (pairs, labelled steps, SFT
    steps). path_lengths: (shortest, longest) separate run.
    pairwise_tokens: unpadded tokens of the naive run, two whole sequences a pair (and one for what no pair's
    sequence passes); distinct_tokens: each distinct one of those once, counted in the first pack that has it.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"StepBatch has no {name!r}; it has {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(self, device: Any, non_blocking: bool = False) -> StepBatch:
        """The same batch with its tensors and its plan on `device`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StepBatch:
        return self._map(lambda value: value.pin_memory())

    def _map(self, move: Any) -> StepBatch:
        return StepBatch({k: move(v) if isinstance(v, Tensor | StepPlan) else v for k, v in self.items()})

    def model_inputs(self, model: Any) -> dict[str, Any]:
        """input_ids, position_ids and the attention_mask that this Hugging Face model needs; see `attention.py`."""
        from .attention import model_inputs

        return model_inputs(self, model)


def pack_trees(trees: Sequence[StepTree], pairs: Sequence[Any], *, max_tokens: int, values: str = "pairs",
               sft: Sequence[Any] | None = None) -> list[StepBatch]:
    """Batches of at most max_tokens tokens; loss and gradient do not depend on the cut when totals are given as counts.

    pairs: one (P, 2) of node indices per tree. values: whose q_values are targets: "pairs", the nodes in some pair;
    "path", their ancestors too; "labelled", every node with a q_value; "all", those without one too, as steps whose
    target is NaN and not counted (for scoring). sft: one list of node indices per tree.
    Each pair is in exactly one batch, with all its ancestors; a value target or SFT membership is in the first batch
    that has the node. Nodes off every needed path are left out; nothing needed gives no batch.

    Raises ValueError, TypeError or IndexError for bad arguments, and ValueError naming tree, pair and tokens for one
    pair that needs more than max_tokens.
    """
    return [pack.batch() for pack in packs_of(trees, pairs, max_tokens=max_tokens, values=values, sft=sft)]


def distinct_batch(trees: Sequence[StepTree], pairs: Sequence[Any], *, values: str = "pairs",
                   sft: Sequence[Any] | None = None) -> StepBatch:
    """Each distinct sequence once, padded on the right, under the model's own causal mask: no tree mask.

    The same loss and gradients as the packs: the fallback for models that trees cannot be packed for, and the honest
    peer. Arguments and errors as for `pack_trees`.
    """
    request = Request("distinct_batch", trees, pairs, values, sft)
    part = Part(request, request.order)
    pack, trie = Pack(part, range(len(request)), Unseen(request)), part.trie
    lengths = trie.depth[pack.ends] + trie.length[pack.ends]
    B, L = len(lengths), int(lengths.max(initial=0))
    input_ids = np.zeros((B, L), dtype=np.int64)
    for b, end in enumerate(pack.ends.tolist()):
        input_ids[b, :lengths[b]] = trie.tokens(trie.path(end))

    def rows(run: int, begin: int, stop: int) -> list[tuple[int, int]]:
        return [(int(np.searchsorted(pack.ends, run)) * L + begin, stop - begin)]  # of the first sequence through run

    batch = _steps(pack, rows)
    batch.update(input_ids=torch.from_numpy(input_ids), position_ids=torch.arange(L).repeat(B, 1),
                 subtree_end=torch.arange(1, B + 1).repeat_interleave(L) * L, lengths=torch.from_numpy(lengths))
    return batch


def empty_batch() -> StepBatch:
    """One token and no step: what a rank without work runs, so that collectives still meet. Its losses are 0."""
    index = torch.zeros(0, dtype=torch.int64)
    return StepBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int64), position_ids=torch.zeros(1, 1, dtype=torch.int64),
        subtree_end=torch.ones(1, dtype=torch.int64), plan=StepPlan.from_predictions(index, index, index, 0),
        pairs=index.reshape(0, 2), value_positions=index, step_ends=index, value_targets=torch.zeros(0),
        ref_step_logps=None, sft_steps=index, node_of_step=index.reshape(0, 2), counts=(0, 0, 0), path_lengths=(1, 1),
        lengths=None, pairwise_tokens=0, distinct_tokens=0,
        pairwise_lengths=(), distinct_lengths=(), pairwise_rows=0, distinct_rows=0)


def packs_of(trees: Sequence[StepTree], pairs: Sequence[Any], *, max_tokens: int,
             values: str | Sequence[np.ndarray] = "pairs", sft: Sequence[Any] | None = None) -> Iterator[Pack]:
    """The packs of `pack_trees` one after the other, cut but not yet made: `Pack.batch` does that.

    What is held at a time grows with max_tokens, not with the trees. values: a rule, or per tree the nodes whose
    q_values are targets. Arguments are checked at once, a pair that needs too many tokens is met on the way.
    """
    if not is_integer(max_tokens) or max_tokens < 1:
        fail("pack_trees", "max_tokens", "an int >= 1", max_tokens)
    return _cut(Request("pack_trees", trees, pairs, values, sft), max_tokens)


def _cut(request: Request, max_tokens: int) -> Iterator[Pack]:
    unseen = Unseen(request)
    begun: list[int] = []
    for items, last in _parts(request, max_tokens):
        part = Part(request, [*begun, *items])
        packs = cut(part.trie, part.items, max_tokens, [part.numbers.index(n) for n in begun])
        sizes = Sizes(part.trie, part.items)
        for pack in packs:
            if len(pack) == 1 and (tokens := sizes.union(pack)) > max_tokens:
                fail("pack_trees", "max_tokens", f">= {tokens}, the tokens of {request.name(part.numbers[pack[0]])}",
                     max_tokens)
        yield from (Pack(part, pack, unseen) for pack in (packs if last else packs[:-1]))
        begun = [part.numbers[n] for n in packs[-1]]  # what comes next may join it


def _parts(request: Request, max_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """Items in order, by the window until they may be more than a pack, and whether they are the last."""
    items: list[int] = []
    known, tokens = -1, 0
    for begin in range(0, len(request), WINDOW):
        window = request.order[begin:begin + WINDOW]
        items += window
        trees, nodes = request.place([g for n in window for g in request.item(n)])
        for t, i in zip(trees.tolist(), nodes.tolist(), strict=True):
            tree = request.trees[t]
            tokens += tree.length[i] - (tree.start[i] if t == known else 0)
            known = t
        last = begin + WINDOW >= len(request)
        if last or tokens > max_tokens:
            yield items, last
            items, known, tokens = [], -1, 0


class Part:
    """Some items of a request over one trie. numbers: their numbers, ascending; items: the runs whose ends each needs;
    node: the numbers of the nodes that they bring, ascending, and end the run that each of those ends with.
    valued, sft: places in node of those that are, and in the request's."""

    def __init__(self, request: Request, items: Sequence[int]) -> None:
        self.request = request
        self.numbers = sorted(items)
        wanted: dict[int, list[int]] = {}
        brought = [g for n in items for g in (*request.item(n), *request.riders.get(n, ()))]
        for t, i in zip(*(found.tolist() for found in request.place(brought)), strict=True):
            wanted.setdefault(t, []).append(i)
        groups = []
        for t, nodes in wanted.items():
            tree = request.trees[t]
            groups.append((t, sorted(with_ancestors(tree, nodes), key=tree.place.__getitem__)))
        self.trie = Trie([(request.trees[t], nodes) for t, nodes in groups])
        every = np.concatenate([np.zeros(0, np.int64), *(request.first[t] + np.array(nodes) for t, nodes in groups)])
        order = np.argsort(every)
        self.node, self.end = every[order], self.trie.end[order]
        self.items = [tuple(self.end[self.at(request.item(n))].tolist()) for n in self.numbers]
        of_trees, of_nodes = request.place(self.node)
        self.places = list(zip(of_trees.tolist(), of_nodes.tolist(), strict=True))
        self.valued, self.sft = (
            np.intersect1d(self.node, wanted, assume_unique=True, return_indices=True)[1:]
            for wanted in (request.valued, request.sft))

    def at(self, numbers: Any) -> np.ndarray:
        """Places of these numbers in `node`."""
        return np.searchsorted(self.node, np.asarray(numbers, dtype=np.int64))

    def tree_and_node(self, at: int) -> tuple[StepTree, int]:
        tree, node = self.places[at]
        return self.request.trees[tree], node

    def of(self, at: int) -> StepNode:
        tree, node = self.tree_and_node(at)
        return tree.nodes[node]

    def own(self, at: int) -> np.ndarray:
        tree, node = self.tree_and_node(at)
        return tree.paths.own(node)


class Unseen:
    """What no batch has had yet: value targets, SFT members and distinct sequences each count in one batch only."""

    def __init__(self, request: Request) -> None:
        self.valued = np.ones(len(request.valued), dtype=bool)
        self.sft = np.ones(len(request.sft), dtype=bool)
        self.sequences: set[int] = set()  # by the names of their runs
        self.scored: set[int] = set()


class Pack:
    """Items of a part that make one batch, which is not made yet, and what counts in it.

    tokens: of the batch. pairs: (P, 2), valued and sft: places in the part's nodes. counts: as of the batch.
    """

    def __init__(self, part: Part, items: Sequence[int], unseen: Unseen) -> None:
        request, trie = part.request, part.trie
        self.part = part
        numbers = np.array([part.numbers[n] for n in items], dtype=np.int64)
        self.pairs = part.at(request.pairs[numbers[numbers < len(request.pairs)]])
        each = np.array([e for n in items for e in part.items[n]], dtype=np.int64)
        self.ends = np.unique(each)
        self.held = trie.needed(self.ends)
        self.tokens = int(trie.length[self.held].sum())
        held = self.held[part.end]
        self.valued, _ = _take(part.valued, held, unseen.valued)
        self.sft, taken = _take(part.sft, held, unseen.sft)
        self.known = [node.q_value for node in map(part.of, self.valued.tolist())]
        self.counts = (len(self.pairs), sum(q is not None for q in self.known), len(self.sft))
        self.naive = self._naive_runs(each, np.concatenate([self.pairs.ravel(), self.sft[request.sft_alone[taken]]]),
                                      unseen)

    def _naive_runs(self, each: np.ndarray, scored: np.ndarray, unseen: Unseen) -> dict[str, Any]:
        """What runs without trees cost for these items. each: the ends of their runs; scored: the nodes whose log-prob
        they take, one each."""
        trie, end = self.part.trie, self.part.end
        names, length = trie.names, trie.depth + trie.length
        fresh = [e for e in self.ends.tolist() if names[e] not in unseen.sequences]
        unseen.sequences.update(names[e] for e in fresh)
        pairwise, distinct = tuple(length[each].tolist()), tuple(length[fresh].tolist() if fresh else ())
        sizes = [len(self.part.own(at)) for at in scored.tolist()]
        sequences = [names[e] for e in end[scored].tolist()]
        rows = {name: size for name, size in zip(sequences, sizes, strict=True) if name not in unseen.scored}
        unseen.scored.update(rows)
        return dict(pairwise_lengths=pairwise, distinct_lengths=distinct, pairwise_tokens=sum(pairwise),
                    distinct_tokens=sum(distinct), pairwise_rows=sum(sizes), distinct_rows=sum(rows.values()))

    def valued_nodes(self) -> list[tuple[int, int]]:
        """(tree, node) of the values that count in this batch."""
        return [self.part.places[at] for at, q in zip(self.valued.tolist(), self.known, strict=True) if q is not None]

    def batch(self) -> StepBatch:
        """The StepBatch of these items: their runs in depth-first order."""
        trie = self.part.trie
        runs = np.nonzero(self.held)[0]
        length = trie.length[runs]
        before = np.concatenate([[0], np.cumsum(np.where(self.held, trie.length, 0))])  # rows before run k
        row = before.tolist()
        batch = _steps(self, lambda run, begin, stop: [
            (row[r] + skipped, many) for r, skipped, many in trie.pieces(run, begin, stop)])
        position = np.arange(self.tokens) + np.repeat(trie.depth[runs] - before[runs], length)
        batch.update(input_ids=torch.from_numpy(trie.tokens(runs)).reshape(1, self.tokens),
                     position_ids=torch.from_numpy(position).reshape(1, self.tokens),
                     subtree_end=torch.from_numpy(np.repeat(before[trie.past[runs]], length)))
        return batch


def _take(found: tuple[np.ndarray, np.ndarray], held: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of nodes (places in a part, places in the request) those that are held and unseen, which they are no more."""
    at, of = found
    here = held[at] & unseen[of]
    unseen[of[here]] = False
    return at[here], of[here]


def _steps(pack: Pack, rows: Callable[[int, int, int], list[tuple[int, int]]]) -> StepBatch:
    """All of a batch but its token tensors. rows(run, begin, stop): where tokens begin ... stop - 1 of the path that
    ends with a run lie, as (first row, how many)."""
    part, pairs, request = pack.part, pack.pairs, pack.part.request
    steps = np.unique(np.concatenate([pairs.ravel(), pack.valued, pack.sft]))
    steps = steps[np.argsort(part.end[steps], kind="stable")]
    S = len(steps)
    index = np.full(len(part.node), -1, dtype=np.int64)
    index[steps] = np.arange(S)
    targets = torch.full((S,), float("nan"))
    targets[torch.from_numpy(index[pack.valued])] = torch.tensor(
        [float("nan") if q is None else q for q in pack.known], dtype=torch.float32)
    pieces: list[tuple[int, int]] = []
    labels, read, last = [np.zeros(0, np.int32)], [], []
    for at, run in zip(steps.tolist(), part.end[steps].tolist(), strict=True):
        tree, i = part.tree_and_node(at)
        stop, value_end = tree.length[i], tree.value_end(i)
        pieces += rows(run, tree.start[i] - 1, stop - 1)
        read += rows(run, value_end - 1, value_end)
        last += rows(run, stop - 1, stop)
        labels.append(tree.paths.own(i))
    first, many = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
    predictors = np.arange(many.sum()) + np.repeat(first - np.cumsum(many) + many, many)
    ids = np.repeat(np.arange(S), [len(own) for own in labels[1:]])
    lengths = part.trie.depth[pack.ends] + part.trie.length[pack.ends]
    return StepBatch(
        input_ids=None, position_ids=None, subtree_end=None, lengths=None,
        plan=StepPlan.from_predictions(predictors, np.concatenate(labels), ids, S),
        pairs=torch.from_numpy(index[pairs]), value_positions=_firsts(read), step_ends=_firsts(last),
        value_targets=targets, ref_step_logps=_ref_logps(part, steps, pairs),
        sft_steps=torch.from_numpy(index[pack.sft]),
        node_of_step=torch.from_numpy(np.stack(request.place(part.node[steps]), axis=1)), counts=pack.counts,
        path_lengths=(int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0), **pack.naive)


def _firsts(pieces: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([row for row, _ in pieces], dtype=torch.int64)


def _ref_logps(part: Part, steps: np.ndarray, pairs: np.ndarray) -> Tensor | None:
    """(S,) float32 reference log-probs: of every node in a pair or of none; 0 where no pair asks for one."""
    known = [part.of(at).ref_logp for at in steps.tolist()]
    paired = set(pairs.ravel().tolist())
    missing = [at for at, value in zip(steps.tolist(), known, strict=True) if value is None and at in paired]
    if len(missing) == len(paired):
        return None
    if missing:
        (tree,), (node,) = part.request.place(part.node[missing[:1]])
        fail(part.request.op, "ref_logp", "given for all nodes in pairs or for none",
             f"none at node {node} of tree {tree}")
    return torch.tensor([0.0 if value is None else value for value in known], dtype=torch.float32)
