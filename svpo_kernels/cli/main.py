"""The command line `svpo`. Heavy imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import reasoning
from .errors import errors_in_one_line

app = typer.Typer(
    help="Step-level preference and value training on step trees, with shared prefixes computed once.\n\n"
    "Begin with `svpo demo` (no file, no download, minutes on a CPU), look at your own data with `svpo data FILE`, "
    "then train with `svpo train CONFIG.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

TRAIN_HELP = """Train a model on step trees or step pairs.

CONFIG.yaml holds the settings: the keys of SVPOConfig, every argument of svpo_loss and every field of
TrainingArguments (transformers) among them; any of them may be given again as key=value. `svpo train --keys` lists
them. A smallest configuration:

\b
    model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
    train_file: trees.jsonl
    output_dir: run1
    preset: svpo            # or step_dpo, mcts_dpo, rstar, alphamath
    min_gap: 0.6            # pairs whose values, in [-1, 1], differ by more
    pairs_per_step: 64

A run that was killed goes on from its newest complete checkpoint when the same command is given again.

\b
    svpo train run1.yaml
    svpo train run1.yaml learning_rate=5e-7 peft=lora bf16=true
    torchrun --nproc-per-node 8 -m svpo_kernels.cli.main train run1.yaml
"""


def print_keys(wanted: bool) -> None:
    """The keys that are ours, each with its default and what it does; for --keys."""
    if wanted:
        from ..trainer import keys
        from ..trainer.settings import own_keys

        own = own_keys()
        for key, default, text in own:
            typer.echo(f"{key}: {default}\n    {text}")
        typer.echo("Besides these, every field of transformers.TrainingArguments that works here:")
        rows = keys.table()
        for row in rows:
            if row.how == "works" and row.key not in [key for key, *_ in own]:
                typer.echo(f"{row.name}{f' ({row.note})' if row.note else ''}")
        typer.echo("and these do not:")
        for row in rows:
            if row.how != "works":
                typer.echo(f"{row.name} ({row.note}{f'; set {row.key}' if row.key else ''})")
        raise typer.Exit


@app.command(help=TRAIN_HELP)
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="File with the settings of the run; may be left "
                                          "out where KEY=VALUE says all.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top.")] = None,
    keys: Annotated[bool, typer.Option("--keys", callback=print_keys, is_eager=True,
                                       help="List every key with its default, and end.")] = False,
) -> None:
    from ..trainer.settings import read_settings

    overrides = overrides or []
    if "=" in config and not os.path.exists(config):
        config, overrides = None, [config, *overrides]
    with errors_in_one_line():
        read_settings(config, overrides)  # a wrong key is answered before torch is imported
    import torch

    command = launcher(sys.argv[1:], torch.cuda.device_count(), os.environ)
    if command is not None:
        typer.echo(f"{torch.cuda.device_count()} GPUs are visible: starting one process on each", err=True)
        os.execv(command[0], command)
    from ..trainer.config import load_config
    from ..trainer.run import leave_group, run_training

    with errors_in_one_line():
        run_training(load_config(config, overrides))
        leave_group()


def launcher(arguments: list[str], devices: int, environment: os._Environ[str] | dict[str, str]) -> list[str] | None:
    """The command that starts one process a GPU, None when there is one GPU, none, or a launcher already."""
    started = any(name in environment for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION"))
    if devices < 2 or started:
        return None
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
            "--num_processes", str(devices), "--mixed_precision", "no", "--dynamo_backend", "no",
            "-m", "svpo_kernels.cli.main", *arguments]


@app.command()
def data(
    file: Annotated[str, typer.Argument(help="JSON, JSONL or Parquet in any supported format, plain or with gzip, a "
                                        "folder of them, or a hub dataset (owner/name, owner/name:split).")],
    to: Annotated[str | None, typer.Option(metavar="OUT", help="Write the data as OUT, which ends in "
                                           "trees.jsonl, pairs.jsonl or stepwise.jsonl; no report.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer (directory or hub name), to count tokens.")] = None,
    format: Annotated[str | None, typer.Option(help="Name of the format; default: detected from the keys.")] = None,
    value_range: Annotated[tuple[float, float] | None, typer.Option(
        help="Least and greatest value in the file, if not the format's own scale.")] = None,
    on_bad: Annotated[str, typer.Option(help="skip bad rows and report them, or stop with an error.")] = "skip",
    rule: Annotated[str, typer.Option(help="Pair rule of the table by tree: best_worst, top_bottom or all.")] = "all",
    min_gap: Annotated[float, typer.Option(help="Pairs whose values, mapped to [-1, 1], differ by more.")] = 0.0,
    any_kind: Annotated[bool, typer.Option(help="Also pair a last step with one that is not.")] = False,
    max_path_tokens: Annotated[int | None, typer.Option(help="Longest path, as in training.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a pack; default: one pack a tree.")] = None,
    step_separator: Annotated[str, typer.Option(help="Text after every step.")] = "\\n\\n",
) -> None:
    """Show what is in a data file, what training would make of it, and what packing saves.

    Prints the format, the scale of its values, rows kept, dropped and truncated with the reasons, trees, steps and
    pairs under every rule; with a tokenizer also the tokens of the naive pairwise run, of each distinct sequence once,
    and packed.

    \b
        svpo data trees.jsonl --min-gap 0.6
        svpo data trees.jsonl --tokenizer Qwen/Qwen2.5-0.5B-Instruct
        svpo data prm800k.jsonl --to stepwise.jsonl
        svpo data trees.jsonl --to pairs.jsonl --min-gap 0.6
    """
    from rich.console import Console

    from ..data import audit
    from ..data.load import DataError

    separator = step_separator.replace("\\n", "\n").replace("\\t", "\t")
    with errors_in_one_line():
        if to is not None:
            from ..data.convert import convert, target
            from ..data.load import load

            target(to)
            read = load(file, format=format, value_range=value_range, on_bad=on_bad, warn=False)
            typer.echo(read.ledger.summary())
            for line in convert(read, to, rule=rule, min_gap=min_gap, same_kind=not any_kind,
                                step_separator=separator):
                typer.echo(line)
            return
        loaded = None
        if tokenizer is not None:
            from transformers import AutoTokenizer

            from ..trainer.run import quiet

            quiet()
            loaded = AutoTokenizer.from_pretrained(tokenizer)
        result = audit.report(
            file, loaded, format=format, value_range=value_range, on_bad=on_bad, rule=rule, min_gap=min_gap,
            same_kind=not any_kind, max_path_tokens=max_path_tokens, max_tokens=max_tokens,
            step_separator=separator,
        )
        audit.render(result, Console())
        if not result.trees:
            raise DataError("no row is left to train on")


@app.command()
def doctor() -> None:
    """Say what is usable here: versions, devices, and for every op which backend runs and why the others do not."""
    from rich.console import Console

    from .doctor import show

    show(Console())


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="The smallest form, for a smoke test: seconds.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps instead of the demo's own number.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where files, model and curves go.")] = Path("svpo-demo"),
    seed: Annotated[int, typer.Option(help="Seed of task, model and order.")] = 0,
) -> None:
    """Run the whole loop on a problem made on the spot: step trees, training, evaluation, compute measured.

    No file and no download: running sums, a tiny tokenizer and a tiny Llama are made here. Ends in a table (loss,
    preference and value accuracy; tokens, FLOPs and seconds of the naive, distinct and packed runs of the same pairs)
    and the curves as PNG.
    """
    from .demo import run_demo

    with errors_in_one_line():
        run_demo(output_dir, quick=quick, steps=steps, seed=seed)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Only the adopter's question: the log-prob lines of a trainer "
                                        "replaced, Qwen2.5-7B's head, under two minutes.")] = False,
    ops: Annotated[str | None, typer.Option(help="Families, with commas between: linear_step_logps, step_logps, "
                                            "svpo_loss, prm, tree_shapes, trees, training. Default: all.")] = None,
    scale: Annotated[str, typer.Option(help="Sizes: auto, cpu, gpu, or tiny (a smoke test).")] = "auto",
    output_dir: Annotated[Path, typer.Option(help="Where table, JSON and plots go.")] = Path("svpo-bench"),
    compare: Annotated[Path | None, typer.Option(metavar="OLD.json", help="Ratios against an older run; exit code 3 "
                                                 "when a case is worse by more than the noise.")] = None,
    against: Annotated[Path | None, typer.Option("--with", metavar="NEW.json", help="With --compare: compare this file "
                                                 "and run nothing.")] = None,
    noise: Annotated[float | None, typer.Option(help="What --compare allows; default 0.15 (0.005 for "
                                                "--instructions).")] = None,
    instructions: Annotated[bool, typer.Option("--instructions", help="Count the instructions of the CPU kernels "
                                               "(callgrind) instead: no load changes them.")] = False,
) -> None:
    """Race every op against the strongest peers that are installed, with the floor of this machine beside each figure.

    Every answer is checked before it is timed, values and gradients; a peer that is absent or wrong is named. Leaves
    results.json, results.md and plots, and ends in the list of cases in which a peer wins.

    \b
        svpo bench --quick
        svpo bench --ops step_logps,prm
        svpo bench --compare svpo-bench-old/results.json
        svpo bench --instructions --compare instructions.json
    """
    from ..bench.command import run_command

    with errors_in_one_line():
        code = run_command(quick=quick, ops=ops, scale=scale, output_dir=output_dir, old=compare, new=against,
                           noise=noise, instructions=instructions)
        if code:
            raise typer.Exit(code)


app.add_typer(reasoning.app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
