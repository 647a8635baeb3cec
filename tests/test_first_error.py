"""A PRM trained on made, verifiable steps finds the first wrong step of held-out problems."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import one_thread  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parents[1]))


@pytest.mark.slow
def test_it_finds_them_and_a_value_regression_on_the_same_labels_fewer():
    from benchmarks import first_error

    found = {way: first_error.run(way, 1) for way in first_error.WAYS}
    assert found["prm"]["kept"] == first_error.HELD_OUT
    assert found["prm"]["prm/f1"] > 0.6  # 0.74 on 2026-11-28; the other 0.41
    assert found["prm"]["prm/f1"] > found["value regression"]["prm/f1"] + 0.1


def test_its_rows_are_what_they_say(tmp_path):
    from benchmarks import first_error
    from svpo_kernels.data.load import load

    train, held = (load(path) for path in first_error.write(tmp_path, 0))
    assert (train.format.name, held.format.name) == ("prm800k", "processbench")
    assert (len(train.records), len(held.records)) == (first_error.TRAIN, first_error.HELD_OUT)
    problems = {record.prompt for record in train.records}
    assert not problems & {record.prompt for record in held.records}
    errors = [record.meta["first_error"] for record in held.records]
    assert errors.count(-1) == first_error.HELD_OUT // 2
