"""`svpo search`: accuracy and tokens of ways to answer, side by side on the same problems."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm.auto import tqdm

from svpo_kernels.data.formats.ledger import Ledger
from svpo_kernels.trainer.prm_metrics import AGGREGATES
from svpo_kernels.trainer.settings import key

from .generation import Asked, Generation, load_engine, make, read_prompts
from .loading import load_scoring_model
from .score import Runner
from .search import Attempt, Beams, Judge, Outcome, accuracies, fit_stop, outcome, search
from .solutions import Solution
from .verifiers import Verifier, verifier

METHODS = ("greedy", "best_of_n", "early_stop", "beam")


@dataclass
class SearchConfig(Generation):
    """All settings of `svpo search`."""

    prm: str | None = key(None, "Directory of a second model that judges steps; default: the value head beside the "
                          "model.")
    scorer: str = key("auto", "How the second model reads a solution, as in svpo score.")
    methods: str = key("greedy,best_of_n,beam", "With commas between: greedy, best_of_n, early_stop, beam.")
    n: int = key(8, "Answers of best_of_n and early_stop.")
    width: int = key(4, "Attempts that beam keeps.")
    branch: int = key(2, "Steps that beam draws behind each.")
    max_depth: int = key(32, "Most steps of an answer.")
    threshold: float | None = key(None, "early_stop, beam: attempts judged below it, in [0, 1], are stopped.")
    recall: float | None = key(None, "Fit the threshold so that this share of right attempts goes on to its end.")
    fit_file: str | None = key(None, "Held-out prompts that it is fitted on.")
    aggregate: str = key("min", "What an answer's score is: min, prod, geomean, mean or last of its steps'.")
    output_file: str | None = key(None, "JSONL of every attempt, a problem and method a line.")


def settings_of(values: dict[str, Any]) -> SearchConfig:
    """A configuration from flat keys; those of Sampling stand among the others. Raises ValueError naming the key."""
    config = make(SearchConfig, values)
    strange = [name for name in config.methods.split(",") if name.strip() not in METHODS]
    if strange:
        raise ValueError(f"config: methods must be some of {', '.join(METHODS)}, got {strange[0]!r}")
    if (config.recall is None) != (config.fit_file is None):
        raise ValueError("config: a threshold is fitted on held-out prompts (fit_file) for a wanted recall: give both")
    if config.threshold is not None and config.recall is not None:
        raise ValueError("config: threshold must be left out with recall, which fits it")
    if "early_stop" in config.methods and config.threshold is None and config.recall is None:
        raise ValueError("config: early_stop needs a threshold, or recall and fit_file")
    if config.aggregate not in AGGREGATES:
        raise ValueError(f"config: aggregate must be one of {', '.join(AGGREGATES)}, got {config.aggregate!r}")
    if config.endpoint and config.prm is None:
        raise ValueError("config: prm must be given with an endpoint: a server gives no hidden states")
    return config


def run_search(config: SearchConfig, engine: Any = None, judge: Callable[[Any], Judge] | None = None,
               say: Callable[[str], None] = print) -> dict[str, dict[str, float]]:
    """Accuracies and generated tokens by method. engine, judge: None loads what the config names; judge(prompt) judges
    attempts of that prompt, without one the engine's own head does.

    Raises ValueError, FileExistsError and DataError in one line.
    """
    out = None if config.output_file is None else Path(config.output_file)
    if out is not None and out.exists():
        raise FileExistsError(f"{out}: is there already; name another output_file, or remove it")
    check = verifier(config.verifier, unsafe=config.unsafe_verifier)
    asked = read_prompts(config.prompts_file, config.max_prompts)
    held_out = read_prompts(config.fit_file) if config.fit_file else []
    engine = engine if engine is not None else load_engine(config)
    judge = judge if judge is not None else second_model(config)
    if judge is None and engine.head is None:
        raise ValueError(f"config: {config.model_name_or_path} has no head beside it that judges steps: give prm")
    threshold = config.threshold
    if held_out:
        fitted = _run("best_of_n", config, engine, judge, check, held_out, None)
        threshold, reached = fit_stop(fitted, config.recall)
        say(f"threshold {threshold:.6g}: {reached:.1%} of the right attempts at {len(held_out):,} held-out problems go "
            "on")
    found, lines = {}, []
    for method in (name.strip() for name in config.methods.split(",")):
        outcomes = _run(method, config, engine, judge, check, asked, threshold)
        found[method] = _figures(outcomes, config.aggregate)
        lines += [_described(method, each, one) for each, one in zip(asked, outcomes, strict=True)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return found


def _run(method: str, config: SearchConfig, engine: Any, judge: Callable[[Any], Judge] | None, check: Verifier,
         asked: Sequence[Asked], threshold: float | None) -> list[Outcome]:
    own = engine.sampling
    beams = {"greedy": Beams(1, 1, None, config.max_depth), "best_of_n": Beams(config.n, 1, None, config.max_depth),
             "early_stop": Beams(config.n, 1, threshold, config.max_depth),
             "beam": Beams(config.width, config.branch, threshold, config.max_depth)}[method]
    engine.sampling = replace(own, temperature=0.0) if method == "greedy" else own
    outcomes = []
    try:
        for each in tqdm(asked, desc=method, unit="problem", disable=not sys.stderr.isatty()):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + each.number)
            before = engine.spent.generated
            beams.judge = None if judge is None else judge(each.prompt)
            attempts = search(engine, each.prompt, beams, generator)
            outcomes.append(outcome(attempts, each.answer, engine.spent.generated - before, check))
    finally:
        engine.sampling = own
    return outcomes


def second_model(config: SearchConfig) -> Callable[[Any], Judge] | None:
    """The judge of a configuration with `prm`: a model of its own, which reads the attempts' text."""
    if config.prm is None:
        return None
    model = load_scoring_model(config.prm, config.scorer, dtype=config.dtype, device=config.device,
                               trust_remote_code=config.trust_remote_code)
    runner = Runner(model, say=lambda line: None)
    separator = config.sampling.step_separator

    def judge_of(prompt: Any) -> Judge:
        def judge(attempts: Sequence[Attempt]) -> list[float]:
            ledger = Ledger("attempts", warn=False)
            group = [Solution(i, i, 0, prompt, [step.text.removesuffix(separator) for step in attempt.steps],
                              attempt.steps[-1].ended) for i, attempt in enumerate(attempts)]
            scores = [0.0] * len(group)  # what the scorer cannot read, or is too long for it, scores 0
            for scored in runner.score(runner.encode(group, ledger)):
                if not scored.truncated:
                    scores[scored.solution.row] = scored.scores[-1]
            return scores
        return judge

    return judge_of


