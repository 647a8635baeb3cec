"""One run of `svpo score`: read, score, write as it goes, go on where it was killed, and say what came out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from svpo_kernels.data.convert import convert
from svpo_kernels.data.formats import DataError
from svpo_kernels.data.formats import tables as hub
from svpo_kernels.trainer import prm_metrics
from svpo_kernels.trainer.resume import file_digest

from . import choose
from .lines import Lines, as_line
from .loading import ScoringModel, load_scoring_model, local
from .score import Runner, Scored
from .solutions import Problems, read_problems

CHUNK = 4  # packs' worth of tokens that are planned, run and written together


@dataclass
class ScoreOptions:
    """What decides the lines of a run: those of a run that was killed are kept only under the same."""

    scorer: str = "auto"
    aggregate: str = "min"
    threshold: float = 0.5
    recall: float | None = None
    fit_on: str | None = None
    format: str | None = None
    value_range: tuple[float, float] | None = None
    on_bad: str = "skip"
    max_path_tokens: int | None = None
    dtype: str = "auto"
    step_separator: str | None = None
    judge_prompt: str | None = None
    good_token: str | None = None
    bad_token: str | None = None
    beta: float | None = None
    reference: str | None = None

    def for_scorer(self) -> dict[str, Any]:
        named = {"step_separator": self.step_separator, "prompt": self.judge_prompt, "good": self.good_token,
                 "bad": self.bad_token, "beta": self.beta, "reference": self.reference}
        return {key: value for key, value in named.items() if value is not None}


def run_score(file: str, model: str | ScoringModel, out: str | os.PathLike | None = None, *,
              options: ScoreOptions | None = None, best_of: str | os.PathLike | None = None,
              trees: str | os.PathLike | None = None, packing: str = "auto", max_tokens: int = 8192,
              device: str | None = None, trust_remote_code: bool = False,
              say: Callable[[str], None] = print) -> dict[str, Any]:
    """Score every solution of a file and write one JSON object a solution to `out` (default: FILE's name with
    .scores.jsonl, in the working directory).

    best_of: also write the best solution of each problem, and the one that a vote weighted by score takes. trees: also
    write the file as step trees whose values are the scores. A run that was killed goes on behind its last whole line
    when it is started again with the same options; `out` appears when it is complete.

    Returns the summary: counts, first-error metrics where first errors are known, best-of-N accuracies where truth is.
    Raises ValueError, FileExistsError, DataError in one line.
    """
    options = options or ScoreOptions()
    if options.aggregate not in prm_metrics.AGGREGATES:
        raise ValueError(f"svpo score: aggregate must be one of {', '.join(prm_metrics.AGGREGATES)}, got "
                         f"{options.aggregate!r}")
    if (options.fit_on is None) != (options.recall is None):
        raise ValueError("svpo score: a threshold is fitted on labels (fit_on) for a wanted recall: give both or none")
    out = Path(out) if out is not None else Path(f"{Path(file).name.partition('.')[0]}.scores.jsonl")
    for path in (out, best_of, trees):
        if path is not None and Path(path).exists():
            raise FileExistsError(f"{path}: is there already; name another file, or remove it")
    if isinstance(model, str):
        identity = model_identity(model)
        model = load_scoring_model(model, options.scorer, dtype=options.dtype, device=device,
                                   trust_remote_code=trust_remote_code, options=options.for_scorer())
    else:
        identity = {"given": type(model.lm).__name__}
    for line in model.said:
        say(line)
    runner = Runner(model, max_tokens, options.max_path_tokens, packing, say)
    if options.fit_on is not None:
        options.threshold = fitted_threshold(runner, options, say)
    read = {"format": options.format, "value_range": options.value_range, "on_bad": options.on_bad}
    problems = read_problems(file, model.scorer, **read)
    if trees is not None and problems.data is None:
        raise DataError(f"{file}: rows of a problem and its answers make no trees; --trees needs a file of "
                        "solutions or trees")
    source = file if hub.hub_name(file) else file_digest(file)
    lines = Lines(out, "svpo score", {"file": source, "model": identity, **asdict(options)})
    _write(lines, runner, problems, options, say)
    return _summary(lines.rows, runner, problems, options, file, out, best_of, trees, say)


def model_identity(model: str) -> dict[str, Any]:
    """Name, sizes and times of a model's files: what tells one from another without reading it."""
    folder = Path(local(model))
    files = sorted(path for path in (*folder.iterdir(), *(folder / "svpo").glob("*")) if path.is_file())
    return {"name": model, "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}}


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(lines: Lines, runner: Runner, problems: Problems, options: ScoreOptions, say: Callable[[str], None]) -> None:
    """The lines of all solutions; what a killed run left is kept, all else scored and appended, chunk by chunk."""
    done = {(line["row"], line["solution"]) for line in lines.rows}
    if lines.rows:
        say(f"{len(lines.rows):,} solutions were scored before: going on behind them")
    with lines:
        bar = tqdm(total=len(problems.solutions), desc="solutions", disable=not sys.stderr.isatty())
        for group, encoded in _chunks(runner, problems, options):
            fresh = [pair for pair in encoded if (pair[0].row, pair[0].index) not in done]
            lines.add([_described(scored, options) for scored in runner.score(fresh)] if fresh else [])
            bar.update(group)
        bar.close()
    if not lines.rows:
        lines.partial.unlink()
        raise DataError(f"no solution was scored: {problems.ledger.summary()}")
    for group in _by_problem(lines.rows):
        for rank, line in enumerate(sorted(group, key=lambda line: -line["score"]), 1):
            line["rank"] = rank
    lines.finish()


def _chunks(runner: Runner, problems: Problems, options: ScoreOptions) -> Iterator[tuple[int, list]]:
    """(solutions read, encoded ones): whole problems, about CHUNK packs of tokens together."""
    read, encoded, tokens = 0, [], 0
    for group in problems.groups:
        found = runner.encode(group, problems.ledger, options.on_bad)
        read, encoded = read + len(group), encoded + found
        tokens += sum(max(reading.positions[-1] + 1 for reading in readings) for _, readings in found)
        if tokens >= CHUNK * runner.max_tokens:
            yield read, encoded
            read, encoded, tokens = 0, [], 0
    if read:
        yield read, encoded


def _described(scored: Scored, options: ScoreOptions) -> dict[str, Any]:
    solution, scores = scored.solution, scored.scores
    every = prm_metrics.aggregates(scores)
    line = {"row": solution.row, "solution": solution.index, "id": solution.id, "prompt": solution.prompt,
            "steps": solution.steps, "scores": scores, "aggregates": every, "score": every[options.aggregate],
            "first_below": prm_metrics.first_below(scores, options.threshold), "threshold": options.threshold}
    if scored.truncated:
        line["truncated"] = scored.truncated
    more = {"first_error": solution.first_error, "correct": solution.correct, "answer": solution.answer}
    line |= {key: value for key, value in more.items() if value is not None}
    if any(label is not None for label in solution.labels):
        line["labels"] = solution.labels
    if solution.nodes is not None:
        line["nodes"] = solution.nodes
    return {key: value for key, value in line.items() if value is not None}


# -- thresholds -------------------------------------------------------------------------------------------------------


def fitted_threshold(runner: Runner, options: ScoreOptions, say: Callable[[str], None]) -> float:
    """The threshold below which `recall` of the wrong steps of a labelled file score."""
    problems = read_problems(options.fit_on, runner.model.scorer, on_bad=options.on_bad)
    scores, wrong, seen = [], [], set()
    for _, encoded in _chunks(runner, problems, options):
        for scored in runner.score(encoded) if encoded else ():
            solution = scored.solution
            nodes = solution.nodes or list(range(len(solution.steps)))
            for score, label, node in zip(scored.scores, solution.labels, nodes, strict=False):
                key = (solution.row, node if solution.nodes else (solution.index, node))
                if label is not None and label != 0.5 and key not in seen:
                    scores.append(score)
                    wrong.append(label < 0.5)
                    seen.add(key)
    threshold = choose.fit_threshold(scores, wrong, options.recall)
    caught = [is_wrong for score, is_wrong in zip(scores, wrong, strict=True) if score < threshold]
    say(problems.ledger.summary())
    say(f"threshold {threshold:.6g}: below it score {sum(caught)} of {sum(wrong)} wrong steps of {options.fit_on} and "
        f"{len(caught) - sum(caught)} of {len(wrong) - sum(wrong)} right ones")
    return threshold


# -- what came out ----------------------------------------------------------------------------------------------------


def _summary(lines: list[dict[str, Any]], runner: Runner, problems: Problems, options: ScoreOptions, file: str,
             out: Path, best_of: Any, trees: Any, say: Callable[[str], None]) -> dict[str, Any]:
    ledger, counts = problems.ledger, runner.counts
    found: dict[str, Any] = {"read": ledger.read, "kept": ledger.kept, "truncated": ledger.truncated,
                             "dropped": ledger.dropped, "solutions": len(lines), "threshold": options.threshold,
                             "tokens": counts.tokens, "tokens_alone": counts.alone, "tokens_again": counts.again}
    say(ledger.summary())
    say(f"{out}: {len(lines):,} solutions, {sum(len(line['scores']) for line in lines):,} steps; {counts.tokens:,} "
        f"tokens run, {counts.alone:,} with one run a solution, {counts.again:,} with one run a step")
    known = [(line["scores"], line["first_error"]) for line in lines if "first_error" in line]
    if known:
        metrics = prm_metrics.first_error_metrics(known, options.threshold)
        found |= metrics
        say(f"first errors of {len(known):,} solutions at threshold {options.threshold:.6g}: "
            + ", ".join(f"{name.removeprefix('prm/')} {value:.4f}" for name, value in metrics.items()))
    groups = _by_problem(lines)
    accuracies = prm_metrics.best_of_accuracy(
        [(line["aggregates"], line.get("correct")) for line in group] for group in groups)
    votes = _vote_accuracy(groups)
    if accuracies:
        found["best_of"] = accuracies | ({"weighted_majority": votes} if votes is not None else {})
        say("best of N, share of problems that are right: "
            + ", ".join(f"{name} {value:.4f}" for name, value in found["best_of"].items()))
    if best_of is not None:
        _write_best(Path(best_of), groups)
        say(f"{best_of}: the best solution of {len(groups):,} problems by {options.aggregate}")
    if trees is not None:
        for line in fill_trees(problems, lines, trees):
            say(line)
    return found


def _by_problem(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(repr(line["prompt"]), []).append(line)
    return list(groups.values())


def _vote_accuracy(groups: list[list[dict[str, Any]]]) -> float | None:
    """Share of problems whose answer with the largest sum of scores is right, where answers and truth are known."""
    hits = []
    for group in groups:
        if len(group) < 2 or any("correct" not in line for line in group):
            continue
        chosen = choose.weighted_majority([line.get("answer") for line in group], [line["score"] for line in group])
        hits.append(chosen is not None and group[chosen]["correct"])
    answered = any("answer" in line for group in groups for line in group)
    return sum(hits) / len(hits) if hits and answered else None


def _write_best(path: Path, groups: list[list[dict[str, Any]]]) -> None:
    kept = ("row", "solution", "id", "prompt", "steps", "score", "answer", "correct")
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            scores = [line["score"] for line in group]
            winner = group[prm_metrics.best(scores)]
            vote = choose.weighted_majority([each.get("answer") for each in group], scores)
            chosen = {key: winner[key] for key in kept if key in winner} | {"of": len(group)}
            if vote is not None:
                chosen["weighted_majority"] = {"solution": group[vote]["solution"], "answer": group[vote]["answer"]}
            file.write(as_line(chosen))


def fill_trees(problems: Problems, lines: list[dict[str, Any]], path: str | os.PathLike) -> list[str]:
    """Write the records as step trees whose values are the scores, 2p - 1; steps without a score have none."""
    scores: dict[tuple[int, int], float] = {}
    for line in lines:
        for node, score in zip(line["nodes"], line["scores"], strict=False):
            scores.setdefault((line["row"], node), score)
    for record in problems.data.records:
        record.pairs = None  # the values choose them now
        for i, node in enumerate(record.nodes):
            score = scores.get((record.row, i))
            node.q_value = None if score is None else 2 * score - 1
    return convert(problems.data, path)
