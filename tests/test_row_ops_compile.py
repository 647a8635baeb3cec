"""torch.compile, opcheck, autocast and deepcopies of the row ops: the same numbers as eager, few graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from cases import BACKENDS, RowCase, make_predictions
from torch._dynamo.testing import CompileCounterWithBackend

import svpo_kernels as sk
from svpo_kernels.linear_step_logps import modes, walks

D, V = 8, 37


@pytest.fixture(autouse=True)
def sizes_known_only_at_run_time() -> Iterator[None]:
    """The setting that linear_step_logps names for the tensor form under old versions; later ones need none.

    Not by monkeypatch: pytest 9.2 deletes it afterwards, and dynamo then fails in every later test.
    """
    setting = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with setting if torch.__version__ < "2.11" else nullcontext():
        yield


def arguments(op: str, T: int, form: str, S: int = 5):
    """The op's differentiable inputs and the rest of a call with T rows."""
    labels, step_ids = torch.randint(0, V, (T,)), torch.randint(-1, S, (T,))
    inputs = [torch.randn(T, V)] if op == "step_logps" else [torch.randn(T, D), torch.randn(V, D)]
    inputs = [x.requires_grad_() for x in inputs]
    if form == "plan":
        return inputs, (sk.StepPlan.from_step_ids(labels, step_ids, shift=0, num_steps=S),), {}
    return inputs, (labels, step_ids), {"shift": 0, "num_steps": S}


