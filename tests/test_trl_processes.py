"""TRL trainers with our head in two gloo processes, DDP and FSDP2: gradients, weights and metrics of one process."""

from __future__ import annotations

import json

import pytest
import torch
from test_distributed import launch
from training_ import relative_error

pytest.importorskip("trl")
RUNS = {"dpo": dict(kind="dpo", loss_type=["ipo"]), "sft": dict(kind="sft"),
        "lora": dict(kind="dpo", lora=True)}
KTO = [dict(kind="kto"), dict(kind="kto", ours=False)]


def results(folder, runs):
    for processes in (1, 2):
        launch(processes, "trl_worker.py", folder / str(processes), processes, *map(json.dumps, runs))
    return [[torch.load(folder / f"{processes}{place}.pt", weights_only=True) for processes in (1, 2)]
            for place in range(len(runs))]


def assert_equal(one, two):
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(one["gradients"]) == len(two["gradients"]) == 2
    for step, expected in zip([*two["gradients"], two["weights"]], [*one["gradients"], one["weights"]], strict=True):
        assert relative_error(step, expected) <= 1e-5  # rows of two shapes of batch
    for entry, expected in zip(two["logs"][:2], one["logs"][:2], strict=True):
        for name, value in expected.items():
            if name.startswith(("loss", "rewards", "logps", "logits", "entropy", "mean_token_accuracy")):
                assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    found = results(tmp_path_factory.mktemp("ddp"), [*RUNS.values(), *KTO])
    return dict(zip([*RUNS, "kto", "TRL's kto"], found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(ddp, name):
    assert_equal(*ddp[name])


@pytest.mark.slow
def test_kto_equals_trls_own_in_two_processes(ddp):
    """Its KL estimate pairs the rows of one process, so that two are not one, whatever the head."""
    (_, ours), (_, theirs) = ddp["kto"], ddp["TRL's kto"]
    for step, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert relative_error(step, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 needs CUDA streams")
def test_sharded_equals_one(tmp_path):
    one, two = results(tmp_path, [dict(kind="dpo", fsdp=True)])[0]
    assert two["local"] < one["local"]
    assert_equal(one, two)
