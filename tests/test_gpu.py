"""What only large inputs and a GPU show: offsets above 2^31, canaries, poison, streams, graphs, syncs, sanitizers.

What does not need a GPU runs on every backend, so that the tests themselves are known to work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cases import BACKENDS, RowCase, make_rows
from guarded import guarded
from processes import TESTS, environment
from torch import Tensor

import svpo_kernels as sk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = [param for param in BACKENDS if param.values[1] == "cuda"]
D = 24
OPS = ["step_logps", "linear_step_logps"]


def make(op: str, case: RowCase, device: str):
    """The op's differentiable inputs and a plan."""
    logits, given = make_rows(case, device)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    if op == "step_logps":
        return [logits], plan
    hidden, weight = (torch.randn(size, device=device).to(case.dtype) for size in ((case.B, case.L, D), (case.V, D)))
    return [hidden, weight / 4], plan


def run(op: str, inputs: list[Tensor], plan: sk.StepPlan, upstream: Tensor, **options) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = getattr(sk, op)(*leaves, plan, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out))]


def assert_bitwise(ours: list[Tensor], theirs: list[Tensor], what: str = "") -> None:
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        # torch.equal calls NaN unequal, which is right: nothing here may be NaN
        assert torch.equal(a, b), f"{what} result {k}: {(a != b).sum()} of {a.numel()} differ"


# -- memory: on every backend -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [127, 1040, 9001])
def test_outputs_are_written_whole_and_nothing_beside_them(
    op: str, dtype: torch.dtype, V: int, backend: str, device: str
) -> None:
    """Every allocation starts as NaN between canaries; results are bitwise those of plain memory."""
    case = RowCase("guarded", L=9, V=V, dtype=dtype, predictions="branching")
    inputs, plan = make(op, case, device)
    padded = plan.pad_to(plan.rows.shape[0] + 3, plan.num_predictions + 5, case.S + 2)
    upstream = torch.randn(case.S + 2)
    # 1e-6 MiB: every row is recomputed in the backward
    for options in ({}, {"logits_budget_mb": 1e-6}) if op == "linear_step_logps" else ({},):
        plain = run(op, inputs, padded, upstream, backend=backend, **options)
        with guarded() as memory:
            ours = run(op, inputs, padded, upstream, backend=backend, **options)
        memory.check()
        assert_bitwise(ours, plain, f"{op} {options}")


def test_the_guard_sees_what_it_should() -> None:
    with guarded() as memory:
        x = torch.zeros(2).new_empty(3, 4)
        y = torch.empty_like(x)
        z = x.new_zeros((2, 2), dtype=torch.bfloat16)
    assert x.shape == (3, 4) and x.isnan().all() and y.isnan().all() and (z == 0).all() and z.dtype == torch.bfloat16
    assert x.data_ptr() % 16 == z.data_ptr() % 16 == 0
    memory.check()
    x.as_strided((1,), (1,), x.storage_offset() + 12).fill_(1.0)
    with pytest.raises(AssertionError, match="written beside 12 of"):
        memory.check()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [126, 1037, 8200])
