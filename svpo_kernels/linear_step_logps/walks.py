"""In which order the (R, V) entries between the products are walked. Pure functions.

A tile is some rows of some columns. By rows: each part of them reads all of W (V, D), and in a backward adds to all of
dW in fp32. By columns, with the row statistics known: each run of them writes its rows of dW once, and what is read
again and added to is hidden (R, D). Either way tiles of one size are as many, so the shorter side should be the one
that is walked again and again. Tiles go column by column, and within a column over the rows.

CPU, fp32, T 4096, D 512, V 65536, 64 MiB (AMD EPYC, 2 cores; seconds for z, U W, dW): rows of 64, as beside kept rows,
6.8 for z; rows of 256 5.0; columns of 1024 4.4, 3.3, 3.9; columns of 4096 3.1, 3.2, 3.5.
"""

from __future__ import annotations

from typing import NamedTuple

LEAST_COLUMNS = {"cuda": 2048, "cpu": 512}  # fewer leave the products waiting for the hidden rows
STEP = 64  # columns that an edge between runs is a multiple of: rows of a tile start where a load of 16 bytes can


class Walk(NamedTuple):
    """Tiles: for each run of columns, each part of the rows."""

    columns: list[tuple[int, int]]
    rows: list[tuple[int, int]]

    def most(self, start: int = 0) -> int:
        """Entries of the largest tile whose rows begin at `start` or later."""
        rows = max((last - first for first, last in self.rows if first >= start), default=0)
        return rows * max((last - first for first, last in self.columns), default=0)


def chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) cut into as few equal pieces of at most `size` as possible."""
    length = stop - start
    count = -(-length // size) if length > 0 else 0
    edges = [start + length * i // count for i in range(count + 1)] if count else [start]
    return list(zip(edges, edges[1:], strict=False))


def runs(V: int, size: int) -> list[tuple[int, int]]:
    """V columns in runs of at most `size`, those of STEP and more cut at multiples of it."""
    step = STEP if size >= STEP else 1
    return [(first * step, min(last * step, V)) for first, last in chunks(0, -(-V // step), size // step)]


def choose(
    R: int, V: int, kept: int, scratch: int, device_type: str, *, in_place: bool = True, by_columns: bool = True
) -> Walk:
    """The walk over R rows that moves less.

    kept: rows whose entries are there; in_place: they need no scratch. scratch: rows of V columns that the others may
    take at a time. by_columns: whether columns can be walked at all.
    """
    first = [(0, kept)] if kept and in_place else chunks(0, kept, scratch)
    rows = Walk([(0, V)], first + chunks(kept, R, scratch))
    if not by_columns or len(rows.rows) < 2 or V < 2:
        return rows
    least = min(V, LEAST_COLUMNS.get(device_type, LEAST_COLUMNS["cuda"]))
    area, most = scratch * V, max(R - kept, 0 if in_place else kept)
    group = max(1, min(most, area // least))
    first = [(0, kept)] if kept and in_place else chunks(0, kept, group)
    columns = Walk(runs(V, min(V, area // group)), first + chunks(kept, R, group))
    return min(rows, columns, key=lambda walk: moved(walk, R, V))


def moved(walk: Walk, R: int, V: int) -> int:
    """Rows of W, dW and hidden that a walk reads or adds to, each time: a tile's products do both alike."""
    return len(walk.rows) * V + len(walk.columns) * R
