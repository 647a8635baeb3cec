"""Masks of packed trees, for attention that is not `tree_attention`: dense, additive, FlexAttention's.

Query q sees key k exactly when k <= q < subtree_end[k]: one integer per token says packing, prefix sharing and
branching. BlockMasks come from the block extremes of blocks.py, the rule that our own kernels use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS, INTEGERS, can_look, fail, require_choice
from ..tree_attention.blocks import ordered, visible_blocks

OP = "tree_attention_mask"
BLOCK = 128  # rows of a block, FlexAttention's default
ALIGNED = 8  # SDPA's GPU kernels copy a mask, once a layer, unless the strides of its rows are multiples of this


def tree_attention_mask(subtree_end: Tensor, kind: str = "dense", *, window: int | None = None,
                        position_ids: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
    """The mask of a pack, on subtree_end's device, one for all layers.

    Equivalent to, for kind="dense" (window: `& (position_ids[:, None] - position_ids < window)` more):

        index = torch.arange(T)
        (index <= index[:, None]) & (index[:, None] < subtree_end)

    Args:
        subtree_end: (T,) integers, the index just past each token's subtree.
        kind: "dense", bool (1, 1, T, T), True = visible. SDPA makes a float (T, T) of it in every layer and keeps each.
            "additive", 0 where visible, else the least finite value of dtype: for sdpa and eager, whose layers all
            share this one. Its rows lie a multiple of 8 apart in memory, so that SDPA's GPU kernels need no copy.
            "block", a FlexAttention BlockMask (its backward needs CUDA) of 128 rows a block, equal to that of
            `create_block_mask`, from the extremes of each block: (T, T) is never made.
        window: a token sees those less than `window` before it, itself included, counted in position_ids, (T,) or
            (1, T). Every token sees itself, so no row is empty.
        dtype: of an additive mask; by default the autocast dtype where autocast is on, else float32.

    Raises ValueError or TypeError for bad shapes, dtypes or kinds, and for a window without position_ids, IndexError
    for a subtree_end on the CPU that leaves out its own token or passes T.
    """
    require_choice(OP, "kind", kind, ("dense", "additive", "block"))
    if not isinstance(subtree_end, Tensor) or subtree_end.dtype not in INTEGERS or subtree_end.dim() != 1:
        fail(OP, "subtree_end", "a (T,) integer tensor", subtree_end, TypeError)
    T, device = subtree_end.shape[0], subtree_end.device
    if can_look(subtree_end) and bool(((subtree_end <= torch.arange(T, device=device)) | (subtree_end > T)).any()):
        fail(OP, "subtree_end", f"above each token's own index and at most T = {T}", f"{subtree_end.tolist()[:8]}",
             IndexError)
    if dtype is not None and (kind != "additive" or dtype not in FLOATS):
        fail(OP, "dtype", "a floating dtype, with kind='additive' only", f"{dtype} with kind={kind!r}")
    position_ids = None if window is None else _positions(window, position_ids, T, device)
    if kind == "block":
        return block_mask(subtree_end, window, position_ids)
    visible = _visible(subtree_end, window, position_ids)
    return visible[None, None] if kind == "dense" else _additive(visible, dtype or run_dtype(device, torch.float32))


def run_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """What attention runs in: the autocast dtype where autocast is on for the device."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


def block_mask(subtree_end: Tensor, window: int | None = None, position_ids: Tensor | None = None,
               size: int = BLOCK) -> Any:
    """FlexAttention's BlockMask of (T,) subtree_end; position_ids (T,) with a window. size: rows of a block."""
    from torch.nn.attention.flex_attention import BlockMask

    T = subtree_end.shape[0]
    if T == 0:
        fail(OP, "subtree_end", "at least one token for kind='block'", subtree_end)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < subtree_end[k])
        return seen if window is None else seen & (position_ids[q] - position_ids[k] < window)

    rows = None if window is None else position_ids.to(torch.int64)[None]
    some, full, _ = visible_blocks(subtree_end.to(torch.int64)[None], window, rows, size, size)
    partial, full = (some & ~full)[:, None], full[:, None]
    lists: dict[str, Any] = {}
    for side, turned in (("kv", False), ("q", True)):
        for name, blocks in (("", partial), ("full_", full)):
            count, index = ordered(blocks.mT if turned else blocks)
            lists |= {f"{name}{side}_num_blocks": count, f"{name}{side}_indices": index}
    return BlockMask(seq_lengths=(T, T), BLOCK_SIZE=(size, size), mask_mod=visible, **lists)


def _positions(window: int, position_ids: Tensor | None, T: int, device: torch.device) -> Tensor:
    if window < 1:
        fail(OP, "window", ">= 1 or None", window)
    if position_ids is None:
        fail(OP, "position_ids", "given with a window (it is counted in them)", None)
    if position_ids.shape not in ((T,), (1, T)):
        fail(OP, "position_ids", f"(T,) or (1, T) with T = {T}", position_ids)
    return position_ids.reshape(T).to(device)


def _visible(subtree_end: Tensor, window: int | None, position_ids: Tensor | None) -> Tensor:
    index = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    visible = (index[:, None] < subtree_end).tril_()  # k <= q is the lower triangle
    if window is not None:
        visible &= position_ids[:, None] - position_ids < window
    return visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, T), the rows of memory that is wider where T is no multiple of ALIGNED."""
    T = visible.shape[0]
    wide = torch.full((1, 1, T, T + -T % ALIGNED), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    return wide[..., :T].masked_fill_(visible, 0.0)
