"""What `linear_step_logps` keeps between forward and backward, and how it is cut into chunks. Pure functions.

| mode    | when                                    | products       | kept                                        |
| ------- | --------------------------------------- | -------------- | ------------------------------------------- |
| forward | no gradient is needed                   | 1              | nothing                                     |
| frozen  | only hidden needs a gradient            | 2              | U W, (R, D)                                 |
| store   | weight or bias needs one                | 3              | U, (kept, V), as far as the budget reaches  |
|         | the rows that the budget cannot keep    | 4              | their row statistics: "recompute"           |

U is the unit gradient of a row, J * (onehot(l*) - softmax(z)): the upstream gradient is only a factor in front of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MODES = ("forward", "frozen", "store")
MOST_ROWS = 4096  # a longer chunk does not make the products any faster
LEAST_ROWS = {"cuda": 256, "cpu": 64}  # fewer rows leave the matrix units waiting for the weight


def mode(needs_hidden: bool, needs_weight: bool, needs_bias: bool, grad_enabled: bool, entropy: bool = False) -> str:
    """The mode of a call. The gradient of an entropy is no multiple of U, so U W cannot be made in the forward."""
    if not grad_enabled or not (needs_hidden or needs_weight or needs_bias):
        return "forward"
    return "store" if needs_weight or needs_bias or entropy else "frozen"


class Budget(NamedTuple):
    """Rows of (rows, V) memory: how many U may be kept, and how many a chunk may have beside them."""

    kept: int
    chunk: int


def budget(V: int, itemsize: int, logits_budget_mb: float, device_type: str, mode: str) -> Budget:
    """Split `logits_budget_mb` (MiB) between kept rows and scratch rows; free of R, so that compiled graphs are too.

    A chunk is at most MOST_ROWS and at least LEAST_ROWS rows, even when the budget is smaller. In store mode a quarter
    of the budget stays scratch for the rows beyond it; when all rows can be kept that quarter is never allocated.
    """
    least = LEAST_ROWS.get(device_type, LEAST_ROWS["cuda"])
    rows = int(logits_budget_mb * 2**20) // max(1, V * itemsize)
    if mode != "store":
        return Budget(0, min(max(rows, least), MOST_ROWS))
    chunk = min(max(rows // 4, least), MOST_ROWS)
    return Budget(max(0, rows - chunk), chunk)


def saved_shape(mode: str, R: Any, D: Any, V: Any, kept: int) -> tuple[Any, Any]:
    """Shape of what is kept between forward and backward; R may be symbolic."""
    if mode == "frozen":
        return R, D
    return (torch.sym_min(R, kept), V) if mode == "store" else (0, V)


def chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) cut into as few equal pieces of at most `size` rows as possible."""
    rows = stop - start
    count = -(-rows // size) if rows > 0 else 0
    edges = [start + rows * i // count for i in range(count + 1)] if count else [start]
    return list(zip(edges, edges[1:], strict=False))
