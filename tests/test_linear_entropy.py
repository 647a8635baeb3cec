"""`linear_step_logps(return_entropy=True)`: log-probs, entropies and the gradients of both against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate
from cases import BACKENDS, RowCase, make_predictions
from test_linear_step_logps import F32, NEEDS, D, make_head

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


def spec(h, w, b, given, case):
    z = torch.nn.functional.linear(h, w, b).reshape(-1, case.V)[given.rows][:, : case.vocab_size or case.V]
    z = z if z.dtype == torch.float64 else z.float()
    z = (case.softcap * torch.tanh(z / case.softcap) if case.softcap else z) / case.temperature
    logp = torch.log_softmax(z, -1) if z.numel() else z
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    chosen = logp.gather(1, given.labels.unsqueeze(1)).squeeze(1)
    if case.reduction == "none":
        return chosen, entropy
    out = chosen.new_zeros(case.S).index_add(0, given.step_ids, chosen)
    if case.reduction == "mean":
        out = out / torch.bincount(given.step_ids, minlength=case.S).clamp_min(1)
    return out, entropy


def run(tensors, needs, upstreams, function):
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    outs = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    loss = sum((out * upstream.to(out)).sum() for out, upstream in zip(outs, upstreams, strict=True))
    return [out.detach() for out in outs], torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("mode", NEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: RowCase, mode: str, backend: str, device: str) -> None:
    given, tensors = make_inputs(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    N = plan.num_predictions
    upstreams = (torch.randn(N if case.reduction == "none" else case.S), torch.randn(N))
    doubles = [None if t is None else t.double() for t in tensors]
    exact, eager = (
        run(inputs, NEEDS[mode], upstreams, lambda *leaves: spec(*leaves, given, case)) for inputs in (doubles, tensors)
    )
    budget = 1e-6 if mode == "recompute" else 512
    ours = run(
        tensors,
        NEEDS[mode],
        upstreams,
        lambda h, w, b: sk.linear_step_logps(
            h, w, plan, bias=b, backend=backend, logits_budget_mb=budget, return_entropy=True, **case.options
        ),
    )
    for what, a, b, c in zip(("out", "entropy"), ours[0], eager[0], exact[0], strict=True):
        assert_accurate(a, b, c, what=what)
    for what, a, b, c in zip(("first", "second", "third"), ours[1], eager[1], exact[1], strict=False):
        assert_accurate(a, b, c, what=f"{what} gradient")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_log_probs_are_those_of_a_call_without(backend: str, device: str) -> None:
    """Padding of a plan gives 0, and one upstream may be missing; a second backward gives the same bits."""
    given, (hidden, weight, _) = make_inputs(RowCase("again", V=503, predictions="branching"))
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, 40)
    N = plan.num_predictions
    padded = plan.pad_to(plan.rows.shape[0] + 3, N + 5, 43)
    hidden.requires_grad_(), weight.requires_grad_()
    out, entropy = sk.linear_step_logps(hidden, weight, padded, return_entropy=True, backend=backend)
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
    out, entropy = sk.linear_step_logps(hidden, weight, labels, shift=1, return_entropy=True, backend=backend)
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

    def function(h, w, b):
        return sk.linear_step_logps(h, w, plan, bias=b, softcap=softcap, temperature=0.7, return_entropy=True)

    assert torch.autograd.gradcheck(function, tensors)
