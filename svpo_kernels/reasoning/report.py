"""`svpo report`: solutions, step trees and runs as one HTML page that needs no script and no network, or in a terminal.

    scores (`svpo score`), data files, run directories -> Page -> report.html

What models and files say is hostile text: the template escapes all of it, and the page forbids itself every script.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.text import Text

from svpo_kernels.data.formats import DataError, Record
from svpo_kernels.data.formats.record import printable
from svpo_kernels.data.load import load
from svpo_kernels.trainer.prm_metrics import first_below
from svpo_kernels.trainer.report import METRICS, draw_curves, read_metrics, summary_rows
from svpo_kernels.trees.tree import node_path

from .drawing import Drawing, TreeNode, choose, draw

DRAWN = 400  # nodes of the largest tree that is drawn
OPEN = 8  # solutions of a problem that are shown at once; the rest of the page's unfold, a terminal's are counted
TEMPLATE = "report.html"


@dataclass
class Step:
    """score in [0, 1], None: not known; wrong: the first of its solution that is judged wrong; label: whether the data
    call it right."""

    text: str
    score: float | None
    wrong: bool = False
    label: float | None = None


@dataclass
class Solution:
    """steps with their scores. score: of the whole, None: not known. correct: whether its answer is right."""

    steps: list[Step]
    score: float | None = None
    correct: bool | None = None
    answer: str | None = None
    rank: int | None = None


@dataclass
class Problem:
    """A prompt with its solutions, and the tree they make, where there is one that can be drawn."""

    prompt: str
    solutions: list[Solution] = field(default_factory=list)
    tree: Drawing | None = None
    note: str = ""


@dataclass
class Run:
    """A training run: rows of (metric, first, last) and the curves as a PNG in base64."""

    name: str
    rows: list[tuple[str, str, str]]
    curves: str


@dataclass
class Page:
    title: str
    threshold: float
    problems: list[Problem] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_page(targets: Sequence[str | os.PathLike], *, threshold: float = 0.5, limit: int = 100) -> Page:
    """What the page of these files and run directories shows. limit: most problems; a note counts those beyond.

    threshold: a step of a tree whose score, (q + 1) / 2, lies below is judged wrong; files of `svpo score` bring their
    own. Raises DataError, FileNotFoundError and ValueError in one line.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"svpo report: threshold must be in [0, 1], got {threshold}")
    if limit < 1:
        raise ValueError(f"svpo report: limit must be at least 1, got {limit}")
    page = Page(", ".join(Path(target).name for target in targets), threshold)
    for target in map(Path, targets):
        if (target / METRICS).is_file():
            page.runs.append(_run(target))
        elif not target.exists():
            raise FileNotFoundError(f"{target}: no such file or run directory")
        elif (lines := _score_lines(target)) is not None:
            page.problems += _scored(lines)
        else:
            data = load(target, warn=False)
            page.notes.append(data.ledger.summary())
            page.problems += [_problem(record, threshold) for record in data.records]
    if len(page.problems) > limit:
        beyond = len(page.problems) - limit
        page.notes.append(f"{beyond:,} of {len(page.problems):,} problems are left out: the limit is {limit}")
        del page.problems[limit:]
    if not page.problems and not page.runs:
        raise DataError(f"{page.title}: nothing to show")
    return page


# -- reading ----------------------------------------------------------------------------------------------------------


