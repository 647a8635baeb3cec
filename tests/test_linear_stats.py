"""`linear_step_logps(stats=)`, temperatures of rows and the logit scale: values and all gradients against fp64."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate
from cases import BACKENDS, RowCase, make_predictions
from test_linear_step_logps import F32, NEEDS, D, budget_of, make_head

import svpo_kernels as sk

CASES = [
    *(case for case in F32 if case.name not in ("bias", "mean", "branching_none", "shifted")),
    RowCase("minus_infinity", bias=True, special="minus_infinity"),
]
CASES += [
    replace(case, name=f"{case.name}_{name}", dtype=dtype)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for case in CASES
    if case.name in ("plain", "softcap_temperature", "branching", "confident", "sibling", "minus_infinity", "long")
]


def make_inputs(case: RowCase):
    given = make_predictions(case)
    masked = case.special == "minus_infinity"
    hidden, weight, bias = make_head(replace(case, special="") if masked else case, given)
    if masked:
        bias[::3] = -torch.inf
        given.labels = given.labels // 3 * 3 + 1
    return given, (hidden, weight, bias)


STATS = ("top1", "logsumexp", "mean_logit", "entropy", "log_sum_sq_probs")  # no order of ours


def transformed(h, w, b, given, case, temperature=None, scale=1.0):
    """z (N, V) of the predictions' rows; temperature (N,) of each."""
    z = torch.nn.functional.linear(h, w, b).reshape(-1, case.V)[given.rows][:, : case.vocab_size or case.V]
    z = (z if z.dtype == torch.float64 else z.float()) * scale
    z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
    return z / (case.temperature if temperature is None else temperature.to(z.dtype).unsqueeze(1))


def spec(h, w, b, given, case, **options):
    z = transformed(h, w, b, given, case, **options)
    logp = torch.log_softmax(z, -1) if z.numel() else z
    stats = {
        "entropy": -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1),
        "logsumexp": torch.logsumexp(z, -1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp, -1),
        "mean_logit": z.sum(-1) / max(z.shape[1], 1),
    }
    chosen = logp.gather(1, given.labels.unsqueeze(1)).squeeze(1)
    if case.reduction == "none":
        return chosen, stats
    out = chosen.new_zeros(case.S).index_add(0, given.step_ids, chosen)
    if case.reduction == "mean":
        out = out / torch.bincount(given.step_ids, minlength=case.S).clamp_min(1)
    return out, stats


def run(tensors, needs, upstreams, function):
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    outs = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    loss = sum((out * upstream.to(out)).sum() for out, upstream in zip(outs, upstreams, strict=True))
    return [out.detach() for out in outs], torch.autograd.grad(loss, wanted)


