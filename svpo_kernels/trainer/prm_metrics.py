"""Metrics of step scores in [0, 1] against labels, from histograms, so that they add over packs and processes.

Step accuracy, AUROC and the expected calibration error come from two histograms of the scores, of good and of bad
steps, in BINS equal bins (AUROC is exact up to ties within a bin: at most half of the pairs that share one). What is of
whole solutions (first error, ProcessBench's F1, best of N) comes from the scores of every step, gathered in evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from svpo_kernels.prm import aggregate_scores

AGGREGATES = ("min", "prod", "geomean", "mean", "last")
BINS = 200
CALIBRATION = 10  # bins of the expected calibration error, as in Guo et al., arXiv 1706.04599
HISTOGRAMS = ("prm/good", "prm/bad", "prm/all", "prm/label")  # good steps, bad steps, all labelled, sums of labels


def step_sums(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Histograms (BINS,) float64 of the labelled steps of a pack, on its device, no host read.

    scores, labels: (S,) in [0, 1], labels NaN where there is none. A step is good where its label is above 0.5, bad
    below; 0.5 says neither and enters the calibration only.
    """
    known = (~labels.isnan()).double()
    place = torch.nan_to_num(scores).mul(BINS).long().clamp(0, BINS - 1)
    weights = ((labels > 0.5).double(), (labels < 0.5).double(), known, torch.nan_to_num(labels).double())
    rows = torch.nn.functional.one_hot(place, BINS).double()  # S x BINS is small, and its sums have a fixed order
    return {name: weight @ rows for name, weight in zip(HISTOGRAMS, weights, strict=True)}


def step_metrics(good: np.ndarray, bad: np.ndarray, every: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """prm/accuracy (a score at or above 0.5 says good), prm/good_share, prm/auroc and prm/ece of summed histograms."""
    found: dict[str, float] = {}
    judged, half = good.sum() + bad.sum(), BINS // 2
    if judged:
        found["prm/accuracy"] = float((good[half:].sum() + bad[:half].sum()) / judged)
        found["prm/good_share"] = float(good.sum() / judged)
    if good.sum() and bad.sum():
        below = np.cumsum(bad) - bad
        found["prm/auroc"] = float((good * (below + bad / 2)).sum() / (good.sum() * bad.sum()))
    if every.sum():
        centre = (np.arange(BINS) + 0.5) / BINS * every
        gaps = (label - centre).reshape(CALIBRATION, -1).sum(1)
        found["prm/ece"] = float(np.abs(gaps).sum() / every.sum())
    return found


def first_below(scores: Sequence[float], threshold: float = 0.5) -> int:
    """Index of the first step whose score is below the threshold, -1 where there is none."""
    return next((index for index, score in enumerate(scores) if score < threshold), -1)


def first_error_metrics(solutions: Iterable[tuple[Sequence[float], int]], threshold: float = 0.5) -> dict[str, float]:
    """Of (scores of a solution's steps, index of its first wrong step or -1): accuracies and ProcessBench's F1.

    A solution counts as found where the first step scored below the threshold is its first wrong one. F1 is the
    harmonic mean of the accuracy on solutions with an error and of that on solutions without one (arXiv 2412.06559).
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for scores, wrong in solutions:
        hits[wrong >= 0].append(first_below(scores, threshold) == wrong)
    found = {}
    for key, name in ((True, "prm/error_accuracy"), (False, "prm/correct_accuracy")):
        if hits[key]:
            found[name] = float(np.mean(hits[key]))
    if hits[True] or hits[False]:
        found["prm/first_error_accuracy"] = float(np.mean([*hits[True], *hits[False]]))
    if hits[True] and hits[False]:
        a, b = found["prm/error_accuracy"], found["prm/correct_accuracy"]
        found["prm/f1"] = 2 * a * b / (a + b) if a + b else 0.0
    return found


def first_error(labels: Sequence[float | None], threshold: float = 0.5) -> int | None:
    """The index of the first step labelled below the threshold, -1 where all are labelled and none is; None: labels
    lack before it is known."""
    for i, label in enumerate(labels):
        if label is None:
            return None
        if label < threshold:
            return i
    return -1


# -- choosing among solutions -----------------------------------------------------------------------------------------


def aggregates(scores: Sequence[float]) -> dict[str, float]:
    """Every aggregate of one solution's scores, by `aggregate_scores` (ties, zeros and empties as there)."""
    each, offsets = torch.tensor(scores, dtype=torch.float32), torch.tensor([0, len(scores)])
    return {how: aggregate_scores(each, offsets, how).item() for how in AGGREGATES}


def best(scores: Sequence[float]) -> int:
    """Index of the largest score, the first of equals; a NaN never wins."""
    return max(range(len(scores)), key=lambda i: (-math.inf if math.isnan(scores[i]) else scores[i], -i))


def best_of_accuracy(groups: Iterable[Sequence[tuple[Mapping[str, float], bool | None]]]) -> dict[str, float]:
    """Share of problems whose best solution is right, by aggregate, over (aggregates, correct) of each solution.

    Groups of one solution, and those with a solution of unknown truth, are left out. `oracle`: some solution is right;
    `first`: the first one is, what a single sample gives.
    """
    hits: dict[str, list[bool]] = {}
    for group in groups:
        if len(group) < 2 or any(correct is None for _, correct in group):
            continue
        for how in AGGREGATES:
            hits.setdefault(how, []).append(bool(group[best([scores[how] for scores, _ in group])][1]))
        hits.setdefault("first", []).append(bool(group[0][1]))
        hits.setdefault("oracle", []).append(any(correct for _, correct in group))
    return {how: sum(found) / len(found) for how, found in hits.items()}
