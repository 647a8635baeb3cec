"""`linear_step_logps`: every backend and mode against fp64, judged by eager PyTorch's own error."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from accuracy import assert_accurate, assert_draws_accurate
from cases import BACKENDS, RowCase, make_predictions

import svpo_kernels as sk
from svpo_kernels.linear_step_logps import modes, walks

D = 24
F32 = [
    RowCase("plain"),
    RowCase("bias", bias=True),
    RowCase("one_column", V=1),
    RowCase("three_columns", V=3),
    RowCase("odd_large", V=32001, B=1, L=6),
    RowCase("one_row", B=1, L=1, S=1, scored=1.0),
    RowCase("all_masked", scored=0.0),
    RowCase("no_rows", L=0),
    RowCase("no_steps", S=0, scored=0.0),
    RowCase("mean", reduction="mean"),
    RowCase("none", reduction="none", bias=True),
    RowCase("softcap_temperature", softcap=5.0, temperature=1.3, scale=3.0, bias=True),
    RowCase("padded_vocab", V=129, vocab_size=127, bias=True),
    RowCase("shifted", layout="shifted"),
    RowCase("branching", predictions="branching", scored=1.0, bias=True),
    RowCase(
        "branching_softcap",
        predictions="branching",
        softcap=4.0,
        temperature=0.9,
        scale=3.0,
        reduction="mean",
        bias=True,
    ),
    RowCase("branching_none", predictions="branching", reduction="none"),
    RowCase("confident", special="confident", predictions="branching", reduction="none"),
    RowCase("sibling", special="sibling", predictions="branching", L=40),
    RowCase("large_logits", scale=30.0),
    RowCase("long", L=300, V=67, S=9),
]
CASES = F32 + [
    replace(case, name=f"{case.name}_{name}", dtype=dtype)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for case in F32
    if case.name
    in (
        "plain",
        "bias",
        "softcap_temperature",
        "branching",
        "confident",
        "sibling",
        "large_logits",
        "padded_vocab",
        "long",
    )
]
NEEDS = {
    "frozen": (True, False, False),
    "store": (True, True, True),
    "head": (False, True, False),
    "recompute": (True, True, True),
    "columns": (True, True, True),
    "columns_beside_kept": (True, True, True),
}


def budget_of(mode: str, case: RowCase, monkeypatch: pytest.MonkeyPatch) -> float:
    """MiB: for all rows, for none, or for some. In the modes of columns the walk is by those, a few at a time."""
    if mode.startswith("columns"):
        monkeypatch.setitem(modes.LEAST_ROWS, "cpu", 6)
        monkeypatch.setitem(walks.LEAST_COLUMNS, "cpu", 7)
        monkeypatch.setattr(walks, "moved", lambda walk, R, V: -len(walk.columns))
    if mode == "columns_beside_kept":
        return 36 * case.V * case.dtype.itemsize / 2**20
    return 1e-6 if mode in ("recompute", "columns") else 512


def make_head(case: RowCase, given, device: str = "cpu"):
    """hidden (B, L, D), weight, bias: logits of about case.scale; rows at p near 1 where the case asks for them."""
    L = case.L + 1 if case.layout == "shifted" else case.L
    hidden = torch.randn(case.B, L, D)
    weight = torch.randn(case.V, D) * (case.scale / D**0.5)
    if case.special and given.rows.numel():
        flat = hidden.view(-1, D)
        first = torch.ones_like(given.rows, dtype=torch.bool)
        first[1:] = given.rows[1:] != given.rows[:-1]
        rows, labels = given.rows[first], given.labels[first]
        strength = torch.linspace(10.0, 20.0, rows.numel())
        flat[rows] = 0.05 * flat[rows] + weight[labels] * (strength / weight[labels].square().sum(1)).unsqueeze(1)
        if case.special == "sibling":
            others = given.labels[~first]
            flat[given.rows[~first]] += weight[others] * (4.0 / weight[others].square().sum(1)).unsqueeze(1)
    bias = torch.randn(case.V) if case.bias else None
    hidden, weight, bias = (None if x is None else x.to(device, case.dtype) for x in (hidden, weight, bias))
    return hidden[:, :-1] if case.layout == "shifted" else hidden, weight, bias


def run(tensors, needs, upstream, function):
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return out.detach(), torch.autograd.grad(out, wanted, upstream.to(out))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("mode", NEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: RowCase, mode: str, backend: str, device: str, monkeypatch) -> None:
    if mode.startswith("columns") and backend == "reference":
        pytest.skip("the reference has no tiles")
    given = make_predictions(case)
    tensors = make_head(case, given, device)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    upstream = torch.randn(plan.num_predictions if case.reduction == "none" else case.S)

    def spec(h, w, b):
        return oracle.linear_step_logps(h, w, b, given, case)

    doubles = [None if t is None else t.double() for t in tensors]
    exact, eager = run(doubles, NEEDS[mode], upstream, spec), run(tensors, NEEDS[mode], upstream, spec)
    budget = budget_of(mode, case, monkeypatch)
    hidden = tensors[0].clone()
    unscored = torch.ones(case.B * case.L, dtype=torch.bool)
    unscored[given.rows] = False
    hidden[unscored.view(case.B, case.L)] = torch.nan  # never read, so never seen
    ours = run(
        (hidden, *tensors[1:]),
        NEEDS[mode],
        upstream,
        lambda h, w, b: sk.linear_step_logps(
            h, w, plan, bias=b, backend=backend, logits_budget_mb=budget, **case.options
        ),
    )
    assert_accurate(ours[0], eager[0], exact[0], what="out")
    for what, a, b, c in zip(("first", "second", "third"), ours[1], eager[1], exact[1], strict=False):
        assert_accurate(a, b, c, what=f"{what} gradient")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("V", [2, 3, 8])
def test_a_head_of_few_columns(V: int, backend: str, device: str) -> None:
    """Every row branches into most columns. The mean of one draw's 2 to 8 entries of db is luck, that of 20 is not."""
    case = RowCase("few", V=V, predictions="branching", scored=1.0, bias=True)
    draws = []
    for _ in range(20):
        given = make_predictions(case)
        tensors = make_head(case, given)
        plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
        upstream = torch.randn(case.S)

        def spec(h, w, b, given=given):
            return oracle.linear_step_logps(h, w, b, given, case)

        def op(h, w, b, plan=plan):
            return sk.linear_step_logps(h, w, plan, bias=b, backend=backend)

        runs = ((tensors, op), (tensors, spec), ([t.double() for t in tensors], spec))
        draws.append([run(inputs, NEEDS["store"], upstream, function)[1] for inputs, function in runs])
    assert_draws_accurate(draws, what=("dhidden", "dweight", "dbias"))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("mode", ["frozen", "store", "recompute"])