def check(case: RowCase, needs, backend: str, names=STATS, budget: float = 512, own=False, scale: float = 1.0):
    """Values of out and `names`, and the gradients of random upstreams of all that is differentiable at once."""
    given, tensors = make_inputs(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    rows, N = plan.rows, plan.num_predictions
    temperatures = torch.rand(rows.shape[0]) + 0.5
    more = {"temperature": temperatures[torch.searchsorted(rows, given.rows)]} if own else {}
    options = {**case.options, "temperature": temperatures if own else case.temperature, "logit_scale": scale}
    differentiable = [name for name in ("entropy", "logsumexp") if name in names]
    upstreams = [torch.randn(N if case.reduction == "none" else case.S), *(torch.randn(N) for _ in differentiable)]

    def outs(found):
        return (found[0], *(found[1][name] for name in differentiable))

    doubles = [None if t is None else t.double() for t in tensors]
    exact, eager = (
        run(inputs, needs, upstreams, lambda *leaves: outs(spec(*leaves, given, case, scale=scale, **more)))
        for inputs in (doubles, tensors)
    )
    kept = {}

    def op(h, w, b):
        found = sk.linear_step_logps(
            h, w, plan, bias=b, backend=backend, logits_budget_mb=budget, stats=names, **options
        )
        out, stats = found if names else (found, {})
        assert list(stats) == list(names)
        kept.update(stats)
        return outs((out, stats))

    ours = run(tensors, needs, upstreams, op)
    for what, a, b, c in zip(("out", *differentiable), ours[0], eager[0], exact[0], strict=True):
        assert_accurate(a, b, c, what=what)
    for what, a, b, c in zip(("first", "second", "third"), ours[1], eager[1], exact[1], strict=False):
        assert_accurate(a, b, c, what=f"{what} gradient")
    eager, exact = (spec(*inputs, given, case, scale=scale, **more)[1] for inputs in (tensors, doubles))
    for name in {"log_sum_sq_probs", "mean_logit"} & set(names):
        assert not kept[name].requires_grad
        if case.special == "minus_infinity" and name == "mean_logit":
            assert (kept[name] == -torch.inf).all()
        else:
            assert_accurate(kept[name], eager[name], exact[name], what=name)
    if "top1" in names:
        z = transformed(*doubles, given, case, scale=scale, **more)
        assert kept["top1"].dtype == torch.bool and kept["top1"].shape == (N,)
        best = z.topk(min(2, z.shape[1]), -1).values
        sure = best[:, 0] - best[:, -1] > 8 * torch.finfo(case.dtype).eps * best[:, 0].abs().clamp_min(1.0)
        assert torch.equal(kept["top1"][sure], (z.argmax(-1) == given.labels)[sure])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("mode", NEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: RowCase, mode: str, backend: str, device: str, monkeypatch) -> None:
    if mode.startswith("columns") and backend == "reference":
        pytest.skip("the reference has no tiles")
    check(case, NEEDS[mode], backend, budget=budget_of(mode, case, monkeypatch))
    if mode.startswith("columns"):  # without what has to be read once more, a forward goes by columns too
        check(case, NEEDS[mode], backend, ("entropy", "logsumexp"), budget_of(mode, case, monkeypatch))


_FEW = ("plain", "branching", "softcap_temperature", "confident", "sibling", "padded_vocab", "all_masked", "long")
FEW = [case for case in CASES if case.name.split("_bf16")[0] in _FEW]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_logsumexp_of_a_frozen_head(case: RowCase, backend: str, device: str) -> None:
    """Two products, as without it: test_linear_cost.py counts them."""
    check(case, NEEDS["frozen"], backend, names=("logsumexp",))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("names", [("logsumexp", "top1"), STATS], ids=["frozen", "logits"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_rows_have_temperatures_and_logits_a_scale(case: RowCase, names, backend: str, device: str) -> None:
    check(case, NEEDS["frozen" if len(names) == 2 else "recompute"], backend, names, 1e-6, own=True, scale=1.7)
    check(replace(case, temperature=0.8), NEEDS["store"], backend, (), scale=0.3)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_temperatures_take_every_form(backend: str, device: str) -> None:
    """(R,) of a plan, labels' shape (that of labels[t] at t) and (B,) agree; what is not scored may be anything."""
    hidden, weight = torch.randn(2, 7, D, device=device), torch.randn(19, D, device=device)
    labels = torch.randint(0, 19, (2, 7))
    labels[0, 3] = -100
    each = torch.rand(2, 7) + 0.5
    each[labels == -100], each[:, 0] = -1.0, torch.nan
    options = dict(backend=backend, reduction="none")
    ours = sk.linear_step_logps(hidden, weight, labels, shift=1, temperature=each.to(device), **options)
    logp = torch.log_softmax(torch.nn.functional.linear(hidden[:, :-1], weight) / each[:, 1:, None].to(device), -1)
    expected = logp.gather(2, labels[:, 1:, None].clamp_min(0).to(device)).squeeze(2)
    scored = (labels != -100)[:, 1:]
    torch.testing.assert_close(ours[:, 1:][scored], expected[scored])
    plan = sk.StepPlan.from_step_ids(labels, None, shift=1)
    of_rows = each.flatten()[plan.rows + 1].to(device)
    planned = sk.linear_step_logps(hidden, weight, plan, temperature=of_rows, **options)
    torch.testing.assert_close(planned, ours[:, 1:][scored])
    some = torch.tensor([0.7, 1.4], device=device)
    torch.testing.assert_close(
        sk.linear_step_logps(hidden, weight, labels, shift=1, temperature=some, **options),
        sk.linear_step_logps(hidden, weight, labels, shift=1, temperature=some[:, None].expand(2, 7), **options))
    padded = plan.pad_to(plan.rows.shape[0] + 2, plan.num_predictions + 2, 2)
    with_padding = torch.cat([of_rows, torch.zeros(2, device=device)])
    out = sk.linear_step_logps(hidden, weight, padded, temperature=with_padding, **options)
    torch.testing.assert_close(out[:-2], planned)
    assert (out[-2:] == 0).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_id(dtype: torch.dtype, backend: str, device: str) -> None:
    """Columns that are equal to the bit, across panels, -0 beside 0, and rows of -inf alone."""
    for V in (7, 20000):
        weight = torch.zeros(V, 2, dtype=dtype)
        weight[[3, V - 2, V - 1], 0] = 2.0
        hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], dtype=dtype)
        for label, expected in ((3, [True, False, False]), (V - 1, [False] * 3), (0, [False, True, True])):
            _, stats = sk.linear_step_logps(
                hidden.to(device), weight.to(device), torch.full((3,), label), shift=0, stats=["top1"], backend=backend)
            assert stats["top1"].tolist() == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stats": ("entropie",)}, ValueError, r"stats must be a sequence of names among 'entropy', 'logsumexp'"),
        ({"stats": "entropy"}, ValueError, r"stats must be a sequence of names"),
        ({"return_entropy": True}, TypeError, "return_entropy"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be > 0"),
        ({"temperature": torch.ones(4)}, ValueError, r"temperature must be one of each distinct row, \(R,\) = \(3,\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "temperature must be > 0, got float 0.0"),
        ({"temperature": torch.tensor([1.0, torch.nan, 1.0])}, ValueError, "temperature must be > 0, got float nan"),
        ({"temperature": torch.ones(3).double()}, TypeError, "temperature must be a number, or a float32 tensor"),
        ({"temperature": torch.ones(3, requires_grad=True)}, ValueError, "temperature must be a tensor that does not"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0"),
    ],
)
def test_bad_arguments(options, error, message) -> None:
    hidden, weight = torch.randn(5, 3), torch.randn(9, 3)
    plan = sk.StepPlan.from_predictions([0, 1, 3], [1] * 3, [0] * 3, 1)
    with pytest.raises(error, match=message):
        sk.linear_step_logps(hidden, weight, plan, **options)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_bad_temperature_that_nobody_looks_at_gives_nan(backend: str, device: str, monkeypatch) -> None:
    """As on a device: of that row alone."""
    monkeypatch.setattr(sys.modules["svpo_kernels.linear_step_logps.inputs"], "can_look", lambda tensor: False)
    plan = sk.StepPlan.from_predictions([0, 1, 3], [1] * 3, [0, 1, 2], 3)
    hidden, weight = torch.randn(5, 3, device=device), torch.randn(9, 3, device=device)
    for bad in (0.0, -1.0, torch.nan):
        temperature = torch.tensor([1.0, bad, 2.0], device=device)
        out = sk.linear_step_logps(hidden, weight, plan, temperature=temperature, backend=backend)
        assert out.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_log_probs_are_those_of_a_call_without(backend: str, device: str) -> None:
    """Padding of a plan gives 0, and one upstream may be missing; a second backward gives the same bits."""
    given, (hidden, weight, _) = make_inputs(RowCase("again", V=503, predictions="branching"))
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, 40)
    N = plan.num_predictions
    padded = plan.pad_to(plan.rows.shape[0] + 3, N + 5, 43)
    hidden.requires_grad_(), weight.requires_grad_()
    out, entropy = sk.linear_step_logps(hidden, weight, padded, stats=["entropy"], backend=backend)
    entropy = entropy["entropy"]
    alone = sk.linear_step_logps(hidden, weight, plan, backend=backend)
    torch.testing.assert_close(out[:40], alone, rtol=1e-6, atol=1e-5)
    assert (out[40:] == 0).all() and (entropy[N:] == 0).all() and (entropy >= 0).all()
    upstream = torch.randn(43)
    first, again = (torch.autograd.grad(out, (hidden, weight), upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    for ours, expected in zip(first, torch.autograd.grad(alone, (hidden, weight), upstream[:40]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(entropy.sum(), (hidden, weight))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_tensor_form_spreads_entropies(backend: str, device: str) -> None:
    hidden, weight = torch.randn(2, 7, D), torch.randn(19, D)
    labels = torch.randint(0, 19, (2, 7))
    labels[torch.rand(2, 7) < 0.3] = -100
    out, entropy = sk.linear_step_logps(hidden, weight, labels, shift=1, stats=["entropy"], backend=backend)
    entropy = entropy["entropy"]
    scored = labels != -100
    scored[:, 0] = False
    assert out.shape == (2,) and entropy.shape == labels.shape and (entropy[~scored] == 0).all()
    p = torch.nn.functional.linear(hidden, weight).softmax(-1)[:, :-1]
    torch.testing.assert_close(entropy[:, 1:][scored[:, 1:]], -(p * p.log()).sum(-1)[scored[:, 1:]])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("mode", ["frozen", "store"])
def test_gradcheck_of_the_reference(mode: str, softcap: float | None) -> None:
    case = RowCase("gradcheck", B=2, L=4, V=7, S=3, dtype=torch.float64, predictions="branching", bias=True)
    given, tensors = make_inputs(case)
    tensors = [t.double().requires_grad_(need) for t, need in zip(tensors, NEEDS[mode], strict=True)]
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)

    temperature = torch.rand(plan.rows.shape[0], dtype=torch.float64) + 0.5

    def function(h, w, b):
        given = dict(bias=b, softcap=softcap, temperature=temperature, logit_scale=1.3)
        out, stats = sk.linear_step_logps(h, w, plan, stats=("logsumexp", "entropy"), **given)
        alone, more = sk.linear_step_logps(h, w, plan, stats=("logsumexp",), **given)
        return out, *stats.values(), alone, *more.values()

    assert torch.autograd.gradcheck(function, tensors)
