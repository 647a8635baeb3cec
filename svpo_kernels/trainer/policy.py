"""`objective: policy`: the keys' arguments, one advantage a step, and token log-probs of the policy that sampled.

A member is a step with a known advantage: a node of the tree, or the whole path to a leaf (`policy_steps`). Averages
are of whole trees, so that the cut changes nothing: `token_mean` counts every token of a tree once; the means over
sequences are over the paths that end in a member without members below it, and a token that several of them share
counts in each, as in one run a path.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svpo_kernels.plan import StepPlan
from svpo_kernels.step_policy import POLICY_PRESETS, policy_weights, step_policy_loss
from svpo_kernels.step_policy.advantages import HOWS
from svpo_kernels.step_policy.weights import HOWS as AVERAGES
from svpo_kernels.trees.advantages import GROUPS, tree_advantages
from svpo_kernels.trees.tree import StepNode, StepTree, node_path

from .train_data import TrainData

LOSS_KEYS = ("ratio", "kind", "clip", "dual_clip", "tau", "kl", "kl_weight", "entropy_weight")
KEYS = (*LOSS_KEYS, "average", "longest", "advantage", "advantage_groups", "gamma", "lam", "policy_steps")
CHOICES = {"policy_steps": (None, "nodes", "paths"), "advantage": (None, *HOWS), "advantage_groups": (None, *GROUPS),
           "average": (None, *AVERAGES)}
DEFAULT_PRESET = "treerpo"
# not offered: it adds two advantages, one of them within anchor states, which a tree does not name
PRESETS = {name: preset for name, preset in POLICY_PRESETS.items() if name != "gigpo"}
OF_PATHS = ("grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "sapo")  # whose step is the whole response
DEFAULTS = {"kl": "k3", "kl_weight": 0.0, "entropy_weight": 0.0, "clip": [0.2, 0.2], "tau": [1.0, 1.05],
            "advantage_groups": "siblings", "gamma": 1.0, "lam": 1.0}


def preset_keys(name: str) -> dict[str, Any]:
    """What a preset says of our keys."""
    preset = PRESETS[name]
    own = {**preset, "average": preset.average, "advantage": preset.advantages["how"],
           **{key: preset.advantages[key] for key in ("gamma", "lam") if key in preset.advantages},
           "policy_steps": "paths" if name in OF_PATHS else "nodes"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}


def fill_in(config: Any) -> None:
    """Every policy key that was left out takes the preset's value, else the ops' own default."""
    for key, value in {**DEFAULTS, **preset_keys(config.preset)}.items():
        if getattr(config, key) is None:
            setattr(config, key, value)


def loss_arguments(config: Any) -> dict[str, Any]:
    """Keyword arguments of `step_policy_loss`."""
    found = {key: getattr(config, key) for key in LOSS_KEYS}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def check(config: Any) -> None:
    """One call of each op on one token: raises what they raise for an argument."""
    one, ids = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    step_policy_loss(one, one, one, ids, ref_logps=one, entropy=one, **loss_arguments(config))
    policy_weights(ids, ids, config.average, ratio=config.ratio, longest=config.longest)
    advantages_of(config, StepTree([0], [StepNode(-1, [0], 0.0)]))


# -- data --------------------------------------------------------------------------------------------------------------


class TokenLogps:
    """Log-probs of every token of the trained steps under one policy, in the places of a TrainData's references."""

    paths, per_token = False, True

    def __init__(self, trees: list[StepTree], given: bool) -> None:
        """given: take up the nodes' old_logps."""
        self.trees, self._logps = trees, {}
        for tree, nodes in enumerate(self.referenced() if given else ()):
            for node in nodes.tolist():
                logps = trees[tree].nodes[node].old_logps
                if logps is not None:
                    self.set_reference(tree, node, np.asarray(logps, np.float64))
        self.given = len(self._logps)

    def referenced(self) -> list[np.ndarray]:
        return [np.array([i for i, node in enumerate(tree.nodes) if node.q_value is not None], np.int64)
                for tree in self.trees]

    def reference(self, tree: int, node: int) -> np.ndarray | None:
        return self._logps.get((tree, node))

    def set_reference(self, tree: int, node: int, logps: np.ndarray) -> None:
        self._logps[tree, node] = logps

    def size(self, tree: int, node: int) -> int:
        return self.trees[tree].length[node] - self.trees[tree].start[node]

    def of(self, batch: Any) -> Tensor | None:
        """(N,) fp32 by the batch's predictions; None where some step has none yet."""
        found = [self._logps.get(tuple(place)) for place in batch.node_of_step.tolist()]
        return None if any(each is None for each in found) else spread(batch.plan, found)


