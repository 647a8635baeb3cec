"""The cost model against what runs, and what must never run: host reads."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS
from torch.profiler import ProfilerActivity, profile

import svpo_kernels as sk
from svpo_kernels.linear_step_logps import modes
from svpo_kernels.linear_step_logps.cost import call_cost

D, V, T, S, RANK = 24, 301, 200, 7, 3
NEEDS = ("hidden", "weight", "lora_a", "lora_b")
CALLS = {
    "forward": ((), 512),
    "frozen": (("hidden",), 512),
    "store": (("hidden", "weight"), 512),
    "head_alone": (("weight",), 512),
    "recompute": (("hidden", "weight"), 1e-6),
    "half_kept": (("hidden", "weight"), 100 * V * 4 / 2**20),
    "frozen_factors": (("hidden", "low"), 512),
    "adapter": (("hidden", "lora_a", "lora_b"), 512),
    "adapter_recomputed": (("hidden", "weight", "lora_a", "lora_b"), 1e-6),
    "factors_alone": (("lora_a", "lora_b"), 512),
}


def events(function):
    """(name, shapes of the inputs) of every ATen call below `function`, those inside raw ops too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        function()
    return [(event.name, event.input_shapes) for event in found.events() if event.name.startswith("aten::")]


def flops(found):
    """Of outermost products: (m, k) x (k, n)."""
    total = 0
    for name, shapes in found:
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (m, k), (_, n) = shapes[:2] if name == "aten::mm" else shapes[1:3]
            total += 2 * m * k * n
    return total


def make_call(needs, budget, backend="cpu", plan=None, **options):
    tensors = {"hidden": torch.randn(T, D), "weight": torch.randn(V, D)}
    if any(name.startswith("lo") for name in needs):
        tensors |= {"lora_a": torch.randn(RANK, D), "lora_b": torch.randn(V, RANK)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needs)
    scored = torch.arange(T)
    plan = plan or sk.StepPlan.from_predictions(scored, scored % V, scored % S, S)

    def call():
        out = sk.linear_step_logps(**tensors, labels=plan, logits_budget_mb=budget, backend=backend, **options)
        parts = (out[0], *out[1].values()) if isinstance(out, tuple) else (out,)
        loss = sum((part * 1.5).sum() for part in parts)
        if loss.requires_grad:
            loss.backward()

    return call


@pytest.mark.parametrize("name", CALLS)
def test_products_that_run_are_those_that_are_counted(name: str) -> None:
    needs, budget = CALLS[name]
    low = any(part.startswith("lo") for part in needs)
    mode = modes.mode("hidden" in needs, "weight" in needs, False, bool(needs), False, "lora_a" in needs)
    cost = call_cost(
        T, D, V, mode, needs_hidden="hidden" in needs, needs_weight="weight" in needs, needs_a="lora_a" in needs,
        needs_b="lora_b" in needs, rank=RANK if low else 0, itemsize=4, logits_budget_mb=budget, device_type="cpu",
    )
    assert flops(events(make_call(needs, budget))) == cost.flops


def test_floors_of_the_contract() -> None:
    """8192 x 4096 x 128256 at 790 TFLOP/s: 10.9, 21.8 and 32.7 ms (DESIGN section 8)."""
    shape = (8192, 4096, 128256)
    assert call_cost(*shape, "forward").floor(790e12) == pytest.approx(10.9e-3, rel=2e-3)
    assert call_cost(*shape, "frozen").floor(790e12) == pytest.approx(21.8e-3, rel=2e-3)
    store = call_cost(*shape, "store", needs_weight=True, logits_budget_mb=4096)
    assert store.floor(790e12) == pytest.approx(32.7e-3, rel=2e-3)
    rows = 8192 * 128256 * 2
    assert store.row_bytes == 3 * rows and store.kept_bytes == rows  # read, read again, written
    assert call_cost(*shape, "forward").row_bytes == rows and call_cost(*shape, "frozen").row_bytes == 3 * rows
    assert store.with_rows(790e12, 4.3e12) == pytest.approx(store.floor(790e12) + 3 * rows / 4.3e12)
    beyond = call_cost(*shape, "store", needs_weight=True, logits_budget_mb=1)
    assert beyond.flops == 4 * 2 * 8192 * 4096 * 128256 and beyond.kept_bytes == 0


def test_a_reference_policy_of_its_own_call_costs_one_product() -> None:
    """Under no_grad nothing is kept and nothing multiplied again; stacked under the policy's rows it would be."""
    call = make_call(("hidden",), 512)
    with torch.no_grad():
        alone = flops(events(call))
    assert alone == 2 * T * D * V and flops(events(call)) == 2 * alone


READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_plan_is_never_read_by_the_host(name: str, backend: str, device: str, monkeypatch) -> None:
    """Forward and backward: no value of a tensor is asked for, but the plan's bounds, which live on the host."""
    needs, budget = CALLS[name]
    scored = torch.arange(T)
    plan = sk.StepPlan.from_predictions(scored.repeat(2), (scored % V).repeat(2), scored.repeat(2) % S, S)
    stats = ("entropy", "top1") if name in ("store", "adapter") else ("logsumexp",)
    call = make_call(needs, budget, backend, plan, stats=stats)
    read, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor) or original(tensor))
    found = [name for name, _ in events(call) if name in READS]
    assert not found
    assert all(tensor is plan.bounds or tensor.data_ptr() == plan.bounds.data_ptr() for tensor in read)


@pytest.mark.parametrize("num_steps", [None, S])
def test_the_tensor_form_reads_once(num_steps: int | None, monkeypatch) -> None:
    """N, and S unless it is given, in one read; the guard above would see more."""
    hidden, weight = torch.randn(T, D), torch.randn(V, D)
    labels, steps = torch.randint(0, V, (T,)), torch.arange(T) % S
    read, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor.shape) or original(tensor))
    found = events(lambda: sk.linear_step_logps(hidden, weight, labels, steps, shift=0, num_steps=num_steps))
    assert not [name for name, _ in found if name in READS]
    assert read.count(torch.Size([2])) == 1 and read.count(torch.Size([4])) == len(read) - 1  # (N, S); bounds, host
    assert "aten::item" in [name for name, _ in events(lambda: labels.sum().item())]