def test_in_place_backward_stays_inside_its_rows(V: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """The logits are a slice of wider rows: the columns and rows around it keep their bits."""
    B, L, S = 2, 7, 5
    wide = torch.randn(B, L + 2, V + 16, device=device).to(dtype)
    before = wide.clone()
    labels = torch.randint(0, V, (B, L))
    plan = sk.StepPlan.from_step_ids(labels, torch.randint(-1, S, (B, L)), shift=0, num_steps=S)
    leaf = wide[:, 1:-1, 8:-8].clone().requires_grad_()
    (expected,) = torch.autograd.grad(sk.step_logps(leaf, plan, backend=backend).sum(), leaf)
    made = _Within.apply(leaf, wide)
    sk.step_logps(made, plan, backend=backend, inplace_backward=True).sum().backward()
    assert torch.equal(wide[:, 1:-1, 8:-8], expected)
    before[:, 1:-1, 8:-8] = wide[:, 1:-1, 8:-8]
    assert torch.equal(wide, before)


class _Within(torch.autograd.Function):
    """A non-leaf in the middle of `wide`, as the logits of a padded head are."""

    @staticmethod
    def forward(ctx, leaf: Tensor, wide: Tensor) -> Tensor:
        return wide[:, 1:-1, 8:-8].detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.clone(), None


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_more_rows_than_a_grid_axis_holds(backend: str, device: str) -> None:
    T, V, S = 66_001, 5, 66_001
    logits, labels = torch.randn(T, V, device=device), torch.randint(0, V, (T,))
    plan = sk.StepPlan.from_step_ids(labels, torch.arange(T), shift=0, num_steps=S)
    upstream = torch.randn(S)
    ours = run("step_logps", [logits], plan, upstream, backend=backend)
    z = logits.double().requires_grad_()
    exact = torch.log_softmax(z, -1).gather(1, labels.to(device)[:, None]).squeeze(1)
    (grad,) = torch.autograd.grad(exact, z, upstream.to(exact))
    torch.testing.assert_close(ours[0].double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_few_rows_of_a_large_vocabulary_are_bitwise_equal_again(op: str, backend: str, device: str) -> None:
    """Many programs share a row here, and their order is the machine's."""
    inputs, plan = make(op, RowCase("shared", B=1, L=3, V=128256, S=3, scored=1.0, predictions="branching"), device)
    upstream = torch.randn(3)
    first = run(op, inputs, plan, upstream, backend=backend)
    for _ in range(5 if device == "cuda" else 1):
        assert_bitwise(run(op, inputs, plan, upstream, backend=backend), first)


# -- only on a GPU ------------------------------------------------------------------------------------------------


def room(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.1f} are free")


@pytest.mark.parametrize(("backend", "device"), GPU)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_beyond_2_to_the_31(inplace: bool, backend: str, device: str) -> None:
    """The last rows of 2.2e9 logits are worth what they are worth alone, and so is their gradient."""
    T, V = 17_200, 128_256
    room(22)
    logits = torch.zeros(1, T, V, dtype=torch.bfloat16, device=device)
    assert logits.numel() > 2**31
    logits[:, -4:] = torch.randn(1, 4, V, device=device) * 3
    alone = logits[:, -4:].clone()
    labels = torch.randint(0, V, (4,))
    rows, steps, upstream = torch.arange(T - 4, T), torch.tensor([0, 0, 1, 2]), torch.randn(3)
    small = run("step_logps", [alone], sk.StepPlan.from_predictions(rows - (T - 4), labels, steps, 3), upstream)
    plan = sk.StepPlan.from_predictions(rows, labels, steps, 3)
    leaf = logits.requires_grad_()
    made = _Same.apply(leaf, logits.detach()) if inplace else leaf
    out = sk.step_logps(made, plan, backend=backend, inplace_backward=inplace)
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out))
    torch.testing.assert_close(out, small[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad[:, -4:], small[1], rtol=2**-7, atol=1e-6)
    assert not grad[:, :-4].any()


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer).detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


@pytest.mark.parametrize(("backend", "device"), GPU)
def test_a_head_beyond_2_to_the_31(backend: str, device: str) -> None:
    """Labels in the last rows of a head of 2.2e9 weights, hidden states and head trained."""
    V, D = 270_000, 8_192
    room(24)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, device=device)
    assert weight.numel() > 2**31
    weight[-8:] = torch.randn(8, D, device=device) / 64
    hidden = torch.randn(1, 4, D, dtype=torch.bfloat16, device=device).requires_grad_()
    weight.requires_grad_()
    plan = sk.StepPlan.from_predictions([0, 1, 1, 3], [V - 1, V - 8, V - 3, V - 1], [0, 1, 2, 3], 4)
    out = sk.linear_step_logps(hidden, weight, plan, backend=backend)
    got = torch.autograd.grad(out.sum(), (hidden, weight))
    # by hand: V - 8 logits are 0
    h, w = hidden.detach()[0].float(), weight.detach()[-8:].float()
    z = h @ w.T
    log_sum = torch.log(z.exp().sum(1) + (V - 8))
    label = torch.tensor([7, 0, 5, 7], device=device)
    row = torch.tensor([0, 1, 1, 3], device=device)
    torch.testing.assert_close(out.detach(), z[row, label] - log_sum[row], rtol=1e-4, atol=1e-3)
    p = (z - log_sum[:, None]).exp()
    u = torch.zeros_like(z).index_put((row, label), torch.ones(4, device=device), accumulate=True)
    u -= p * torch.bincount(row, minlength=4)[:, None]
    torch.testing.assert_close(got[0][0].float(), u @ w, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got[1][-8:].float(), u.T @ h, rtol=2e-2, atol=2e-2)


