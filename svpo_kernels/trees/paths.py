"""The token ids of a tree, each stored once as four bytes, and sequences over them that read like lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Ids(Sequence):
    """Token ids that read like a list and are held as one int32 array."""

    __slots__ = ("_ids",)
    __hash__ = None

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids

    def array(self) -> np.ndarray:
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.array().tolist())

    def __getitem__(self, at: Any) -> Any:
        return self.array()[at].tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence | np.ndarray):
            return NotImplemented
        return len(self) == len(other) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array(), dtype=dtype)


class PathIds(Ids):
    """The ids from a prompt's first to a node's last, put together when they are read."""

    __slots__ = ("_paths", "_node")

    def __init__(self, paths: Paths, node: int) -> None:
        self._paths, self._node = paths, node

    def array(self) -> np.ndarray:
        return self._paths.path(self._node)

    def __len__(self) -> int:
        return self._paths.length[self._node]


class Paths:
    """All ids of a tree: those of the prompt, then every node's own, and which of its parent's path a node keeps.

    ids: int32, one after the other. first: prompt and node i begin at first[0] and first[i + 1]. The path of node i is
    the first start[i] ids of its parent's path, then its own: length[i] in all. parent: -1 for the prompt.
    """

    __slots__ = ("ids", "first", "parent", "start", "length")

    def __init__(self, ids: np.ndarray, first: np.ndarray, parent: Sequence[int], start: Sequence[int],
                 length: Sequence[int]) -> None:
        self.ids, self.first, self.parent, self.start, self.length = ids, first, parent, start, length

    @property
    def prompt(self) -> np.ndarray:
        return self.ids[:self.first[1]]

    def own(self, i: int) -> np.ndarray:
        """The scored ids of node i."""
        return self.ids[self.first[i + 1]:self.first[i + 2]]

    def path(self, i: int, stop: int | None = None) -> np.ndarray:
        """The ids from the prompt's first to the last of node i (-1: the prompt), or the first `stop` of them."""
        whole = len(self.prompt) if i == -1 else self.length[i]
        left = whole if stop is None else min(stop, whole)
        parts: list[np.ndarray] = []
        while i != -1:
            if self.start[i] < left:
                parts.append(self.own(i)[:left - self.start[i]])
                left = self.start[i]
            i = self.parent[i]
        parts.append(self.prompt[:left])
        return np.concatenate(parts[::-1])


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two runs share."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n
