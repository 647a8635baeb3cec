"""Planning: 60,000 pairs through every pass of a run, a step of a large tree, a long chain. Answers are checked first.

Seconds of one process, beside the limits and beside smaller cases times the ratio of sizes, which is linear growth.
"""

from __future__ import annotations

from svpo_kernels.bench import planning


def test_pairs(record, scale: str) -> None:
    record(planning.time_pairs(scale))


def test_step_of_a_large_tree(record, scale: str) -> None:
    record(planning.time_tree(scale))


def test_chain(record, scale: str) -> None:
    record(planning.time_chain(scale))