def everything(device: str, backend: str):
    """Forward and backward of every op on tensors that are there already: what a training step calls with a plan."""
    case = RowCase("step", predictions="branching", V=1000, S=6)
    lp_plan = {op: make(op, case, device) for op in OPS}
    plans = {op: plan.to(device) for op, (_, plan) in lp_plan.items()}
    upstream = torch.randn(case.S, device=device)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]], device=device)
    hidden, head = torch.randn(2, 9, 16, device=device).requires_grad_(), torch.randn(1, 16, device=device)
    positions, values = torch.tensor([1, 4, 17], device=device), torch.randn(case.S, device=device).requires_grad_()
    labels, offsets = torch.tensor([0.0, 1.0, 0.5], device=device), torch.tensor([0, 1, 3], device=device)

    def step() -> list[Tensor]:
        found = []
        for op in OPS:
            found += run(op, lp_plan[op][0], plans[op], upstream, backend=backend)
        out = sk.svpo_loss(found[0], pairs, values=values, value_targets=torch.zeros_like(upstream), backend=backend)
        score = sk.prm_scores(hidden, positions, head, activation="sigmoid", backend=backend)
        total = out.loss + sk.aggregate_scores(score, offsets, "prod", backend=backend).sum()
        total = total + sk.prm_loss(hidden, positions, labels, head, backend=backend)
        return found + [out.loss.detach(), score.detach(), *torch.autograd.grad(total, (values, hidden))]

    return step


def no_gap(backend: str) -> None:
    """An op whose kernels are missing on this backend would raise for that, not for what is tested."""
    for op, report in sk.backends(device="cuda").items():
        if report[backend] != "usable":
            pytest.skip(f"{op}: {report[backend]}")


@pytest.mark.parametrize(("backend", "device"), GPU)
def test_a_step_with_a_plan_never_waits_for_the_device(backend: str, device: str) -> None:
    no_gap(backend)
    step = everything(device, backend)
    expected = step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_bitwise(got, expected)


@pytest.mark.parametrize(("backend", "device"), GPU)
def test_another_stream(backend: str, device: str) -> None:
    """Kernels run on the current stream: after a long wait there, still behind what made their inputs."""
    no_gap(backend)
    step = everything(device, backend)
    expected = step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = step()
    stream.synchronize()
    assert_bitwise(got, expected)
    logits = torch.zeros(2, 50, 4096, device=device)
    labels = torch.randint(0, 4096, (2, 50), device=device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits.normal_()
        out = sk.step_logps(logits, labels, shift=0, num_steps=2, backend=backend)
    stream.synchronize()
    assert torch.equal(out, sk.step_logps(logits, labels, shift=0, num_steps=2, backend=backend))


@pytest.mark.parametrize(("backend", "device"), GPU)
def test_another_device(backend: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    no_gap(backend)
    results = []
    for where in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        found = everything(where, backend)()
        assert torch.cuda.current_device() == 0
        assert all(x.device == torch.device(where) for x in found)
        results.append([x.cpu() for x in found])
    assert_bitwise(*results)


@pytest.mark.parametrize(("backend", "device"), GPU)
@pytest.mark.parametrize("op", OPS)
def test_a_captured_step_replays_with_other_predictions(op: str, backend: str, device: str) -> None:
    """Two plans padded to one size: the graph captured with the first gives the second's results from its buffer."""
    case = RowCase("graph", predictions="branching", V=1000, S=6)
    inputs, first = make(op, case, device)
    _, second = make(op, case, device)
    sizes = (160, 480, case.S)
    first, second = (plan.pad_to(*sizes).to(device) for plan in (first, second))
    upstream = torch.randn(case.S, device=device)
    expected = [run(op, inputs, plan, upstream, backend=backend) for plan in (first, second)]
    assert not torch.equal(expected[0][0], expected[1][0])
    static = sk.StepPlan(first.buffer.clone(), first.bounds, *sizes)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(op, inputs, static, upstream, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, inputs, static, upstream, backend=backend)
    for plan, wanted in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        static.buffer.copy_(plan.buffer)
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(captured, wanted)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_compute_sanitizer_finds_nothing(tool: str, backend: str) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(program):
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    chosen = f"{backend}-gpu and (plain or branching or padded or odd_large or written_whole or stays_inside)"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable, "-m",
               "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_step_logps.py", "test_gpu.py", "-k", chosen]
    # One allocation a tensor: inside the caching allocator's blocks nobody sees a step too far.
    env = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip(f"the {backend} backend is not here: {done.stdout.splitlines()[-1]}")
