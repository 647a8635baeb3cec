"""The calls that make every Triton kernel take every launch configuration: public ops on small CPU tensors.

A new kernel needs a call here that reaches it; tests/test_triton_pins.py names kernels that no call launches.
`full=False` leaves out combinations whose parts are met elsewhere: every kernel, dtype, mode and alignment stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

import svpo_kernels as sk
from svpo_kernels import _triton

DTYPES = _triton.DTYPES
MODES = {"plain": {}, "scaled": {"temperature": 0.7}, "capped": {"softcap": 30.0}}
# (V, vocab_size, columns of the buffer before and after a row's own): what decides how reads and writes are aligned
LAYOUTS = {
    "whole": (2048, None, 0, 0),
    "padded vocabulary": (2048, 2043, 0, 0),
    "odd": (2047, None, 0, 0),
    "odd in a wide buffer": (2047, None, 0, 1),
    "off by one": (2048, None, 1, 15),
    "narrow": (512, None, 0, 0),
    "narrow odd": (511, None, 0, 0),
}


def _plan(T: int, V: int) -> sk.StepPlan:
    """Two predictions a row; the last row is not scored."""
    rows = torch.arange(T - 1).repeat_interleave(2)
    return sk.StepPlan.from_predictions(rows, torch.randint(0, V, rows.shape), rows // 2, T)


def _step_logps(dtype: torch.dtype, layout: str, options: dict, reduction: str = "sum") -> None:
    V, vocab_size, front, behind = LAYOUTS[layout]
    buffer = torch.zeros(2, 3, front + V + behind, dtype=dtype)
    logits = buffer[..., front : front + V].requires_grad_()
    plan = _plan(6, vocab_size or V)
    options = {"vocab_size": vocab_size, "reduction": reduction, "backend": "triton", **options}
    out = sk.step_logps(logits, plan, **options)
    torch.autograd.grad(out, logits, torch.ones_like(out))
    made = _Buffer.apply(logits, buffer.clone()[..., front : front + V])
    out = sk.step_logps(made, plan, inplace_backward=True, **options)
    torch.autograd.grad(out, logits, torch.ones_like(out))


class _Buffer(torch.autograd.Function):
    """A non-leaf with the strides of `buffer`, as a model's logits are."""

    @staticmethod
    def forward(ctx, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _linear(dtype: torch.dtype, V: int, D: int, options: dict, needs: tuple[bool, ...], budget: float = 512) -> None:
    hidden, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((2, 3, D), (V, D), (V,)))
    leaves = [x.requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True)]
    options = {"bias": bias if needs[2] else None, "logits_budget_mb": budget, "backend": "triton", **options}
    out = sk.linear_step_logps(hidden, weight, _plan(6, V), **options)
    torch.autograd.grad(out, [x for x in leaves if x.requires_grad], torch.ones_like(out))


def _step_calls(full: bool) -> Iterator[Callable[[], None]]:
    for dtype, (mode, options), layout in product(DTYPES, MODES.items(), LAYOUTS):
        # fp16 loads as bf16 does, and alignment does not meet the mode
        main = layout == "whole" or (mode == "plain" and dtype != torch.float16)
        if full or main:
            yield lambda d=dtype, la=layout, o=options: _step_logps(d, la, o)
    for reduction in ("mean", "none"):
        yield lambda r=reduction: _step_logps(torch.float32, "narrow", {}, r)


def _linear_calls(full: bool) -> Iterator[Callable[[], None]]:
    frozen, trained, head, bias = (True, False, False), (True, True, False), (False, True, True), (False, False, True)
    for dtype, (mode, options), (V, D), needs in product(
        DTYPES, MODES.items(), ((2048, 64), (2047, 63), (512, 64), (511, 64)), (frozen, trained, head, bias)
    ):
        main = V in (2048, 2047) and mode == "plain" and dtype != torch.float16
        if full or main or (needs == frozen and V == 2048):
            yield lambda d=dtype, V=V, D=D, o=options, n=needs: _linear(d, V, D, o, n)
            if needs == head:  # more rows than the budget keeps: recomputed in the backward
                yield lambda d=dtype, V=V, D=D, o=options, n=needs: _linear(d, V, D, o, n, 1e-6)


def calls(full: bool) -> list[Callable[[], None]]:
    return [*_step_calls(full), *_linear_calls(full)]