def test_few_rows_are_as_exact_as_many(mode: str, backend: str, device: str) -> None:
    """dHidden of one to three rows of 32,001 columns, whose entries are small and of both signs, beside that of six."""
    V, errors = 32001, {1: [], 2: [], 3: [], 6: []}
    for _ in range(4):
        hidden, weight = torch.randn(6, D, device=device), torch.randn(V, D, device=device) / D**0.5
        labels, upstream = torch.randint(0, V, (6,)), torch.randn(6, device=device)
        exact = None
        for R in (6, 3, 2, 1):
            plan = sk.StepPlan.from_predictions(torch.arange(R), labels[:R], torch.arange(R), R)

            def dhidden(h, w, plan=plan, R=R, upstream=upstream, **options):
                leaf = h[:R].clone().requires_grad_()
                out = sk.linear_step_logps(leaf, w.clone().requires_grad_(mode != "frozen"), plan, **options)
                return torch.autograd.grad(out, leaf, upstream[:R].to(out))[0]

            if exact is None:
                exact = dhidden(hidden.double(), weight.double(), backend="reference")
            budget = 1e-6 if mode == "recompute" else 512
            found = dhidden(hidden, weight, backend=backend, logits_budget_mb=budget)
            errors[R].append((found - exact[:R]).abs().mean())
    mean = {R: torch.stack(found).mean().item() for R, found in errors.items()}
    assert max(mean[1], mean[2], mean[3]) <= 2 * mean[6], mean


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_tensor_form_equals_plan_form(backend: str, device: str) -> None:
    B, L, V, S = 3, 11, 33, 6
    hidden, weight = torch.randn(B, L, D, device=device), torch.randn(V, D, device=device)
    labels = torch.randint(0, V, (B, L))
    labels[torch.rand(B, L) < 0.3] = -100
    labels, step_ids = labels.to(device), torch.randint(-1, S, (B, L)).to(device)
    for shift in (0, 1):
        plan = sk.StepPlan.from_step_ids(labels.cpu(), step_ids.cpu(), shift=shift, num_steps=S)
        for reduction in ("sum", "mean", "none"):
            out = sk.linear_step_logps(
                hidden, weight, labels, step_ids, shift=shift, num_steps=S, reduction=reduction, backend=backend
            )
            expected = sk.linear_step_logps(hidden, weight, plan, reduction=reduction, backend=backend)
            if reduction == "none":
                scored = (labels != -100) & (step_ids >= 0)
                scored[:, :shift] = False
                assert out.shape == labels.shape and (out[~scored] == 0).all()
                out = out[scored]
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
        sized = sk.linear_step_logps(hidden, weight, labels, step_ids, shift=shift, backend=backend)
        logits = torch.nn.functional.linear(hidden, weight)
        torch.testing.assert_close(sized, sk.step_logps(logits, labels, step_ids, shift=shift, backend="reference"))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130, 200])
