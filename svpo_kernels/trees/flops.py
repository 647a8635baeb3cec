"""Training FLOPs, counted: of packs, of the naive pairwise run, of each distinct sequence once.

A product (m, k) x (k, n) is 2 m k n; the backward of a product is two of its size, so training is three forwards.
Counted are all matrix products: those per token, attention (QK^T and PV), and lm_head for the scored rows only, on
every side alike. "dense" attention pays T * T a pack and L * L a sequence, as torch's own counter does for sdpa and
eager; "exact" pays the visible (query, key) pairs only, as an attention does that never builds (T, T).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from .._checks import fail, require_choice
from ..linear_step_logps.cost import call_cost
from ..models import num_experts
from .cuts import MaxTokens, Price, Sizes, cut
from .layers import TREE
from .packing import Part, StepBatch
from .request import Request, longest_pair
from .tree import StepTree

PACK = 4.0  # tokens that a pack of its own must save: little trees stay together where a wider mask costs less
SAMPLE = 512  # pairs that choose_max_tokens looks at
EXACT = ("flex_attention", TREE)  # implementations that never build (T, T)
STEP, PATIENCE = 1.1, 8  # it tries sizes 10 % apart and stops after eight without a gain (2.1 x the best)


class ModelCost(NamedTuple):
    """Forward FLOPs of a causal LM: per token, per lm_head row, and per (query, key) pair of its attention layers.

    attention: (window or None, FLOPs per pair) of each group of equal layers.
    """

    token: int
    row: int
    attention: tuple[tuple[int | None, int], ...]

    def training(self, tokens: int, rows: int, pairs: Mapping[int | None, int]) -> int:
        """FLOPs of forward and backward. pairs: (query, key) pairs of a layer, by its window (None: no window)."""
        attention = sum(cost * pairs[window] for window, cost in self.attention)
        return 3 * (self.token * tokens + self.row * rows + attention)


class FlopCount(NamedTuple):
    """Training FLOPs of the same loss and gradients: as packed, pairwise, and each distinct sequence once."""

    packed: int
    pairwise: int
    distinct: int

    @property
    def saved(self) -> tuple[float, float]:
        """Shares of the pairwise and of the distinct run's FLOPs that packing saves."""
        return 1 - self.packed / max(self.pairwise, 1), 1 - self.packed / max(self.distinct, 1)


def model_cost(config: Any) -> ModelCost:
    """The cost of a Hugging Face causal LM, read off its weights on the meta device: nothing is allocated.

    Of E experts a token meets num_experts_per_tok. Raises ValueError for a config without attention heads.
    """
    return _model_cost(_Config(config))


class _Config:
    """A config that is equal to another by what it says: some do not come back from their own JSON (Falcon-H1)."""

    def __init__(self, config: Any) -> None:
        self.config, self.says = config, (type(config), config.to_json_string(use_diff=False))

    def __hash__(self) -> int:
        return hash(self.says)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.says == other.says


@lru_cache(maxsize=32)
def _model_cost(of: _Config) -> ModelCost:
    from transformers import AutoModel

    config = copy.deepcopy(of.config)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    experts = num_experts(config)
    token = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and id(weight) not in embeddings:
            routed = experts and (".experts." in name) and "shared" not in name
            token += 2 * weight.numel() * (config.num_experts_per_tok / experts if routed else 1.0)
    row = call_cost(1, config.hidden_size, config.vocab_size, "forward").flops
    return ModelCost(round(token), row, _attention(config))


def _attention(config: Any) -> tuple[tuple[int | None, int], ...]:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        fail("model_cost", "config", "of a model with attention heads", type(config).__name__)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    qk, v = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "layer_types", None) and window is not None:
        types = ["sliding_attention"] * config.num_hidden_layers
    count: dict[int | None, int] = {}
    for layer_type in types:
        if ("attention" in layer_type and layer_type != "linear_attention") or layer_type.startswith("hybrid"):
            key = window if "sliding" in layer_type else None
            count[key] = count.get(key, 0) + 2 * heads * (qk + v)
    return tuple(count.items())


def attention_kind(config: Any) -> str:
    """What a model's attention pays for packs: "exact", visible pairs, or "dense", T * T. Taken from its config."""
    return "exact" if getattr(config, "_attn_implementation", None) in EXACT else "dense"


