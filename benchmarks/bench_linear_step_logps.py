"""`linear_step_logps`: every peer's head at the sizes of `svpo bench`, and the bars of the contract."""

from __future__ import annotations

import pytest

from svpo_kernels.bench import linear_step_logps as head
from svpo_kernels.bench.peers import HeadShape

FAMILY = "linear_step_logps"
PROMISED = {"cpu": (1024, 1024, 65536), "tiny": (64, 48, 1000)}
BUDGET = {"cpu": ((4096, 512, 65536), 64), "tiny": ((2048, 16, 4096), 1)}


def test_race(record, rates, case) -> None:
    record(head.run(case, rates))


@pytest.mark.parametrize("f", [0.25, 1.0])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_promised(record, rates, scale: str, trainable: bool, f: float) -> None:
    record(head.promised(HeadShape(*PROMISED[scale], f, trainable), rates))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_peak_memory(record, scale: str, trainable: bool) -> None:
    shape, mebibytes = BUDGET[scale]
    record(head.budget(HeadShape(*shape, 1.0, trainable), mebibytes, 10 if trainable else 20))


def test_time_within_a_budget(record, scale: str) -> None:
    shape, mebibytes = BUDGET[scale]
    record(head.within_budget(HeadShape(*shape, 1.0, True), mebibytes, 1.35))
