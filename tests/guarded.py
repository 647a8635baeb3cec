"""Allocations that show who writes beside them and who leaves a part of them unwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # elements on either side: 128 bytes of 16-bit numbers, so that the middle stays on 16 bytes
CANARY = 77.0  # exact in every dtype


class Guarded:
    """Every allocation made while it was on, with a canary on either side."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def take(self, like: Tensor, sizes: tuple[Any, ...], fill: float, options: dict[str, Any]) -> Tensor:
        size = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        dtype, device = options.get("dtype") or like.dtype, options.get("device") or like.device
        numel = torch.Size(size).numel()
        buffer = torch.full((numel + 2 * GUARD,), CANARY, dtype=dtype, device=device)
        middle = buffer[GUARD : GUARD + numel]
        middle.fill_(fill if dtype.is_floating_point or fill == 0 else -1)
        self.buffers.append(buffer)
        return middle.view(size)

    def check(self) -> None:
        assert self.buffers, "nothing was allocated: the guard saw no call"
        for buffer in self.buffers:
            for side in (buffer[:GUARD], buffer[-GUARD:]):
                assert (side == CANARY).all(), f"written beside {buffer.numel() - 2 * GUARD} of {buffer.dtype}"


@contextlib.contextmanager
def guarded() -> Iterator[Guarded]:
    """Uninitialised memory is NaN (integers: -1), and whatever torch hands out lies between canaries."""
    found = Guarded()
    kept = torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.empty_like

    def new_empty(self: Tensor, *sizes: Any, **options: Any) -> Tensor:
        return found.take(self, sizes, torch.nan, options)

    def new_zeros(self: Tensor, *sizes: Any, **options: Any) -> Tensor:
        return found.take(self, sizes, 0.0, options)

    def empty_like(input: Tensor, **options: Any) -> Tensor:
        return found.take(input, (input.shape,), torch.nan, options)

    torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.empty_like = new_empty, new_zeros, empty_like
    try:
        yield found
    finally:
        torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.empty_like = kept
