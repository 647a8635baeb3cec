"""Cutting what does not fit into one pack so that little is computed twice, and little is attended to in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .trie import Trie

WINDOW = 256  # items clustered together; the gain of merging any two is held, 512 KiB


class Price(NamedTuple):
    """What a pack of T tokens costs, in tokens: pack + T + width T^2. A dense mask attends to T^2, seen or not."""

    width: float
    pack: float

    def of(self, tokens: np.ndarray | float) -> np.ndarray | float:
        """Of packs that are not empty."""
        return self.pack + tokens * (1.0 + self.width * tokens)

    @classmethod
    def usual(cls, max_tokens: int) -> Price:
        """Of an unknown model: attention in vain costs a full pack at most a fifth of its tokens, and a pack so much
        that two halves always join."""
        return cls(0.2 / max_tokens, 0.1 * max_tokens)


class MaxTokens(int):
    """The max_tokens chosen for a model: an int that also knows the price by which that model's packs are cut."""

    price: Price | None

    def __new__(cls, tokens: int, price: Price | None = None) -> MaxTokens:
        self = super().__new__(cls, tokens)
        self.price = price
        return self


class Sizes:
    """Tokens of any union of items, without walking the trie.

    The paths to the ends of runs a < b (depth first) share as many tokens as the least depth among runs a + 1 ... b, so
    the union of paths to sorted ends has the sum of their lengths less the sum of what neighbours share.
    """

    def __init__(self, trie: Trie, items: Sequence[tuple[int, ...]]) -> None:
        ends = np.unique(np.array([e for item in items for e in item], dtype=np.int64))
        self.items = [np.searchsorted(ends, item).tolist() for item in items]
        self.length = trie.depth[ends] + trie.length[ends]
        inner = ends[:-1] + 1
        self.shared = np.minimum.reduceat(trie.depth[:ends[-1] + 1], inner) if len(inner) else inner

    def union(self, numbers: Sequence[int]) -> int:
        """Tokens that the items of these numbers need together."""
        if not len(numbers):
            return 0
        at = np.array(sorted({e for n in numbers for e in self.items[n]}))
        shared = np.minimum.reduceat(self.shared[:at[-1]], at[:-1]).sum() if len(at) > 1 else 0
        return int(self.length[at].sum() - shared)


def cut(trie: Trie, items: Sequence[tuple[int, ...]], max_tokens: int, begun: Sequence[int] = ()) -> list[list[int]]:
    """Items (each the runs whose ends it needs together) -> packs of item numbers of at most max_tokens tokens each.

    Packs cost what the price of max_tokens says, or the usual one. One pack when all fits and no price is known. Else,
    among items that are neighbours in depth-first order, the two clusters whose merger saves most are merged until none
    does; clusters are joined in that order where that saves a pack; then items that need the same tokens move
    together to where they cost least, until none gains. Packs come depth first, by their first items; the items of a
    pack in the order given. An item that alone needs more than max_tokens stays alone: the caller checks.
    begun: items that are a pack already, the first; others may join it as a whole.
    """
    price = getattr(max_tokens, "price", None)
    order = sorted(set(range(len(items))).difference(begun), key=lambda n: (max(items[n]), min(items[n])))
    sizes = Sizes(trie, items)
    if price is None and sizes.union([*begun, *order]) <= max_tokens:
        return [sorted([*begun, *order])] if len(items) else []
    usual = Price.usual(max_tokens)
    packs: list[list[int]] = [list(begun)] if begun else []
    for first in range(0, len(order), WINDOW):
        window = order[first:first + WINDOW]
        member, weight = _classes(trie, [items[n] for n in window])
        clusters = sorted(_cluster(member, weight, max_tokens, usual), key=min)
        joined = _join(sizes, [[window[n] for n in cluster] for cluster in clusters], max_tokens, usual)
        local = {n: at for at, n in enumerate(window)}
        moved = _descend(member, weight, [[local[n] for n in pack] for pack in joined], max_tokens, usual)
        if price is not None:
            moved = _descend(member, weight, moved, max_tokens, price)
        packs += [[window[n] for n in pack] for pack in moved]
    return [sorted(pack) for pack in _join(sizes, packs, max_tokens, price or usual)]


