"""The widest pairs of many siblings, without making the others."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice, repeat

Pair = tuple[int, int]


def widest_pairs(groups: Sequence[Sequence[int]], q: Sequence[float | None], above: float, most: int,
                 same: Sequence[int] | None) -> list[Pair]:
    """The `most` pairs (chosen, rejected) of one group's nodes whose q_values differ most, and by more than `above`.

    groups: node indices, ascending. same: a number per node, equal for equal texts; of pairs with equal texts only the
    first counts (None: all do). Widest first, ties in the order of groups, then of (lower, higher) index. The work
    grows with the nodes and the pairs that are kept.
    """
    met: dict[int, list[dict[int, float]]] = {}  # by the texts of a group, those of the groups before it
    found: list[Pair] = []
    for group in groups:
        earlier: list[dict[int, float]] = []
        if same is not None:
            texts = {same[i]: q[i] for i in group}
            for text in texts:
                earlier += [other for other in met.get(text, ()) if other not in earlier]
                met.setdefault(text, []).append(texts)
        fresh = (pair for pair in _by_gap(group, q, above) if not any(
            same[pair[0]] in other and same[pair[1]] in other
            and other[same[pair[0]]] - other[same[pair[1]]] > above for other in earlier))
        found += islice(fresh, most)
    return sorted(found, key=lambda pair: q[pair[1]] - q[pair[0]])[:most]


def _by_gap(group: Sequence[int], q: Sequence[float | None], above: float) -> Iterator[Pair]:
    """Pairs of a group, the widest first, ties by (lower, higher) index."""
    classes: dict[float, list[int]] = {}
    for i in group:
        classes.setdefault(q[i], []).append(i)
    values = sorted(classes)
    last = len(values) - 1
    # Of every value as the chosen one's: the gap to the lowest value that it has not met yet.
    heap = [(values[0] - values[high], high, 0) for high in range(last, 0, -1)]
    heapq.heapify(heap)
    while heap and -heap[0][0] > above:
        gap, level = heap[0][0], []
        while heap and heap[0][0] == gap:
            _, high, low = heap[0]
            level.append((values[high], values[low]))
            if low + 1 < high:
                heapq.heapreplace(heap, (values[low + 1] - values[high], high, low + 1))
            else:
                heapq.heappop(heap)
        yield from _in_order(level, classes, q)


def _in_order(level: Sequence[tuple[float, float]], classes: dict[float, list[int]],
              q: Sequence[float | None]) -> Iterator[Pair]:
    """The pairs of some (chosen, rejected) values, by (lower, higher) index."""
    partners: dict[float, list[tuple[float, bool]]] = {}
    for high, low in level:
        partners.setdefault(high, []).append((low, True))
        partners.setdefault(low, []).append((high, False))
    for i in heapq.merge(*(classes[value] for value in partners)):
        behind = [zip(islice(classes[value], bisect_right(classes[value], i), None), repeat(chosen))
                  for value, chosen in partners[q[i]]]
        for j, chosen in heapq.merge(*behind):
            yield (i, j) if chosen else (j, i)
