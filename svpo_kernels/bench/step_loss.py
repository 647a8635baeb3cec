"""`svpo_loss` against the eager lines it replaces, and `torch.compile` of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import svpo_kernels as sk

from .machine import Rates
from .race import Result, check_same, gradients, race

FAMILY = "svpo_loss"
REPEATS = 50  # one call takes 0.1 ms: less than the jitter of a shared machine


def cases(scale: str) -> list[int]:
    """Numbers of pairs."""
    return [8] if scale == "tiny" else [64, 1024]


def eager(step_logps: Any, values: Any, ref: Any, pairs: Any, targets: Any) -> tuple[torch.Tensor, ...]:
    """Preference, value and rank term and the usual metrics, as a trainer writes them."""
    w, l = pairs.unbind(1)
    reward = 0.1 * (step_logps - ref)
    x = reward[w] - reward[l]
    preference = -F.logsigmoid(x).mean()
    labelled = ~targets.isnan()
    value = (values[labelled] - targets[labelled]).square().mean()
    gap = values[w] - values[l]
    rank = F.relu(0.1 - gap).mean()
    with torch.no_grad():
        metrics = reward[w], reward[l], (x > 0).float().mean(), (gap > 0).float().mean()
    return preference + value + rank, preference, value, rank, *metrics


compiled = torch.compile(eager)


def run(P: int, rates: Rates, **limits: Any) -> Iterator[Result]:
    torch.manual_seed(0)
    S = P + P // 2
    step_logps, values = (torch.randn(S, requires_grad=True) for _ in range(2))
    ref, targets = torch.randn(S), torch.rand(S) * 2 - 1
    pairs = torch.randint(0, S, (P, 2))
    targets[::5] = torch.nan
    functions = {
        "ours": lambda a, b: sk.svpo_loss(a, pairs, ref, values=b, value_targets=targets, rank_margin=0.1).loss,
        "eager": lambda a, b: eager(a, b, ref, pairs, targets)[0],
        "torch.compile": lambda a, b: compiled(a, b, ref, pairs, targets)[0],
    }
    leaves, upstream = [step_logps, values], torch.tensor(0.7)
    expected = gradients(functions["eager"], leaves, upstream)
    for function in functions.values():
        check_same(expected, gradients(function, leaves, upstream), rtol=1e-4, atol=1e-6)

    def repeat(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def again() -> None:
            for _ in range(REPEATS):
                torch.autograd.grad(function(*leaves), leaves, upstream)

        return again

    variants = {name: repeat(function) for name, function in functions.items()}
    yield race(f"{FAMILY} forward + backward, P {P}, {REPEATS} times", variants, ours="ours",
               targets={"eager": ">= 3"} if P == 64 else {}, family=FAMILY, headline=True, weighed=True,
               **limits)
