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
import test_linear_step_logps
import torch
from cases import ROW_CASES, RowCase, make_rows
from cuda_emulator import SCHEDULES
from test_step_logps import plan_of, run

import svpo_kernels as sk
from svpo_kernels import _native
from svpo_kernels.linear_step_logps import cuda as linear
from svpo_kernels.plan import PlanTensors

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

CLUSTER_FAULTS = {
    "early_block": "divergent threads: .* has ended",
    "divergent_cluster": "divergent threads: .* waits at a barrier",
    "shared_bytes": r"more than the launch gave: bytes\[260\]",
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
    if SCHEDULES[schedule][2] < 90:
        assert library.svpo_cluster_fault(0, ctypes.c_void_p(data.data_ptr())) == 5
        assert b"no clusters" in library.svpo_cuda_last_error()
        return
    data = torch.arange(128.0)
    assert library.svpo_cluster_fault(0, ctypes.c_void_p(data.data_ptr())) == 0
    assert data.tolist() == list(range(127, -1, -1))
    for fault, (name, message) in enumerate(CLUSTER_FAULTS.items(), 1):
        assert library.svpo_cluster_fault(fault, ctypes.c_void_p(torch.zeros(128).data_ptr())) == 5, name
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


def kept_in_cluster(
    capability: int, V: int, dtype: torch.dtype, softcap: float = 0.0, rows: int = 4096, processors: int = 132
) -> int:
    choose = ctypes.CDLL(os.environ["SVPO_EMULATION"]).svpo_cuda_kept_in_cluster
    choose.restype = ctypes.c_int64
    choose.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return choose(_native.DTYPES[dtype], V, softcap, rows, capability, processors)


def test_what_a_cluster_holds() -> None:
    """Panels that each of at most 8 blocks keeps: none before sm_90, none where two blocks no longer fit an SM."""
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [kept_in_cluster(arch, 128256, bf16) for arch in (80, 89, 90, 100, 120)] == [0, 0, 2, 2, 2]
    assert [kept_in_cluster(arch, 151936, bf16) for arch in (90, 120)] == [3, 3]  # 48 KB and the slots: twice in 100 KB
    assert [kept_in_cluster(arch, 256000, bf16) for arch in (90, 120)] == [4, 0]
    assert [kept_in_cluster(arch, 128256, fp32) for arch in (90, 120)] == [2, 0]
    assert kept_in_cluster(90, 256000, fp32) == 0
    assert kept_in_cluster(90, 128256, bf16, softcap=30.0) == 4  # panels of half the columns
    assert kept_in_cluster(90, 8186, bf16) == 1 and kept_in_cluster(90, 8185, bf16) == 0  # one panel, from any address
    assert kept_in_cluster(90, 128256, bf16, rows=17) == 2 and kept_in_cluster(90, 128256, bf16, rows=16) == 0


def both_ways(
    memory: torch.Tensor, part: tuple[slice, slice], label_z0: torch.Tensor, plan: PlanTensors,
    options: tuple[float, float], entropy: bool, monkeypatch: pytest.MonkeyPatch,
) -> list[torch.Tensor]:
    """`memory` with U in the place of z, logp and statistics: the same bits with and without clusters."""
    found = []
    for clusters in (True, False):
        monkeypatch.setattr(linear, "CLUSTERS", clusters)
        mine = memory.clone()
        logp, stats = torch.full_like(label_z0, 7.0), torch.full((3, plan.rows.shape[0]), 7.0).unbind()
        linear.rows_fwd(mine[part], part[0].start, label_z0, logp, *stats[:2], stats[2] if entropy else None, plan,
                        *options, True)
        found.append((mine, logp, *stats))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return found[0]


def plan_of_rows(rows: list[int], start: list[int], labels: list[int], first: list[int]) -> PlanTensors:
    none = torch.zeros(0, dtype=torch.int64)
    return PlanTensors(*(torch.tensor(index) for index in (rows, start, labels, first)), none, none, none, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [(1.0, 0.0), (0.7, 0.0), (1.3, 20.0)], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
def test_clusters_give_the_same_bits(
    dtype: torch.dtype, options: tuple[float, float], entropy: bool, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics and U of a chunk, from its first row and from its second: branching rows, equal labels, labels that do
    not exist, padding, -inf, any alignment; and nothing beside the rows is touched."""
    V = 8200 if options[1] else 16400
    plan = plan_of_rows([0, 4, 7, 9, -1], [0, 4, 5, 6, 7, 7], [3, V - 1, 3, 8191, 0, V, 4095], [0, 1, 0, 3, 4, 5, 6])
    _, processors, capability = SCHEDULES[schedule]
    for offset, begin in ((0, 0), (3, 1)):
        memory = torch.randn(5, V + 24).to(dtype)
        memory[2, 5:6000] = -torch.inf
        memory[3, :] = -torch.inf if options[1] == 0.0 else 1.0
        part = (slice(begin, None), slice(offset, offset + V))
        mine = both_ways(memory, part, torch.randn(7) * 3, plan, options, entropy, monkeypatch)[0]
        held = kept_in_cluster(capability, V, dtype, options[1], 5 - begin, processors)
        assert bool(held) == (capability >= 90)
        assert not mine[part][0].equal(memory[part][0]) and (mine[4, offset : offset + V] == 0).all()
        mine[part] = memory[part]
        torch.testing.assert_close(mine, memory, rtol=0, atol=0)


def test_more_panels_than_lanes(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 panels, which a warp joins in two turns."""
    V, dtype, options = 32 * 4096 + 1, torch.bfloat16, (1.0, 20.0)
    assert bool(kept_in_cluster(SCHEDULES[schedule][2], V, dtype, options[1], 1, 1)) == (SCHEDULES[schedule][2] >= 90)
    memory = torch.randn(1, V).to(dtype)
    memory[0, -1] = 30.0  # the row's maximum, in the last panel
    plan = plan_of_rows([0], [0, 1], [77], [0])
    both_ways(memory, (slice(0, None), slice(0, V)), torch.zeros(1), plan, options, True, monkeypatch)


@pytest.mark.parametrize(
    "case", [case for case in test_linear_step_logps.CASES if case.L < 300], ids=lambda case: case.name
)
def test_common_cases_of_more_panels(case: RowCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's own cases with rows of two or three panels: from 9.0 on a frozen head holds them in clusters."""
    monkeypatch.setattr(linear, "CLUSTERS", True)
    padding = 0 if case.vocab_size is None else case.V - case.vocab_size
    V = 8200 + case.V % 17
    wide = replace(case, V=V, vocab_size=V - padding if padding else None)
    test_linear_step_logps.test_values_and_gradients(wide, "frozen", "cuda", "cpu", monkeypatch)


def test_scratch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_step_logps(), "scratch", lambda like, size: like.new_empty(1, dtype=torch.uint8))
    case = replace(ROW_CASES[0], S=3)
    logits, given = make_rows(case)
    with pytest.raises(RuntimeError, match="step_logps_fwd: scratch is too small"):
        sk.step_logps(logits, plan_of(given, case), backend="cuda")


def _step_logps():
    from svpo_kernels.step_logps import cuda

    return cuda
