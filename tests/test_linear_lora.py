"""Low-rank factors on the head: every backend and mode against fp64, and `peft`'s own module."""

from __future__ import annotations

import oracle
import pytest
import torch
from accuracy import assert_draws_accurate
from cases import BACKENDS, RowCase, make_predictions
from test_linear_stats import run
from test_linear_step_logps import D, budget_of, make_head

import svpo_kernels as sk

BF16 = torch.bfloat16
CASES = [
    RowCase("plain"),
    RowCase("bias_mean", bias=True, reduction="mean"),
    RowCase("softcap", softcap=5.0, temperature=1.3, bias=True, predictions="branching"),
    RowCase("padded", V=129, vocab_size=127, predictions="branching"),
    RowCase("sibling", special="sibling", predictions="branching", L=40),
    RowCase("long", L=300, V=67, S=9),
    RowCase("all_masked", scored=0.0),
    RowCase("bf16", dtype=BF16, predictions="branching", bias=True),
    RowCase("bf16_wide_factors", dtype=BF16, special="wide", predictions="branching"),
    RowCase("fp16", dtype=torch.float16),
]
# hidden, weight, bias, lora_a, lora_b
NEEDS = {
    "frozen": (True, False, False, False, False),
    "adapter": (True, False, False, True, True),
    "factors": (False, False, False, True, True),
    "all": (True, True, True, True, True),
    "recompute": (True, True, False, True, True),
    "columns": (True, True, False, True, True),
    "columns_beside_kept": (True, True, True, True, True),
}
SCALING, RANK, DRAWS = 1.7, 3, 8


def spec(h, w, b, a, c, given, case):
    """As peft's lora.Linear: the factors in their own dtype, the sum in the output's."""
    z = torch.nn.functional.linear(h, w, b)
    z = (z + torch.nn.functional.linear(torch.nn.functional.linear(h.to(a.dtype), a), c) * SCALING).to(h.dtype)
    return oracle.step_logps(z, given, case)


