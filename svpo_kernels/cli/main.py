"""The command line `svpo`. Heavy imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

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
def score(
    file: Annotated[str, typer.Argument(help="Solutions: any format that `svpo data` reads, or rows of a problem and a "
                                        "list of answers (best of N).")],
    model: Annotated[str, typer.Option(help="A directory or hub name: our own output with its head, or a public PRM.")],
    out: Annotated[Path | None, typer.Option(help="JSONL, one object a solution; default: FILE's name with "
                                             ".scores.jsonl, here.")] = None,
    scorer: Annotated[str, typer.Option(help="auto, head, implicit, qwen (Qwen2.5-Math-PRM), math_shepherd, rlhflow, "
                                        "skywork or judge (yes or no where the verdict begins; no rationale before "
                                        "it).")] = "auto",
    aggregate: Annotated[str, typer.Option(help="One score a solution: min, prod, geomean (prod without its bias "
                                           "against long solutions), mean or last.")] = "min",
    threshold: Annotated[float, typer.Option(help="A step that scores below it is wrong.")] = 0.5,
    fit_on: Annotated[str | None, typer.Option(help="Labelled file: fit the threshold on it, with --recall.")] = None,
    recall: Annotated[float | None, typer.Option(help="Share of the wrong steps that must score below it.")] = None,
    best_of: Annotated[Path | None, typer.Option(metavar="BEST.jsonl", help="Also write each problem's best solution, "
                                                 "and that of a vote weighted by score.")] = None,
    trees: Annotated[Path | None, typer.Option(metavar="OUT_trees.jsonl", help="Also write the file as step trees "
                                               "whose values are the scores: `svpo data` makes pairs of them.")] = None,
    format: Annotated[str | None, typer.Option(help="Name of the format; default: detected from the keys.")] = None,
    value_range: Annotated[tuple[float, float] | None, typer.Option(
        help="Least and greatest value in the file, if not the format's own scale.")] = None,
    on_bad: Annotated[str, typer.Option(help="skip bad rows and count them, or stop with an error.")] = "skip",
    max_path_tokens: Annotated[int | None, typer.Option(help="Steps that end beyond it get no score, and the row "
                                                        "counts as truncated; default: the model's positions.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a pack.")] = 8192,
    packing: Annotated[str, typer.Option(help="auto, tree (solutions of a problem share what they begin with) or "
                                         "distinct (one by one, padded).")] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")] = None,
    step_separator: Annotated[str | None, typer.Option(help="What parts the steps of an answer that is one text; "
                                                       "default: the scorer's own.")] = None,
    judge_prompt: Annotated[Path | None, typer.Option(help="Text file with {problem}, {solution}, {step}.")] = None,
    good_token: Annotated[str | None, typer.Option(help="The judge's token for a right step; default: Yes.")] = None,
    bad_token: Annotated[str | None, typer.Option(help="The judge's token for a wrong step; default: No.")] = None,
    reference: Annotated[str | None, typer.Option(help="Reference model of implicit rewards.")] = None,
    beta: Annotated[float | None, typer.Option(help="Strength of implicit rewards.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's repository run its own code.")] = False,
) -> None:
    """Score every step of every solution with a process reward model, a value head or a judge.

    Scores lie in [0, 1]. Solutions of one problem share the prompt's computation, and only the rows where steps end
    meet the head. A run that was killed goes on when the same command is given again. With labels of first errors
    (ProcessBench) it prints F1, with truth values the accuracy of best of N under every aggregation.

    \b
        svpo score solutions.jsonl --model runs/prm
        svpo score best_of_8.jsonl --model Qwen/Qwen2.5-Math-PRM-7B --aggregate prod --best-of best.jsonl
        svpo score processbench.jsonl --model runs/prm --fit-on held_out.jsonl --recall 0.9
        svpo score trees.jsonl --model runs/prm --trees scored_trees.jsonl
    """
    from ..reasoning.run import ScoreOptions, run_score
    from ..trainer.run import quiet

    with errors_in_one_line():
        quiet()
        separator = None if step_separator is None else step_separator.replace("\\n", "\n").replace("\\t", "\t")
        options = ScoreOptions(
            scorer=scorer, aggregate=aggregate, threshold=threshold, recall=recall, fit_on=fit_on, format=format,
            value_range=value_range, on_bad=on_bad, max_path_tokens=max_path_tokens, dtype=dtype,
            step_separator=separator, judge_prompt=judge_prompt and judge_prompt.read_text(encoding="utf-8"),
            good_token=good_token, bad_token=bad_token, reference=reference, beta=beta)
        run_score(file, model, out, options=options, best_of=best_of, trees=trees, packing=packing,
                  max_tokens=max_tokens, device=device, trust_remote_code=trust_remote_code, say=typer.echo)


ROLLOUT_HELP = """Grow step trees: from prompts, a model and a verifier to the values of steps (MCTS).

