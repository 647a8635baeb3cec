"""`svpo score`: every step of every solution of a file scored, solutions of one problem packed over what they share.

    file -> problems -> ids and positions (the scorer) -> packs -> one row of hidden states a step -> scores -> JSONL

Only rows where a step ends meet the head. What can be packed exactly runs as trees, all else as padded sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError

from svpo_kernels.data.formats import RowProblem
from svpo_kernels.data.formats.ledger import Ledger
from svpo_kernels.models import unwrap
from svpo_kernels.trees.attention import PackingError, unpackable
from svpo_kernels.trees.check import check_packing
from svpo_kernels.trees.packing import StepBatch, distinct_batch, pack_trees
from svpo_kernels.trees.tree import StepNode, StepTree

from .loading import ScoringModel
from .scorers import Head, Reading, Scorer
from .solutions import Solution

NONE = torch.zeros(0, 2, dtype=torch.int64)  # no pairs


@dataclass
class Scored:
    """A solution with the scores of its first steps, in [0, 1]; those beyond the longest run have none."""

    solution: Solution
    scores: list[float]

    @property
    def truncated(self) -> int:
        return len(self.solution.steps) - len(self.scores)


@dataclass
class Counts:
    """tokens: run, without padding; alone: those of one run a solution; again: those of one run a step."""

    tokens: int = 0
    alone: int = 0
    again: int = 0
    steps: int = 0
    solutions: int = 0


@dataclass
class Runner:
    """Scores groups of solutions with one model. max_tokens: most of one pack (a longer single run is let through).
    packing: "auto" (trees where they are exact), "tree" or "distinct". say: is told what was chosen and why."""

    model: ScoringModel
    max_tokens: int = 8192
    max_path_tokens: int | None = None
    packing: str = "auto"
    say: Callable[[str], None] = print
    counts: Counts = field(default_factory=Counts)
    _way: str | None = None

    def encode(self, group: list[Solution], ledger: Ledger,
               on_bad: str = "skip") -> list[tuple[Solution, list[Reading]]]:
        """The runs of each solution; what cannot be encoded, or is longer than the model or max_path_tokens, counts as
        dropped or truncated rows."""
        limits = [limit for limit in (self.max_path_tokens, self.model.limit) if limit]
        limit, found, bad = min(limits, default=sys.maxsize), [], {}
        for solution in group:
            try:
                readings = _readings(self.model.scorer, solution)
                found.append((solution, _cut(readings, limit)))
            except RowProblem as problem:
                bad.setdefault(solution.row, []).append((solution, problem.kind, problem.detail))
            except (ValueError, TypeError, TemplateError) as error:
                bad.setdefault(solution.row, []).append((solution, "cannot be tokenised", str(error)))
        self._account(found, bad, ledger, on_bad, limit)
        return found

    def _account(self, found: list[tuple[Solution, list[Reading]]], bad: dict[int, list], ledger: Ledger, on_bad: str,
                 limit: int) -> None:
        rows = {solution.row for solution, _ in found}
        for row, problems in bad.items():
            solution, kind, detail = problems[0]
            action = "truncated" if row in rows or ledger.outcome.get(row) == "truncated" else "dropped"
            where = f"{len(problems)} solutions; the first: {detail}" if len(problems) > 1 else detail
            ledger.record(action, row, solution.line, kind, where, on_bad)
        short: dict[int, list[Solution]] = {}
        for solution, readings in found:
            if sum(len(reading.positions) for reading in readings) < len(solution.steps):
                short.setdefault(solution.row, []).append(solution)
        for row, cut in short.items():
            ledger.record("truncated", row, cut[0].line, "longer than the longest run",
                          f"steps of {len(cut)} solutions end beyond {limit} tokens and have no score", on_bad)

    def score(self, encoded: list[tuple[Solution, list[Reading]]]) -> list[Scored]:
        """The solutions with their scores, in the order given. Raises ValueError for a score that is not finite."""
        places = [(s, step) for s, (_, readings) in enumerate(encoded)
                  for reading in readings for step in reading.steps]
        values = iter(self._values([readings for _, readings in encoded]))
        scores: list[dict[int, float]] = [{} for _ in encoded]
        for s, step in places:
            scores[s][step] = next(values)
        result = [Scored(solution, [own[step] for step in sorted(own)])
                  for (solution, _), own in zip(encoded, scores, strict=True)]
        self.counts.solutions += len(result)
        self.counts.steps += len(places)
        return result

    def _values(self, each: list[list[Reading]]) -> list[float]:
        """The scores of all positions of all readings, in their order."""
        trees, numbers = as_trees(each)
        out = torch.full((sum(map(len, trees)),), float("nan"))
        for batch in self._batches(trees):
            where = [numbers[tree][node] for tree, node in batch.node_of_step.tolist()]
            out[torch.tensor(where, dtype=torch.int64)] = self.model.scores(batch, _parents(trees, batch))
        if not bool(out.isfinite().all()):
            raise ValueError(f"svpo score: {int((~out.isfinite()).sum())} of {len(out)} scores are not finite: the "
                             "model's weights or its dtype give NaN")
        for readings in each:
            ends = [position + 1 for reading in readings for position in reading.positions]
            self.counts.alone += max(ends)
            self.counts.again += sum(ends)
        return out.tolist()

    def _batches(self, trees: list[StepTree]) -> Iterator[StepBatch]:
        way = self._chosen(trees)
        longest = max(max(tree.length) for tree in trees)
        if way == "tree":
            batches: Iterable[StepBatch] = pack_trees(
                trees, [NONE] * len(trees), max_tokens=max(self.max_tokens, longest), values="all")
        else:
            batches = (distinct_batch(part, [NONE] * len(part), values="all")
                       for part in _padded_parts(trees, self.max_tokens))
        for batch in batches:
            self.counts.tokens += batch.distinct_tokens if way == "distinct" else batch.input_ids.numel()
            yield batch

    def _chosen(self, trees: list[StepTree]) -> str:
        """Trees or padded sequences, found out once: by config and modules, then on the first pack itself."""
        if self._way is None:
            self._way = "distinct" if self.packing == "distinct" else "tree"
            reason = None if self._way == "distinct" else self._objection(trees)
            if reason is not None and self.packing == "tree":
                raise PackingError(f"svpo score: {reason}")
            if reason is not None:
                self._way = "distinct"
                self.say(f"solutions run one by one, padded: {reason}")
        return self._way

    def _objection(self, trees: list[StepTree]) -> str | None:
        lm = unwrap(self.model.lm)
        reason = unpackable(lm)
        if reason is not None:
            return f"{type(lm).__name__} cannot run packs: {reason}"
        longest = max(max(tree.length) for tree in trees)
        batch = pack_trees(trees, [NONE] * len(trees), max_tokens=max(self.max_tokens, longest), values="all")[0]
        try:
            check_packing(lm, batch.to(self.model.device))
        except PackingError as error:
            return str(error)
        return None


def _readings(scorer: Scorer, solution: Solution) -> list[Reading]:
    """A public model's own text has no white space of the row's: where the steps carry theirs, it goes."""
    if isinstance(scorer, Head):
        return scorer.encode(solution.prompt, solution.steps, terminal=solution.terminal, separator=solution.separator,
                             template_kwargs=solution.template_kwargs)
    carried = solution.separator == ""
    return scorer.encode(solution.prompt, [step.strip() for step in solution.steps] if carried else solution.steps)


def _cut(readings: list[Reading], limit: int) -> list[Reading]:
    """Without the positions at or beyond the limit. Raises RowProblem where none is left."""
    kept = []
    for reading in readings:
        count = sum(position < limit for position in reading.positions)
        if count:
            positions = reading.positions[:count]
            kept.append(reading._replace(positions=positions, steps=reading.steps[:count],
                                         ids=reading.ids[:positions[-1] + 1]))
    if not kept:
        first = readings[0].positions[0] + 1
        raise RowProblem("longer than the longest run", f"the first step ends at token {first}, beyond {limit}")
    return kept


def as_trees(each: list[list[Reading]]) -> tuple[list[StepTree], list[list[int]]]:
    """(trees with one node a position, for every node the number of its position over all readings).

    One tree holds all runs with the same ids in front of `start`; a run that goes on from the one before it hangs under
    it, so that every id is scored once a solution.
    """
    nodes: dict[tuple[int, ...], list[StepNode]] = {}
    numbers: dict[tuple[int, ...], list[int]] = {}
    number = 0
    for readings in each:
        last: tuple[tuple[int, ...], list[int], int] | None = None  # context, ids so far, node
        for reading in readings:
            context = tuple(reading.ids[:reading.start])
            own, held = nodes.setdefault(context, []), numbers.setdefault(context, [])
            goes_on = last is not None and last[0] == context and reading.ids[:len(last[1])] == last[1]
            parent, begin = (last[2], len(last[1])) if goes_on else (-1, reading.start)
            for position in reading.positions:
                own.append(StepNode(parent, reading.ids[begin:position + 1]))
                held.append(number)
                parent, begin, number = len(own) - 1, position + 1, number + 1
            last = (context, reading.ids[:begin], parent)
    return [StepTree(context, own) for context, own in nodes.items()], list(numbers.values())


def _parents(trees: list[StepTree], batch: StepBatch) -> list[int]:
    places = batch.node_of_step.tolist()
    at = {tuple(place): step for step, place in enumerate(places)}
    return [at.get((tree, trees[tree].nodes[node].parent), -1) for tree, node in places]


def _padded_parts(trees: list[StepTree], max_tokens: int) -> Iterator[list[StepTree]]:
    """Trees in runs of at most max_tokens tokens, padding counted; sequences are the trees' leaves."""
    part: list[StepTree] = []
    rows = longest = 0
    for tree in trees:
        own, length = sum(not below for below in tree.children), max(tree.length)
        if part and (rows + own) * max(longest, length) > max_tokens:
            yield part
            part, rows, longest = [], 0, 0
        part.append(tree)
        rows, longest = rows + own, max(longest, length)
    if part:
        yield part
