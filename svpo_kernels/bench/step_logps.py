"""`step_logps` against eager PyTorch, `torch.compile` of it, TRL, and the floor: one read of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import svpo_kernels as sk

from .machine import Rates, Work, installed
from .race import Result, check_same, gradients, race

FAMILY = "step_logps"
S = 64
READ = "one read (x.sum())"
FORWARD_TARGETS = {"eager": ">= 6", "torch.compile": ">= 1.5"}
BACKWARD_TARGETS = {"eager": ">= 3", "torch.compile": ">= 1.5"}


@dataclass(frozen=True)
class RowShape:
    """T rows of V logits, every row scored."""

    T: int
    V: int
    dtype: torch.dtype
    backward: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.T} x {self.V} {str(self.dtype).removeprefix('torch.')}"

    @property
    def work(self) -> Work:
        """One read of the logits; with the backward another one, and the gradient written."""
        size = self.T * self.V * torch.finfo(self.dtype).bits / 8
        return Work(2 * size, size) if self.backward else Work(size)


def cases(scale: str) -> list[RowShape]:
    T, V = {"tiny": (16, 1000), "cpu": (512, 128256), "gpu": (8192, 128256)}[scale]
    device = "cuda" if scale == "gpu" else "cpu"
    main = torch.bfloat16 if scale == "gpu" else torch.float32
    return [RowShape(T, V, torch.float32, device=device), RowShape(T, V, torch.bfloat16, device=device),
            RowShape(T, V, main, True, device)]


def run(shape: RowShape, rates: Rates, **limits: Any) -> Iterator[Result]:
    yield from (_forward_backward if shape.backward else _forward)(shape, rates, limits)


def eager(logits: torch.Tensor, labels: torch.Tensor, step_ids: torch.Tensor) -> torch.Tensor:
    """What a trainer writes: fp32 log-softmax, gather, sum per step."""
    logp = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logp.new_zeros(S).index_add(0, step_ids, logp)


compiled = torch.compile(eager, dynamic=False)


def trl(logits: torch.Tensor, labels: torch.Tensor, step_ids: torch.Tensor) -> torch.Tensor:
    from trl.trainer.utils import selective_log_softmax

    logp = selective_log_softmax(logits.unsqueeze(0), labels.unsqueeze(0)).squeeze(0).float()
    return logp.new_zeros(S).index_add(0, step_ids, logp)


def inputs(shape: RowShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(shape.T, shape.V, device=shape.device).mul_(3).to(shape.dtype)
    labels = torch.randint(0, shape.V, (shape.T,), device=shape.device)
    return logits, labels, torch.arange(shape.T, device=shape.device) * S // shape.T


@torch.no_grad()
def _forward(shape: RowShape, rates: Rates, limits: dict[str, Any]) -> Iterator[Result]:
    logits, labels, step_ids = inputs(shape)
    plan = sk.StepPlan.from_step_ids(labels.cpu(), step_ids.cpu(), shift=0, num_steps=S).to(shape.device)
    logp = torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    exact = logp.new_zeros(S).index_add(0, step_ids, logp)
    del logp
    variants = {
        "ours": lambda: sk.step_logps(logits, plan),
        "eager": lambda: eager(logits, labels, step_ids),
        "torch.compile": lambda: compiled(logits, labels, step_ids),
    }
    skipped, errors = {}, {}
    for function in variants.values():
        check_same([exact], [function()], rtol=1e-5, atol=1e-3)
    if installed("trl"):
        variants["TRL selective_log_softmax"] = lambda: trl(logits, labels, step_ids)
    else:
        skipped["TRL selective_log_softmax"] = "trl is not installed"
    for name, function in variants.items():  # TRL rounds to bf16, which the table shows
        errors[name] = float((function().double() - exact).abs().max() / exact.abs().max())
    variants[READ] = logits.sum
    targets = {**FORWARD_TARGETS, READ: "<= 2" if shape.dtype == torch.float32 else "<= 3"}
    yield race(f"{FAMILY} forward, {shape}", variants, ours="ours", targets=targets, device=shape.device,
               family=FAMILY, floors=[READ], work=vars(shape.work), floor_ms=rates.floor_ms(shape.work),
               errors=errors, skipped=skipped, headline=True, weighed=True,
               **limits)


def _forward_backward(shape: RowShape, rates: Rates, limits: dict[str, Any]) -> Iterator[Result]:
    logits, labels, step_ids = inputs(shape)
    leaf = logits.requires_grad_()
    plan = sk.StepPlan.from_step_ids(labels.cpu(), step_ids.cpu(), shift=0, num_steps=S).to(shape.device)
    upstream, buffer = torch.randn(S, device=shape.device), logits.detach().clone()
    functions = {"ours": lambda x: sk.step_logps(x, plan), "eager": lambda x: eager(x, labels, step_ids),
                 "torch.compile": lambda x: compiled(x, labels, step_ids)}
    if installed("trl"):
        functions["TRL selective_log_softmax"] = lambda x: trl(x, labels, step_ids)

    def inplace() -> tuple[torch.Tensor, ...]:
        # The logits of a model are not a leaf; this stands for them without a product in front.
        made = _Handle.apply(leaf, buffer)
        return torch.autograd.grad(sk.step_logps(made, plan, inplace_backward=True), leaf, upstream)

    tolerance = dict(rtol=1e-4, atol=1e-4) if shape.dtype == torch.float32 else dict(rtol=5e-2, atol=5e-2)
    expected = gradients(functions["eager"], [leaf], upstream)
    for function in functions.values():
        check_same(expected, gradients(function, [leaf], upstream), **tolerance)
    check_same(expected[1:], list(inplace()), **tolerance)
    del expected
    variants = {name: lambda f=f: torch.autograd.grad(f(leaf), leaf, upstream) for name, f in functions.items()}
    variants["ours, inplace_backward"] = inplace
    about = dict(family=FAMILY, headline=True, work=vars(shape.work), floor_ms=rates.floor_ms(shape.work))
    result = race(f"{FAMILY} forward + backward, {shape}", variants, ours="ours", targets=BACKWARD_TARGETS,
                  device=shape.device, weighed=True, **about, **limits)
    own = result.medians.pop("ours, inplace_backward")
    yield result
    medians = {"ours, inplace_backward": own, **{k: v for k, v in result.medians.items() if k != "ours"}}
    yield Result(f"{result.case}, inplace_backward", "ours, inplace_backward", "ms", medians, result.spread,
                 {"eager": ">= 8"}, memory=result.memory, **about)


class _Handle(torch.autograd.Function):
    """A non-leaf that lives in a given buffer: what a model's logits are to the op."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
