"""`step_logps` against its peers; its options, drawn from the tests' case table, against the eager lines for them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import svpo_kernels as sk
from svpo_kernels.bench import step_logps
from svpo_kernels.bench.machine import Work
from svpo_kernels.bench.race import check_same, race

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import cases  # noqa: E402  the case table of the tests

FAMILY = "step_logps"
OPTIONS = ("plain", "temperature", "softcap", "padded_vocab", "wide", "transposed", "branching", "mean", "plain_bf16")
LARGE = {"cpu": dict(B=2, L=128, V=32001, S=40), "tiny": {}}


def test_race(record, rates, case) -> None:
    record(step_logps.run(case, rates))


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_options(record, rates, scale: str, name: str) -> None:
    """One row of the case table, enlarged: what an option costs."""
    torch.manual_seed(0)
    case = next(case for case in cases.ROW_CASES if case.name == name)
    case = replace(case, **LARGE[scale])
    case = replace(case, vocab_size=case.V - 2 if case.vocab_size else None)
    logits, given = cases.make_rows(case)
    plan = sk.StepPlan.from_predictions(given.rows, given.labels, given.step_ids, case.S)
    counts = plan.counts.clamp(min=1)

    def eager() -> torch.Tensor:
        z = logits.flatten(0, 1)[..., : case.vocab_size].float()
        z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
        logp = torch.log_softmax(z / case.temperature, -1)[given.rows, given.labels]
        out = logp.new_zeros(case.S).index_add(0, given.step_ids, logp)
        return out / counts if case.reduction == "mean" else out

    def ours() -> torch.Tensor:
        return sk.step_logps(logits, plan, **case.options)

    check_same([eager()], [ours()], rtol=1e-4, atol=1e-3)
    size = given.rows.unique().numel() * case.V * logits.element_size()
    work = Work(size)
    shape = f"{case.B * case.L} x {case.V} {str(case.dtype).removeprefix('torch.')}"
    record(race(f"step_logps forward, {shape}, case {name}", {"ours": ours, "eager": eager}, ours="ours", targets={},
                rounds=5, family="step_logps options", work=vars(work), floor_ms=rates.floor_ms(work)))
