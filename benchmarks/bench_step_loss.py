"""`svpo_loss` against the eager lines it replaces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import svpo_kernels as sk

from .race import check_same, gradients, race


def eager(step_logps, values, ref, pairs, targets):
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


@pytest.mark.parametrize("P", [64, 1024])
def test_forward_backward(record, P: int) -> None:
    torch.manual_seed(0)
    S = P + P // 2
    step_logps, values = torch.randn(S, requires_grad=True), torch.randn(S, requires_grad=True)
    ref, targets, pairs = torch.randn(S), torch.rand(S) * 2 - 1, torch.randint(0, S, (P, 2))
    targets[::5] = torch.nan
    functions = {
        "ours": lambda a, b: sk.svpo_loss(a, pairs, ref, values=b, value_targets=targets, rank_margin=0.1).loss,
        "eager": lambda a, b: eager(a, b, ref, pairs, targets)[0],
        "torch.compile": lambda a, b: compiled(a, b, ref, pairs, targets)[0],
    }
    inputs, upstream = [step_logps, values], torch.tensor(0.7)
    expected = gradients(functions["eager"], inputs, upstream)
    for function in functions.values():
        check_same(expected, gradients(function, inputs, upstream), rtol=1e-4, atol=1e-6)

    def repeat(function):
        def run():
            for _ in range(50):
                torch.autograd.grad(function(*inputs), inputs, upstream)

        return run

    variants = {name: repeat(function) for name, function in functions.items()}
    targets_ = {"eager": ">= 3"} if P == 64 else {}
    record(
        race(f"svpo_loss forward + backward, P {P}, 50 times", variants, ours="ours", targets=targets_),
        variants["ours"],
    )
