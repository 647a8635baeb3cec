"""Bytes that the Triton kernels load and store, counted in the interpreter against the minimum (run by
tests/test_triton_numerics.py, in a process of its own)."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from triton.runtime import interpreter

import svpo_kernels as sk
from svpo_kernels import _triton
from svpo_kernels.linear_step_logps import triton_ as linear
from svpo_kernels.step_logps import triton_ as step

V, T = 32000, 24


@pytest.fixture
def traffic(monkeypatch):
    """Counter of bytes by (kernel, "load" | "store" | "atomic")."""
    count, running = Counter(), []
    builder = interpreter.interpreter_builder

    def counted(kind, original, ptr, *args):
        mask = args[1].data if kind == "store" else args[0].data
        count[running[-1], kind] += int(mask.sum()) * (ptr.get_element_ty().primitive_bitwidth // 8)
        return original(ptr, *args)

    def atomic(original, *args):
        count[running[-1], "atomic"] += 1
        return original(*args)

    def launch(original, function, *args, **kwargs):
        running.append(function.fn.__name__)
        original(function, *args, **kwargs)
        running.pop()

    # create_load and create_store end in the masked forms: both are counted once.
    for name, kind in (("create_masked_load", "load"), ("create_masked_store", "store")):
        monkeypatch.setattr(builder, name, partial(counted, kind, getattr(builder, name)), raising=False)
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        monkeypatch.setattr(builder, name, partial(atomic, getattr(builder, name)), raising=False)
    for module in (step, linear):
        monkeypatch.setattr(module, "launch", partial(launch, _triton.launch))
    return count


def total(count, kind):
    return sum(size for (_, what), size in count.items() if what == kind)


def check(what, counted, least):
    print(f"traffic: {what}: {counted} bytes, minimum {least}, {counted / max(least, 1) - 1:+.2%}")
    assert least <= counted <= 1.02 * least, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_step_logps(traffic, dtype) -> None:
    logits = torch.randn(1, T, V).to(dtype)
    scored = torch.arange(0, T, 2)
    logits[0, 1::2] = torch.nan
    plan = sk.StepPlan.from_predictions(scored, torch.randint(0, V, scored.shape), scored // 6, 4)
    logits.requires_grad_()
    row = V * dtype.itemsize
    out = sk.step_logps(logits, plan, backend="triton")
    check("step_logps forward, loads", total(traffic, "load"), len(scored) * row)
    assert total(traffic, "store") < 0.02 * len(scored) * row
    traffic.clear()
    out.backward(torch.randn(4))
    check("step_logps backward, loads", total(traffic, "load"), len(scored) * row)
    check("step_logps backward, stores", total(traffic, "store"), T * row)
    assert total(traffic, "atomic") == 0
    traffic.clear()
    none = sk.step_logps(logits, torch.full((1, T), -100), shift=0, num_steps=2, step_ids=torch.zeros(1, T).long(),
                         backend="triton")
    programs = _triton.cdiv(V, _triton.WIDE.columns)  # each reads one index: not scored
    assert traffic["step_logps_fwd_kernel", "load"] == T * 8 * programs and (none == 0).all()


def test_linear_row_kernels(traffic) -> None:
    D, dtype = 4096, torch.float16
    V = 8192
    hidden, weight = torch.randn(1, T, D).to(dtype), torch.randn(V, D).to(dtype) / 64
    plan = sk.StepPlan.from_predictions(torch.arange(T), torch.randint(0, V, (T,)), torch.arange(T) // 6, 4)
    hidden.requires_grad_()
    out = sk.linear_step_logps(hidden, weight, plan, backend="triton")
    row, vector = T * V * dtype.itemsize, T * D * dtype.itemsize
    check("label_dots, loads", traffic["label_dots_kernel", "load"], 2 * vector)
    check("rows_fwd, loads", traffic["step_logps_fwd_kernel", "load"], row)
    check("rows_unit, loads", traffic["step_logps_bwd_kernel", "load"], row)
    check("rows_unit, stores", traffic["step_logps_bwd_kernel", "store"], row)
    out.backward(torch.randn(4))
    check("branch_hidden, loads", traffic["branch_hidden_kernel", "load"], vector)
    check("branch_hidden, stores", traffic["branch_hidden_kernel", "store"], vector)
    assert total(traffic, "atomic") == 0
