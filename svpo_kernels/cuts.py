"""Cutting what does not fit into one pack so that little is computed twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trie import Trie

WINDOW = 256  # items clustered together: the gains of all pairs of clusters are held, 256 KiB here


def cut(trie: Trie, items: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Items (each the ends it needs together) -> packs of item numbers of at most max_tokens positions each.

    One pack when all fits. Else, among items that are neighbours in depth-first order, the two clusters that share
    most are merged until none fits; clusters are then filled up in that order, sharing or not. An item that alone
    needs more than max_tokens stays alone: the caller checks.
    """
    order = sorted(range(len(items)), key=lambda n: (max(items[n]), min(items[n])))
    clusters: list[list[int]] = []
    for first in range(0, len(order), WINDOW):
        window = order[first:first + WINDOW]
        clusters += [[window[n] for n in cluster] for cluster in _cluster(trie, [items[n] for n in window], max_tokens)]
    place = {n: at for at, n in enumerate(order)}
    clusters = sorted((sorted(cluster, key=place.__getitem__) for cluster in clusters), key=lambda c: place[c[0]])
    return _fill(trie, items, clusters, max_tokens)


def _cluster(trie: Trie, items: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    member, weight = _classes(trie, items)
    clusters = [[n] for n in range(len(items))]
    size = member @ weight
    shared = (member * weight) @ member.T

    gain = np.where(size[:, None] + size - shared <= max_tokens, shared, 0.0)
    np.fill_diagonal(gain, 0.0)
    while len(items) and gain.max() > 0:
        i, j = sorted(divmod(int(gain.argmax()), len(items)))
        clusters[i] += clusters[j]
        clusters[j] = []
        member[i] = np.maximum(member[i], member[j])
        size[i] = member[i] @ weight
        shared[i] = shared[:, i] = member @ (member[i] * weight)
        open_ = np.array([bool(cluster) for cluster in clusters])
        open_[i] = False
        gain[i] = gain[:, i] = np.where(open_ & (size[i] + size - shared[i] <= max_tokens), shared[i], 0.0)
        gain[j] = gain[:, j] = 0.0
    return [cluster for cluster in clusters if cluster]


def _classes(trie: Trie, items: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """(items, classes) 0/1 and the tokens of each class: positions that the same items need are one class."""
    ends = np.unique(np.array([e for item in items for e in item], dtype=np.int64))
    held = np.nonzero(trie.needed(ends))[0]
    below = np.searchsorted(ends, held), np.searchsorted(ends, trie.subtree_end[held])
    (low, high), weight = np.unique(np.stack(below), axis=1, return_counts=True)
    member = np.zeros((len(items), len(weight)))
    for n, item in enumerate(items):
        for e in np.searchsorted(ends, item):
            member[n, (low <= e) & (e < high)] = 1.0
    return member, weight.astype(np.float64)


def _fill(trie: Trie, items: Sequence[tuple[int, ...]], clusters: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Join clusters, in order, while their union fits: a pack is closed when the next one does not."""
    packs: list[list[int]] = []
    for cluster in clusters:
        if packs:
            joined = packs[-1] + cluster
            if trie.needed([e for n in joined for e in items[n]]).sum() <= max_tokens:
                packs[-1] = joined
                continue
        packs.append(cluster)
    return packs
