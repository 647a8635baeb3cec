"""Step-level search: beams of steps judged at their ends, and attempts that are stopped before theirs.

    draw width * branch first steps; then, until no attempt goes on:
        judge every attempt at the end of its newest step        one forward, which also goes on from it
        stop those judged below the threshold                    nothing more is generated for them
        keep the `width` best, draw `branch` steps behind each

branch = 1 with all kept is best-of-N, with a threshold best-of-N with early stops. Source: step-level beam search with
a value model (AlphaMath, arXiv 2405.03553).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from svpo_kernels.trainer.prm_metrics import aggregates, best

from .choose import weighted_majority
from .engines import Prefix, Step
from .verifiers import Verifier, stated


@dataclass
class Attempt:
    """An answer, or its beginning. scores: of its steps in [0, 1], one a judged step. stopped: given up below the
    threshold; over: its answer is whole, or as long as may be."""

    prefix: Prefix
    steps: list[Step] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    stopped: bool = False

    def then(self, step: Step) -> Attempt:
        return Attempt(self.prefix.then(step), [*self.steps, step], list(self.scores))


Judge = Callable[[Sequence[Attempt]], list[float]]  # of the newest step of each, in [0, 1]


@dataclass
class Beams:
    """width: attempts kept, branch: steps drawn behind each; threshold: attempts judged below it are stopped.
    max_depth: most steps. judge: None reads the engine's own head, in the forward that goes on."""

    width: int = 8
    branch: int = 1
    threshold: float | None = None
    max_depth: int = 32
    judge: Judge | None = None

    def __post_init__(self) -> None:
        for name in ("width", "branch", "max_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"search: {name} must be at least 1, got {getattr(self, name)}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"search: threshold must be in [0, 1], got {self.threshold}")


def search(engine: Any, prompt: Any, beams: Beams, generator: torch.Generator) -> list[Attempt]:
    """The attempts that came to an end, whole or stopped, in the order in which they did. Beams that were not among the
    best are dropped: they are neither."""
    pool = [Attempt(engine.begin(prompt))]
    ended: list[Attempt] = []
    draw = beams.width * beams.branch
    while pool:
        kept, steps = _advance(engine, pool, beams, draw, generator)
        ended += [attempt for i, attempt in enumerate(pool) if attempt.steps and (attempt.stopped or
                                                                                  _over(attempt, engine, beams))]
        pool = [pool[i].then(step) for i in kept for step in steps[i] if step.text.strip() or step.ended]
        draw = beams.branch
    return ended


def _advance(engine: Any, pool: list[Attempt], beams: Beams, draw: int,
             generator: torch.Generator) -> tuple[list[int], list[list[Step]]]:
    """Scores every attempt at its newest step, stops what is to be stopped, and draws behind those that are kept."""
    kept: list[int] = []

    def keep(scores: list[float]) -> list[int]:
        for attempt, score in zip(pool, scores, strict=True):
            if attempt.steps:
                attempt.scores.append(min(max(score, 0.0), 1.0))
        going = []
        for i, attempt in enumerate(pool):
            if attempt.steps and _over(attempt, engine, beams):
                continue
            attempt.stopped = bool(attempt.steps) and beams.threshold is not None and (
                attempt.scores[-1] < beams.threshold)
            if not attempt.stopped:
                going.append(i)
        best = sorted(going, key=lambda i: -pool[i].scores[-1] if pool[i].scores else 0.0)[:beams.width]
        kept.extend(sorted(best))
        return kept

    prefixes = [attempt.prefix for attempt in pool]
    if beams.judge is None:
        return kept, engine.advance(prefixes, draw, generator, keep=keep)[1]
    keep(beams.judge(pool) if pool[0].steps else [0.0] * len(pool))
    drawn = engine.go_on([prefixes[i] for i in kept], draw, generator) if kept else []
    steps = [[] for _ in pool]
    for i, found in zip(kept, drawn, strict=True):
        steps[i] = found
    return kept, steps


def _over(attempt: Attempt, engine: Any, beams: Beams) -> bool:
    longest = attempt.prefix.used >= engine.sampling.max_tokens or len(attempt.steps) >= beams.max_depth
    return attempt.steps[-1].ended or longest


# -- what the attempts are worth --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One problem: its attempts, the row's answer, tokens generated, and which attempts are right."""

    attempts: list[Attempt]
    answer: Any
    generated: int
    right: list[bool]

    @property
    def whole(self) -> list[int]:
        """Attempts that said an answer."""
        return [i for i, attempt in enumerate(self.attempts) if not attempt.stopped and attempt.steps[-1].ended]


def outcome(attempts: list[Attempt], answer: Any, generated: int, check: Verifier) -> Outcome:
    right = [not attempt.stopped and check(attempt.prefix.text, answer) for attempt in attempts]
    return Outcome(attempts, answer, generated, right)


def accuracies(outcomes: Sequence[Outcome], weigh_by: str = "min") -> dict[str, float]:
    """Shares of problems that are right: any attempt, the majority, the vote weighted by score, the best by aggregate.
    A problem without a whole answer is wrong in all of them."""
    hits: Counter[str] = Counter()
    for found in outcomes:
        right = [found.right[i] for i in found.whole]
        if not right:
            continue
        said = [stated(found.attempts[i].prefix.text) for i in found.whole]
        scores = [aggregates(found.attempts[i].scores) for i in found.whole]
        hits["any"] += any(right)
        hits["majority"] += right[said.index(Counter(said).most_common(1)[0][0])]
        hits["weighted_majority"] += right[weighted_majority(said, [each[weigh_by] for each in scores])]
        for name in scores[0]:
            hits[f"best_by_{name}"] += right[best([each[name] for each in scores])]
    names = ("any", "majority", "weighted_majority", *(f"best_by_{name}" for name in aggregates([0.0])))
    return {name: hits[name] / len(outcomes) for name in names}


def fit_stop(outcomes: Sequence[Outcome], recall: float) -> tuple[float, float]:
    """(threshold, recall reached): the largest threshold at which at least `recall` of the right attempts reach their
    end. From attempts that ran to their end without a threshold; a step that ends an answer stops nothing."""
    if not 0 < recall <= 1:
        raise ValueError(f"search: recall must be in (0, 1], got {recall}")
    lowest = sorted(min(attempt.scores[:-1], default=1.0) for found in outcomes
                    for attempt, right in zip(found.attempts, found.right, strict=True) if right)
    if not lowest:
        raise ValueError("search: a threshold is fitted on right attempts, and there is none")
    lost = int((1 - recall) * len(lowest) + 1e-9)
    threshold = lowest[lost] if lost < len(lowest) else 1.0
    return threshold, sum(low >= threshold for low in lowest) / len(lowest)