@dataclass
class Rollouts:
    """Per tree (nodes,): the advantages (NaN: not trained), the weight of a node's tokens, and what it adds to the
    totals (members, tokens) of an optimizer step. old, reference: token log-probs of policy and reference."""

    advantages: list[np.ndarray]
    weights: list[np.ndarray]
    members: list[np.ndarray]
    tokens: list[np.ndarray]
    old: TokenLogps
    reference: TokenLogps
    unknown: int  # steps with a value and no advantage

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(digest_size=16)  # now, before log-probs are computed: those are the model's
        for array in (*self.advantages, *self.weights, *self.members, *self.tokens,
                      *(self.old._logps[place] for place in sorted(self.old._logps))):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = digest.hexdigest()

    def totals(self, nodes: dict[int, list[int]]) -> tuple[int, int]:
        """(members, tokens) that these nodes, by tree, add to the denominators."""
        return tuple(int(sum(each[tree][own].sum() for tree, own in nodes.items()))
                     for each in (self.members, self.tokens))


def make_rollouts(config: Any, trees: list[StepTree]) -> tuple[list[StepTree], Rollouts]:
    """The trees of which members alone keep a value, and what is trained on them."""
    if config.policy_steps == "paths":
        trees = [as_paths(tree) for tree in trees]
    valued = sum(node.q_value is not None for tree in trees for node in tree.nodes)
    advantages = [advantages_of(config, tree) for tree in trees]
    trees = [with_values_of(tree, ~np.isnan(own)) for tree, own in zip(trees, advantages, strict=True)]
    by_step = config.ratio != "token"
    longest = config.longest
    if config.average == "dr_grpo" and longest is None:
        longest = max((int(path_sizes(tree, ~np.isnan(own), by_step).max(initial=1))
                       for tree, own in zip(trees, advantages, strict=True)), default=1)
    shares = [shares_of(tree, ~np.isnan(own), config.average, by_step, longest)
              for tree, own in zip(trees, advantages, strict=True)]
    weights, members, tokens = ([share[part] for share in shares] for part in range(3))
    known = sum(int((~np.isnan(own)).sum()) for own in advantages)
    return trees, Rollouts(advantages, weights, members, tokens, TokenLogps(trees, True), TokenLogps(trees, False),
                           valued - known)


def with_values_of(tree: StepTree, keep: np.ndarray) -> StepTree:
    """The tree with q_values only where keep (nodes,) is true."""
    nodes = [node if kept or node.q_value is None else replace(node, q_value=None)
             for node, kept in zip(tree.nodes, keep.tolist(), strict=True)]
    return tree if all(map(operator.is_, nodes, tree.nodes)) else StepTree(tree.paths.prompt, nodes)


def advantages_of(config: Any, tree: StepTree) -> np.ndarray:
    if not len(tree):
        return np.zeros(0, np.float32)
    return tree_advantages(tree, config.advantage, groups=config.advantage_groups, gamma=config.gamma,
                           lam=config.lam).numpy()


def as_paths(tree: StepTree) -> StepTree:
    """Every path to a leaf with a value as one step under the prompt: a response, as sequence-level methods see it."""
    nodes = []
    for leaf in range(len(tree)):
        if tree.children[leaf] or tree.nodes[leaf].q_value is None:
            continue
        chain = node_path(tree.nodes, leaf)
        ends = [*(tree.start[i] for i in chain[1:]), tree.length[leaf]]
        logps: list[Any] | None = []
        for i, end in zip(chain, ends, strict=True):
            own = tree.nodes[i].old_logps
            logps = None if own is None or logps is None else [*logps, *own[:end - tree.start[i]]]
        end = tree.nodes[leaf]
        nodes.append(StepNode(-1, q_value=end.q_value, path_ids=tree.path(leaf), start=tree.start[chain[0]],
                              terminal=end.terminal, old_logps=logps, value_end=tree.value_end(leaf)))
    return StepTree(tree.prompt_ids, nodes)


