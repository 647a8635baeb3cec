"""What a pair rule keeps and what it drops, said in words: `svpo data` and `svpo train` both count here.

A mixed pair sets a step that ends its solution against one that does not. On search trees such pairs run one way, a
finished answer over an inner step, and are longer for it: they train "finish now", which is why `same_kind` drops them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from torch import Tensor

from .tree import GAP_ROUNDING, StepTree, first_of_texts, select_pairs, sibling_groups, text_keys

ROWS = 1024  # siblings compared with all others at a time


@dataclass
class PairCounts:
    """Pairs of a rule, added up over trees.

    pairs: siblings of any kind, equal texts counted as often as they stand. distinct: equal texts once. used: what
    is trained on. finished, inner: mixed pairs among the distinct ones, a finished step over an inner one and the other
    way round; *_longer: those of them whose chosen step is the longer one. beyond_max: pairs that max_pairs cut.
    """

    pairs: int = 0
    distinct: int = 0
    used: int = 0
    finished: int = 0
    finished_longer: int = 0
    inner: int = 0
    inner_longer: int = 0
    beyond_max: int = 0

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def mixed(self) -> int:
        return self.finished + self.inner

    def directions(self) -> str:
        """The mixed pairs by direction and length."""
        parts = []
        if self.finished:
            parts.append(f"{self.finished:,} a finished step over an inner one (longer in {self.finished_longer:,})")
        if self.inner:
            parts.append(f"{self.inner:,} an inner step over a finished one (longer in {self.inner_longer:,})")
        return ", ".join(parts)

    def lines(self, *, dedup: bool = True, same_kind: bool = True, given: bool = False) -> list[str]:
        """What was dropped and why, and the warning when most pairs run one way; nothing to say gives no line.

        given: the pairs are the data's own, which no rule filters.
        """
        lines = []
        if dedup and not given and self.pairs > self.distinct:
            lines.append(f"dedup dropped {self.pairs - self.distinct:,} of {self.pairs:,} pairs: their texts are equal "
                         "to another's")
        if same_kind and not given and self.mixed:
            lines.append(f"same_kind dropped {self.mixed:,} of {self.distinct:,} pairs of a step that ends its "
                         f"solution with one that does not: {self.directions()}; {self.used:,} are left")
        if self.beyond_max:
            lines.append(f"max_pairs dropped {self.beyond_max:,} pairs, the narrowest gaps of each tree")
        way = max(self.finished, self.inner)
        if (given or not same_kind) and 2 * way > self.distinct:
            what = "finish now" if self.finished >= self.inner else "do not finish"
            lines.append(f"warning: {way:,} of {self.distinct:,} pairs run one way, {self.directions()}: they train "
                         f"\"{what}\" whatever the steps say" + ("" if given else "; same_kind=true drops them"))
        return lines


def count_pairs(tree: StepTree, rule: str = "best_worst", min_gap: float = 0.0, max_pairs: int | None = None, *,
                dedup: bool = True, same_kind: bool = True, given: Tensor | None = None) -> tuple[Tensor, PairCounts]:
    """`select_pairs` of one tree with the account of what it dropped. Returns ((P, 2) int64, PairCounts).

    given: the pairs that the data hold themselves; no rule or filter applies to them, all are counted.

    Raises what `select_pairs` raises.
    """
    if given is not None:
        return given, PairCounts(len(given), len(given), len(given), **_mixed(tree, given.tolist()))
    if rule == "all" and max_pairs is not None and (counted := _count_all(tree, min_gap, dedup, same_kind)):
        counts, number = counted
        used = select_pairs(tree, rule, min_gap, None if number <= max_pairs else max_pairs, dedup, same_kind)
        return used, replace(counts, used=len(used), beyond_max=number - len(used))
    any_kind = select_pairs(tree, rule, min_gap, None, dedup, False)
    every = select_pairs(tree, rule, min_gap, None, False, False) if dedup else any_kind
    kept = select_pairs(tree, rule, min_gap, None, dedup, True) if same_kind else any_kind
    used = kept if max_pairs is None or len(kept) <= max_pairs else select_pairs(
        tree, rule, min_gap, max_pairs, dedup, same_kind)
    return used, PairCounts(len(every), len(any_kind), len(used), **_mixed(tree, any_kind.tolist()),
                            beyond_max=len(kept) - len(used))


def pairs_of_all(trees: Iterable[StepTree], given: Iterable[Tensor | None], rule: str, min_gap: float,
                 max_pairs: int | None, *, dedup: bool, same_kind: bool) -> tuple[list[Tensor], list[str]]:
    """`count_pairs` of every tree: one (P, 2) each, and what the rule dropped, in lines to be said."""
    pairs, chosen, held = [], PairCounts(), PairCounts()
    for tree, own in zip(trees, given, strict=True):
        used, counts = count_pairs(tree, rule, min_gap, max_pairs, dedup=dedup, same_kind=same_kind, given=own)
        pairs.append(used)
        if own is None:
            chosen += counts
        else:
            held += counts
    return pairs, [*chosen.lines(dedup=dedup, same_kind=same_kind), *held.lines(given=True)]


def _count_all(tree: StepTree, min_gap: float, dedup: bool, same_kind: bool) -> tuple[PairCounts, int] | None:
    """The counts of the rule "all", and how many pairs it keeps, from the siblings' values without making the pairs;
    None where equal pairs have to be met to be counted once: under parents of equal text, or of both kinds."""
    same = text_keys(tree)
    groups = [{same[i] for i in group} for group in sibling_groups(tree, same_kind)]
    if dedup and len(set().union(*groups)) < sum(map(len, groups)):
        return None
    counts, kept = PairCounts(), 0
    for group in sibling_groups(tree, False):
        counts.pairs += _count(tree, group, min_gap)[0]
        distinct, *mixed = _count(tree, first_of_texts(group, same) if dedup else group, min_gap)
        counts += PairCounts(0, distinct, 0, *mixed)
    for group in sibling_groups(tree, same_kind):
        kept += _count(tree, first_of_texts(group, same) if dedup else group, min_gap)[0]
    return counts, kept


def _count(tree: StepTree, group: Sequence[int], min_gap: float) -> tuple[int, int, int, int, int]:
    """Pairs of these siblings with a gap above min_gap; of them a finished step over an inner one, the longer such
    ones, and the other way round."""
    q = np.array([tree.nodes[i].q_value for i in group], dtype=np.float64)
    ends = np.array([tree.nodes[i].terminal for i in group], dtype=bool)
    length = np.array([_length(tree, i) for i in group])
    total = np.zeros(5, dtype=np.int64)
    for begin in range(0, len(group), ROWS):
        rows = slice(begin, begin + ROWS)
        wide = q[rows, None] - q > min_gap + GAP_ROUNDING
        longer = length[rows, None] > length
        finished, inner = wide & ends[rows, None] & ~ends, wide & ~ends[rows, None] & ends
        total += [wide.sum(), finished.sum(), (finished & longer).sum(), inner.sum(), (inner & longer).sum()]
    wide_pairs, finished_over, longer_over, inner_over, longer_inner = total.tolist()
    return wide_pairs, finished_over, longer_over, inner_over, longer_inner


def add_up(counts: Iterable[PairCounts]) -> PairCounts:
    """The sum of the trees' counts."""
    return sum(counts, PairCounts())


def _mixed(tree: StepTree, pairs: Sequence[Sequence[int]]) -> dict[str, int]:
    found = {"finished": 0, "finished_longer": 0, "inner": 0, "inner_longer": 0}
    for chosen, rejected in pairs:
        ends = tree.nodes[chosen].terminal
        if ends == tree.nodes[rejected].terminal:
            continue
        way = "finished" if ends else "inner"
        found[way] += 1
        found[f"{way}_longer"] += _length(tree, chosen) > _length(tree, rejected)
    return found


def _length(tree: StepTree, node: int) -> int:
    """Of a step: characters of its text, ids where it has none."""
    text = tree.nodes[node].text
    return len(tree.step_ids(node)) if text is None else len(text)
