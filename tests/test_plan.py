"""StepPlan: what it holds, how it moves, what it refuses."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import svpo_kernels as sk
from svpo_kernels.plan import scatter_rows


def by_step(plan):
    return [plan.step_order[a:b].tolist() for a, b in zip(plan.step_start[:-1], plan.step_start[1:], strict=True)]


def test_from_step_ids_shifts_within_each_sequence() -> None:
    labels = torch.tensor([[7, 8, -100, 9], [4, 5, 6, 3]])
    step_ids = torch.tensor([[0, 0, 0, 2], [1, -1, 1, 0]])
    plan = sk.StepPlan.from_step_ids(labels, step_ids, shift=1)
    assert plan.rows.tolist() == [0, 2, 5, 6]
    assert plan.labels.tolist() == [8, 9, 6, 3]
    assert plan.step_ids.tolist() == [0, 2, 1, 0]
    assert plan.row_start.tolist() == [0, 1, 2, 3, 4]
    assert by_step(plan) == [[0, 3], [2], [1]]
    assert plan.counts.tolist() == [2, 1, 1]
    assert (plan.num_steps, plan.num_predictions) == (3, 4)
    plain = sk.StepPlan.from_step_ids(labels, step_ids, shift=0, num_steps=5)
    assert plain.rows.tolist() == [0, 1, 3, 4, 6, 7] and plain.num_steps == 5


@pytest.mark.parametrize("shift", [0, 1])
def test_the_number_of_steps_is_the_same_everywhere(shift: int) -> None:
    """Steps that end up without predictions count too: a pair may name them."""
    logits, hidden, weight = torch.randn(2, 4, 9), torch.randn(2, 4, 5), torch.randn(9, 5)
    labels, step_ids = torch.full((2, 4), 3), torch.zeros(2, 4, dtype=torch.int64)
    first, masked, nothing = step_ids.clone(), step_ids.clone(), step_ids - 1
    first[0, 0] = masked[1, 2] = 6
    without = labels.clone()
    without[1] = -100
    for given, steps, S in ((labels, first, 7), (without, masked, 7), (without, None, 2), (labels, nothing, 0)):
        assert sk.StepPlan.from_step_ids(given, steps, shift=shift).num_steps == S
        assert sk.step_logps(logits, given, steps, shift=shift).shape == (S,)
        assert sk.linear_step_logps(hidden, weight, given, steps, shift=shift).shape == (S,)


def test_from_predictions_keeps_position_order_and_merges_equal_targets() -> None:
    plan = sk.StepPlan.from_predictions([5, 2, 5, 5, 2, 9], [1, 3, 4, 1, 3, -100], [0, 1, 1, 2, 2, 0], 4)
    assert plan.rows.tolist() == [2, 5]
    assert plan.row_start.tolist() == [0, 2, 5]
    assert plan.labels.tolist() == [3, 3, 1, 4, 1]
    assert plan.first.tolist() == [0, 0, 2, 3, 2]
    assert plan.step_ids.tolist() == [1, 2, 0, 1, 2]
    assert by_step(plan) == [[2], [0, 3], [1, 4], []]


def test_arrays_lists_and_tensors_are_the_same() -> None:
    labels, step_ids = [[1, 2, 3]], [[0, 1, 1]]
    for kind in (list, np.array, lambda x: np.array(x, dtype=np.int16), lambda x: torch.tensor(x, dtype=torch.int32)):
        plan = sk.StepPlan.from_step_ids(kind(labels), kind(step_ids), shift=0)
        assert plan.rows.tolist() == [0, 1, 2] and plan.rows.dtype == torch.int64
    assert sk.StepPlan.from_predictions([], [], [], 3).counts.tolist() == [0, 0, 0]


def test_moves_and_pickles_as_one_buffer() -> None:
    plan = sk.StepPlan.from_predictions([0, 3, 3], [1, 2, 5], [0, 0, 1], 2)
    storage = plan.buffer.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == storage for t in plan.tensors[:-1])
    for copy in (plan.to("cpu"), pickle.loads(pickle.dumps(plan))):
        assert all(torch.equal(a, b) for a, b in zip(plan.tensors, copy.tensors, strict=True))
    meta = plan.to("meta")
    assert meta.rows.device.type == "meta" and meta.num_steps == 2


def test_rows_are_put_back_once_each_and_padding_nowhere() -> None:
    rows, values = torch.tensor([4, 0, -1, -1]), torch.randn(4, 3)
    values[2:] = torch.nan
    put = scatter_rows(torch.empty(2, 3, 3), rows, values)
    expected = torch.zeros(6, 3)
    expected[[4, 0]] = values[:2]
    assert put.is_contiguous() and torch.equal(put.view(6, 3), expected)
    assert scatter_rows(torch.empty(0, 3, 3), rows[2:], values[2:]).shape == (0, 3, 3)


def test_pad_to_adds_only_padding() -> None:
    plan = sk.StepPlan.from_predictions([0, 3, 3], [1, 2, 5], [0, 0, 1], 2)
    padded = plan.pad_to(4, 6, 3)
    assert padded.rows.tolist() == [0, 3, -1, -1]
    assert padded.row_start.tolist() == [0, 1, 3, 3, 3]
    assert padded.counts.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"StepPlan.pad_to: predictions must be >= 3, the plan's own, got int 2"):
        plan.pad_to(4, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(labels=[[1]], step_ids=[[0]], shift=None), TypeError, "shift must be given with labels: shift=1 when"),
        (dict(labels=[[1]], step_ids=[[0]], shift=2), ValueError, "shift must be 0 or 1, got int 2"),
        (
            dict(labels=[[1]], step_ids=[0], shift=0),
            ValueError,
            r"step_ids must be shaped like labels \(1, 1\) and on cpu, got \(1,\)",
        ),
        (
            dict(labels=[[[1]]], step_ids=None, shift=0),
            ValueError,
            r"labels must be \(B, L\) or \(T,\), got \(1, 1, 1\)",
        ),
        (dict(labels=[1.5], step_ids=[0], shift=0), TypeError, "labels must be integers"),
        (dict(labels=[1], step_ids=[0.0], shift=0), TypeError, "step_ids must be integers"),
        (
            dict(labels=[1], step_ids=[4], shift=0, num_steps=4),
            IndexError,
            "step_ids must be below num_steps = 4, got a step id of 4",
        ),
        (dict(labels=[1], step_ids=[0], shift=0, num_steps=-1), ValueError, "num_steps must be >= 0"),
        (dict(labels=[1], step_ids=[0], shift=0, num_steps=1.5), TypeError, "num_steps must be an int, got float 1.5"),
        (dict(labels=[[1, 2], [3]], step_ids=None, shift=0), (TypeError, ValueError), "labels must be integers"),
        (dict(labels=5, step_ids=None, shift=0), ValueError, r"labels must be \(B, L\) or \(T,\), got \(\)"),
        (
            dict(labels=[-5], step_ids=[0], shift=0),
            IndexError,
            "labels must be >= 0, or -100 for not scored, got a label of -5",
        ),
    ],
)
def test_from_step_ids_refuses(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sk.StepPlan.from_step_ids(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], [1, 2], [0], 1), ValueError, r"labels must be \(N,\) like rows \(1,\), got \(2,\)"),
        (([-1], [1], [0], 1), IndexError, "rows must be >= 0, got a row of -1"),
        (([0], [1], [1], 1), IndexError, "step_ids must be below num_steps = 1"),
        (([0], [-2], [0], 1), IndexError, "got a label of -2"),
        (([0], [1], [0], None), TypeError, "num_steps must be an int, got None"),
    ],
)
def test_from_predictions_refuses(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sk.StepPlan.from_predictions(*arguments)
