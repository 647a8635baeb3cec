"""The CPU kernels on every instruction set of this machine: arithmetic, memory, threads and the build itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from accuracy import assert_accurate
from cases import RowCase, make_logits, make_rows
from processes import TESTS, environment
from torch import Tensor

import svpo_kernels as sk
from svpo_kernels import _native
from svpo_kernels.linear_step_logps import cpu as linear_rows
from svpo_kernels.step_logps import cpu as row_kernels

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("avx512", "avx2", "portable")
HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(_native.cpu_reason() is not None, reason=str(_native.cpu_reason()))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set, forced; one that this machine lacks is skipped."""
    native = _native.cpu()
    if ISAS.index(request.param) < ISAS.index(native.best_isa()):
        pytest.skip(f"this machine has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=TESTS,
        env=environment(**more),
    )


# -- arithmetic -------------------------------------------------------------------------------------------------------

FUNCTIONS = {"exp": (0, torch.exp, 2.0), "tanh": (1, torch.tanh, 2.5), "exp2": (2, torch.exp2, 3.0)}


def elementwise(x: Tensor, function: str) -> Tensor:
    out = torch.empty_like(x)
    _native.cpu().elementwise(x.data_ptr(), out.data_ptr(), x.numel(), FUNCTIONS[function][0])
    return out


def inputs(function: str) -> Tensor:
    """The whole range where the result is neither 0 nor inf, both sides of it, and every scale near 0."""
    low, high = {"exp": (-120.0, 100.0), "tanh": (-12.0, 12.0), "exp2": (-126.0, 127.0)}[function]
    small = torch.logspace(-38, 0, 100_001)
    return torch.cat([torch.linspace(low, high, 1_000_001), small, -small])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_elementary_functions_over_the_whole_range(isa: str, function: str) -> None:
    _, exact, ulps = FUNCTIONS[function]
    x = inputs(function)
    expected = exact(x.double())
    fits = expected.float().isfinite()
    rounded = expected.float()[fits].abs()
    unit = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    error = (elementwise(x, function).double()[fits] - expected[fits]).abs() / unit
    assert not error.isnan().any() and error.max() <= ulps, f"{error.max():.2f} ulp at {x[fits][error.argmax()]}"


def test_elementary_functions_at_the_ends(isa: str) -> None:
    x = torch.tensor([torch.nan, -torch.inf, -1e30, -200.0, 0.0, -0.0])
    expected = {
        "exp": [0.0, 0.0, 0.0, 1.0, 1.0],
        "exp2": [0.0, 0.0, 0.0, 1.0, 1.0],
        "tanh": [-1.0, -1.0, -1.0, 0.0, -0.0],
    }
    for function, values in expected.items():
        out = elementwise(x, function)
        assert out[0].isnan() and out[1:].tolist() == values, function
    assert elementwise(torch.tensor([torch.inf]), "exp").isinf() and elementwise(x, "tanh")[-1].signbit()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factor", [1.0, 1.0006, 3e-6, -3e4])
