"""Attention of packed trees that never builds (T, T): blocks, then reference -> cpu -> (triton_) -> this file.

Backends: `cpu` (C++: products in registers over the keys that a block of queries sees) and `reference` (dense, the
spec). On a GPU the work is that of a FlashAttention kernel over the lists of blocks.py, which is Triton's home ground;
CUDA C++ would repeat it for each generation's matrix instructions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from .._autograd import once_differentiable
from .._checks import (
    fail,
    require_float,
    require_integer,
    require_number,
    require_positive,
    require_same_device,
    require_size,
)
from .reference import accumulator, output

OP = "tree_attention"


# -- raw ops ----------------------------------------------------------------------------------------------------------


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return output(q, v, rest[-1]), *(q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) for _ in range(2))


def _fake_bwd(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, position_ids: Tensor | None,
              sinks: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    none = q.new_empty(0)
    return tuple(torch.empty_like(x) if need else none for x, need in zip((q, k, v, sinks), rest[-4:], strict=True))


dispatch.define(
    __name__,
    "tree_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor? position_ids, Tensor? sinks, "
    "float scale, SymInt window, float softcap, bool low, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
dispatch.define(
    __name__,
    "tree_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor? position_ids, "
    "Tensor? sinks, Tensor out, Tensor row_max, Tensor row_sum, float scale, SymInt window, float softcap, "
    "bool need_q, bool need_k, bool need_v, bool need_sinks, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


# -- autograd ---------------------------------------------------------------------------------------------------------


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, subtree_end: Tensor,
                position_ids: Tensor | None, scale: float, window: int, softcap: float, low: bool,
                backend: str) -> Tensor:
        options = (scale, window, softcap)
        args = (q, k, v, subtree_end, position_ids, sinks, *options, low)
        out, row_max, row_sum = dispatch.call("tree_attention_fwd", backend, q, args)
        ctx.save_for_backward(q, k, v, subtree_end, position_ids, sinks, out, row_max, row_sum)
        ctx.options, ctx.backend = options, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        args = (grad, *ctx.saved_tensors, *ctx.options, *needs)
        found = dispatch.call("tree_attention_bwd", ctx.backend, grad, args)
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 7


# -- public function --------------------------------------------------------------------------------------------------


def tree_attention(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, scale: float | None = None,
                   window: int | None = None, position_ids: Tensor | None = None, softcap: float | None = None,
                   sinks: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Attention in which a token sees its ancestors and itself, in time and memory of what is visible.

    Equivalent to (without window, softcap and sinks, Hkv = H):

        index = torch.arange(T)
        visible = (index <= index[:, None]) & (index[:, None] < subtree_end)
        out = softmax((scale * q.float() @ k.float().mT).masked_fill(~visible, -inf), -1) @ v.float()

    but (T, T) is never made. A plain causal sequence is subtree_end = T everywhere; padding is subtree_end[k] = k + 1,
    which sees itself only.

    Args:
        q: (B, H, T, Dh), fp32, bf16, fp16 (fp64 on the reference); the last dimension contiguous, any other strides
            (transformers' own layout is (B, T, H, Dh) transposed).
        k: (B, Hkv, T, Dh), v: (B, Hkv, T, Dv), in q's dtype; Hkv divides H, query head h reads key head h Hkv // H.
        subtree_end: (T,) or (B, T) integers, the index just past each token's subtree, in (k, T].
        scale: of the logits, by default Dh ** -0.5.
        window: a token sees those less than `window` before it, itself included, counted in position_ids, which are
            required then: (T,) or (B, T) integers. None = all.
        softcap: z = softcap * tanh(z / softcap) before the mask; None = none.
        sinks: (H,) floats, a logit per head, neither scaled nor capped, that takes part in the softmax with value 0.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        (B, H, T, Dv), fp32 (fp64 for fp64), computed in fp32. Differentiable once in q, k, v and sinks, each gradient
        in its own dtype. No dropout. The same bits from run to run.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, device, layout or option that does not fit.
        IndexError: a subtree_end outside (k, T] (CPU tensors, and a device's under SVPO_CHECK=1).

    Source: the visibility rule of depth-first packed trees; softcap of Gemma-2 (arXiv 2408.00118), sinks of gpt-oss
    (arXiv 2508.10925), computed block by block as in FlashAttention-2 (arXiv 2307.08691).
    """
    return attend(q, k, v, subtree_end, scale=scale, window=window, position_ids=position_ids, softcap=softcap,
                  sinks=sinks, backend=backend)