def test_modes_agree_and_chunks_do_not_show(rows: int) -> None:
    """Store, half store and recompute, one chunk and many: the same values and gradients to rounding."""
    V, S = 301, 7
    hidden, weight, bias = torch.randn(rows, D), torch.randn(V, D), torch.randn(V)
    plan = sk.StepPlan.from_predictions(
        torch.arange(rows), torch.randint(0, V, (rows,)), torch.randint(0, S, (rows,)), S
    )
    upstream = torch.randn(S)
    results = []
    for budget in (512, 100 * V * 4 / 2**20, 1e-6):
        results.append(
            run(
                (hidden, weight, bias),
                (True, True, True),
                upstream,
                lambda h, w, b, m=budget: sk.linear_step_logps(h, w, plan, bias=b, logits_budget_mb=m),
            )
        )
    frozen = run(
        (hidden, weight, bias), (True, False, False), upstream, lambda h, w, b: sk.linear_step_logps(h, w, plan, bias=b)
    )
    results.append((frozen[0], (frozen[1][0], *results[0][1][1:])))
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-5, atol=1e-5)
        for a, b in zip(other[1], results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_main_grad_takes_the_gradient_of_weight(dtype: torch.dtype, backend: str, device: str) -> None:
    """Added in fp32 on top of what is there; in bf16 sixteen small micro-batches are not rounded away."""
    V, S = 41, 9
    weight = torch.nn.Parameter(torch.randn(V, D, device=device).to(dtype))
    hidden = torch.randn(16, 30, D, device=device).to(dtype)
    labels = torch.randint(0, V, (30,), device=device)
    steps = torch.arange(30, device=device) % S
    total = torch.zeros(V, D, dtype=torch.float64, device=device)
    for part in hidden:
        leaf = weight.detach().double().requires_grad_()
        sk.linear_step_logps(part.double(), leaf, labels, steps, shift=0, backend="reference").sum().backward()
        total += leaf.grad
    start = 256 * torch.randn(V, D, device=device)
    weight.main_grad, weight.grad_added_to_main_grad = start.clone(), False
    for part in hidden:
        sk.linear_step_logps(part, weight, labels, steps, shift=0, backend=backend).sum().backward()
    assert weight.grad is None and weight.grad_added_to_main_grad
    error = (weight.main_grad.double() - start.double() - total).norm() / total.norm()
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2)
    weight.main_grad = start.half()
    with pytest.raises(ValueError, match=r"weight.main_grad must be \(41, 24\) torch.float32"):
        sk.linear_step_logps(hidden, weight, labels.expand(16, -1), shift=0, backend=backend)


def test_mode_table() -> None:
    assert modes.mode(True, False, False, True) == "frozen"
    assert modes.mode(True, False, False, False) == "forward"
    assert modes.mode(False, False, False, True) == "forward"
    for needs in (
        (True, True, False),
        (False, True, False),
        (True, False, True),
        (False, False, True),
        (True, True, True),
    ):
        assert modes.mode(*needs, True) == "store"
        assert modes.mode(*needs, True, entropy=True) == modes.mode(*needs, True, needs_lora=True) == "logits"
    assert modes.mode(True, False, False, True, entropy=True) == "logits"
    assert modes.mode(False, False, False, True, needs_lora=True) == "logits"
    assert modes.mode(False, False, False, False, needs_lora=True) == "forward"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_budget_bounds_rows(device: str) -> None:
    least = modes.LEAST_ROWS[device]
    for V, itemsize, mib in ((128256, 2, 512), (65536, 4, 64), (257, 4, 512), (151936, 2, 1), (1, 4, 1)):
        whole = int(mib * 2**20) // (V * itemsize)
        for mode in modes.MODES:
            limit = modes.budget(V, itemsize, mib, device, mode)
            for R in (0, 1, whole - 1, whole, whole + 1, 2 * whole, 5 * whole, 10**6):
                R = max(R, 0)
                kept, scratch = limit.kept(R), limit.scratch(R)
                assert 0 <= kept <= R and least <= scratch <= modes.MOST_ROWS
                assert kept == 0 or mode in ("store", "logits")
                needs_scratch = kept < R or mode == "logits"
                assert kept + needs_scratch * scratch <= max(whole, least)
                if mode == "store" and R <= whole:
                    assert kept == R


