"""One process and two gloo processes, trees of unequal size: the same loss, metrics and gradients."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from processes import TESTS, environment
from training_ import relative_error

RUNS = [
    {"max_steps": 2, "max_tokens": 150, "optim": "sgd"},  # a number of packs that two processes cannot share evenly
    {"max_steps": 2, "packing": "stream", "optim": "sgd"},  # whole trees, unequal numbers of segments
    {"max_steps": 1, "pairs_per_step": 1},  # one process has nothing but an empty pack
    {"max_steps": 3, "max_tokens": 100, "optim": "sgd", "objective": "policy", "preset": "grpo",
     "entropy_weight": 0.01},
]


def launch(processes, script, *words):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = run if processes > 1 else []
    command = [sys.executable, *start, str(TESTS / script), *map(str, words)]
    env = environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(of one process, of two) for every run, as rank 0 saw them."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        launch(processes, "distributed_worker.py", folder / str(processes), *map(json.dumps, RUNS))
    return [[torch.load(folder / f"{processes}{place}.pt", weights_only=True) for processes in (1, 2)]
            for place in range(len(RUNS))]


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(RUNS)))
def test_two_processes_equal_one(results, place):
    one, two = results[place]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(two["packs"][0]) == len(two["packs"][1])
    empty = (two["packs"][0] + two["packs"][1]).count(1)  # an empty pack has one token
    assert empty == (1 if "pairs_per_step" in RUNS[place] else len(one["packs"][0]) % 2)
    assert len(two["references"]) == len(one["references"]) > 20
    assert two["references"] == pytest.approx(one["references"], rel=1e-6)
    for step, expected in zip(two["gradients"], one["gradients"], strict=True):
        assert relative_error(step, expected) <= 1e-6
    for logs, expected in zip([*two["logs"], two["eval"]], [*one["logs"], one["eval"]], strict=True):
        for name, value in expected.items():
            if any(word in name for word in ("loss", "logps", "value", "margins", "policy/")):
                assert logs[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