def count_flops(config: Any, batches: StepBatch | Iterable[StepBatch], attention: str = "dense") -> FlopCount:
    """Training FLOPs of these batches and of the runs they replace. attention: "dense" or "exact", on all sides.

    A distinct batch counts unpadded: as the best that can be done without trees.
    """
    require_choice("count_flops", "attention", attention, ("dense", "exact"))
    cost = model_cost(config)
    total = np.zeros(3, dtype=object)
    for batch in [batches] if isinstance(batches, StepBatch) else batches:
        pairwise = _sequences(cost, batch.pairwise_lengths, batch.pairwise_rows, attention)
        distinct = _sequences(cost, batch.distinct_lengths, batch.distinct_rows, attention)
        packed = distinct
        if batch.lengths is None:
            seen = batch.position_ids.reshape(-1).cpu().numpy() + 1
            packed = _pack(cost, seen, batch.plan.rows.shape[0], attention)
        total += (packed, pairwise, distinct)
    return FlopCount(*map(int, total))


def stream_flops(config: Any, batch: StepBatch, recompute: bool = False) -> int:
    """Training FLOPs of a pack run by `stream_backward`: 4/3 of the pack's under exact attention, 5/3 with recompute.

    Its first walk is one forward more, and recompute runs what others go on from once more (counted for all tokens).
    """
    return count_flops(config, batch, "exact").packed * (5 if recompute else 4) // 3


def _pack(cost: ModelCost, seen: np.ndarray, rows: int, attention: str) -> int:
    """seen: (T,) the tokens that each token sees without a window, itself included."""
    T = len(seen)
    pairs = {w: T * T if attention == "dense" else int(np.minimum(seen, w or T).sum()) for w, _ in cost.attention}
    return cost.training(T, rows, pairs)


def _sequences(cost: ModelCost, lengths: Sequence[int], rows: int, attention: str) -> int:
    L = np.array(lengths, dtype=np.int64)
    pairs = {}
    for window, _ in cost.attention:
        inside = np.minimum(L, window or L.max(initial=0))  # queries that see everything before them
        exact = inside * (inside + 1) // 2 + (L - inside) * inside
        pairs[window] = int((L * L if attention == "dense" else exact).sum())
    return cost.training(int(L.sum()), rows, pairs)


def choose_max_tokens(trees: Sequence[StepTree], pairs: Sequence[Any], model_config: Any, *,
                      at_most: int | None = None) -> MaxTokens:
    """The max_tokens for `pack_trees` that minimises counted training FLOPs of this model: `max_tokens: auto`.

    A larger pack repeats less and, under a dense mask, attends to more that it cannot see; with flex_attention or
    svpo_tree in the config nothing is attended in vain. A pack counts as 4 tokens more than it has. Sizes are tried
    from the largest pair's up; of many pairs the first 512 are looked at. at_most: what memory holds; it bounds the
    choice where every pair fits into it. The int that is returned also tells `pack_trees` what attention costs this
    model; a plain one of the same size is cut for an unknown model.

    Raises what pack_trees raises for bad trees and pairs, and ValueError when there is no pair.
    """
    request = Request("choose_max_tokens", trees, pairs, "pairs", None)
    if not len(request):
        fail("choose_max_tokens", "pairs", "at least one pair", "none")
    cost = model_cost(model_config)
    attention = attention_kind(model_config)
    part = Part(request, request.order[:SAMPLE])
    trie, items = part.trie, part.items
    sizes = Sizes(trie, items)
    least = longest_pair(request)
    most = sizes.union(range(len(items)))
    most = max(least, most if at_most is None else min(most, at_most))
    if attention == "exact":
        return MaxTokens(most, Price(0.0, most))
    price = Price(sum(flops for _, flops in cost.attention) / cost.token, PACK)

    def predicting(at: int, run: int) -> set[tuple[int, int]]:
        """The rows that predict a node's ids, as (run, token in it)."""
        tree, i = part.tree_and_node(at)
        return {(r, skipped + k) for r, skipped, many in trie.pieces(run, tree.start[i] - 1, tree.length[i] - 1)
                for k in range(many)}

    scored = [set().union(*(predicting(at, int(part.end[at])) for at in part.at(request.item(n)).tolist()))
              for n in part.numbers]

    def flops(packs: list[list[int]]) -> float:
        total = 3 * cost.token * PACK * len(packs)
        for pack in packs:
            T = sizes.union(pack)
            rows = len(set().union(*(scored[n] for n in pack)))
            total += cost.training(T, rows, dict.fromkeys((w for w, _ in cost.attention), T * T))
        return total

    def tried(size: int) -> tuple[float, int]:
        return flops(cut(trie, items, MaxTokens(size, price))), size

    best, size, waited = (float("inf"), most), float(least), 0
    while size < most and waited < PATIENCE:
        found = tried(int(size))
        waited = 0 if found < best else waited + 1
        best = min(best, found)
        size *= STEP
    return MaxTokens(min(best, tried(most))[1], price)