def make_inputs(case: RowCase):
    given = make_predictions(case)
    wide = case.special == "wide"
    head = make_head(RowCase(**{**vars(case), "special": ""}) if wide else case, given)
    dtype = torch.float32 if wide else case.dtype
    return given, (*head, (torch.randn(RANK, D) / D**0.5).to(dtype), torch.randn(case.V, RANK).to(dtype))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("mode", NEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: RowCase, mode: str, backend: str, device: str, monkeypatch) -> None:
    """Gradients of 3 x 24 entries and outputs of 40: judged over DRAWS together."""
    if mode.startswith("columns") and backend == "reference":
        pytest.skip("the reference has no tiles")
    budget = budget_of(mode, case, monkeypatch)
    draws = []
    for _ in range(DRAWS):
        given, tensors = make_inputs(case)
        plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
        upstreams = (torch.randn(plan.num_predictions if case.reduction == "none" else case.S),)
        doubles = [None if t is None else t.double() for t in tensors]

        def eagerly(*leaves, given=given):
            return (spec(*leaves, given, case),)

        def op(h, w, b, a, c, plan=plan):
            more = dict(bias=b, lora_a=a, lora_b=c, lora_scaling=SCALING, backend=backend,
                        logits_budget_mb=budget)
            return (sk.linear_step_logps(h, w, plan, **more, **case.options),)

        runs = ((tensors, op), (tensors, eagerly), (doubles, eagerly))
        results = [run(inputs, NEEDS[mode], upstreams, function) for inputs, function in runs]
        draws.append(tuple([*out, *gradients] for out, gradients in results))
    names = ("hidden", "weight", "bias", "lora_a", "lora_b")
    given = zip(names, tensors, NEEDS[mode], strict=True)
    assert_draws_accurate(draws, what=["out", *(name for name, t, need in given if t is not None and need)])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_entropies_see_the_factors(backend: str, device: str) -> None:
    given, tensors = make_inputs(RowCase("entropy", predictions="branching", bias=True))
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, 40)
    h, w, b, a, c = (t.requires_grad_() for t in tensors)
    merged = w + SCALING * c @ a
    upstreams = torch.randn(40), *torch.randn(2, plan.num_predictions)
    ours = sk.linear_step_logps(h, w, plan, bias=b, lora_a=a, lora_b=c, lora_scaling=SCALING,
                                stats=("entropy", "logsumexp"), backend=backend)
    theirs = sk.linear_step_logps(h, merged, plan, bias=b, stats=("entropy", "logsumexp"), backend="reference")
    ours, theirs = ((out, *stats.values()) for out, stats in (ours, theirs))
    grads = []
    for outs in (ours, theirs):
        loss = sum((out * upstream).sum() for out, upstream in zip(outs, upstreams, strict=True))
        grads.append(torch.autograd.grad(loss, (h, w, b, a, c)))
    for x, y in zip((*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_reference() -> None:
    case = RowCase("gradcheck", B=2, L=4, V=7, S=3, dtype=torch.float64, predictions="branching", bias=True)
    given, tensors = make_inputs(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)

    def function(h, w, b, a, c):
        out, stats = sk.linear_step_logps(h, w, plan, bias=b, lora_a=a, lora_b=c, lora_scaling=SCALING, softcap=3.0,
                                          stats=["entropy"])
        return out, stats["entropy"]

    assert torch.autograd.gradcheck(function, [t.double().requires_grad_() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_pefts_own_module(tied: bool, dtype: torch.dtype) -> None:
    """peft keeps its factors in fp32 on a bf16 head; a tied weight that trains gets both parts."""
    peft = pytest.importorskip("peft")
    V = 61

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False)
            if tied:
                self.lm_head.weight = self.embed.weight

        def forward(self, ids):
            return self.lm_head(self.embed(ids).tanh())

    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(Model().to(dtype), config)
    base = model.get_base_model()
    base.embed.weight.requires_grad_()
    layer = base.lm_head
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ids = torch.randint(0, V, (2, 9))
    labels = torch.randint(0, V, (2, 9))
    upstream = torch.randn(2)
    wanted = (base.embed.weight, *factors)

    def ours(backend):
        hidden = base.embed(ids).tanh()
        return sk.linear_step_logps(hidden, layer.base_layer.weight, labels, shift=0, lora_a=factors[0],
                                    lora_b=factors[1], lora_scaling=layer.scaling["default"], backend=backend)

    theirs = torch.log_softmax(model(ids).float(), -1).gather(-1, labels[..., None]).sum((1, 2))
    expected = torch.autograd.grad(theirs, wanted, upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for backend in ("cpu", "reference"):
        out = ours(backend)
        torch.testing.assert_close(out, theirs, rtol=tolerance, atol=tolerance)
        for a, b in zip(torch.autograd.grad(out, wanted, upstream), expected, strict=True):
            assert a.dtype == b.dtype
            assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(lora_b=None), ValueError, "lora_b must be given: lora_a and lora_b come together, got None"),
        (dict(lora_a=None), ValueError, "lora_a must be given"),
        (dict(lora_a=torch.randn(3, D + 1)), ValueError, r"lora_a must be \(r, D\) = \(3, 24\), got \(3, 25\)"),
        (dict(lora_b=torch.randn(11, 2)), ValueError, r"lora_b must be \(V, r\) = \(11, 3\), got \(11, 2\)"),
        (dict(lora_b=torch.randn(11, 3).half()), TypeError, "lora_b must be torch.float32 like hidden, or float32"),
        (dict(lora_a=torch.randn(3, D).half()), TypeError, "lora_a must be torch.float32 like hidden, or float32"),
        (dict(lora_a=torch.randn(3, D, device="meta")), ValueError, "lora_a must be on cpu like hidden"),
    ],
)
def test_bad_factors(change: dict, error: type, message: str) -> None:
    factors = {"lora_a": torch.randn(3, D), "lora_b": torch.randn(11, 3), **change}
    with pytest.raises(error, match=f"linear_step_logps: {message}"):
        sk.linear_step_logps(torch.randn(4, D), torch.randn(11, D), torch.zeros(4).long(), shift=0, **factors)
