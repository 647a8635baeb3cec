"""Backward functions that may be differentiated once, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """Hands a gradient through; its own backward raises."""

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"{ctx.name} is once_differentiable: its second derivative is not implemented")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's decorator, but a second derivative raises whatever the upstream is.

    torch's own hands back a constant when the upstream gradient is one (`loss.sum()`), and a gradient penalty is then
    silently zero.
    """
    name = backward.__qualname__.split(".")[0].strip("_")

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        sources = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad] if again else []
        with torch.no_grad():
            result = backward(ctx, *grads)
        if not sources:
            return result
        return tuple(_Once.apply(name, g, *sources) if isinstance(g, Tensor) else g for g in result)

    return wrapper
