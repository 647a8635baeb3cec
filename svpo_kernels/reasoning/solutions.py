"""What is scored: solutions of problems, read from any format of `data/` or from rows of one problem and N answers.

Best-of-N rows have a problem under `question`, `problem`, `prompt` or `query` and a list of texts (or of lists of
steps) under one of `ANSWERS`; where they are there, truth values and final answers of each are taken along.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svpo_kernels.data.formats import DataError, Record, Row, RowProblem, detect
from svpo_kernels.data.formats.files import iterate_rows
from svpo_kernels.data.formats.ledger import Ledger
from svpo_kernels.data.formats.record import RawRow, need_text, with_template_fields
from svpo_kernels.data.load import DataFile, load
from svpo_kernels.trainer.prm_metrics import first_error
from svpo_kernels.trees.tree import node_path

from .scorers import Scorer

PROBLEM = ("question", "problem", "prompt", "query")
ANSWERS = ("responses", "response", "solutions", "completions", "samples", "outputs", "answers", "code")
TRUTH = ("correct", "is_correct", "correctness", "score", "scores", "report", "labels")
FINAL = ("pred", "preds", "predictions", "final_answers", "extracted_answers")
RIGHT = ("gt", "answer", "ground_truth", "final_answer", "reference")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


@dataclass
class Solution:
    """One solution of one problem. nodes: its path in the record's tree. labels: of its steps, in [0, 1], None: not
    known. first_error: the index of its first wrong step, -1 for none, None: not known. correct: whether its answer is
    right; answer: what it is."""

    row: int
    line: int
    index: int
    prompt: Any
    steps: list[str]
    terminal: bool = True
    separator: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    nodes: list[int] | None = None
    labels: list[float | None] = field(default_factory=list)
    first_error: int | None = None
    correct: bool | None = None
    answer: str | None = None
    id: Any = None


@dataclass
class Problems:
    """groups: solutions by problem, in the order in which problems came. data: the file as `load` read it, None for
    best-of-N rows."""

    groups: list[list[Solution]]
    ledger: Ledger
    data: DataFile | None

    @property
    def solutions(self) -> list[Solution]:
        return [solution for group in self.groups for solution in group]


def read_problems(path: str | Path, scorer: Scorer, *, format: str | None = None,
                  value_range: Sequence[float] | None = None, on_bad: str = "skip") -> Problems:
    """The solutions of a file, by problem. scorer: its separator parts answers that are one text.

    Raises DataError as `load` does.
    """
    if format is None and _is_best_of(path):
        solutions, ledger = _best_of(path, scorer, on_bad)
        data = None
    else:
        data = load(path, format=format, value_range=value_range, on_bad=on_bad, warn=False)
        ledger, solutions = data.ledger, []
        for record in data.records:
            try:
                solutions += _paths(record)
            except RowProblem as problem:
                ledger.leave_out("dropped", record, problem.kind, problem.detail, on_bad)
    if not solutions:
        raise DataError(f"no solution to score: {ledger.summary()}")
    groups: dict[str, list[Solution]] = {}
    for solution in solutions:
        groups.setdefault(repr((solution.prompt, solution.template_kwargs)), []).append(solution)
    return Problems(list(groups.values()), ledger, data)


# -- records ----------------------------------------------------------------------------------------------------------


def _paths(record: Record) -> list[Solution]:
    """Every path of a record from the prompt to a leaf."""
    if record.completions is not None:
        raise RowProblem("no steps", f"rows of whole messages hold no steps to score ({record.format})")
    if record.prompt_ids is not None and any(node.text is None for node in record.nodes):
        raise RowProblem("no text", "the row's steps are ids without text")
    inner = {node.parent for node in record.nodes}
    found = []
    for leaf in (i for i in range(len(record.nodes)) if i not in inner):
        path = node_path(record.nodes, leaf)
        labels = [None if (q := record.nodes[i].q_value) is None else (q + 1) / 2 for i in path]
        found.append(Solution(
            record.row, record.line, len(found), record.prompt, [record.nodes[i].text for i in path],
            record.nodes[leaf].terminal, record.step_separator, record.template_kwargs, path, labels,
            record.meta.get("first_error", first_error(labels)), record.meta.get("final_answer_correct"),
            final_answer(record.nodes[leaf].text), record.meta.get("id")))
    return found


# -- rows of one problem and N answers --------------------------------------------------------------------------------


def _is_best_of(path: str | Path) -> bool:
    """Whether the first readable row is of no format of `data/` and holds a problem and a list of answers."""
    for raw in iterate_rows(path):
        if raw.problem is not None:
            continue
        try:
            return detect(raw.value) is None and _answers_key(raw.value) is not None
        except RowProblem:
            return False
    return False


def _answers_key(row: dict[str, Any]) -> str | None:
    if not any(isinstance(row.get(key), str | list) for key in PROBLEM):
        return None
    return next((key for key in ANSWERS if isinstance(row.get(key), list) and row[key]
                 and all(isinstance(each, str | list) for each in row[key])), None)


def _best_of(path: str | Path, scorer: Scorer, on_bad: str) -> tuple[list[Solution], Ledger]:
    ledger = Ledger(str(path), warn=False)
    solutions: list[Solution] = []
    for raw in iterate_rows(path, ledger.facts):
        ledger.read += 1
        try:
            if raw.problem is not None:
                raise raw.problem
            row = Row(raw.value)
            found, bad = _best_of_row(row, raw, scorer)
            solutions += found
            ledger.outcome[raw.row] = "kept"
            ledger.unread.update(set(row.unread()))
            if bad:
                what = f"{len(bad)} of {len(bad) + len(found)} answers left out; the first: {bad[0].detail}"
                ledger.record("truncated", raw.row, raw.line, bad[0].kind, what, on_bad)
        except RowProblem as problem:
            ledger.record("dropped", raw.row, raw.line, problem.kind, problem.detail, on_bad)
    return solutions, ledger


def _best_of_row(row: Row, raw: RawRow, scorer: Scorer) -> tuple[list[Solution], list[RowProblem]]:
    key = _answers_key(row)
    if key is None:
        raise RowProblem("missing key", f"expected a problem ({', '.join(PROBLEM)}) and a list of answers "
                         f"({', '.join(ANSWERS)}), got the keys {', '.join(map(str, row)) or 'none'}")
    for same in ("query", "code"):  # the sample's second spellings of problem and answers
        row.seen.add(same)
    answers = row[key]
    problem = row[next(name for name in PROBLEM if isinstance(row.get(name), str | list))]
    prompt = Record(need_text(problem, "the problem") if isinstance(problem, str) else problem, [])
    with_template_fields(prompt, row)
    truth = _beside(row, TRUTH, bool, len(answers), key)
    final = _beside(row, FINAL, str, len(answers), key)
    right = next((str(row[name]) for name in RIGHT if isinstance(row.get(name), str | int | float)), None)
    found, bad = [], []
    for i, answer in enumerate(answers):
        try:
            steps = _steps(answer, f"{key}[{i}]", scorer)
        except RowProblem as found_bad:
            bad.append(found_bad)
            continue
        said = final[i] if final else final_answer(steps[-1] if steps[-1].strip() else steps[-2])
        correct = truth[i] if truth else None if right is None or said is None else same_answer(said, right)
        found.append(Solution(raw.row, raw.line, i, prompt.prompt, steps, correct=correct, answer=said,
                              template_kwargs=prompt.template_kwargs, id=row.get("id", row.get("idx"))))
    if not found:
        raise bad[0]
    return found, bad


def _steps(answer: Any, name: str, scorer: Scorer) -> list[str]:
    if isinstance(answer, str):
        return scorer.split(need_text(answer, name))
    if not answer:
        raise RowProblem("no steps", f"{name} holds no step")
    return [need_text(step, f"{name}[{j}]") for j, step in enumerate(answer)]


def _beside(row: Row, names: Sequence[str], kind: type, length: int, key: str) -> list[Any] | None:
    """What the row says of each answer: the first of the keys that holds a list of that kind."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list) and value and all(isinstance(each, kind) for each in value):
            if len(value) != length:
                raise RowProblem("wrong length", f"{name} must have one entry an answer of {key} ({length}), got "
                                 f"{len(value)}")
            return value
    return None


def final_answer(text: str | None) -> str | None:
    """What stands in the last box of a text, or behind its last "####"; None without either."""
    if text is None:
        return None
    boxes = list(BOX.finditer(text))
    if boxes:
        begin, depth = boxes[-1].end(), 1
        for at in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[begin:at].strip()
    _, mark, behind = text.rpartition("####")
    return behind.strip() if mark and behind.strip() else None


def same_answer(a: str, b: str) -> bool:
    """Equal numbers, or equal texts up to white space, dollars and commas between digits."""
    a, b = (re.sub(r"(?<=\d),(?=\d{3})|[\s$]", "", text) for text in (a, b))
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b
