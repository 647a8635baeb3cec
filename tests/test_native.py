"""The CPU kernels on every instruction set of this machine: their arithmetic, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from accuracy import assert_accurate
from cases import RowCase, make_logits, make_rows
from torch import Tensor

import svpo_kernels as sk
from svpo_kernels import _native
from svpo_kernels.linear_step_logps import cpu as linear_rows
from svpo_kernels.step_logps import cpu as row_kernels

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
    linear_rows.rows_fwd(at_once, 0, label_z0, *stats, None, plan, 0.9, softcap, True)
    for start in range(0, R, 7):  # by chunks, and the statistics without U
        again = [torch.full((size,), torch.nan) for size in (N, R, R)]
        chunk = z[start : start + 7].clone()
        linear_rows.rows_fwd(chunk, start, label_z0, *again, None, plan, 0.9, softcap, False)
        assert torch.equal(chunk, z[start : start + 7])
        for ours, whole in zip(again, stats, strict=True):
            assert torch.equal(ours[~ours.isnan()], whole[~ours.isnan()])
        for first, last in ((0, 901), (901, 2500)):
            tile = later[start : start + 7, first:last]
            linear_rows.rows_unit(tile, start, first, label_z0, *stats, plan, 2500, 0.9, softcap)
    assert torch.equal(at_once, later) and (at_once[plan.rows < 0] == 0).all()
    assert at_once[plan.rows >= 0].isfinite().all()


# -- threads ----------------------------------------------------------------------------------------------------------


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
        linear_rows.rows_fwd(z, 0, torch.zeros(plan.num_predictions), *stats, None, plan.tensors, 1.0, 20.0, True)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), logits), z, *stats]

    first = run(1)
    for count in (2, 3, 7):
        for ours, expected in zip(run(count), first, strict=True):
            assert torch.equal(ours, expected), f"{count} threads"
