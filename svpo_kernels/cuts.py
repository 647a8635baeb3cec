"""Cutting what does not fit into one pack so that little is computed twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trie import Trie

WINDOW = 256  # items clustered together; the gain of merging any two is held, 512 KiB
# A merge saves tokens and makes a dense mask attend to more that cannot be seen, which counts as a fifth of its share
# of a full pack's width: 1 % fewer FLOPs (three real trees, Llama-3-8B shape) than not counted, for 0.3 % more tokens.
WASTE = 0.2


class Sizes:
    """Tokens of any union of items, without walking the trie.

    The paths to positions a < b (depth first) share as many tokens as the least depth among a + 1 ... b, so the union
    of paths to sorted ends has the sum of their lengths less the sum of what neighbours share.
    """

    def __init__(self, trie: Trie, items: Sequence[tuple[int, ...]]) -> None:
        ends = np.unique(np.array([e for item in items for e in item], dtype=np.int64))
        self.items = [np.searchsorted(ends, item) for item in items]
        self.length = trie.depth[ends] + 1
        inner = ends[:-1] + 1
        self.shared = np.minimum.reduceat(trie.depth[:ends[-1] + 1], inner) if len(inner) else inner

    def union(self, numbers: Sequence[int]) -> int:
        """Tokens that the items of these numbers need together."""
        if not len(numbers):
            return 0
        at = np.unique(np.concatenate([self.items[n] for n in numbers]))
        shared = np.minimum.reduceat(self.shared[:at[-1]], at[:-1]).sum() if len(at) > 1 else 0
        return int(self.length[at].sum() - shared)


def cut(trie: Trie, items: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Items (each the ends it needs together) -> packs of item numbers of at most max_tokens positions each.

    One pack when all fits. Else, among items that are neighbours in depth-first order, the two clusters that share
    most are merged until none fits; clusters are then filled up in that order, sharing or not. Packs come depth first,
    by their first items; the items of a pack in the order given. An item that alone needs more than max_tokens
    stays alone: the caller checks.
    """
    order = sorted(range(len(items)), key=lambda n: (max(items[n]), min(items[n])))
    sizes = Sizes(trie, items)
    if sizes.union(order) <= max_tokens:
        return [sorted(order)] if order else []
    clusters: list[list[int]] = []
    for first in range(0, len(order), WINDOW):
        window = order[first:first + WINDOW]
        clusters += [[window[n] for n in cluster] for cluster in _cluster(trie, [items[n] for n in window], max_tokens)]
    place = {n: at for at, n in enumerate(order)}
    clusters.sort(key=lambda cluster: min(place[n] for n in cluster))
    return [sorted(pack) for pack in _fill(sizes, clusters, max_tokens)]


def _cluster(trie: Trie, items: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    member, weight = _classes(trie, items)
    clusters = [[n] for n in range(len(items))]
    open_ = np.ones(len(items), dtype=bool)
    size = member @ weight
    shared = (member * weight) @ member.T

    def gain(a: np.ndarray, b: np.ndarray, shared: np.ndarray) -> np.ndarray:
        union = a + b - shared
        return np.where(union <= max_tokens, shared - WASTE * (union**2 - a**2 - b**2) / max_tokens, 0.0)

    gains = gain(size[:, None], size[None, :], shared)
    np.fill_diagonal(gains, 0.0)
    while len(items) and gains.flat[best := int(gains.argmax())] > 0:
        i, j = sorted(divmod(best, len(items)))
        clusters[i] += clusters[j]
        clusters[j], open_[j] = [], False
        np.maximum(member[i], member[j], out=member[i])
        size[i] = member[i] @ weight
        row = gain(size[i], size, member @ (member[i] * weight))
        row[~open_] = row[i] = 0.0
        gains[i] = gains[:, i] = row
        gains[j] = gains[:, j] = 0.0
    return [cluster for cluster in clusters if cluster]


def _classes(trie: Trie, items: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """(items, classes) 0/1 and the tokens of each class: positions that the same items need are one class."""
    ends = np.unique(np.array([e for item in items for e in item], dtype=np.int64))
    held = np.nonzero(trie.needed(ends))[0]
    below = np.searchsorted(ends, held) * (len(ends) + 1) + np.searchsorted(ends, trie.subtree_end[held])
    key, weight = np.unique(below, return_counts=True)
    low, high = np.divmod(key, len(ends) + 1)  # a position is needed for ends[low:high]
    member = np.zeros((len(items), len(weight)))
    for n, item in enumerate(items):
        for e in np.searchsorted(ends, item):
            member[n, (low <= e) & (e < high)] = 1.0
    return member, weight.astype(np.float64)


def _fill(sizes: Sizes, clusters: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Join clusters, in order, while their union fits: a pack is closed when the next one does not."""
    packs: list[list[int]] = []
    for cluster in clusters:
        if packs and sizes.union(packs[-1] + cluster) <= max_tokens:
            packs[-1] = packs[-1] + cluster
        else:
            packs.append(cluster)
    return packs
