"""Whole training steps, TRL's DPOTrainer and our trainer three ways: synthetic trees, the real ones, rStar pairs."""

from __future__ import annotations

import pytest

from svpo_kernels.bench import training
from svpo_kernels.bench.training import TrainingCase, whole

from .trees import data_folder, real_pairs, real_trees, rstar

FAMILY = "training"
needs_samples = pytest.mark.skipif(
    not data_folder().is_dir(), reason="the real samples are not here; set SVPO_DATA to their folder")


def test_step(record, rates, case) -> None:
    record(training.run(case, rates))


@needs_samples
@pytest.mark.parametrize("dedup", [True, False], ids=["distinct_texts", "duplicates_kept"])
def test_real_trees(record, rates, scale: str, dedup: bool) -> None:
    trees = real_trees()
    if scale == "tiny":
        trees = trees[:1]
    name = f"{len(trees)} real trees, gap > 0.6{'' if dedup else ', duplicate texts kept'}"
    case = whole(TrainingCase(name, trees, real_pairs(trees, dedup=dedup), steps=3 if dedup else 2, headline=True))
    record(training.run(case, rates))


@needs_samples
def test_rstar_pairs(record, rates) -> None:
    record(training.run(whole(TrainingCase("five rStar pairs", *rstar())), rates))
