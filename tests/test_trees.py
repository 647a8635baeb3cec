"""StepNode, StepTree and select_pairs."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import tiny_trees
import torch

import svpo_kernels as sk
from svpo_kernels import StepNode, StepTree, select_pairs
from svpo_kernels.trees.widest import widest_pairs


def star(*values, terminal=None, texts=None):
    """Siblings with these q_values under the prompt."""
    return StepTree([1, 2], [
        StepNode(-1, [3 + i], q, terminal=bool(terminal and terminal[i]), text=texts[i] if texts else None)
        for i, q in enumerate(values)])


# -- trees ----------------------------------------------------------------------------------------------------------


def test_paths_and_scored_ids_of_both_forms():
    tree = StepTree([1, 2, 3], [
        StepNode(-1, [4, 5]), StepNode(0, [6]),
        StepNode(0, path_ids=[1, 2, 3, 4, 9, 8], start=4),  # keeps one token of its parent's two
        StepNode(2, torch.tensor([7, 7]))])
    assert [tree.path(i) for i in range(-1, 4)] == [
        [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 8], [1, 2, 3, 4, 9, 8, 7, 7]]
    assert [tree.step_ids(i) for i in range(4)] == [[4, 5], [6], [9, 8], [7, 7]]
    assert tree.start == [3, 5, 4, 6] and tree.length == [5, 6, 6, 8]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.int32)])
def test_ids_may_be_any_sequence(kind):
    tree = StepTree(kind([1, 2]), [StepNode(-1, kind([3])), StepNode(-1, path_ids=kind([1, 2, 4]), start=2)])
    assert tree.path(0) == [1, 2, 3] and tree.path(1) == [1, 2, 4]


def test_nodes_may_come_in_any_order():
    nodes = [StepNode(2, [5]), StepNode(0, [6]), StepNode(-1, [4]), StepNode(2, [7])]
    tree = StepTree([1], nodes)
    assert tree.path(1) == [1, 4, 5, 6] and tree.path(3) == [1, 4, 7]
    assert all(tree.order.index(node.parent) < tree.order.index(i) for i, node in enumerate(nodes) if node.parent >= 0)


def test_a_deep_tree_does_not_recurse():
    depth = 20_000
    tree = StepTree([1], [StepNode(i - 1, [i % 7]) for i in range(depth)])
    assert tree.length[-1] == depth + 1 and len(tree.path(depth - 1)) == depth + 1
    batch, = sk.pack_trees([tree], [[]], max_tokens=depth + 1, values="labelled", sft=[[depth - 1]])
    assert batch.input_ids.shape == (1, depth + 1)
    assert select_pairs(tree).shape == (0, 2)


@pytest.mark.parametrize("make, error, message", [
    (lambda: StepNode(-1, [1], 1.5), ValueError, r"StepNode: q_value must be in \[-1, 1\] or None, got float 1.5"),
    (lambda: StepNode(-1, [1], float("nan")), ValueError, "q_value must be in"),
    (lambda: StepNode(-1, [1], "0.5"), TypeError, "StepNode: q_value must be a number or None, got str '0.5'"),
    (lambda: StepNode(-1, [1], True), TypeError, "q_value must be a number or None, got bool True"),
    (lambda: StepNode(None, [1]), TypeError, "StepNode: parent must be an integer, -1 for the prompt, got None"),
    (lambda: StepNode(0.0, [1]), TypeError, "parent must be an integer, -1 for the prompt, got float 0.0"),
    (lambda: select_pairs([[1]]), TypeError, "select_pairs: tree must be a StepTree, got a list"),
    (lambda: StepNode(-1, [1], path_ids=[1], start=0), ValueError, "token_ids must be None when path_ids is given"),
    (lambda: StepNode(-1, path_ids=[1, 2]), ValueError, "start must be given together with path_ids, got None"),
    (lambda: StepNode(-1, [1], start=3), ValueError, "start must be given together with path_ids, got int 3"),
    (lambda: StepNode(-1, [0.5]), TypeError, "token_ids must be integers"),
    (lambda: StepNode(-1, [[1]]), ValueError, r"one sequence of ids, got \(1, 1\)"),
    (lambda: StepNode(-1, [-100]), IndexError, "token ids >= 0, got an id of -100"),
    (lambda: StepTree([], []), ValueError, "prompt_ids must be at least one id"),
    (lambda: StepTree([1], [StepNode(1, [1])]), ValueError, r"nodes\[0\].parent must be -1 or a node below 1, got"),
    (lambda: StepTree([1], [StepNode(-2, [1])]), ValueError, "got int -2"),
    (lambda: StepTree([1], [StepNode(1, [1]), StepNode(0, [1])]), ValueError, r"nodes\[0\].parent .* got a cycle"),
    (lambda: StepTree([1], [StepNode(0, [1])]), ValueError, "a cycle"),
    (lambda: StepTree([1], [StepNode(-1, text="a")]), ValueError, "neither .*tree_from_text"),
    (lambda: StepTree([1], [StepNode(-1, [])]), ValueError, r"nodes\[0\] must be a step of at least one token"),
    (lambda: StepTree([1], [[2]]), TypeError, r"nodes\[0\] must be a StepNode"),
    (lambda: StepTree([1, 2], [StepNode(-1, path_ids=[1, 2, 3], start=3)]), ValueError, r"in 1 \.\.\. 2"),
    (lambda: StepTree([1, 2], [StepNode(-1, path_ids=[1, 2], start=0)]), ValueError, "got int 0"),
    (lambda: StepTree([1, 2], [StepNode(-1, path_ids=[1, 9, 3], start=2)]), ValueError, "path up to start = 2"),
    (lambda: StepTree([1, 2], [StepNode(-1, path_ids=[1, 2], start=2)]), ValueError, "at least one token"),
])
def test_bad_trees(make, error, message):
    with pytest.raises(error, match=message):
        make()


# -- pairs ----------------------------------------------------------------------------------------------------------


def test_best_worst_takes_the_first_of_ties():
    assert select_pairs(star(0.5, 1.0, -1.0, 1.0, -1.0)).tolist() == [[1, 2]]
    assert select_pairs(star(0.5)).shape == (0, 2)
    assert select_pairs(star(0.5, 0.5)).shape == (0, 2)


def test_top_bottom_uses_no_node_twice():
    assert select_pairs(star(0.1, 0.9, -0.9, 0.8, -0.8), "top_bottom").tolist() == [[1, 2], [3, 4]]
    assert select_pairs(star(0.1, 0.9, -0.9), "top_bottom").tolist() == [[1, 2]]
    assert select_pairs(star(1.0, 0.0, 0.0, 0.0), "top_bottom").tolist() == [[0, 2]]
    assert select_pairs(star(0.9, 0.8, 0.1, 0.0), "top_bottom", min_gap=0.75).tolist() == [[0, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_all_is_every_two_siblings_above_the_gap(seed):
    rng = random.Random(seed)
    tree = tiny_trees.random_tree(seed, depth=3, children=3)
    for node in tree.nodes:
        if rng.random() < 0.2:
            node.q_value = None
    expected = {(a, b) for a, b in itertools.permutations(range(len(tree)), 2)
                if tree.nodes[a].parent == tree.nodes[b].parent
                and None not in (tree.nodes[a].q_value, tree.nodes[b].q_value)
                and tree.nodes[a].q_value - tree.nodes[b].q_value > 0.3}
    pairs = select_pairs(tree, "all", 0.3)
    assert pairs.dtype == torch.int64 and set(map(tuple, pairs.tolist())) == expected and len(pairs) == len(expected)


def test_a_gap_equal_to_min_gap_is_not_above_it_whatever_rounding_says():
    assert (2 * 0.7 - 1) - (2 * 0.4 - 1) > 0.6 - 1e-15
    for low in range(8):
        tree = star(2 * (low + 3) / 10 - 1, 2 * low / 10 - 1)
        assert len(select_pairs(tree, min_gap=0.6)) == 0
        assert len(select_pairs(tree, min_gap=0.599)) == 1


def test_max_pairs_keeps_the_widest_first():
    tree = star(1.0, 0.6, 0.1, -1.0)
    assert select_pairs(tree, "all", max_pairs=3).tolist() == [[0, 3], [1, 3], [2, 3]]
    assert select_pairs(tree, "all", max_pairs=0).shape == (0, 2)
    assert len(select_pairs(tree, "all", max_pairs=99)) == 6


def test_same_kind_never_pairs_terminal_with_inner():
    tree = star(1.0, 0.5, -0.5, -1.0, terminal=[True, False, True, False])
    assert select_pairs(tree, "all").tolist() == [[1, 3], [0, 2]]
    assert select_pairs(tree, "all", same_kind=False).shape == (6, 2)
    assert select_pairs(tree).tolist() == [[1, 3], [0, 2]]
    assert select_pairs(tree, same_kind=False).tolist() == [[0, 3]]


def test_equal_texts_count_once():
    tree = star(1.0, 1.0, -1.0, texts=["a", "a", "b"])
    assert select_pairs(tree, "all").tolist() == [[0, 2]]
    assert select_pairs(tree, "all", dedup=False).tolist() == [[0, 2], [1, 2]]
    # Equal steps under parents of equal text are the same pair; nodes without text are compared by their ids.
    nodes = [StepNode(-1, [3]), StepNode(-1, [3])]
    nodes += [StepNode(p, [4 + i], 1.0 - i) for p in (0, 1) for i in (0, 1)]
    tree = StepTree([1], nodes)
    assert select_pairs(tree, "all").tolist() == [[2, 3]]
    assert select_pairs(tree, "all", dedup=False).tolist() == [[2, 3], [4, 5]]


def test_known_counts_of_the_real_trees(shared_data):
    rows = tiny_trees.real_texts(shared_data / "aps_trees.jsonl")
    assert [len(nodes) + 1 for _, nodes in rows] == [143, 90, 24]
    trees = [StepTree([0], [StepNode(n.parent, [1], n.q_value, text=n.text, terminal=n.terminal) for n in nodes])
             for _, nodes in rows]
    assert [len(select_pairs(t, "all", 0.6, dedup=False, same_kind=False)) for t in trees] == [89, 140, 28]
    assert [len(select_pairs(t, "all", 0.6, same_kind=False)) for t in trees] == [29, 108, 20]


@pytest.mark.parametrize("arguments, message", [
    (dict(rule="best"), "rule must be one of 'best_worst', 'top_bottom', 'all', got str 'best'"),
    (dict(min_gap=-0.1), "min_gap must be a number >= 0"),
    (dict(min_gap=float("nan")), "min_gap must be a number >= 0"),
    (dict(min_gap="wide"), "min_gap must be a number >= 0, got str 'wide'"),
    (dict(max_pairs=-1), "max_pairs must be an int >= 0 or None"),
    (dict(max_pairs=1.5), "max_pairs must be an int >= 0 or None, got float 1.5"),
])
def test_bad_selections(arguments, message):
    with pytest.raises(ValueError, match="select_pairs: " + message):
        select_pairs(star(1.0, 0.0), **arguments)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dedup", [True, False])
def test_the_widest_of_all_pairs_are_those_of_the_whole_list(seed, dedup):
    """Few values and many ties, texts that repeat under parents of equal text, values that differ by roundings."""
    rng = random.Random(seed)
    grid = [round(-1 + 2 * k / 8, 3) for k in range(9)] if seed % 2 else [rng.uniform(-1, 1) for _ in range(30)]
    grid += [0.1 + 0.2, 0.3, 0.30000000000000004 - 0.7, -0.4]
    nodes = [StepNode(-1, [1], 0.5, text="a"), StepNode(-1, [2], rng.choice(grid), text="a" if seed % 3 else "b"),
             *(StepNode(rng.choice([0, 1]), [3 + i], rng.choice([*grid, None]), text=f"t{rng.randrange(15)}",
                        terminal=rng.random() < 0.4) for i in range(40))]
    tree = StepTree([1], nodes)
    for gap, same_kind in ((0.0, True), (0.3, False)):
        every = select_pairs(tree, "all", gap, None, dedup, same_kind).tolist()
        q = [node.q_value for node in nodes]
        expected = sorted(every, key=lambda pair: q[pair[1]] - q[pair[0]])
        for most in (0, 1, 7, 50, len(every), 10**6):
            assert select_pairs(tree, "all", gap, most, dedup, same_kind).tolist() == expected[:most]


def test_the_widest_of_many_siblings_are_found_without_the_others():
    rng = random.Random(0)
    for values in ([rng.uniform(-1, 1) for _ in range(3000)], [rng.choice([-1.0, 0.0, 1.0]) for _ in range(3000)]):
        tree = star(*values)
        taken = []
        q = [Counted(value, taken) for value in values]
        assert widest_pairs([list(range(3000))], q, 0.0, 64, None) == [
            tuple(pair) for pair in select_pairs(tree, "all", max_pairs=64).tolist()]
        assert len(taken) < 20_000  # 4.5 million pairs


class Counted(float):
    """A float that counts how often it is subtracted from."""

    def __new__(cls, value, taken):
        self = super().__new__(cls, value)
        self.taken = taken
        return self

    def __sub__(self, other):
        self.taken.append(1)
        return float(self) - float(other)
