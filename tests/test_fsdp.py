"""accelerate's own FSDP2 on two gloo processes against one process: losses, gradients, weights, metrics, files."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import fsdp_cases
import pytest
import torch
import transformers as hf
from processes import TESTS, environment

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 needs CUDA streams"),
]

KEYS = ("state", "ram", "tied", "weights", "lora", "checkpointing", "reference", "packing", "objective", "evaluate")
VALUES = (("full", "sharded"), (0, 1), (0, 1), ("float32", "bfloat16", "autocast"), (0, 1), ("none", "layers", "fsdp"),
          ("cache", "second", "online"), ("tree", "distinct", "pairs"), ("preference", "prm"), (0, 1))
MATRIX = [  # every two values of two keys meet in at least one run
    ("sharded", 1, 0, "autocast", 0, "fsdp", "cache", "tree", "preference", 0),
    ("full", 0, 1, "bfloat16", 0, "none", "online", "distinct", "prm", 1),
    ("full", 0, 1, "float32", 1, "layers", "second", "pairs", "preference", 0),
    ("sharded", 1, 0, "bfloat16", 1, "layers", "cache", "pairs", "prm", 1),
    ("sharded", 1, 0, "float32", 0, "none", "second", "distinct", "prm", 1),
    ("full", 0, 1, "autocast", 1, "fsdp", "second", "tree", "prm", 1),
    ("sharded", 1, 1, "autocast", 1, "none", "online", "pairs", "preference", 1),
    ("full", 1, 0, "float32", 0, "fsdp", "online", "pairs", "prm", 0),
    ("sharded", 0, 1, "autocast", 0, "layers", "cache", "distinct", "prm", 0),
    ("full", 0, 0, "bfloat16", 0, "none", "cache", "tree", "preference", 0),
    ("sharded", 0, 1, "float32", 0, "layers", "online", "tree", "prm", 1),
    ("sharded", 0, 1, "bfloat16", 1, "fsdp", "second", "distinct", "preference", 0),
    ("full", 0, 1, "float32", 0, "fsdp", "cache", "distinct", "preference", 0),
]
EXACT = 1e-6
FACTOR, FLOOR = 4.0, 0.02  # bf16: against fp32, so many times the error of one process under autocast, and a rounding
LOGGED = ("loss", "logps", "margins", "mse")


def case_of(row):
    """(settings of a run on one process, what FSDP adds)."""
    values = dict(zip(KEYS, row, strict=True))
    case = {"tied": bool(values["tied"]), "lora": bool(values["lora"]), "evaluate": bool(values["evaluate"]),
            "weights": "float32" if values["weights"] == "autocast" else values["weights"],
            "bf16": values["weights"] == "autocast", "packing": values["packing"], "objective": values["objective"],
            "reference": "online" if values["reference"] == "online" else "cache",
            "second": values["reference"] == "second" or (values["reference"] == "online" and not values["lora"]),
            "gradient_checkpointing": values["checkpointing"] == "layers", "save_strategy": "steps", "save_steps": 1}
    fsdp = {"state_dict_type": values["state"].upper() + "_STATE_DICT", "cpu_ram_efficient_loading":
            bool(values["ram"]), "activation_checkpointing": values["checkpointing"] == "fsdp"}
    return case, fsdp


def launch(out, cases, processes=2):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*run, str(TESTS / "fsdp_cases.py"), str(out), *map(json.dumps, cases)], text=True, cwd=TESTS,
                          capture_output=True, env=environment(OMP_NUM_THREADS="1"), timeout=500)
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank") or "what():" in line]
    assert done.returncode == 0, "\n".join(said[-20:]) or done.stderr[-4000:]
    return [torch.load(f"{out}{place}.pt", weights_only=True) for place in range(len(cases))]


def differences(found, expected):
    """(norm of the difference, norm) of every tensor of two dicts; what only one of them has is 0 there."""
    for name in found.keys() | expected.keys():
        ours, theirs = (side.get(name) for side in (found, expected))
        if ours is None or theirs is None:
            assert not (theirs if ours is None else ours).any(), name
            continue
        norm = theirs.double().norm().item()
        scale = max(1.0, norm) if theirs.dim() == 0 else norm  # logged numbers: absolute below 1
        yield (ours.double() - theirs.double()).norm().item(), scale


def difference(found, expected):
    """The largest of any tensor, relative to its norm."""
    return max(error / (scale or 1.0) for error, scale in differences(found, expected))


def assert_equal(found, expected, what=None):
    """To 1e-6 together, and to 1e-5 each: a small tensor has more rounding."""
    errors, scales = torch.tensor(list(differences(found, expected)), dtype=torch.float64).T
    assert errors.norm() <= EXACT * scales.norm(), what
    assert difference(found, expected) <= 10 * EXACT, what


def numbers(logs):
    """What decides of log entries, as tensors."""
    return {f"{place} {name}": torch.tensor(value) for place, entry in enumerate(logs) for name, value in entry.items()
            if any(word in name for word in LOGGED) and isinstance(value, float)}


def parts(found):
    """The dicts of tensors that two runs are compared in."""
    return [*found["gradients"], found["weights"], numbers([*found["logs"][:2], found["after"], found["before"]])]


def check(found, one, exact, case, folder):
    """exact: the run of one process in fp32; None where `one` is that."""
    assert (found["world_size"], one["world_size"], len(found["gradients"]), len(one["gradients"])) == (2, 1, 2, 2)
    assert found["local"] < 0.6 * one["local"], "the model is cut"
    assert found["second"] is None or found["second"] < 0.6 * one["second"], "and so is the second one"
    assert "FSDPLlamaDecoderLayer" in found["groups"]
    for place, (ours, theirs) in enumerate(zip(parts(found), parts(one), strict=True)):
        if exact is None:
            assert_equal(ours, theirs, place)
        else:
            truth = parts(exact)[place]
            assert difference(ours, truth) <= FACTOR * difference(theirs, truth) + FLOOR, place
    assert (Path(folder) / "svpo").is_dir()
    if not case["lora"]:
        saved = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        own = {name.removeprefix("lm."): tensor.float() for name, tensor in found["weights"].items()}
        assert all(torch.equal(saved[name], own[name]) for name in saved if name in own)
        assert sum(name in own for name in saved) >= len(saved) - case["tied"]


def test_the_matrix_covers_every_two_settings():
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(range(len(KEYS)), 2)
              for x in VALUES[a] for y in VALUES[b]}
    met = {((a, row[a]), (b, row[b])) for row in MATRIX for a, b in itertools.combinations(range(len(KEYS)), 2)}
    assert met == wanted


def compare(tmp_path, rows):
    cases = [case_of(row) for row in rows]
    sharded = launch(tmp_path / "two", [case | {"fsdp": fsdp} for case, fsdp in cases])
    for place, (row, (case, _), found) in enumerate(zip(rows, cases, sharded, strict=True)):
        one, exact = fsdp_cases.run(str(tmp_path / f"one{place}"), **case), None
        if row[3] != "float32":
            exact = fsdp_cases.run(str(tmp_path / f"exact{place}"), **case | {"bf16": False}, exact=True)
        try:
            check(found, one, exact, case, tmp_path / f"two{place}-run")
        except AssertionError as error:
            raise AssertionError(f"run {place}, {dict(zip(KEYS, row, strict=True))}: {error}") from error


@pytest.mark.slow
def test_two_sharded_processes_equal_one(tmp_path):
    compare(tmp_path, [("sharded", 1, 1, "float32", 0, "fsdp", "cache", "tree", "preference", 1),
                       ("full", 0, 0, "autocast", 1, "none", "online", "tree", "preference", 0)])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on_under_any_set_up(tmp_path, lora):
    """One process, FSDP2 whole, DDP, FSDP2 in parts, one process: a step each, as five steps without a stop."""
    case = {"lora": lora, "tied": not lora, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    straight = fsdp_cases.run(str(tmp_path / "straight"), **case, max_steps=5)
    fsdp_cases.run(str(tmp_path / "first"), **case, max_steps=1)
    before = "first-run/checkpoint-1"
    cases = []
    for step, fsdp in enumerate(({"state_dict_type": "FULL_STATE_DICT"}, None, {
            "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}), start=2):
        cases.append({**case, "max_steps": step, "resume": str(tmp_path / before), "fsdp": fsdp})
        before = f"two{step - 2}-run/checkpoint-{step}"
    launch(tmp_path / "two", cases)
    last = fsdp_cases.run(str(tmp_path / "last"), **case, max_steps=5, resume=str(tmp_path / before))
    assert_equal(last["weights"], straight["weights"])
    assert_equal(last["gradients"][0], straight["gradients"][4])
    losses = [[entry["loss"] for entry in found["logs"] if "loss" in entry] for found in (last, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=EXACT) and len(losses[0]) == 5


@pytest.mark.slow
def test_the_matrix(tmp_path):
    compare(tmp_path, MATRIX)
