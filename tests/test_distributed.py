"""One process and two gloo processes, trees of unequal size: the same loss, metrics and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_ import relative_error

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[1]


def launch(folder, processes, *settings):
    """Results of rank 0 of a run with so many processes."""
    folder.mkdir()
    out = folder / "out.pt"
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [] if processes == 1 else run
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(WORKER.parent)])}
    done = subprocess.run([sys.executable, *start, str(WORKER), str(out), *settings], capture_output=True, text=True,
                          env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("settings", [
    ("max_steps=2", "max_tokens=150", "optim=\"sgd\""),  # a pack count that two processes cannot share evenly
    ("max_steps=1", "pairs_per_step=1"),  # one process has nothing but an empty pack
])
def test_two_processes_equal_one(tmp_path, settings):
    one = launch(tmp_path / "one", 1, *settings)
    two = launch(tmp_path / "two", 2, *settings)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(two["packs"][0]) == len(two["packs"][1])
    assert (1 in two["packs"][0] + two["packs"][1]) == ("pairs_per_step=1" in settings or len(one["packs"][0]) % 2 == 1)
    assert len(two["references"]) == len(one["references"]) > 20
    assert two["references"] == pytest.approx(one["references"], rel=1e-6)
    for step, expected in zip(two["gradients"], one["gradients"], strict=True):
        assert relative_error(step, expected) <= 1e-6
    for logs, expected in zip([*two["logs"], two["eval"]], [*one["logs"], one["eval"]], strict=True):
        for name, value in expected.items():
            if "loss" in name or "logps" in name or "value" in name or "margins" in name:
                assert logs[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