def _cluster(member: np.ndarray, weight: np.ndarray, max_tokens: int, price: Price) -> list[list[int]]:
    clusters = [[n] for n in range(len(member))]
    open_ = np.ones(len(member), dtype=bool)
    member = member.copy()
    size = member @ weight
    shared = (member * weight) @ member.T

    def gain(a: np.ndarray, b: np.ndarray, shared: np.ndarray) -> np.ndarray:
        union = a + b - shared
        return np.where(union <= max_tokens, shared - price.width * (union**2 - a**2 - b**2), 0.0)

    gains = gain(size[:, None], size[None, :], shared)
    np.fill_diagonal(gains, 0.0)
    while len(member) and gains.flat[best := int(gains.argmax())] > 0:
        i, j = sorted(divmod(best, len(member)))
        clusters[i] += clusters[j]
        clusters[j], open_[j] = [], False
        np.maximum(member[i], member[j], out=member[i])
        size[i] = member[i] @ weight
        row = gain(size[i], size, member @ (member[i] * weight))
        row[~open_] = row[i] = 0.0
        gains[i] = gains[:, i] = row
        gains[j] = gains[:, j] = 0.0
    return [cluster for cluster in clusters if cluster]


def _descend(member: np.ndarray, weight: np.ndarray, packs: list[list[int]], max_tokens: int,
             price: Price) -> list[list[int]]:
    """Move what needs the same tokens, all of it that a pack has at once, to the pack or to a new one where it costs
    least, while anything gains: 1.2 % fewer FLOPs (three real trees, 4 layers of 768)."""
    pack_of = np.empty(len(member), dtype=np.int64)
    for p, pack in enumerate(packs):
        pack_of[pack] = p
    holds = np.stack([*(member[pack].sum(0) for pack in packs), np.zeros(len(weight))])  # items by (pack, class)
    cost: np.ndarray = np.asarray(price.of((holds > 0) @ weight))
    cost[-1] = 0.0  # the last pack is a new one
    bits = np.packbits(np.concatenate([member.T, np.eye(len(member))]) > 0, axis=1)  # a group a row: sorted as bytes
    groups = [np.nonzero(np.unpackbits(np.frombuffer(group, np.uint8)))[0]
              for group in sorted({group.tobytes() for group in bits})]
    moved = True
    while moved:
        moved = False
        for group in groups:
            for source in sorted(set(pack_of[group].tolist())):
                part = group[pack_of[group] == source]
                leaving = member[part].sum(0)
                left = float((holds[source] > leaving) @ weight)
                left_cost = price.of(left) if left else 0.0
                grown = ((holds > 0) | (leaving > 0)) @ weight
                grown_cost = np.asarray(price.of(grown))
                gain: np.ndarray = cost[source] - left_cost + cost - grown_cost
                gain[grown > max_tokens] = gain[source] = 0.0
                best = int(gain.argmax())
                if gain[best] < 1e-6:
                    continue
                moved = True
                holds[source] -= leaving
                holds[best] += leaving
                cost[source], cost[best], pack_of[part] = left_cost, grown_cost[best], best
                if best == len(cost) - 1:
                    holds, cost = np.pad(holds, ((0, 1), (0, 0))), np.append(cost, 0.0)
    return sorted((np.nonzero(pack_of == p)[0].tolist() for p in np.unique(pack_of)), key=min)


def _classes(trie: Trie, items: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """(items, classes) 0/1 and the tokens of each class: runs that the same items need are one class."""
    ends = np.unique(np.array([e for item in items for e in item], dtype=np.int64))
    held = np.nonzero(trie.needed(ends))[0]
    below = np.searchsorted(ends, held) * (len(ends) + 1) + np.searchsorted(ends, trie.past[held])
    key, kind = np.unique(below, return_inverse=True)
    weight = np.bincount(kind, weights=trie.length[held], minlength=len(key))
    low, high = np.divmod(key, len(ends) + 1)  # a run is needed for ends[low:high]
    member = np.zeros((len(items), len(weight)))
    for n, item in enumerate(items):
        for e in np.searchsorted(ends, item):
            member[n, (low <= e) & (e < high)] = 1.0
    return member, weight


def _join(sizes: Sizes, packs: list[list[int]], max_tokens: int, price: Price) -> list[list[int]]:
    """Join packs, in order, where that fits and costs less: one is closed when the next one does not."""
    joined: list[list[int]] = []
    last = 0
    for pack in packs:
        own = sizes.union(pack)
        if joined:
            union = sizes.union(joined[-1] + pack)
            if union <= max_tokens and price.of(union) < price.of(last) + price.of(own):
                joined[-1], last = joined[-1] + pack, union
                continue
        joined.append(pack)
        last = own
    return joined
