"""`linear_step_logps` against full logits, gathered rows, PyTorch's own fused op, and the bare matrix products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import svpo_kernels as sk

from .race import check_same, gradients, race, weigh

T, D, V, S = 1024, 1024, 65536, 32
TARGETS = {
    "frozen": {"eager, full logits": ">= 4", "eager, gathered rows": ">= 1.1", "bare products": "<= 1.2"},
    "trainable": {"eager, full logits": ">= 3", "eager, gathered rows": ">= 1.0", "bare products": "<= 1.2"},
}


def eager_full(hidden, weight, rows, labels, step_ids):
    """What a trainer writes: all rows' logits, fp32 log-softmax, gather, mask."""
    logp = torch.log_softmax(F.linear(hidden, weight).float(), -1)[rows, labels]
    return logp.new_zeros(S).index_add(0, step_ids, logp)


def eager_gathered(hidden, weight, rows, labels, step_ids):
    """The same, on the scored rows only."""
    logp = torch.log_softmax(F.linear(hidden[rows], weight).float(), -1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return logp.new_zeros(S).index_add(0, step_ids, logp)


def torch_fused(hidden, weight, rows, labels, step_ids):
    """`F.linear_cross_entropy`, where this torch has it."""
    logp = -F.linear_cross_entropy(hidden[rows], weight, labels, reduction="none")
    return logp.new_zeros(S).index_add(0, step_ids, logp)


def make(T: int, D: int, V: int, f: float, trainable: bool, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(T, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_(trainable)
    rows = torch.sort(torch.randperm(T)[: int(T * f)]).values
    return hidden, weight, rows, torch.randint(0, V, rows.shape), torch.arange(rows.numel()) * S // max(1, rows.numel())


def products(hidden, weight, rows, trainable: bool):
    """The floor: 2 matrix products (frozen head) or 3 (trainable), into buffers that exist already."""
    h = hidden.detach()[rows]
    w = weight.detach()
    z, dh, dw = h.new_empty(rows.numel(), w.shape[0]), torch.empty_like(h), torch.empty_like(w)
    for buffer in (z, dh, dw):
        buffer.zero_()

    def run():
        torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=dh)
        if trainable:
            torch.mm(z.t(), h, out=dw)

    return run


@pytest.mark.parametrize("f", [0.25, 1.0])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_forward_backward(record, trainable: bool, f: float) -> None:
    hidden, weight, rows, labels, step_ids = make(T, D, V, f, trainable)
    plan = sk.StepPlan.from_predictions(rows, labels, step_ids, S)
    upstream = torch.randn(S)
    functions = {
        "ours": lambda h, w: sk.linear_step_logps(h, w, plan),
        "eager, full logits": lambda h, w: eager_full(h, w, rows, labels, step_ids),
        "eager, gathered rows": lambda h, w: eager_gathered(h, w, rows, labels, step_ids),
    }
    if hasattr(F, "linear_cross_entropy"):
        functions["F.linear_cross_entropy, gathered"] = lambda h, w: torch_fused(h, w, rows, labels, step_ids)
    inputs = [hidden, weight]
    expected = gradients(functions["eager, full logits"], inputs, upstream)
    for function in functions.values():
        check_same(expected, gradients(function, inputs, upstream), rtol=2e-3, atol=2e-4)
    wanted = [x for x in inputs if x.requires_grad]
    variants = {
        name: (lambda g=g: torch.autograd.grad(g(hidden, weight), wanted, upstream)) for name, g in functions.items()
    }
    variants["bare products"] = products(hidden, weight, rows, trainable)
    head = "trainable" if trainable else "frozen"
    case = f"linear_step_logps forward + backward, {head} head, T {T}, D {D}, V {V}, f {f}, float32"
    result = race(case, variants, ours="ours", targets=TARGETS[head] if f == 0.25 else {}, rounds=7, seconds=60)
    record(result, variants["ours"])


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_peak_memory(record, trainable: bool) -> None:
    T, D, V = 4096, 512, 65536
    hidden, weight, rows, labels, step_ids = make(T, D, V, 1.0, trainable)
    plan = sk.StepPlan.from_predictions(rows, labels, step_ids, S)
    upstream = torch.randn(S)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    functions = {
        "ours": lambda: sk.linear_step_logps(hidden, weight, plan, logits_budget_mb=64),
        "eager, full logits": lambda: eager_full(hidden, weight, rows, labels, step_ids),
    }
    variants = {name: (lambda g=g: torch.autograd.grad(g(), wanted, upstream)) for name, g in functions.items()}
    check_same(list(variants["eager, full logits"]()), list(variants["ours"]()), rtol=2e-3, atol=2e-4)
    head, factor = ("trainable", 10) if trainable else ("frozen", 20)
    case = f"linear_step_logps peak extra memory, {head} head, {T} x {D} x {V}, 64 MiB budget"
    record(weigh(case, variants, ours="ours", targets={"eager, full logits": f">= {factor}"}), variants["ours"])