def attend(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, scale: float | None = None,
           window: int | None = None, position_ids: Tensor | None = None, softcap: float | None = None,
           sinks: Tensor | None = None, low: bool = False, backend: str = "auto") -> Tensor:
    """`tree_attention`; low: the output in q's dtype, as a model's layers pass it on."""
    if torch.is_autocast_enabled(getattr(getattr(q, "device", None), "type", "cpu")):
        q, k, v = _one_dtype(q, k, v)
    _check_rows(q, k, v)
    B, H, T, D = q.shape
    _check_integers("subtree_end", subtree_end, q)
    if window is not None:
        require_size(OP, "window", window)
        if window < 1:
            fail(OP, "window", ">= 1 or None", window)
        if position_ids is None:
            fail(OP, "position_ids", "given with a window (it is counted in them)", None)
    if position_ids is not None:
        _check_integers("position_ids", position_ids, q)
    if scale is not None:
        require_number(OP, "scale", scale)
    if softcap is not None:
        require_positive(OP, "softcap", softcap)
    if sinks is not None:
        require_float(OP, "sinks", sinks)
        require_same_device(OP, "sinks", sinks, "q", q)
        if sinks.shape != (H,):
            fail(OP, "sinks", f"(H,) = {(H,)}", sinks)
    dispatch.check_backend(OP, backend, q)
    return _TreeAttention.apply(q, k, v, sinks, subtree_end, position_ids if window is not None else None,
                                float(D**-0.5 if scale is None else scale), window or 0, float(softcap or 0.0), low,
                                backend)


# -- checks -----------------------------------------------------------------------------------------------------------


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast a norm may leave q and k in fp32 and v in bf16; all is computed in fp32 then."""
    same = len({x.dtype for x in tensors if isinstance(x, Tensor)}) == 1
    return tensors if same else tuple(x.float() if x.dtype.is_floating_point else x for x in tensors)


def _check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, letters in (("q", q, "(B, H, T, Dh)"), ("k", k, "(B, Hkv, T, Dh)"), ("v", v, "(B, Hkv, T, Dv)")):
        require_float(OP, name, x)
        if x.dim() != 4:
            fail(OP, name, letters, x)
        if x.dtype != q.dtype:
            fail(OP, name, f"in q's dtype {q.dtype}".replace("torch.", ""), x, TypeError)
        require_same_device(OP, name, x, "q", q)
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    if H < 1 or D < 1:
        fail(OP, "q", "(B, H, T, Dh) with at least one head and Dh >= 1", q)
    if k.shape != (B, Hkv, T, D) or Hkv < 1 or H % Hkv:
        fail(OP, "k", f"(B, Hkv, T, Dh) = ({B}, Hkv, {T}, {D}) with Hkv a divisor of H = {H}", k)
    if v.shape[:3] != (B, Hkv, T):
        fail(OP, "v", f"(B, Hkv, T, Dv) = ({B}, {Hkv}, {T}, Dv)", v)


def _check_integers(name: str, x: Tensor, q: Tensor) -> None:
    B, _, T, _ = q.shape
    require_integer(OP, name, x)
    require_same_device(OP, name, x, "q", q)
    if x.shape not in ((T,), (B, T)):
        fail(OP, name, f"(T,) = ({T},) or (B, T) = ({B}, {T})", x)
