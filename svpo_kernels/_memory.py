"""Large CPU buffers, used again: mapping new pages costs more than the kernels that fill them.

512 x 128256 fp32 (263 MB, 2 cores): 66 ms to map and fill for the first time, 5 ms to fill again, 9 ms to hand back. A
buffer that nobody holds any more is kept, but given to the system (MADV_FREE): it takes the pages when it needs them
and leaves them where they are until then. `SVPO_CPU_CACHE_MB` bounds what is kept, by default an eighth of the
machine's memory; 0 keeps nothing.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")  # a kernel without it refuses the advice
LEAST = 16 << 20  # bytes; the system's own allocator keeps smaller blocks, and a cache holds them


class Buffer(NamedTuple):
    tensor: Tensor
    written: bool  # its pages are mapped: it was in use before


class Pool:
    """Blocks that nobody uses, oldest first. Tensors hold a block through a memoryview, whose end brings it back."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.idle: list[mmap.mmap] = []
        # Reentrant: a collection inside `take` may end a memoryview and so enter `give`.
        self.lock = threading.RLock()

    def take(self, size: int) -> tuple[memoryview, bool]:
        """`size` bytes, uninitialised, and whether they have been used before."""
        with self.lock:
            # Not more than twice what is asked for: a large block is left to those who need it.
            fitting = [block for block in self.idle if size <= len(block) <= 2 * size]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self.idle = [other for other in self.idle if other is not block]
        written = block is not None
        if block is None:
            block = _mapped(_rounded(size))
        view = memoryview(block)[:size]
        weakref.finalize(view, self.give, block).atexit = False
        return view, written

    def give(self, block: mmap.mmap) -> None:
        if len(block) > self.limit:
            return
        block.madvise(mmap.MADV_FREE)
        with self.lock:
            self.idle.append(block)
            while sum(map(len, self.idle)) > self.limit:
                self.idle.pop(0)

    def clear(self) -> None:
        with self.lock:
            self.idle.clear()


def _mapped(size: int) -> mmap.mmap:
    """New pages, huge ones where the system has them: given back and taken again, 128 MiB cost 0.6 ms and not 4.4."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and HUGE_PAGES.exists():
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _rounded(size: int) -> int:
    """Up to an eighth more, so that batches of similar sizes share a block; pages never touched cost nothing."""
    unit = max(mmap.PAGESIZE, 1 << max(size.bit_length() - 4, 0))
    return -(-size // unit) * unit


def _limit() -> int:
    """Bytes to keep; 0 where the system cannot be told to take pages back."""
    if not hasattr(mmap, "MADV_FREE") or not hasattr(os, "sysconf"):
        return 0
    wish = os.environ.get("SVPO_CPU_CACHE_MB")
    if wish is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    if not wish.isdecimal():
        raise ValueError(f"SVPO_CPU_CACHE_MB must be a whole number of MiB, got {wish!r}")
    return int(wish) << 20


@functools.cache
def pool() -> Pool:
    """The pool of this process."""
    return Pool(_limit())


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Buffer:
    """An uninitialised contiguous tensor on the device of `like`: from the pool when it is large and on the CPU."""
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    if not like.is_cpu or size < LEAST or pool().limit < size:
        return Buffer(like.new_empty(shape, dtype=dtype), False)
    view, written = pool().take(size)
    # set_, not view: a gradient is nobody's view.
    storage = torch.frombuffer(view, dtype=dtype).untyped_storage()
    return Buffer(like.new_empty(0, dtype=dtype).set_(storage, 0, shape), written)
