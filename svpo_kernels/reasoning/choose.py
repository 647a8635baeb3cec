"""Choices by score: votes weighted by it, and a threshold for a wanted recall. Aggregates and the best of N, which
training measures too, are in `trainer/prm_metrics.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
