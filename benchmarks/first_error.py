"""A PRM that finds the first wrong step of held-out problems, beside a value regression on the same labels.

    python -m benchmarks.first_error [SEED ...]     # 3 minutes a seed on one core of a busy machine

Problems are the demo's running sums, steps are verified by computing them. Training rows hold right steps and wrong
ones beside them (PRM800K), held-out ones whole solutions of which half have an error (ProcessBench). Model, data,
learning rate and steps are the same for both; each threshold is 0.5.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from svpo_kernels.data import demo_data as task
from svpo_kernels.reasoning.run import run_score
from svpo_kernels.trainer import load_config
from svpo_kernels.trainer.run import quiet, run_training

TRAIN, HELD_OUT, STEPS = 320, 100, 200
task.HIGHEST, task.LARGEST_OPERAND = 6, 2  # some 30 facts: a tiny model learns them in a minute
WAYS = {"prm": {"objective": "prm"}, "value regression": {
    "preset": "svpo", "preference_weight": 0.0, "rank_weight": 0.0, "value_weight": 1.0, "reference": "none"}}


def labelled(problem: task.Problem, rng: random.Random) -> dict[str, Any]:
    """Every right step of a problem, with wrong ones beside it."""
    steps, value = [], problem.start
    for depth in range(len(problem.operations)):
        found = list(task._candidates(problem, value, depth, rng))
        right = next(i for i, (_, _, is_right) in enumerate(found) if is_right)
        steps.append({"completions": [{"text": text, "rating": 1 if is_right else -1} for text, _, is_right in found],
                      "chosen_completion": right})
        value = found[right][1]
    return {"question": {"problem": problem.question}, "label": {"steps": steps, "finish_reason": "solution"}}


def solution(problem: task.Problem, wrong: int, rng: random.Random) -> dict[str, Any]:
    """A whole solution whose first error is step `wrong` (-1: none); the steps behind it go on from its result."""
    steps, value = [], problem.start
    for depth in range(len(problem.operations)):
        if depth == wrong:
            text, value = task._wrong_step(problem, value, depth, rng)
        else:
            text, value = task._step(problem, depth, value, *problem.operations[depth])
        steps.append(text)
    return {"problem": problem.question, "steps": steps, "label": wrong}


def write(folder: Path, seed: int) -> tuple[Path, Path]:
    rng = random.Random(f"first error {seed}")
    problems = task.make_problems(TRAIN + HELD_OUT, seed)
    train = [labelled(problem, rng) for problem in problems[:TRAIN]]
    held = [solution(problem, -1 if i % 2 else rng.randrange(len(problem.operations)), rng)
            for i, problem in enumerate(problems[TRAIN:])]
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, (train, held), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def run(way: str, seed: int) -> dict[str, Any]:
    """Metrics of `svpo score` on the held-out solutions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held = write(folder, seed)
        tokenizer = task.make_tokenizer(seed)
        config = load_config(None, output_dir=str(folder / "out"), train_file=str(train), pairs_per_step=16,
                             max_steps=STEPS, learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=20,
                             save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=100, seed=seed,
                             packing="tree", max_tokens=4096, **WAYS[way])
        with open(folder / "log", "w", encoding="utf-8") as log:
            from rich.console import Console

            run_training(config, lm=task.make_model(tokenizer, seed), tokenizer=tokenizer, console=Console(file=log),
                         summary=False)
        return run_score(str(held), str(folder / "out"), folder / "scores.jsonl", say=lambda text: None, device="cpu")


def main(seeds: list[int]) -> None:
    quiet()
    torch.set_num_threads(1)
    for seed in seeds:
        for way in WAYS:
            found = run(way, seed)
            print(f"seed {seed}, {way}: F1 {found['prm/f1']:.3f}, first errors {found['prm/error_accuracy']:.3f}, "
                  f"right solutions kept {found['prm/correct_accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