def _figures(outcomes: list[Outcome], aggregate: str) -> dict[str, float]:
    found = accuracies(outcomes, aggregate)
    tokens = sum(each.generated for each in outcomes)
    solved = found[f"best_by_{aggregate}"] * len(outcomes)
    return {"accuracy": found[f"best_by_{aggregate}"], **found, "tokens_per_problem": tokens / len(outcomes),
            "tokens_per_solved": tokens / solved if solved else float("inf"),
            "stopped": sum(attempt.stopped for each in outcomes for attempt in each.attempts)
            / max(sum(len(each.attempts) for each in outcomes), 1)}


def _described(method: str, asked: Asked, found: Outcome) -> dict[str, Any]:
    return {"row": asked.number, "method": method, "prompt": asked.prompt, "answer": asked.answer,
            "generated": found.generated, "attempts": [
                {"steps": [step.text for step in attempt.steps], "scores": attempt.scores, "stopped": attempt.stopped,
                 "right": right} for attempt, right in zip(found.attempts, found.right, strict=True)]}


def table(found: dict[str, dict[str, float]], aggregate: str) -> Table:
    """A row a method."""
    made = Table(title="svpo search", title_justify="left")
    shown = {"accuracy": f"best by {aggregate}", "majority": "majority", "weighted_majority": "weighted majority",
             "any": "any attempt", "stopped": "stopped", "tokens_per_problem": "tokens a problem",
             "tokens_per_solved": "tokens a solved one"}
    made.add_column("method")
    for heading in shown.values():
        made.add_column(heading, justify="right")
    for method, figures in found.items():
        made.add_row(method, *(f"{figures[key]:,.1f}" if key.startswith("tokens") else f"{figures[key]:.1%}"
                               for key in shown))
    return made
