"""`svpo rollout`, `score`, `search`, `report`, `export`: trees of a model, steps judged, answers found, a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import errors_in_one_line

app = typer.Typer()

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
        from ..reasoning.generation import describe_keys
        from ..reasoning.rollout import RolloutConfig

        for line in describe_keys(RolloutConfig):
            typer.echo(line)
        raise typer.Exit


@app.command(help=ROLLOUT_HELP)
def rollout(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="File with the settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top.")] = None,
    keys: Annotated[bool, typer.Option("--keys", callback=print_rollout_keys, is_eager=True,
                                       help="List every key with its default, and end.")] = False,
) -> None:
    from ..reasoning.generation import known_keys
    from ..reasoning.rollout import RolloutConfig, run_rollout, settings_of
    from ..trainer.run import quiet
    from ..trainer.settings import read_settings

    with errors_in_one_line():
        settings = settings_of(read_settings(config, overrides or [], known=known_keys(RolloutConfig)))
        quiet()
        run_rollout(settings, say=typer.echo)


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


@app.command()
def search(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="File with the settings.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top.")] = None,
) -> None:
    """Answer prompts by step-level search, and say which way is right how often for how many tokens.

    \b
        prompts_file: prompts.jsonl          # {"question": ..., "answer": ...}
        model_name_or_path: run1             # its value head judges every step; or prm: DIR, a second model
        methods: greedy,best_of_n,early_stop,beam
        n: 8                                 # answers of best_of_n and early_stop
        width: 4                             # attempts that beam keeps, branch: 2 steps drawn behind each
        recall: 0.95                         # early_stop: right attempts that are not stopped,
        fit_file: held_out.jsonl             # fitted on held-out prompts

    best_of_n chooses by aggregate, majority and weighted majority; early_stop is the same with attempts given up at the
    first step that is judged below the threshold.
    """
    from rich.console import Console

    from ..reasoning.generation import known_keys
    from ..reasoning.search_run import SearchConfig, run_search, settings_of, table
    from ..trainer.run import quiet
    from ..trainer.settings import read_settings

    with errors_in_one_line():
        settings = settings_of(read_settings(config, overrides or [], known=known_keys(SearchConfig)))
        quiet()
        Console().print(table(run_search(settings, say=typer.echo), settings.aggregate))


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
