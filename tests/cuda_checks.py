"""What only the emulation shows: that it finds faults, that order and alignment do not matter, that offsets are wide.

Run by tests/test_cuda_emulated.py with the plugin cuda_emulator, under every schedule.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from dataclasses import replace

import pytest
import torch
from cases import ROW_CASES, RowCase, make_rows
from cuda_emulator import SCHEDULES
from test_step_logps import plan_of, run

import svpo_kernels as sk
from svpo_kernels import _native

FAULTS = {
    "no_barrier": "read (before it was written|of what another thread wrote, no barrier in between): slots",
    "no_warp_barrier": "read (before it was written|of what another thread wrote, no barrier in between): slots",
    "not_written": r"read before it was written: slots\[7\]",
    "two_writers": r"written by two threads, no barrier in between: slots\[10\]",
    "shared_index": r"out of bounds: slots\[64\]",
    "divergent_barrier": "divergent threads: .* waits at a barrier",
    "early_exit": r"divergent threads: .* has ended",
    "divergent_shuffle": r"divergent threads: .* waits in a warp operation .* has ended",
    "no_such_lane": r"no such lane: \[32\]",
    "misaligned": "a 16-byte store is not aligned",
}


def test_the_emulation_finds_faults(schedule: str) -> None:
    library = ctypes.CDLL(os.environ["SVPO_EMULATION_FAULTS"])
    library.svpo_cuda_last_error.restype = ctypes.c_char_p
    library.svpo_emulation_schedule(*SCHEDULES[schedule])
    data = torch.arange(64.0)
    assert library.svpo_fault(0, ctypes.c_void_p(data.data_ptr())) == 0
    assert data.tolist() == list(range(63, -1, -1))
    for fault, (name, message) in enumerate(FAULTS.items(), 1):
        assert library.svpo_fault(fault, ctypes.c_void_p(torch.zeros(64).data_ptr())) == 5, name
        why = library.svpo_cuda_last_error().decode()
        assert why.startswith("fault: ") and re.search(message, why), f"{name}: {why}"


def outputs(logits, plan, upstream, case, backend="cuda"):
    return run(logits, upstream, lambda x: sk.step_logps(x, plan, backend=backend, **case.options))


@pytest.mark.parametrize(
    "case", [case for case in ROW_CASES if case.predictions == "branching" or case.V > 9999], ids=lambda case: case.name
)
def test_order_does_not_show(case: RowCase, schedule: str) -> None:
    """The same bits under every schedule and number of multiprocessors."""
    logits, given = make_rows(case)
    plan = plan_of(given, case)
    upstream = torch.randn(plan.num_predictions if case.reduction == "none" else case.S)
    ours = outputs(logits, plan, upstream, case)
    _native.cuda().schedule("ascending")
    for a, b in zip(ours, outputs(logits, plan, upstream, case), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 7, 8, 9, 255, 257, 1017, 1025, 8191, 8200, 8201])
def test_any_alignment(dtype: torch.dtype, V: int) -> None:
    """Every distance of a row from a 16-byte border, its own and its gradient's; its neighbours are left alone."""
    case = RowCase("aligned", B=1, L=2, V=V, S=2, scored=1.0, dtype=dtype, softcap=7.0 if V % 2 else None)
    for offset in range(16 // dtype.itemsize):
        memory = torch.full((2, V + 16), torch.nan, dtype=dtype)
        logits = memory[:, offset : offset + V]
        logits.copy_(torch.randn(2, V))
        given = make_rows(case)[1]
        plan = plan_of(given, case)
        upstream = torch.randn(2)
        ours = outputs(logits[None], plan, upstream, case)
        expected = outputs(logits.float()[None], plan, upstream, case, "cpu")
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1].float(), expected[1], rtol=1e-2, atol=1e-3)
        options = (list(plan.tensors), V, 1.0, case.softcap or 0.0, "sum")
        stats = _step_logps().step_logps_fwd(logits[None], *options)
        made = _step_logps().step_logps_bwd(upstream, logits[None], *stats[1:], *options, inplace=True)
        torch.testing.assert_close(made, ours[1], rtol=0, atol=0)
        memory[:, offset : offset + V] = torch.nan
        assert memory.isnan().all()


