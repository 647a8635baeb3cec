"""`aggregate_scores`: every backend against fp64; ties, zeros, empties and negatives exactly as the contract says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from engines import ENGINES, running
from torch import Tensor

import svpo_kernels as sk

HOWS = ("min", "prod", "geomean", "mean", "last", "max")

OP = "aggregate_scores"  # whose kernels a GPU backend must have for this file (conftest.py)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest):
    with running(*request.param) as found:
        yield found


def eager(scores: Tensor, offsets: Tensor, how: str) -> Tensor:
    """One sequence after the other; NaN where it is empty."""
    x = scores if scores.dtype == torch.float64 else scores.float()
    reduce = {"min": torch.min, "max": torch.max, "prod": torch.prod, "mean": torch.mean, "last": lambda part: part[-1],
              "geomean": lambda part: part.log().mean().exp()}[how]
    parts = [x[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return torch.stack([reduce(part) if len(part) else x.new_tensor(torch.nan) for part in parts]) if parts else x[:0]


def run(function: Any, scores: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().requires_grad_()
    out = function(leaf)
    if not out.requires_grad:
        return out, torch.zeros_like(scores)
    grad, = torch.autograd.grad(out, leaf, upstream.to(out), allow_unused=True, materialize_grads=True)
    return out.detach().cpu(), grad.cpu()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[3], [1, 1, 1], [0, 5, 0, 0, 2, 63], [1000, 1, 7], [4] * 300, [0], []], ids=len)
def test_values_and_gradients(how: str, dtype: torch.dtype, lengths: list[int], engine: Any) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    # Near 1, so that a product of a thousand scores is still a number.
    scores = (1 - torch.rand(sum(lengths)) / 100).to(dtype)
    upstream = torch.randn(len(lengths))
    upstream[torch.tensor(lengths, dtype=torch.int64) == 0] = torch.nan  # an empty sequence hands nothing on
    ours = run(lambda x: sk.aggregate_scores(x, offsets.to(engine.device), how, backend=engine.backend),
               scores.to(engine.device), upstream)
    theirs = run(lambda x: eager(x, offsets, how), scores, upstream)
    exact = run(lambda x: eager(x, offsets, how), scores.double(), upstream)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert_accurate(ours[0], theirs[0], exact[0], what="out")
    if how in ("min", "max") and dtype != torch.float32:  # ties: eager spreads or not, the contract says the first
        return
    assert_accurate(ours[1], theirs[1], exact[1], what="gradient")


def aggregate(engine: Any, values: list[float], how: str, lengths: list[int] | None = None) -> tuple[list, list]:
    x = torch.tensor(values, device=engine.device, requires_grad=True)
    offsets = torch.tensor([0, *(lengths or [len(values)])], device=engine.device).cumsum(0)
    out = sk.aggregate_scores(x, offsets, how, backend=engine.backend)
    out.backward(torch.full_like(out, 2.0))
    return out.tolist(), x.grad.tolist()


def test_ties_go_to_the_first(engine: Any) -> None:
    assert aggregate(engine, [0.5, 0.25, 0.25, 0.75, 0.75], "min") == ([0.25], [0, 2, 0, 0, 0])
    assert aggregate(engine, [0.5, 0.25, 0.25, 0.75, 0.75], "max") == ([0.75], [0, 0, 0, 2, 0])
    for how in ("min", "max"):  # equals of more than one tile
        assert aggregate(engine, [0.5] * 300, how) == ([0.5], [2] + [0] * 299)


def test_product_is_exact_with_zeros(engine: Any) -> None:
    assert aggregate(engine, [0.5, 0.0, 0.25], "prod") == ([0], [0, 0.25, 0])
    assert aggregate(engine, [0.5, 0.0, 0.0], "prod") == ([0], [0, 0, 0])
    assert aggregate(engine, [-0.5, 0.0, -4.0, 2.0], "prod") == ([0], [0, 8, 0, 0])


def test_geometric_mean_at_zero_and_below(engine: Any) -> None:
    assert aggregate(engine, [0.5, 0.0, 0.25], "geomean") == ([0], [0, 0, 0])
    out, grad = aggregate(engine, [0.5, -0.1, 0.0, 4.0, 1.0], "geomean", [3, 2])
    assert out[0] != out[0] and all(g != g for g in grad[:3])
    assert out[1] == pytest.approx(2.0) and grad[3:] == pytest.approx([0.5, 2.0])


def test_long_sequences_do_not_shrink(engine: Any) -> None:
    """The geometric mean of equal scores is that score at any length; the product underflows."""
    out, grad = aggregate(engine, [0.25] * 1000, "geomean")
    assert out == pytest.approx([0.25], rel=1e-6) and grad == pytest.approx([0.002] * 1000, rel=1e-5)
    assert aggregate(engine, [0.25] * 1000, "prod")[0] == [0.0]


@pytest.mark.parametrize("how", HOWS)
def test_empty_sequences_and_nan(how: str, engine: Any) -> None:
    out, grad = aggregate(engine, [0.5, 0.25], how, [0, 2, 0])
    assert out[0] != out[0] and out[2] != out[2] and out[1] == out[1]
    assert all(g == g for g in grad)
    out, _ = aggregate(engine, [0.5, torch.nan, 0.25, 0.5], how, [2, 2])
    assert out[0] != out[0] and out[1] == out[1]
    out, grad = aggregate(engine, [0.5] * 150 + [torch.nan] + [0.25] * 60, how)  # behind the first tile
    assert (out[0] == out[0]) == (how == "last") and (how not in ("min", "max") or grad[150] == 2)
    out, grad = aggregate(engine, [], how, [0, 0])
    assert all(x != x for x in out) and grad == []
    scores = torch.empty(0, device=engine.device)
    none = sk.aggregate_scores(scores, torch.tensor([0], device=engine.device), how, backend=engine.backend)
    assert none.shape == (0,)


def test_layouts(engine: Any) -> None:
    scores = torch.rand(8, 3, device=engine.device)[:, 1]
    for kind in (torch.int32, torch.uint8, torch.int64):
        offsets = torch.tensor([0, 0, 3, 3, 8, 8], device=engine.device).to(kind)[::1]
        for how in HOWS:
            expected = eager(scores.cpu(), offsets.cpu(), how)
            ours = sk.aggregate_scores(scores, offsets, how, backend=engine.backend)
            torch.testing.assert_close(ours.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("how", HOWS)
def test_gradcheck(how: str) -> None:
    scores = (torch.rand(9, dtype=torch.float64) + 0.1).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 8, 9])
    assert torch.autograd.gradcheck(lambda x: sk.aggregate_scores(x, offsets, how)[[0, 2, 3]], scores)


def test_a_second_derivative_raises(engine: Any) -> None:
    x = torch.rand(3, device=engine.device, requires_grad=True)
    out = sk.aggregate_scores(x, torch.tensor([0, 3], device=engine.device), "prod", backend=engine.backend)
    grad, = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