def own_sizes(tree: StepTree, member: np.ndarray, by_step: bool) -> np.ndarray:
    """(nodes,) what a node adds to the length of a path: its tokens, or 1 by step; 0 for no member."""
    sizes = np.array(tree.length, np.int64) - np.array(tree.start, np.int64)
    return np.where(member, 1 if by_step else sizes, 0)


def path_sizes(tree: StepTree, member: np.ndarray, by_step: bool) -> np.ndarray:
    """(nodes,) lengths of the paths to the nodes, members counted."""
    sizes = own_sizes(tree, member, by_step)
    for i in tree.order:
        parent = tree.nodes[i].parent
        sizes[i] += sizes[parent] if parent >= 0 else 0
    return sizes


def shares_of(tree: StepTree, member: np.ndarray, average: str, by_step: bool,
              longest: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(nodes,) each: the weight of a node's tokens, what it adds to the members and to the tokens that are averaged."""
    if average == "token_mean":
        tokens = own_sizes(tree, member, False)
        return member.astype(np.float64), own_sizes(tree, member, True) if by_step else tokens, tokens
    sizes, weights = path_sizes(tree, member, by_step), np.zeros(len(tree))
    ends = member.copy()
    below = np.zeros(len(tree), bool)
    for i in reversed(tree.order):
        parent = tree.nodes[i].parent
        ends[i] &= not below[i]
        if ends[i]:
            weights[i] = 1 / sizes[i] if average == "sequence_mean" else 1.0
        if parent >= 0:
            weights[parent] += weights[i]
            below[parent] |= below[i] | member[i]
    counted = ends.astype(np.int64) * (longest if average == "dr_grpo" else 1)
    return np.where(member, weights, 0.0), counted, counted


def facts(config: Any, trees: list[StepTree], data: TrainData) -> list[str]:
    """What is said of a file before training. trees: as read."""
    rollouts = data.rollouts
    if rollouts is None:
        held = sum(node.old_logps is not None for tree in trees for node in tree.nodes)
        return [f"{held:,} steps bring old_logps, which objective {config.objective} does not read: objective: policy "
                "trains on them"] if held else []
    trained = sum(map(len, rollouts.old.referenced()))
    zero = sum(int((own == 0).sum()) for own in rollouts.advantages)
    lines = [f"{trained:,} steps with an advantage ({config.advantage}, policy_steps {config.policy_steps}), {zero:,} "
             f"of them 0; {rollouts.unknown:,} steps with a value have none (alone in their group, or nothing known "
             "before them) and are not trained"]
    if config.policy_steps == "paths":
        open_ends = sum(node.q_value is not None and not node.terminal for tree in data.trees for node in tree.nodes)
        if open_ends:
            lines.append(f"{open_ends:,} of these paths do not end a solution (a leaf that is not terminal)")
    given, how = rollouts.old.given, "the starting model is taken as the policy that sampled them"
    lines.append("old log-probs: all from the file" if given == trained else
                 f"old log-probs: {given:,} of {trained:,} steps bring theirs, so {how}, for all" if given else
                 f"old log-probs: not in the file, so {how}")
    return lines


# -- packs -------------------------------------------------------------------------------------------------------------


def spread(plan: StepPlan, values: list[np.ndarray]) -> Tensor:
    """(N,) fp32 by prediction, from one array a step."""
    found = torch.empty(plan.num_predictions)
    if values:
        found[plan.step_order] = torch.from_numpy(np.concatenate(values)).float()
    return found


def add_rollouts(data: TrainData, pack: dict[str, Any]) -> None:
    """A pack's advantages (S,) and token weights (N,), and its batch's log-probs where they are known."""
    rollouts, batch = data.rollouts, pack["batch"]
    places = batch.node_of_step.tolist()
    counted = ~torch.isnan(batch.value_targets)
    advantages, weights = (torch.tensor([each[tree][node] for tree, node in places], dtype=torch.float32)
                           for each in (rollouts.advantages, rollouts.weights))
    pack["advantages"] = torch.where(counted, advantages, torch.nan)
    pack["token_weights"] = torch.where(counted, weights, 0.0)[batch.plan.step_ids]
    batch["old_logps"], batch["ref_logps"] = rollouts.old.of(batch), rollouts.reference.of(batch)
