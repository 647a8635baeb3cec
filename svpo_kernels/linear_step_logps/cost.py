"""What a call of `linear_step_logps` costs, counted: products, passes of the row kernels, memory kept. Pure functions.

A product (m, k) x (k, n) is 2 m k n. The floor of a call is the time of its products alone, at the rate of bare ones;
the row kernels come on top, at the rate of a copy, for they run between the products and not beside them.
"""

from __future__ import annotations

from typing import NamedTuple

from . import modes


class Cost(NamedTuple):
    """Forward and backward: FLOPs of the products, bytes that row kernels read and write, bytes kept in between."""

    flops: int
    row_bytes: int
    kept_bytes: int

    def floor(self, flops_per_second: float) -> float:
        """Seconds of the products alone."""
        return self.flops / flops_per_second

    def with_rows(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds of the products and then of the row kernels."""
        return self.floor(flops_per_second) + self.row_bytes / bytes_per_second


def call_cost(
    R: int,
    D: int,
    V: int,
    mode: str,
    *,
    needs_hidden: bool = True,
    needs_weight: bool = False,
    needs_a: bool = False,
    needs_b: bool = False,
    rank: int = 0,
    itemsize: int = 2,
    logits_budget_mb: float = 512,
    device_type: str = "cuda",
) -> Cost:
    """The cost of scoring R rows. mode: of `modes.mode`; rank: of low-rank factors; itemsize: bytes of a number.

    Gradients of the bias and of branching rows' own labels are not products and not counted.
    """
    limit = modes.budget(V, itemsize, logits_budget_mb, device_type, mode)
    kept = limit.kept(R)
    head, thin, low = 2 * R * D * V, 2 * R * rank * V, 2 * R * rank * D
    flops, passes = head + thin + low, R  # z, read once
    if mode != "forward":
        passes += 2 * R  # read again, and U or the gradient written
    if mode == "frozen":
        flops += head + thin + low
    elif mode != "forward":
        again = R - kept
        flops += head * (needs_hidden + needs_weight) + 2 * again * V * (D + rank) + low
        flops += thin * ((needs_hidden or needs_a) + needs_b) + low * (needs_hidden + needs_a)
    shape = modes.saved_shape(mode, R, D + rank, V, kept)
    return Cost(flops, passes * V * itemsize, shape[0] * shape[1] * itemsize)
