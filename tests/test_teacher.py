"""A PRM as a teacher: the guide's commands as printed, trees -> scores -> pairs -> a trained policy, tiny models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import prm_models
from test_score import make_model, read_rows, write_rows
from tiny_models import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from svpo_kernels.cli import main as cli

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "prm.md"
PROBLEM, SOLUTIONS = prm_models.PROBLEM, prm_models.SOLUTIONS
SMALL = ["use_cpu=true", "max_steps=1", "save_strategy=no", "disable_tqdm=true", "packing=tree", "max_tokens=1024"]


def commands(section):
    text = re.split(f"^#+ {section}\n", GUIDE.read_text(encoding="utf-8"), flags=re.M)[1]
    block = re.search(r"```sh\n(.*?)```", text, flags=re.S)[1]
    return [shlex.split(line.partition("#")[0])[1:] for line in block.splitlines()]


def test_the_guides_path_from_a_prm_to_a_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "runs" / "prm")
    make_model(tmp_path / "DIR", seed=3)
    states = {"0": {"text": ""}} | {f"0.{i}": {"text": steps[0]} for i, steps in enumerate(SOLUTIONS)} | {
        f"0.{i}.{k}": {"text": steps[1]} for i, steps in enumerate(SOLUTIONS) for k, steps in enumerate(SOLUTIONS)}
    write_rows(tmp_path / "trees.jsonl", [{"question": f"{PROBLEM} {i}", "rstar": states} for i in range(3)])
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    said = []
    for words in commands("A PRM as a teacher"):
        result = runner.invoke(cli.app, [*words, *(SMALL if words[0] == "train" else [])])
        assert result.exit_code == 0, result.output
        said.append(result.output)
    scored = read_rows(tmp_path / "trees.scores.jsonl")
    filled = read_rows(tmp_path / "scored_trees.jsonl")
    values = [state["q_value"] for row in filled for tag, state in row["rstar"].items() if tag != "0"]
    assert len(values) == 36 and all(-1 <= value <= 1 for value in values)
    by_text = {tuple(line["steps"]): 2 * line["scores"][-1] - 1 for line in scored if line["row"] == 1}
    pairs = read_rows(tmp_path / "scored_pairs.jsonl")
    assert pairs and "3 rows read, 3 kept" in said[0] and "rewards/accuracies" in said[2]
    second = [pair for pair in pairs if pair["initial_reason_steps"] and pair["prompt"] == f"{PROBLEM} 0"]
    assert second
    for pair in second:  # a chosen step is the one that the PRM scores higher, by more than the gap
        first = pair["initial_reason_steps"].strip()
        gap = by_text[first, pair["chosen"].strip()] - by_text[first, pair["rejected"].strip()]
        assert gap > 0.2
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "policy")


def test_a_prm_trains_with_nothing_else_set(tmp_path, monkeypatch):
    """The guide's first commands, but for where to run and for how long: the loss falls, and svpo score reads it."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "DIR")
    for path in (tmp_path / "DIR" / "svpo").iterdir():
        path.unlink()
    rows = [{"question": {"problem": f"{PROBLEM} {i}"}, "label": {"finish_reason": "solution", "steps": [
        {"completions": [{"text": good, "rating": 1}, {"text": bad, "rating": -1}], "chosen_completion": 0}
        for good, bad in zip(SOLUTIONS[0], SOLUTIONS[1] + SOLUTIONS[2][-1:], strict=True)]}} for i in range(4)]
    write_rows(tmp_path / "prm800k.jsonl", rows)
    train, score = [words for words in commands("Process reward models") if words][:2]
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    result = runner.invoke(cli.app, [*train, "use_cpu=true", "disable_tqdm=true", "num_train_epochs=30"])
    assert result.exit_code == 0, result.output
    losses = [json.loads(line) for line in (tmp_path / "svpo-output" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses
    write_rows(tmp_path / "solutions.jsonl", [{"problem": PROBLEM, "steps": SOLUTIONS[0], "label": -1},
                                              {"problem": PROBLEM, "steps": SOLUTIONS[2][:2], "label": 1}])
    result = runner.invoke(cli.app, score)
    assert result.exit_code == 0, result.output
    assert "first errors of 2 solutions" in result.output
