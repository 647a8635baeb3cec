"""`svpo demo`: the whole loop on running sums, with everything made on the spot, and its compute measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import demo_data, report
from .config import SVPOConfig, load_config
from .measure import Measured, compare
from .run import RunResult, quiet, run_training
from .sampler import TrainData

NAMES = {"pairs": "naive: two sequences a pair", "distinct": "each distinct sequence once", "tree": "packed trees"}


@dataclass(frozen=True)
class Size:
    """How large a demo is: problems, optimizer steps, and trees of the side-by-side measurement."""

    problems: int
    eval_problems: int
    steps: int
    measured_trees: int
    rounds: int


FULL = Size(problems=256, eval_problems=32, steps=240, measured_trees=24, rounds=3)
QUICK = Size(problems=16, eval_problems=4, steps=6, measured_trees=4, rounds=1)


def run_demo(output_dir: str | Path, *, quick: bool = False, steps: int | None = None, seed: int = 0,
             console: Console | None = None) -> dict[str, Any]:
    """Make the task, train, measure, report. Returns {"result": RunResult, "measured": [Measured], "seconds": float}."""
    quiet()
    console = console or Console()
    began = time.perf_counter()
    size = QUICK if quick else FULL
    output_dir = Path(output_dir) / time.strftime("%Y%m%d-%H%M%S")
    console.print(
        "[bold]svpo demo[/bold]: step trees of running sums (Start with 7. Add 5. ...), valued by rollouts; a tiny Llama "
        "learns which step is right, by preference and by value.", highlight=False)
    files = demo_data.write(output_dir / "data", size.problems, seed, eval_problems=size.eval_problems)
    tokenizer = demo_data.make_tokenizer(seed)
    config = demo_config(output_dir, files, steps or size.steps, seed)
    result = run_training(config, lm=demo_data.make_model(tokenizer, seed), tokenizer=tokenizer, console=console)
    console.print("measuring the naive, the distinct and the packed run of the same pairs ...", highlight=False)
    sample = _first_trees(result.trainer.train_data, size.measured_trees)
    measured = compare(result.trainer, sample, max_tokens=4096, rounds=size.rounds)
    seconds = time.perf_counter() - began
    for table in (learned_table(result), measured_table(measured, sample)):
        console.print(table)
    console.print(f"curves: {result.curves}\n{seconds:.0f} seconds in all", highlight=False)
    return {"result": result, "measured": measured, "seconds": seconds}


def demo_config(output_dir: Path, files: Any, steps: int, seed: int) -> SVPOConfig:
    return load_config(
        None, output_dir=str(output_dir), train_file=str(files.train), eval_file=str(files.eval), preset="svpo",
        min_gap=demo_data.MIN_GAP, pairs_per_step=64, max_steps=steps, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), eval_strategy="steps",
        eval_steps=max(1, steps // 4), eval_on_start=True, save_strategy="no", seed=seed, max_tokens="auto",
        weight_decay=0.0,
    )


def _first_trees(data: TrainData, count: int) -> TrainData:
    return TrainData(data.trees[:count], data.pairs[:count], data.sft[:count], data.weights[:count])


def learned_table(result: RunResult) -> Table:
    """Held-out problems, before and after training."""
    history = result.history
    table = Table("held-out problems", "before", "after", title="What was learned", title_justify="left")
    for name, label, form in (("eval_loss", "loss", "{:.3f}"), ("eval_rewards/accuracies", "preference accuracy", "{:.1%}"),
                              ("eval_value/accuracy", "value accuracy (pairs in order)", "{:.1%}"),
                              ("eval_value/mse", "value squared error", "{:.3f}")):
        values = [read(history, name) for read in (report.first, report.last)]
        if values[0] is not None:
            table.add_row(label, *(form.format(value) for value in values))
    return table


def measured_table(rows: list[Measured], data: TrainData) -> Table:
    """Tokens, FLOPs and seconds of forward and backward, each with what it saves against the naive run."""
    naive = rows[0]
    title = f"{data.num_pairs} pairs of {len(data.trees)} trees, forward and backward"
    table = Table("run", "tokens", "saved", "FLOPs", "saved", "seconds", "saved", "loss", "gradient differs by",
                  title=title, title_justify="left")
    for row in rows:
        cells = [NAMES[row.way]]
        for value, base, text in ((row.tokens, naive.tokens, f"{row.tokens:,}"),
                                  (row.flops, naive.flops, report.human(row.flops)),
                                  (row.seconds, naive.seconds, f"{row.seconds:.2f}")):
            cells += [text, "" if row is naive else f"{1 - value / base:.1%}"]
        table.add_row(*cells, f"{row.loss:.5f}", "" if row is naive else f"{row.gradient_error:.1e}")
    return table