@pytest.mark.parametrize("op", ["step_logps", "linear_step_logps"])
@pytest.mark.parametrize("form", ["plan", "tensor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_twenty_sizes_make_at_most_four_graphs(op: str, form: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(sk, op)

    def call(inputs, rest, options):
        return function(*inputs, *rest, **options).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for i in range(20):
        inputs, rest, options = arguments(op, 4 + 3 * i, form, S=3 + i % 7)
        ours, eager = compiled(inputs, rest, options), call(inputs, rest, options)
        torch.testing.assert_close(ours, eager)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(eager, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 4


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.6 must know whether a size read from the device is 1")
def test_the_tensor_form_compiles_without_num_steps() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(hidden, weight, labels, step_ids):
        return sk.linear_step_logps(hidden, weight, labels, step_ids, shift=0).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for S in (1, 2, 5, 9):
        inputs, rest, _ = arguments("linear_step_logps", 4 + 3 * S, "tensor", S=S)
        ours, eager = compiled(*inputs, *rest), call(*inputs, *rest)
        torch.testing.assert_close(ours, eager)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(eager, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("dynamic", [None, True])
def test_entropies_and_factors_make_at_most_four_graphs(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(inputs, plan, temperatures):
        hidden, weight, a, b = inputs
        more = dict(stats=("entropy", "top1", "logsumexp"), temperature=temperatures)
        out, found = sk.linear_step_logps(hidden, weight, plan, lora_a=a, lora_b=b, **more)
        return out.square().sum() + (found["entropy"] * 0.3).exp().sum() + found["logsumexp"].sum()

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for i in range(20):
        inputs, (plan,), _ = arguments("linear_step_logps", 4 + 3 * i, "plan", S=3 + i % 7)
        inputs += [torch.randn(2, D).requires_grad_(), torch.randn(V, 2).requires_grad_()]
        temperatures = torch.rand(plan.rows.shape[0]) + 0.5
        ours, eager = compiled(inputs, plan, temperatures), call(inputs, plan, temperatures)
        torch.testing.assert_close(ours, eager)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(eager, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("form", ["plan", "tensor"])
def test_rows_all_some_or_none_kept_make_no_graph_more(form: str, monkeypatch) -> None:
    """10 rows are kept whole, of up to 30 some, of more none: columns are walked then, a few at a time."""
    torch._dynamo.reset()
    monkeypatch.setitem(modes.LEAST_ROWS, "cpu", 4)
    monkeypatch.setitem(walks.LEAST_COLUMNS, "cpu", 4)
    monkeypatch.setattr(walks, "moved", lambda walk, R, V: -len(walk.columns))
    counter = CompileCounterWithBackend("aot_eager")

    def call(inputs, rest, options):
        return sk.linear_step_logps(*inputs, *rest, **options).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for T in (9, 14, 22, 47, 60, 8):
        inputs, rest, options = arguments("linear_step_logps", T, form)
        options["logits_budget_mb"] = 10.5 * V * 4 / 2**20
        ours, eager = compiled(inputs, rest, options), call(inputs, rest, options)
        torch.testing.assert_close(ours, eager)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(eager, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 4


def test_inplace_backward_compiles() -> None:
    """It cannot be had there, and a leaf is as good as any."""
    torch._dynamo.reset()
    logits, labels = torch.randn(5, 9, requires_grad=True), torch.randint(0, 9, (5,))

    def call(logits):
        return sk.step_logps(logits, labels, shift=0, inplace_backward=True).sum()

    (ours,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(logits), logits)
    (eager,) = torch.autograd.grad(sk.step_logps(logits, labels, shift=0).sum(), logits)
    torch.testing.assert_close(ours, eager)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["step_logps", "linear_step_logps"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_with_ignored_rows_equals_eager(op: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    function = getattr(sk, op)
    inputs, rest, options = arguments(op, 19, "tensor")

    def call(inputs, rest):
        return (function(*inputs, *rest, **options, temperature=0.9, softcap=4.0) * 0.3).exp()

    ours, eager = torch.compile(call, fullgraph=True, dynamic=dynamic)(inputs, rest), call(inputs, rest)
    torch.testing.assert_close(ours, eager)
    upstream = torch.randn_like(eager)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(eager, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck_of_the_raw_ops(backend: str, device: str) -> None:
    case = RowCase("opcheck", predictions="branching", V=V)
    given = make_predictions(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    plan = plan.to(device)
    logits, options = torch.randn(case.B, case.L, V, device=device), (V, 1.0, 0.0, "sum")
    fwd = (logits, list(plan.tensors), *options, backend)
    torch.library.opcheck(torch.ops.svpo.step_logps_fwd, fwd)
    out, *kept = torch.ops.svpo.step_logps_fwd(*fwd)
    bwd = (torch.randn_like(out), logits, *kept, list(plan.tensors), *options, backend)
    torch.library.opcheck(torch.ops.svpo.step_logps_bwd, bwd)
    torch.library.opcheck(torch.ops.svpo.step_logps_bwd_, bwd)
    hidden, weight = torch.randn(case.B, case.L, D, device=device), torch.randn(V, D, device=device)
    for mode, needs in (
        ("forward", (False, False, False)),
        ("frozen", (True, False, False)),
        ("store", (True, True, False)),
    ):
        low = (torch.randn(3, D).to(device), torch.randn(V, 3).to(device))
        for more, factors in ((False, (None, None)), (True, low)):
            mode = "logits" if mode == "store" and more else mode
            stats = [name for name in modes.STATS if mode != "frozen" or name != "entropy"] if more else []
            own = torch.rand(plan.rows.shape[0], device=device) + 0.5 if more else None
            options = (V, 1.0, 0.0, "sum", 1.0, mode, stats, 0.5, "", [])
            fwd = (hidden, weight, None, *factors, own, list(plan.tensors), *options, backend)
            torch.library.opcheck(torch.ops.svpo.linear_step_logps_fwd, fwd)
            out, *found = torch.ops.svpo.linear_step_logps_fwd(*fwd)
            entropies, logsumexps, *kept = found[:2] + found[5:]
            if mode != "forward":
                upstreams = (torch.randn_like(out), torch.randn_like(entropies), torch.randn_like(logsumexps))
                wanted = [*needs, *(needs[1] and factor is not None for factor in factors)]
                bwd = (*upstreams, *fwd[:6], *kept, list(plan.tensors), wanted, *options, backend)
                torch.library.opcheck(torch.ops.svpo.linear_step_logps_bwd, bwd)
                if needs[1]:
                    main_grad = torch.randn(V, D).to(device)
                    torch.library.opcheck(torch.ops.svpo.linear_step_logps_bwd_, (main_grad, *bwd))
    labels, step_ids = torch.randint(0, V, (2, 5)).to(device), torch.randint(-1, 3, (2, 5)).to(device)
    torch.library.opcheck(torch.ops.svpo.compact_plan, (labels, step_ids, 1, None))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_autocast(backend: str, device: str) -> None:
    """linear_step_logps casts as F.linear does; step_logps computes in fp32 whatever comes."""
    labels = torch.randint(0, V, (9,)).to(device)
    hidden, weight = (torch.randn(n, D, device=device, requires_grad=True) for n in (9, V))
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        ours = sk.linear_step_logps(hidden, weight, labels, shift=0, backend=backend)
        theirs = sk.step_logps(logits, labels, shift=0, backend=backend)
        plain = sk.step_logps(logits.detach().float(), labels, shift=0, backend=backend)
    assert logits.dtype == torch.bfloat16 and ours.dtype == theirs.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(theirs, plain, rtol=1e-6, atol=1e-5)
    grads = [torch.autograd.grad(out.sum(), (hidden, weight), retain_graph=True) for out in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_autocast_of_entropies_and_factors(backend: str, device: str) -> None:
    labels = torch.randint(0, V, (9,)).to(device)
    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in ((9, D), (V, D), (2, D), (V, 2))]
    hidden, weight, a, b = leaves
    with torch.autocast(device, dtype=torch.bfloat16):
        out, stats = sk.linear_step_logps(
            hidden, weight, labels, shift=0, lora_a=a, lora_b=b, stats=["entropy"], backend=backend
        )
        entropy = stats["entropy"]
        z = torch.nn.functional.linear(hidden, weight) + torch.nn.functional.linear(hidden @ a.t(), b)
    logp = torch.log_softmax(z.float(), -1)
    expected = logp.gather(1, labels[:, None]).sum(), -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(out, expected[0][None], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(entropy, expected[1], rtol=2e-2, atol=2e-2)
    ours = torch.autograd.grad(out.sum() + entropy.sum(), leaves)
    for x, y in zip(ours, torch.autograd.grad(expected[0] + expected[1].sum(), leaves), strict=True):
        assert x.dtype == torch.float32 and (x - y).norm() <= 5e-2 * y.norm()
