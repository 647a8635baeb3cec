"""What `linear_step_logps` keeps between forward and backward, and how much of it. Pure functions.

| mode    | when                                    | products       | kept                                        |
| ------- | --------------------------------------- | -------------- | ------------------------------------------- |
| forward | no gradient is needed                   | 1              | nothing                                     |
| frozen  | only hidden needs a gradient            | 2              | U W and U B, (R, D + r)                     |
| store   | weight or bias needs one                | 3              | U, (kept, V), as far as the budget reaches  |
| logits  | entropies, or low-rank factors train,   | 3 (2 if not W) | z, (kept, V), as far as the budget reaches  |
|         | or logsumexp and the head trains        |                |                                             |
|         | the rows that the budget cannot keep    | one more       | their row statistics: "recompute"           |

U is the unit gradient of a row, J * (onehot(l*) - softmax(z)): the upstream gradient is only a factor in front of it.
That of an entropy is no multiple of U, and a product with few columns would show how U and the terms of a branching row
cancel: there the backward makes the whole gradient from z. Products with low-rank factors are not counted.

d logsumexp / dz0 = J softmax(z) costs no product in any mode. In logits mode an upstream L of it takes L from the G of
the columns. A frozen head has it from U W: J softmax(z) = J[l*] onehot(l*) - U, so that G becomes G - L, and L J[l*] is
a term of l*, as a branching row has them. The store mode could do the same; but U is rounded near l*, where the two
parts cancel, and z gives the same three products without that: so a head that trains takes the logits mode. A frozen
head with an entropy takes it too: 3 products, where 2 would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATS = ("entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "top1")  # in the order of the raw op's results
DIFFERENTIABLE = STATS[:2]
MODES = ("forward", "frozen", "store", "logits")
MOST_ROWS = 4096  # a longer chunk does not make the products any faster
NO_LIMIT = 2**40  # MiB; float("inf") has no int
LEAST_ROWS = {"cuda": 256, "cpu": 64}  # fewer rows leave the matrix units waiting for the weight
# How many times the budget's rows a call may have before none of them is kept. Every kept row saves a product, but on a
# CPU the tiles of the others are the slower for what it takes from scratch (walks.py): three quarters of a third of the
# rows save 6 % of four products.
SOME_KEPT = {"cuda": 2**20, "cpu": 3}


class Options(NamedTuple):
    """The scalars of the raw ops, in their order.

    temperature: (R,) fp32 inside the op where rows have their own. softcap 0.0 means none. vocab_size counts columns of
    all shards together. group: name of the process group that shares the vocabulary, "" for none; shards: columns of
    each of its processes, in rank order.
    """

    vocab_size: int
    temperature: float | Tensor
    softcap: float
    reduction: str
    logits_budget_mb: float
    mode: str
    stats: Sequence[str] = ()
    lora_scaling: float = 1.0
    group: str = ""
    shards: Sequence[int] = ()

    @property
    def transform(self) -> tuple[float | Tensor, float]:
        return self.temperature, self.softcap

    @property
    def entropy(self) -> bool:
        return "entropy" in self.stats

    @property
    def logsumexp(self) -> bool:
        return "logsumexp" in self.stats

    @property
    def more_stats(self) -> bool:
        """Whether a row's maximum and sum are not enough."""
        return any(name in self.stats for name in STATS[2:])

    def of_rows(self, temperatures: Tensor | None) -> Options:
        """With the rows' own temperatures (R,), NaN for what is none, so that their results are NaN."""
        if temperatures is None:
            return self
        return self._replace(temperature=torch.where(temperatures > 0.0, temperatures, torch.nan).contiguous())


def mode(
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    grad_enabled: bool,
    entropy: bool = False,
    needs_lora: bool = False,
    logsumexp: bool = False,
) -> str:
    """The mode of a call."""
    if not grad_enabled or not (needs_hidden or needs_weight or needs_bias or needs_lora):
        return "forward"
    if entropy or needs_lora or (logsumexp and (needs_weight or needs_bias)):
        return "logits"
    return "store" if needs_weight or needs_bias else "frozen"


class Budget(NamedTuple):
    """(rows, V) memory of a call, in rows. Up to `whole` rows are all kept, more of them `some`, beyond `most` none."""

    rows: int
    whole: int
    some: int
    most: int
    least: int

    def kept(self, R: Any) -> Any:
        """How many of R rows are kept. R may be symbolic: it decides no branch, so compiled graphs are free of it."""
        return torch.sym_min(R, torch.sym_max(_up_to(self.whole, R, self.whole), _up_to(self.most, R, self.some)))

    def scratch(self, R: int) -> int:
        """Rows at a time beside the kept ones: at least `least`, even when the budget is smaller."""
        return min(max(self.rows - self.kept(R), self.least), MOST_ROWS)


def _up_to(limit: int, R: Any, value: int) -> Any:
    """value where R <= limit, else 0."""
    return torch.sym_min(value, torch.sym_max(0, (limit + 1 - R) * value))


def budget(V: int, itemsize: int, logits_budget_mb: float, device_type: str, mode: str) -> Budget:
    """Split `logits_budget_mb` (MiB) between kept rows and scratch rows.

    V: columns of the widest shard, so that every process cuts alike. Where some rows are kept a quarter of the budget
    stays scratch for the others; where all are, U needs none, but a gradient made from kept z does.
    """
    least = LEAST_ROWS.get(device_type, LEAST_ROWS["cuda"])
    rows = int(min(logits_budget_mb, NO_LIMIT) * 2**20) // max(1, V * itemsize)
    if mode not in ("store", "logits"):
        return Budget(rows, 0, 0, 0, least)
    some = max(0, rows - min(max(rows // 4, least), MOST_ROWS))
    times = SOME_KEPT.get(device_type, SOME_KEPT["cuda"])
    return Budget(rows, rows if mode == "store" else some, some, rows * times, least)


def limits(V: int, h: Tensor, o: Options) -> Budget:
    """The budget of a call. V: columns of the widest shard; h: hidden, or rows of it."""
    return budget(V, h.element_size(), o.logits_budget_mb, h.device.type, o.mode)


def saved_shape(mode: str, R: Any, D: Any, V: Any, kept: Any) -> tuple[Any, Any]:
    """Shape of what is kept between forward and backward; R may be symbolic. D counts low-rank columns too."""
    if mode == "frozen":
        return R, D
    return (kept, V) if mode in ("store", "logits") else (0, V)
