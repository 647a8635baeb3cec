"""Advantages of steps from rewards and values: within a group, as a gain in value, and by GAE on trees. No gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    NUMBERS,
    fail,
    require_choice,
    require_integer,
    require_no_grad,
    require_number,
    require_vector,
)
from .reference import sum_by

GROUPED = ("group_mean", "group_norm", "rloo")
HOWS = (*GROUPED, "gain", "gae")


def step_advantages(
    rewards: Tensor | None,
    how: str,
    *,
    groups: Tensor | None = None,
    parents: Tensor | None = None,
    values: Tensor | None = None,
    root_values: float | Tensor = 0.0,
    terminal: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """One advantage a step, (S,) fp32 (fp64 for fp64), for `step_policy_loss`; NaN: the step is no member there.

    Args:
        rewards: (S,) of each step; NaN = unknown: it belongs to no group and its advantage is NaN. None only with
            "gain".
        how: with m and std (n - 1 below it) the mean and the deviation of the n known rewards of a step's group:
            "group_mean": r - m · "group_norm": (r - m) / (std + eps) · "rloo": n / (n - 1) (r - m), the reward less the
            mean of the others. A group of one: NaN.
            "gain": values[s] - V(parent) · "gae": delta = r + gamma values[s] (0 if terminal) - V(parent),
            A = delta + gamma lam (mean of the children's A). V(parent) = values[parent], or root_values where there is
            none. A step whose delta is NaN has no A and is left out of its parent's mean.
        groups: (S,) integers, any labels: siblings (`groups=parents`), the prompt, the step's index, an anchor state.
            None: one group.
        parents: (S,) integers, the step before each; -1: none. In any order. A chain has one child a step.
        values: (S,) of the state after each step.
        root_values: of the state before the first steps: a number, or (S,) read where the parent is -1.
        terminal: (S,) bool; None: no step ends its episode.

    Nothing is whitened. Sums are fp64 in a fixed order; "gae" walks the tree on the CPU, whatever the device.

    Raises TypeError for a dtype, ValueError for a shape, device, option or cycle that does not fit, IndexError for a
    parent at or above S.

    Source: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), RLOO (arXiv 2402.14740), GAE (arXiv 1506.02438).
    """
    op = "step_advantages"
    require_choice(op, "how", how, HOWS)
    for name, number in (("gamma", gamma), ("lam", lam), ("eps", eps)):
        require_number(op, name, number)
    like = values if how == "gain" and rewards is None else rewards
    name = "values" if like is values and how == "gain" else "rewards"
    require_vector(op, name, like, None, None, "(S,)")
    S = like.shape[0]
    require_no_grad(op, rewards=rewards, values=values, root_values=root_values)
    if how in GROUPED:
        if groups is not None:
            _check_integers(op, "groups", groups, like)
        r = rewards.double()
        found = _grouped(r, groups, how, eps)
    else:
        if values is None:
            fail(op, "values", f"the (S,) values of the states after the steps with how={how!r}", None)
        if parents is None:
            fail(op, "parents", f"the (S,) step before each, -1 for none, with how={how!r}", None)
        require_vector(op, "values", values, like, S, "(S,)")
        _check_integers(op, "parents", parents, like)
        if terminal is not None and (not isinstance(terminal, Tensor) or terminal.dtype != torch.bool):
            fail(op, "terminal", "a bool tensor", terminal, TypeError)
        if terminal is not None and (terminal.shape != like.shape or terminal.device != like.device):
            fail(op, "terminal", f"(S,) = ({S},) on {like.device}", terminal)
        v, before = values.double(), _values_before(op, values, parents, root_values)
        if how == "gain":
            found = v - before
        else:
            delta = rewards.double() + gamma * (v if terminal is None else torch.where(terminal, 0.0, v)) - before
            found = _back_up(op, delta, parents, gamma * lam).to(like.device)
    doubles = any(x is not None and x.dtype == torch.float64 for x in (rewards, values))
    return found if doubles else found.float()


def _grouped(r: Tensor, groups: Tensor | None, how: str, eps: float) -> Tensor:
    known = ~r.isnan()
    ids = torch.zeros_like(r, dtype=torch.int64) if groups is None else torch.unique(groups, return_inverse=True)[1]
    G = int(ids.max()) + 1 if ids.numel() else 0
    n = sum_by(known.double(), ids, G)[ids]
    centred = r - sum_by(torch.where(known, r, 0.0), ids, G)[ids] / n
    if how == "rloo":
        centred = centred * n / (n - 1.0)
    if how == "group_norm":
        squares = sum_by(torch.where(known, centred.square(), 0.0), ids, G)[ids]
        centred = centred / ((squares / (n - 1.0)).sqrt() + eps)
    return torch.where(known & (n > 1), centred, torch.nan)


def _values_before(op: str, values: Tensor, parents: Tensor, root_values: float | Tensor) -> Tensor:
    """V(parent), (S,)."""
    S = values.shape[0]
    if isinstance(root_values, Tensor):
        require_vector(op, "root_values", root_values, values, S, "(S,)")
        root = root_values.double()
    elif isinstance(root_values, NUMBERS):
        root = values.new_full((S,), float(root_values), dtype=torch.float64)
    else:
        fail(op, "root_values", "a number or an (S,) tensor", root_values, TypeError)
    if S == 0:
        return root
    low, high = map(int, parents.aminmax())
    if high >= S or low < -1:
        fail(op, "parents", f"steps in [0, S) with S = {S}, or -1", f"step {high if high >= S else low}", IndexError)
    parents = parents.long()
    return torch.where(parents < 0, root, values.double()[parents.clamp_min(0)])


def _back_up(op: str, delta: Tensor, parents: Tensor, decay: float) -> Tensor:
    """A = delta + decay (mean of the children's A), children first; a NaN is left out of its parent's mean."""
    deltas, above = delta.tolist(), parents.tolist()
    children: list[list[int]] = [[] for _ in deltas]
    for s, parent in enumerate(above):
        if parent >= 0:
            children[parent].append(s)
    waiting = [len(own) for own in children]
    ready = [s for s, count in enumerate(waiting) if count == 0]
    found = [0.0] * len(deltas)
    for s in ready:  # it grows: a step is ready when its last child is done
        below = [found[child] for child in children[s] if not math.isnan(found[child])]
        found[s] = deltas[s] + (decay * (math.fsum(below) / len(below)) if below else 0.0)
        parent = above[s]
        if parent >= 0:
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
    if len(ready) < len(deltas):
        cycle = next(s for s, count in enumerate(waiting) if count)
        fail(op, "parents", "without a cycle", f"step {cycle} among its own ancestors")
    return torch.tensor(found, dtype=torch.float64, device="cpu")


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_integers(op: str, name: str, x: Any, like: Tensor) -> None:
    require_integer(op, name, x)
    if x.shape != like.shape or x.device != like.device:
        fail(op, name, f"(S,) = {tuple(like.shape)} on {like.device}", x)