def test_chunks_and_runs_cover_everything_once() -> None:
    for stop, size in ((0, 64), (1, 64), (64, 64), (65, 64), (1000, 64), (4097, 4096), (37, 5), (130, 100)):
        for pieces in (walks.chunks(0, stop, size), walks.runs(stop, size)):
            assert [at for first, last in pieces for at in range(first, last)] == list(range(stop))
            assert all(0 < last - first <= size for first, last in pieces)
    assert all(first % walks.STEP == 0 for first, _ in walks.runs(1000, 130))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_walks_cover_every_entry_once_within_scratch(device: str, in_place: bool) -> None:
    shapes = [(0, 9, 0, 4), (5, 9, 5, 4), (100, 0, 0, 16), (90, 7, 40, 16)]
    for R, V, kept, scratch in [*shapes, (4096, 65536, 0, 256), (8192, 128256, 1570, 523)]:
        walk = walks.choose(R, V, kept, scratch, device, in_place=in_place)
        for pieces, stop in ((walk.columns, V), (walk.rows, R)):
            assert [at for first, last in pieces for at in range(first, last)] == list(range(stop))
        assert all(last <= kept or first >= kept for first, last in walk.rows)
        assert walk.most(kept if in_place else 0) <= scratch * V


def test_the_longer_side_is_cut() -> None:
    """Columns where V is longer than the rows are many, 16 runs of the shape that the README measures; else rows."""
    options = dict(device_type="cpu")
    assert len(walks.choose(4096, 65536, 0, 256, **options).columns) == 16
    assert len(walks.choose(65536, 512, 0, 4096, **options).columns) == 1
    assert len(walks.choose(4096, 65536, 0, 256, by_columns=False, **options).rows) == 16
    assert walks.choose(4096, 65536, 4096, 256, **options) == ([(0, 65536)], [(0, 4096)])


@pytest.mark.parametrize("mode", ["frozen", "store", "recompute"])
def test_gradcheck_of_the_reference(mode: str) -> None:
    case = RowCase("gradcheck", B=2, L=4, V=7, S=3, dtype=torch.float64, predictions="branching", bias=True)
    given = make_predictions(case)
    tensors = [t.double().requires_grad_(need) for t, need in zip(make_head(case, given), NEEDS[mode], strict=True)]
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    for softcap in (None, 3.0):

        def function(h, w, b, softcap=softcap):
            return sk.linear_step_logps(h, w, plan, bias=b, softcap=softcap, temperature=0.7, logits_budget_mb=1e-6)

        assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_bitwise_equal_from_run_to_run(backend: str, device: str) -> None:
    case = RowCase("again", L=40, V=503, predictions="branching", bias=True)
    given = make_predictions(case)
    tensors = make_head(case, given, device)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    upstream = torch.randn(case.S)
    for needs in NEEDS.values():
        first, again = (
            run(tensors, needs, upstream, lambda h, w, b: sk.linear_step_logps(h, w, plan, bias=b, backend=backend))
            for _ in range(2)
        )
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_backward_twice_and_tied_weight(backend: str, device: str) -> None:
    """retain_graph gives the same gradient again, and a weight that is also the embedding gets both parts."""
    V = 50
    weight = torch.randn(V, D, device=device, requires_grad=True)
    ids, labels = (torch.randint(0, V, (2, 9)).to(device) for _ in range(2))

    def loss(op_weight):
        hidden = torch.nn.functional.embedding(ids, weight).tanh()
        return sk.linear_step_logps(hidden, op_weight, labels, shift=1, backend=backend).square().sum()

    out = loss(weight)
    first, again = (torch.autograd.grad(out, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    logits = torch.nn.functional.linear(torch.nn.functional.embedding(ids, weight).tanh(), weight)
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(first, torch.autograd.grad(logp.square().sum(), weight)[0], rtol=1e-4, atol=1e-3)
