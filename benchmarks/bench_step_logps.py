"""`step_logps` against eager PyTorch, `torch.compile` of it, and the floor: one read of the logits."""

from __future__ import annotations

import pytest
import torch

import svpo_kernels as sk

from .race import Result, check_same, gradients, race

T, V, S = 512, 128256, 64


def eager(logits: torch.Tensor, labels: torch.Tensor, step_ids: torch.Tensor) -> torch.Tensor:
    """What a trainer writes: fp32 log-softmax, gather, sum per step."""
    logp = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logp.new_zeros(S).index_add(0, step_ids, logp)


compiled = torch.compile(eager)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(T, V).mul_(3).to(dtype), torch.randint(0, V, (T,)), torch.arange(T) * S // T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_forward(record, dtype: torch.dtype) -> None:
    logits, labels, step_ids = inputs(dtype)
    plan = sk.StepPlan.from_step_ids(labels, step_ids, shift=0)
    exact = eager(logits.double(), labels, step_ids)
    variants = {
        "ours": lambda: sk.step_logps(logits, plan),
        "eager": lambda: eager(logits, labels, step_ids),
        "torch.compile": lambda: compiled(logits, labels, step_ids),
        "one read (x.sum())": logits.sum,
    }
    for name in ("ours", "eager", "torch.compile"):
        check_same([exact], [variants[name]()], rtol=1e-5, atol=1e-3)
    floor = "<= 2" if dtype == torch.float32 else "<= 3"
    targets = {"eager": ">= 6", "torch.compile": ">= 1.5", "one read (x.sum())": floor}
    case = f"step_logps forward, {T} x {V} {str(dtype).removeprefix('torch.')}"
    record(race(case, variants, ours="ours", targets=targets), variants["ours"])


def test_forward_backward(record) -> None:
    logits, labels, step_ids = inputs(torch.float32)
    leaf = logits.requires_grad_()
    plan = sk.StepPlan.from_step_ids(labels, step_ids, shift=0)
    upstream = torch.randn(S)

    def run(function):
        return lambda: torch.autograd.grad(function(leaf), leaf, upstream)

    def inplace():
        # The logits of a model are not a leaf; this stands for them without a product in front.
        made = _Handle.apply(leaf, buffer)
        return torch.autograd.grad(sk.step_logps(made, plan, inplace_backward=True), leaf, upstream)

    buffer = logits.detach().clone()
    expected = gradients(lambda x: eager(x, labels, step_ids), [leaf], upstream)
    for function in (lambda x: sk.step_logps(x, plan), lambda x: compiled(x, labels, step_ids)):
        check_same(expected, gradients(function, [leaf], upstream), rtol=1e-4, atol=1e-4)
    check_same(expected[1:], list(inplace()), rtol=1e-4, atol=1e-4)
    variants = {
        "ours": run(lambda x: sk.step_logps(x, plan)),
        "ours, inplace_backward": inplace,
        "eager": run(lambda x: eager(x, labels, step_ids)),
        "torch.compile": run(lambda x: compiled(x, labels, step_ids)),
    }
    result = race(
        f"step_logps forward + backward, {T} x {V} float32",
        variants,
        ours="ours",
        targets={"eager": ">= 3", "torch.compile": ">= 1.5"},
    )
    record(result, variants["ours"])
    medians = {name: result.medians[name] for name in ("ours, inplace_backward", "eager", "torch.compile")}
    case = f"{result.case}, inplace_backward"
    record.again(Result(case, "ours, inplace_backward", "ms", medians, result.spread, {"eager": ">= 8"}))


class _Handle(torch.autograd.Function):
    """A non-leaf that lives in a given buffer: what a model's logits are to the op."""

    @staticmethod
    def forward(ctx, leaf: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None