CONFIG.yaml holds the settings, any of them may be given again as key=value. What comes out is a file that
`svpo train`, `svpo data` and `svpo report` read: ids as generated, their log-probs, priors, visits and values.

\b
    prompts_file: prompts.jsonl        # {"question": ..., "answer": ...}
    model_name_or_path: run1
    verifier: numeric                  # exact, boxed, code, or package.module:function
    value: rollouts                    # or head: the value head beside the model
    simulations: 32
    children: 4

\b
    svpo rollout rollout.yaml
    svpo rollout rollout.yaml endpoint=http://localhost:8000/v1 model_name_or_path=NAME tokenizer_name_or_path=DIR

A run that was killed goes on with the next prompt when the same command is given again.
"""


def print_rollout_keys(wanted: bool) -> None:
    if wanted:
        from ..reasoning.rollout import describe_keys

        for line in describe_keys():
            typer.echo(line)
        raise typer.Exit


@app.command(help=ROLLOUT_HELP)
def rollout(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="File with the settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top.")] = None,
    keys: Annotated[bool, typer.Option("--keys", callback=print_rollout_keys, is_eager=True,
                                       help="List every key with its default, and end.")] = False,
) -> None:
    from ..reasoning.rollout import known_keys, run_rollout, settings_of
    from ..trainer.run import quiet
    from ..trainer.settings import read_settings

    with errors_in_one_line():
        settings = settings_of(read_settings(config, overrides or [], known=known_keys()))
        quiet()
        run_rollout(settings, say=typer.echo)


@app.command()
def report(
    targets: Annotated[list[str], typer.Argument(metavar="RUN|FILE ...", help="Run directories of `svpo train`, files "
                                                 "of `svpo score`, and data files with steps.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    threshold: Annotated[float, typer.Option(help="A step of a tree that scores less, in [0, 1], is judged wrong; "
                                             "files of `svpo score` bring their own.")] = 0.5,
    limit: Annotated[int, typer.Option(help="Most problems shown; those beyond are counted.")] = 100,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here instead of writing a page.")] = False,
) -> None:
    """Make a page that a person reads: steps coloured by score, the first one judged wrong, trees, curves.

    One HTML file without scripts that needs no network; every text of a model is escaped.

    \b
        svpo report run1 trees.scores.jsonl --out report.html
        svpo report trees.jsonl --terminal --limit 5
    """
    from rich.console import Console

    from ..reasoning.report import read_page, show_page, write_page

    with errors_in_one_line():
        page = read_page(targets, threshold=threshold, limit=limit)
        if terminal:
            show_page(page, Console())
        else:
            for note in page.notes:
                typer.echo(note)
            typer.echo(f"{write_page(page, out)}: {len(page.problems):,} problems, {len(page.runs):,} runs")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Our own output: a directory with a head in svpo/.")],
    out: Annotated[Path, typer.Argument(help="An empty directory, or one that is not there yet.")],
    layout: Annotated[str, typer.Option("--as", help="vllm, mario (Super_MARIO) or llamafactory (ms-swift reads it "
                                        "too).")],
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16, float16.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's repository run its own code.")] = False,
) -> None:
    """Write a model and its head in the layout that others serve, with svpo_head.json beside it.

    vllm: a class head with a hidden layer on Qwen2 becomes Qwen2ForProcessRewardModel (two outputs) or
    Qwen2ForRewardModel (one); a head of one layer the model's own *ForTokenClassification. What a layout cannot hold is
    refused by name.

    \b
        svpo export runs/prm served --as vllm
        svpo export runs/svpo mario --as mario
    """
    from ..reasoning.export import export as write
    from ..trainer.run import quiet

    with errors_in_one_line():
        quiet()
        write(model, out, layout, dtype=dtype, trust_remote_code=trust_remote_code, say=typer.echo)


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


class errors_in_one_line:
    """Errors of settings, data, files and model names end in their message; all others keep their traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, (ValueError, OSError)) and os.environ.get("SVPO_TRACEBACK") != "1":
            typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1)
        return False


def main() -> None:
    app()


if __name__ == "__main__":
    main()
