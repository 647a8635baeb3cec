"""What is made of step scores: aggregates, the best of N, votes weighted by score, a threshold for a wanted recall."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from svpo_kernels.prm import aggregate_scores

AGGREGATES = ("min", "prod", "geomean", "mean", "last")


def aggregates(scores: Sequence[float]) -> dict[str, float]:
    """Every aggregate of one solution's scores, by `aggregate_scores` (ties, zeros and empties as there)."""
    each = torch.tensor(scores, dtype=torch.float32)
    offsets = torch.tensor([0, len(scores)])
    return {how: aggregate_scores(each, offsets, how).item() for how in AGGREGATES}


def best(scores: Sequence[float]) -> int:
    """Index of the largest score, the first of equals; a NaN never wins."""
    return max(range(len(scores)), key=lambda i: (-math.inf if math.isnan(scores[i]) else scores[i], -i))


def weighted_majority(answers: Sequence[str | None], scores: Sequence[float]) -> int | None:
    """Index of the best-scored solution among those of the answer with the largest sum of scores; the first of equals.
    None where no solution has an answer."""
    sums: dict[str, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + score
    if not sums:
        return None
    chosen = max(sums, key=sums.__getitem__)
    return max((i for i, answer in enumerate(answers) if answer == chosen), key=lambda i: (scores[i], -i))


def fit_threshold(scores: Sequence[float], wrong: Sequence[bool], recall: float) -> float:
    """The smallest threshold below which at least that share of the wrong steps scores: the fewest right steps fall.

    A step is said to be wrong where its score is below the threshold. Raises ValueError without a wrong step, or for a
    recall outside (0, 1].
    """
    if not 0 < recall <= 1:
        raise ValueError(f"svpo score: recall must be in (0, 1], got {recall}")
    below = sorted(score for score, is_wrong in zip(scores, wrong, strict=True) if is_wrong)
    if not below:
        raise ValueError("svpo score: no labelled step is wrong: a threshold cannot be fitted")
    needed = math.ceil(recall * len(below) - 1e-9)
    return math.nextafter(below[needed - 1], math.inf)


def best_of_accuracy(groups: Iterable[Sequence[tuple[dict[str, float], bool]]]) -> dict[str, float]:
    """Share of problems whose best solution is right, by aggregate, over (aggregates, correct) of each solution.

    Groups of one solution, and those with a solution of unknown truth, are left out. `oracle`: some solution is right;
    `first`: the first one is, what a single sample gives.
    """
    hits: dict[str, list[bool]] = {}
    for group in groups:
        if len(group) < 2 or any(correct is None for _, correct in group):
            continue
        for how in AGGREGATES:
            hits.setdefault(how, []).append(group[best([scores[how] for scores, _ in group])][1])
        hits.setdefault("first", []).append(group[0][1])
        hits.setdefault("oracle", []).append(any(correct for _, correct in group))
    return {how: sum(found) / len(found) for how, found in hits.items()}
