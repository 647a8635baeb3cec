"""`svpo_loss` against the eager lines it replaces."""

from __future__ import annotations

from svpo_kernels.bench import step_loss

FAMILY = "svpo_loss"


def test_race(record, rates, case) -> None:
    record(step_loss.run(case, rates))