def _score_lines(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that `svpo score` wrote; None for any other."""
    if path.suffix != ".jsonl":
        return None
    with path.open(encoding="utf-8") as file:
        try:
            head = json.loads(next(file, "null"))
            if not (isinstance(head, dict) and {"steps", "scores", "first_below", "threshold"} <= set(head)):
                return None
            return [head, *map(json.loads, file)]
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            return None


def _scored(lines: list[dict[str, Any]]) -> list[Problem]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["prompt"], line["row"] if "nodes" in line else None]), []).append(line)
    problems = []
    for group in groups.values():
        problem = Problem(_prompt(group[0]["prompt"]))
        nodes: dict[int, TreeNode] = {}
        for line in sorted(group, key=lambda line: line.get("rank", 0)):
            scores = [*line["scores"], *[None] * (len(line["steps"]) - len(line["scores"]))]
            labels = [*line.get("labels", []), *[None] * len(line["steps"])]
            steps = [Step(text, score, i == line["first_below"], label)
                     for i, (text, score, label) in enumerate(zip(line["steps"], scores, labels, strict=False))]
            problem.solutions.append(Solution(steps, line["score"], line.get("correct"), line.get("answer"),
                                              line.get("rank")))
            path = [-1, *line.get("nodes", [])]
            for step, parent, node in zip(steps, path, path[1:], strict=False):
                nodes.setdefault(node, TreeNode(parent, step.text, step.score))
        _draw(problem, _renumbered(nodes))
        problems.append(problem)
    return problems


def _renumbered(nodes: dict[int, TreeNode]) -> list[TreeNode]:
    place = {-1: -1} | {node: i for i, node in enumerate(nodes)}
    for node in nodes.values():
        node.parent = place[node.parent]
    return list(nodes.values())


def _problem(record: Record, threshold: float) -> Problem:
    """A record's tree, and its paths from the prompt to a leaf, the highest last value first."""
    nodes = [TreeNode(node.parent, node.text or f"{len(node.token_ids or ())} ids without text",
                      None if node.q_value is None else (node.q_value + 1) / 2, node.visits, node.prior, node.terminal)
             for node in record.nodes]
    problem, inner = Problem(_prompt(record.prompt)), {node.parent for node in nodes}
    for leaf in (i for i in range(len(nodes)) if i not in inner):
        path = [nodes[i] for i in node_path(record.nodes, leaf)]
        wrong = first_below([1.0 if node.score is None else node.score for node in path], threshold)
        steps = [Step(node.text, node.score, i == wrong) for i, node in enumerate(path)]
        problem.solutions.append(Solution(steps, steps[-1].score))
    problem.solutions.sort(key=lambda solution: -1.0 if solution.score is None else solution.score, reverse=True)
    _draw(problem, nodes)
    return problem


def _draw(problem: Problem, nodes: list[TreeNode]) -> None:
    parents = [node.parent for node in nodes]
    if len(set(parents)) == len(parents):
        return  # a chain is no tree
    if len(nodes) > DRAWN:
        problem.note = f"The tree has {len(nodes):,} steps and is not drawn; up to {DRAWN} are."
        return
    choose(nodes)
    problem.tree = draw(nodes)


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n\n".join(f"{message.get('role')}: {_content(message.get('content'))}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _run(folder: Path) -> Run:
    history = read_metrics(folder)
    with tempfile.TemporaryDirectory() as scratch:
        picture = draw_curves(history, Path(scratch) / "curves.png", folder.name).read_bytes()
    return Run(folder.name, summary_rows(history), base64.b64encode(picture).decode())


# -- writing ----------------------------------------------------------------------------------------------------------


def write_page(page: Page, path: str | os.PathLike) -> Path:
    """The page as one HTML file, whole or not at all."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    text = environment.get_template(TEMPLATE).render(page=page, open=OPEN)
    partial.write_text(text, encoding="utf-8", errors="replace")  # half of a surrogate pair is no text
    os.replace(partial, path)
    return path


def show_page(page: Page, console: Console) -> None:
    """The same in a terminal: a line a step, its score in front, the first one judged wrong marked."""
    for note in page.notes:
        console.print(Text(note, style="dim"))
    for run in page.runs:
        console.print(Text(run.name, style="bold"))
        for name, begin, end in run.rows:
            console.print(Text(f"  {name}: {begin} -> {end}"))
    for i, problem in enumerate(page.problems, 1):
        console.print(Text(f"\n{i}. {_line(problem.prompt)}", style="bold"), no_wrap=True, overflow="ellipsis")
        for solution in problem.solutions[:OPEN]:
            known = "" if solution.correct is None else ", right" if solution.correct else ", wrong"
            console.print(Text(f"  {_number(solution.score)}{known}"))
            for step in solution.steps:
                mark = Text("first judged wrong: " if step.wrong else "", style="bold red")
                line = Text(f"    {_number(step.score)} ", style=_color(step.score)) + mark + Text(_line(step.text))
                console.print(line, no_wrap=True, overflow="ellipsis")
        if len(problem.solutions) > OPEN:
            console.print(Text(f"  and {len(problem.solutions) - OPEN:,} more solutions", style="dim"))


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def _number(score: float | None) -> str:
    return " -- " if score is None else f"{score:.2f}"


def _color(score: float | None) -> str:
    return "dim" if score is None else "green" if score >= 2 / 3 else "yellow" if score >= 1 / 3 else "red"