def test_half_precision_conversion_of_every_value(isa: str, dtype: torch.dtype, factor: float) -> None:
    """All 65536 values read, scaled in fp32 and written: the same bits as torch, NaN aside."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 256)
    rows = x.shape[0]
    plan = sk.StepPlan.from_predictions(
        torch.arange(rows), torch.zeros(rows, dtype=torch.int64), torch.arange(rows), rows
    )
    zeros = torch.zeros(rows)
    scaled = linear_rows.branch_hidden(
        x, x[:1], zeros, torch.full((rows,), factor), plan.tensors, 0
    )
    expected = (x.float() * factor).to(dtype)
    nan = expected.isnan()
    assert torch.equal(scaled.isnan(), nan)
    assert torch.equal(scaled.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


# -- rows -------------------------------------------------------------------------------------------------------------

COLUMNS = (1, 3, 63, 127, 1000, 2049, 32001)


def compare(case: RowCase, logits: Tensor, given) -> None:
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    upstream = torch.randn(case.S)

    def run(x: Tensor, function) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]

    exact, eager = (run(x, lambda leaf: oracle.step_logps(leaf, given, case)) for x in (logits.double(), logits))
    ours = run(logits, lambda leaf: sk.step_logps(leaf, plan, backend="cpu", **case.options))
    assert_accurate(ours[0], eager[0], exact[0], what="out")
    assert_accurate(ours[1], eager[1], exact[1], what="gradient")


@pytest.mark.parametrize("V", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 6.0, "temperature": 1.3}], ids=str)
def test_step_logps(isa: str, V: int, dtype: torch.dtype, options: dict) -> None:
    L = max(3, min(40, 20_000 // V))
    case = RowCase("native", B=2, L=L, V=V, S=7, dtype=dtype, predictions="branching", **options)
    compare(case, *make_rows(case))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7, 15])
def test_misaligned_rows(isa: str, dtype: torch.dtype, offset: int) -> None:
    case = RowCase("misaligned", B=1, L=9, V=333, S=4, dtype=dtype, scored=1.0)
    logits, given = make_rows(case)
    wide = torch.full((9, 333 + 2 * offset), torch.nan, dtype=dtype)
    wide[:, offset:-offset] = logits[0]
    compare(case, wide[:, offset:-offset].unsqueeze(0), given)


@pytest.mark.parametrize("layout", ["wide", "shifted", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_strides(isa: str, layout: str, inplace: bool) -> None:
    """Any strides, into a new tensor and over the logits: the same bits as for contiguous ones."""
    case = RowCase("strided", B=3, L=7, V=141, S=5, layout=layout, softcap=4.0)
    logits, given = make_logits(case), make_rows(case)[1]
    plan = list(sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S).tensors)
    options = (case.V, 1.0, 4.0, "sum")
    upstream = torch.randn(case.S)

    def run(x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        out, *stats = row_kernels.step_logps_fwd(x, plan, *options)
        return out, row_kernels.step_logps_bwd(upstream, x, *stats, plan, *options, inplace=inplace)

    expected = run(logits.contiguous(), False)
    ours = run(logits, inplace)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert ours[1].is_contiguous() or inplace and ours[1].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_gradient_larger_than_the_cache(isa: str, dtype: torch.dtype) -> None:
    """A new gradient of more than 16 MiB is written past the cache: the same bits as over the logits."""
    V = 30_011
    L = 17 * 2**20 // (V * dtype.itemsize) + 1
    logits = torch.randn(1, L, V).to(dtype)
    plan = list(sk.StepPlan.from_step_ids(torch.randint(0, V, (L,)), torch.arange(L) % 7, shift=0).tensors)
    options = (plan, V, 1.0, 0.0, "sum")
    _, *stats = row_kernels.step_logps_fwd(logits, *options)
    upstream = torch.randn(7)
    fresh = row_kernels.step_logps_bwd(upstream, logits, *stats, *options)
    assert torch.equal(fresh, row_kernels.step_logps_bwd(upstream, logits, *stats, *options, inplace=True))


def test_a_row_of_a_thousand_labels(isa: str) -> None:
    """Labels in any order, many of them neighbours, some predicted for several steps."""
    V, N = 1201, 2500
    case = RowCase("crowded", B=1, L=2, V=V, S=9, scored=1.0)
    logits, given = make_rows(case)
    given.rows = torch.arange(2).repeat_interleave(N // 2)
    given.labels, given.step_ids = torch.randint(0, V, (N,)), torch.randint(0, case.S, (N,))
    compare(case, logits, given)


def test_what_is_not_scored_is_never_read_or_kept(isa: str) -> None:
    """NaN in unscored rows and padded columns changes nothing, and their gradient is 0 over whatever was there."""
    V, padded = 1000, 1024
    logits = torch.full((1, 6, padded), torch.nan)
    logits[0, [1, 4], :V] = torch.randn(2, V)
    plan = list(sk.StepPlan.from_predictions([1, 4], [5, 999], [0, 1], 2).tensors)
    out, *stats = row_kernels.step_logps_fwd(logits, plan, V, 1.0, 0.0, "sum")
    assert out.isfinite().all()
    grad = row_kernels.step_logps_bwd(torch.randn(2), logits, *stats, plan, V, 1.0, 0.0, "sum", inplace=True)
    assert grad.isfinite().all() and (grad[0, [0, 2, 3, 5]] == 0).all() and (grad[..., V:] == 0).all()
    assert (grad[0, 1, :V] != 0).all()


def test_rows_without_upstream_give_zeros(isa: str) -> None:
    logits, labels = torch.randn(4, 300), torch.tensor([3, 4, 5, 6])
    logits[3, 7] = torch.nan
    plan = list(sk.StepPlan.from_step_ids(labels, torch.arange(4), shift=0).tensors)
    out, *stats = row_kernels.step_logps_fwd(logits.unsqueeze(0), plan, 300, 1.0, 0.0, "sum")
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0])
    grad = row_kernels.step_logps_bwd(upstream, logits.unsqueeze(0), *stats, plan, 300, 1.0, 0.0, "sum")[0]
    assert (grad[1] == 0).all() and grad[3].isnan().all() and (grad[[0, 2]] != 0).all()


def test_upstreams_that_cancel_leave_the_label_columns(isa: str) -> None:
    """G = 0 with g = 1 and -1: only the two labels move, exactly."""
    logits = torch.randn(1, 1, 500)
    plan = list(sk.StepPlan.from_predictions([0, 0], [10, 400], [0, 1], 2).tensors)
    _, *stats = row_kernels.step_logps_fwd(logits, plan, 500, 1.0, 0.0, "sum")
    grad = row_kernels.step_logps_bwd(torch.tensor([1.0, -1.0]), logits, *stats, plan, 500, 1.0, 0.0, "sum")
    expected = torch.zeros(500)
    expected[10], expected[400] = 1.0, -1.0
    assert torch.equal(grad[0, 0], expected)


def test_a_label_or_row_out_of_range_gives_nan(isa: str) -> None:
    """The kernels check by themselves: a plan made on another device comes without bounds."""
    logits = torch.randn(1, 3, 50)
    for bad in (50, -1, 2**40):
        plan = sk.StepPlan.from_predictions([0, 1, 2], [1, 2, 3], [0, 1, 2], 3)
        plan.labels[1] = bad
        out, *_ = row_kernels.step_logps_fwd(logits, list(plan.tensors), 50, 1.0, 0.0, "sum")
        assert out.isnan().tolist() == [False, True, False]
    plan = sk.StepPlan.from_predictions([0, 1, 2], [1, 2, 3], [0, 1, 2], 3)
    plan.rows[2] = 3
    out, *_ = row_kernels.step_logps_fwd(logits, list(plan.tensors), 50, 1.0, 0.0, "sum")
    assert out.isnan().tolist() == [False, False, True]


def test_offsets_beyond_two_billion_elements(isa: str) -> None:
    """A row at 2^31 elements and more from the first; the memory between is never touched."""
    V, far = 1000, 2**31 + 12345
    logits = torch.empty(far + V, dtype=torch.bfloat16).as_strided((2, 1, V), (far, V, 1))
    logits.copy_(torch.randn(2, 1, V))
    plan = list(sk.StepPlan.from_predictions([0, 1], [7, 999], [0, 1], 2).tensors)
    options = (plan, V, 1.0, 0.0, "sum")
    out, *stats = row_kernels.step_logps_fwd(logits, *options)
    near, *_ = row_kernels.step_logps_fwd(logits.contiguous(), *options)
    assert torch.equal(out, near)
    expected = row_kernels.step_logps_bwd(torch.ones(2), logits.contiguous(), *stats, *options)
    grad = row_kernels.step_logps_bwd(torch.ones(2), logits, *stats, *options, inplace=True)
    assert torch.equal(grad, expected)


# -- rows between the products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_unit_gradient_is_the_same_made_at_once_or_later(isa: str, dtype: torch.dtype, softcap: float) -> None:
    case = RowCase("unit", B=1, L=40, V=2500, S=6, predictions="branching", dtype=dtype)
    logits, given = make_rows(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, 6).pad_to(50, 200, 6).tensors
    R, N = plan.rows.shape[0], plan.labels.shape[0]
    z = logits[0, plan.rows.clamp_min(0)].contiguous()
    label_z0 = z.float()[torch.zeros(N, dtype=torch.int64), plan.labels] + torch.randn(N)
    stats = [torch.full((size,), torch.nan) for size in (N, R, R)]
    at_once, later = z.clone(), z.clone()
    linear_rows.rows_fwd(at_once, 0, label_z0, *stats, plan, 0.9, softcap, True)
    for start in range(0, R, 7):  # by chunks, and the statistics without U
        again = [torch.full((size,), torch.nan) for size in (N, R, R)]
        chunk = z[start : start + 7].clone()
        linear_rows.rows_fwd(chunk, start, label_z0, *again, plan, 0.9, softcap, False)
        assert torch.equal(chunk, z[start : start + 7])
        for ours, whole in zip(again, stats, strict=True):
            assert torch.equal(ours[~ours.isnan()], whole[~ours.isnan()])
        linear_rows.rows_unit(later[start : start + 7], start, label_z0, *stats, plan, 0.9, softcap)
    assert torch.equal(at_once, later) and (at_once[plan.rows < 0] == 0).all()
    assert at_once[plan.rows >= 0].isfinite().all()


# -- threads and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("L", "V"), [(2, 70_000), (200, 700), (37, 20_011)])
def test_results_do_not_depend_on_the_thread_count(isa: str, threads: None, L: int, V: int) -> None:
    """Rows shared out whole, and few rows shared out by panels of columns: the same bits."""
    case = RowCase("threads", B=1, L=L, V=V, S=5, scored=1.0, predictions="branching", softcap=20.0)
    logits, given = make_rows(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    hidden, weight = torch.randn(L, 8), torch.randn(V, 8)
    leaves = [logits, hidden, weight]

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        for leaf in leaves:
            leaf.requires_grad_()
        out = sk.step_logps(logits, plan, softcap=20.0, backend="cpu")
        stats = [torch.empty(n) for n in (plan.num_predictions, *plan.rows.shape, *plan.rows.shape)]
        z = logits.detach()[0].clone()
        linear_rows.rows_fwd(z, 0, torch.zeros(plan.num_predictions), *stats, plan.tensors, 1.0, 20.0, True)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), logits), z, *stats]

    first = run(1)
    for count in (2, 3, 7):
        for ours, expected in zip(run(count), first, strict=True):
            assert torch.equal(ours, expected), f"{count} threads"


def test_nothing_outside_the_tensor_is_touched() -> None:
    """Logits and gradient end and begin at a page that may not be read or written, for every dtype and tail length."""
    done = python("""
        import ctypes, mmap, torch
        from svpo_kernels import StepPlan, _native
        from svpo_kernels.step_logps import cpu
        libc, PAGE, BODY = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 8 * mmap.PAGESIZE
        area = mmap.mmap(-1, BODY + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for guard in (start, start + PAGE + BODY):
            assert libc.mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
        for isa in ("portable", "avx2", "avx512"):
            try:
                _native.cpu().set_isa(isa)
            except RuntimeError:
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                size = torch.empty((), dtype=dtype).element_size()
                body = torch.frombuffer(area, dtype=dtype, count=BODY // size, offset=PAGE)
                for V in (*range(1, 70), 127, 2049, 3001):
                    for place in (body[: 2 * V], body[-2 * V :]):
                        place.copy_(torch.randn(2 * V))
                        logits = place.view(1, 2, V)
                        plan = list(StepPlan.from_predictions([0, 1], [0, V - 1], [0, 1], 2).tensors)
                        for softcap in (0.0, 3.0):
                            out, *stats = cpu.step_logps_fwd(logits, plan, V, 1.0, softcap, "sum")
                            cpu.step_logps_bwd(out, logits, *stats, plan, V, 1.0, softcap, "sum", inplace=True)
        print("untouched")
    """)
    assert done.returncode == 0 and "untouched" in done.stdout, f"exit {done.returncode}\n{done.stderr}"


WORK = """
    import os, sys, torch
    torch.manual_seed(0)
    torch.set_num_threads(4)
    import svpo_kernels as sk
    from svpo_kernels import _native
    logits, labels = torch.randn(64, 5000), torch.randint(0, 5000, (64,))
    plan = sk.StepPlan.from_step_ids(labels, torch.arange(64) // 8, shift=0)
    def tasks():
        return len(os.listdir("/proc/self/task"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_runs_on_the_threads_of_torch() -> None:
    done = python(
        WORK
        + """
    before = tasks()
    sk.step_logps(logits, plan, backend="cpu")
    print(_native.cpu().has_openmp(), tasks() - before)
    """
    )
    assert done.stdout.split() == ["True", "3"], done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_serial_and_finishes() -> None:
    done = python(
        WORK
        + """
    expected = sk.step_logps(logits, plan, backend="cpu")
    child = os.fork()
    if child == 0:
        ours = sk.step_logps(logits, plan, backend="cpu")
        os._exit(0 if torch.equal(ours, expected) and tasks() == 1 else 7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    )
    assert done.stdout.split() == ["0"], done.stdout + done.stderr


def test_loads_without_torch_and_runs_serial() -> None:
    """No OpenMP runtime in the process: the module still loads and computes."""
    done = python(f"""
        import array, importlib.machinery, importlib.util
        loader = importlib.machinery.ExtensionFileLoader("_C", {str(_native.cpu().__file__)!r})
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
        loader.exec_module(module)
        x, out = array.array("f", [0.0, 1.0]), array.array("f", [0.0, 0.0])
        module.elementwise(x.buffer_info()[0], out.buffer_info()[0], 2, 0)
        print(module.has_openmp(), round(out[1], 5))
    """)
    assert done.stdout.split() == ["False", "2.71828"], done.stdout + done.stderr


# -- choice and build -------------------------------------------------------------------------------------------------


def test_instruction_set_is_forced_by_the_environment() -> None:
    code = "import svpo_kernels._native as n; print(n.cpu().isa())"
    assert python(code, SVPO_CPU_ISA="portable").stdout.split() == ["portable"]
    assert python(code, SVPO_CPU_ISA="").stdout.split() == [_native.cpu().best_isa()]
    wrong = python(code, SVPO_CPU_ISA="sse9")
    assert wrong.returncode != 0 and "SVPO_CPU_ISA must be avx512, avx2 or portable, got sse9" in wrong.stderr


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="label_dots: dtype must be fp32, bf16 or fp16"):
        _native.cpu().label_dots(0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_links_neither_openmp_nor_torch() -> None:
    listing = subprocess.run(
        ["readelf", "-d", _native.cpu().__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert needed and not [name for name in needed if re.search("omp|torch|c10|python", name)], needed


@pytest.mark.skipif(not all(map(shutil.which, ("g++", "nm"))), reason="needs g++ and nm")
@pytest.mark.skipif("avx512" not in ISAS or os.uname().machine != "x86_64", reason="one instruction set only")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_kernels_share_no_symbol_between_instruction_sets(source: str, tmp_path: Path) -> None:
    """A weak symbol built for AVX-512 could be the one the linker keeps for every CPU. -O0 inlines nothing away."""
    made = tmp_path / "kernel.o"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O0",
            "-w",
            "-fno-exceptions",
            "-fno-rtti",
            "-fPIC",
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-Icsrc",
            "-DSVPO_ISA=avx512",
            "-DSVPO_FOR_AVX512=1",
            "-DSVPO_X86_ISAS=1",
            "-c",
            f"csrc/cpu/{source}",
            "-o",
            str(made),
        ],
        check=True,
        cwd=ROOT,
    )
    listing = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" T svpo_cpu_\w+_avx512$", listing, re.M), listing
    shared = re.findall(r"^\S* +[WVu] .*$", listing, re.M)
    assert not shared, "\n".join(shared)
    others = [name for name in re.findall(r" [TDB] (.*)$", listing, re.M) if not name.endswith("_avx512")]
    assert not others, others