def test_offsets_are_wide() -> None:
    """A row more than 2^31 elements behind the first: mapped, never touched but for that row."""
    V, rows = 32768, 70000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, rows * V * 2, flags=flags)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).view(1, rows, V)
    logits[0, -1] = torch.randn(V)
    plan = sk.StepPlan.from_predictions([rows - 1], [V - 1], [0], 1)
    out = torch.ops.svpo.step_logps_fwd(logits, list(plan.tensors), V, 1.0, 0.0, "sum", "cuda")[0]
    expected = torch.log_softmax(logits[0, -1].float(), -1)[-1:]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("V", [50, 9000])
def test_a_constant_does_not_show(V: int) -> None:
    """Rows far below and far above 0, where exp would underflow or overflow without their maximum."""
    logits = torch.randint(-8, 8, (1, 3, V)).float()
    plan = sk.StepPlan.from_predictions([0, 1, 2], [0, V // 2, V - 1], [0, 1, 2], 3)
    expected = sk.step_logps(logits, plan, backend="cuda")
    for constant in (-1000.0, 1000.0):
        torch.testing.assert_close(sk.step_logps(logits + constant, plan, backend="cuda"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_indices_give_nan(dtype: torch.dtype) -> None:
    """What a device cannot raise: a label, row or step out of range makes its own results NaN, and reads nothing."""
    logits = torch.randn(1, 6, 50, dtype=dtype)
    rows, each = torch.tensor([0, 1, 2, 6]), torch.arange(5)
    labels, steps = torch.tensor([3, 50, -7, 2]), torch.arange(4)
    bounds = torch.tensor([0, 0, 0, 0])
    plan = [rows, each, labels, each[:4], steps, each[:4], each, bounds]
    out, logp, row_max, row_logsum = _step_logps().step_logps_fwd(logits, plan, 50, 1.0, 0.0, "sum")
    assert out.isnan().tolist() == logp.isnan().tolist() == [False, True, True, True]
    assert row_max.isnan().tolist() == [False, False, False, True]
    grad = _step_logps().step_logps_bwd(torch.ones(4), logits, logp, row_max, row_logsum, plan, 50, 1.0, 0.0, "sum")
    assert grad.isnan().any(-1).tolist() == [[False, True, True, False, False, False]]
    assert (grad[0, 3:] == 0).all()
    labels, steps = torch.tensor([3, 4, 5]), torch.tensor([0, 1, 2])
    late = [rows[:3], each[:4], labels, each[:3], steps, each[:3], each[:3], bounds]
    out, logp, row_max, row_logsum = _step_logps().step_logps_fwd(logits, late, 50, 1.0, 0.0, "sum")
    assert out.isnan().all() and not logp.isnan().any()
    grad = _step_logps().step_logps_bwd(torch.ones(2), logits, logp, row_max, row_logsum, late, 50, 1.0, 0.0, "sum")
    assert grad.isnan().any(-1).tolist() == [[False, False, True, False, False, False]]


def test_every_row_branches(schedule: str) -> None:
    """No prediction is left out of dW: the last label's terms end with the list of them."""
    hidden, weight = torch.randn(3, 9, requires_grad=True), torch.randn(8, 9, requires_grad=True)
    plan = sk.StepPlan.from_predictions([0, 0, 1, 1, 2, 2], [0, 7, 2, 7, 4, 7], [0, 1, 2, 0, 1, 2], 3)
    upstream = torch.randn(3)

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        out = sk.linear_step_logps(hidden, weight, plan, backend=backend)
        return torch.autograd.grad(out, (hidden, weight), upstream)

    for ours, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(ours, expected)


def test_scratch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_step_logps(), "scratch", lambda like, size: like.new_empty(1, dtype=torch.uint8))
    case = replace(ROW_CASES[0], S=3)
    logits, given = make_rows(case)
    with pytest.raises(RuntimeError, match="step_logps_fwd: scratch is too small"):
        sk.step_logps(logits, plan_of(given, case), backend="cuda")


def _step_logps():
    from svpo_kernels.step_logps import cuda

    return cuda
