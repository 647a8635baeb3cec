"""Planning grows with what is needed: many trees, one large tree, long chains."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
import tiny_trees
from test_packing import check_steps, path_of, sequences, trie_size
from training_ import make_trainer, unequal_data

from svpo_kernels import StepNode, StepTree, pack_trees, select_pairs
from svpo_kernels.trainer import TrainData
from svpo_kernels.trainer import trainer as trainer_module
from svpo_kernels.trainer.planner import EpochPlanner, PackSettings
from svpo_kernels.trees.cuts import MaxTokens, Price
from svpo_kernels.trees.packing import Pack, Part, packs_of
from svpo_kernels.trees.request import Request, by_prompt
from svpo_kernels.trees.trie import Trie


def forest(count, **shape):
    trees = [tiny_trees.random_tree(i, **dict(depth=2, children=3, tokens=(2, 5), prompt=4, vocab=9) | shape)
             for i in range(count)]
    return trees, [select_pairs(tree, "all") for tree in trees]


@pytest.mark.parametrize("max_tokens", [60, 300, MaxTokens(10**6, Price(1 / 300, 4.0)), 10**6])
@pytest.mark.parametrize("values", ["pairs", "path", "labelled"])
def test_more_items_than_a_window_lose_and_repeat_nothing(max_tokens, values):
    trees, pairs = forest(24)
    sft = [rows[:2, 0].unique().tolist() for rows in pairs]
    assert sum(map(len, pairs)) > 256
    batches = pack_trees(trees, pairs, max_tokens=max_tokens, values=values, sft=sft)
    assert (len(batches) == 1) == (max_tokens == 10**6 and not isinstance(max_tokens, MaxTokens))
    got, targets, members = [], [], []
    for batch in batches:
        check_steps(trees, batch, path_of)
        nodes = list(map(tuple, batch.node_of_step.tolist()))
        assert len(set(nodes)) == len(nodes)
        got += [(*nodes[w], nodes[l][1]) for w, l in batch.pairs.tolist()]
        targets += [node for node, q in zip(nodes, batch.value_targets.tolist(), strict=True) if q == q]
        members += [nodes[step] for step in batch.sft_steps.tolist()]
    assert sorted(got) == sorted((t, w, l) for t, rows in enumerate(pairs) for w, l in rows.tolist())
    wanted = {(t, i) for t, tree in enumerate(trees) for i in range(len(tree))}
    if values != "labelled":
        held = {(t, i) for t, rows in enumerate(pairs) for i in rows.flatten().tolist()}
        above = {(t, trees[t].nodes[i].parent) for t, i in held} - {(t, -1) for t in range(len(trees))}
        wanted = held | above if values == "path" else held
    assert sorted(targets) == sorted(wanted)
    assert sorted(members) == sorted((t, i) for t, nodes in enumerate(sft) for i in nodes)
    runs = [run for tree, rows in zip(trees, pairs, strict=True) for run in sequences([tree], [rows], values)]
    assert sum(batch.pairwise_tokens for batch in batches) == sum(map(len, runs))
    assert sum(batch.distinct_tokens for batch in batches) == sum(map(len, set(map(tuple, runs))))
    if len(batches) == 1:
        assert batches[0].input_ids.shape[1] == trie_size(runs)


def test_a_pair_that_is_too_long_is_named_wherever_it_stands():
    trees, pairs = forest(24)
    trees.append(StepTree([1], [StepNode(-1, [5] * 70), StepNode(-1, [6])]))
    with pytest.raises(ValueError, match=r"max_tokens must be >= 72, the tokens of pair .* of tree 24, got int 60"):
        pack_trees(trees, [*pairs, [[0, 1]]], max_tokens=60)


def test_memory_does_not_grow_with_the_trees():
    def peak(count):
        rng = np.random.default_rng(0)
        trees = [StepTree(rng.integers(0, 999, 40), [StepNode(-1, rng.integers(0, 999, 60)) for _ in range(2)])
                 for _ in range(count)]
        tracemalloc.start()
        tokens = sum(pack.batch().input_ids.numel() for pack in packs_of(trees, [[[0, 1]]] * count, max_tokens=1000))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, tokens

    (small, few), (large, many) = peak(300), peak(900)
    assert many > 2.9 * few
    assert large - small < 600 * 1500  # bytes a tree: the order of the items and what has been seen, not its ids


def test_only_what_the_pairs_need_is_looked_at():
    rng = random.Random(0)
    nodes = [StepNode(i // 4 - 1 if i >= 4 else -1, [rng.randrange(50) for _ in range(5)], 0.5) for i in range(5000)]
    tree = StepTree([1, 2], nodes)
    pairs = np.array([[4 * i, 4 * i + 1] for i in range(600, 664)])
    request = Request("test", [tree], [pairs], "pairs", None)
    part = Part(request, request.order)
    held = set()
    for i in pairs.ravel().tolist():
        while i != -1:
            held.add(i)
            i = tree.nodes[i].parent
    assert part.node.tolist() == sorted(held) and len(held) < 400


def test_a_trie_names_equal_paths_alike_and_parts_runs_where_paths_end():
    tree = StepTree([1, 2], [StepNode(-1, [3]), StepNode(-1, [3, 4, 5]), StepNode(0, [4, 5]), StepNode(-1, [9])])
    trie = Trie([(tree, [0, 2, 1, 3])])
    assert [ids.tolist() for ids in trie.ids] == [[1, 2], [3], [4, 5], [9]]
    assert trie.above.tolist() == [-1, 0, 1, 0] and trie.depth.tolist() == [0, 2, 3, 2]
    assert trie.past.tolist() == [4, 3, 3, 4] and trie.end.tolist() == [1, 2, 2, 3]
    other = Trie([(StepTree([1], [StepNode(-1, [2, 3, 4, 5])]), [0])])
    assert len(other.ids) == 2 and other.names[other.end[0]] == trie.names[trie.end[1]]
    assert len(set(trie.names)) == 4
    assert trie.pieces(2, 1, 4) == [(0, 1, 1), (1, 0, 1), (2, 0, 1)] and trie.path(2) == [0, 1, 2]


def test_trees_are_taken_prompt_by_prompt_as_a_trie_would_meet_them():
    rng = random.Random(1)
    prompts = [[rng.randrange(3) for _ in range(rng.randint(1, 4))] for _ in range(60)]
    trees = [StepTree(prompt, [StepNode(-1, [7])]) for prompt in prompts]
    found = by_prompt(trees)
    assert sorted(found) == list(range(60))

    def first(prefix):
        return min(t for t, prompt in enumerate(prompts) if prompt[:len(prefix)] == prefix)

    for a, b in zip(found, found[1:], strict=False):
        shared = next((k for k, (x, y) in enumerate(zip(prompts[a], prompts[b], strict=False)) if x != y),
                      min(len(prompts[a]), len(prompts[b])))
        branch = [first(prompts[t][:shared + 1]) if len(prompts[t]) > shared else t for t in (a, b)]
        assert branch[0] < branch[1], (a, b)
    assert by_prompt([]) == []


# -- the trainer's plan ---------------------------------------------------------------------------------------------


def planner_of(data, **settings):
    return EpochPlanner(data, PackSettings(**dict(max_tokens=80, pairs_per_step=20) | settings), 3)


def test_a_process_makes_its_own_packs_only(monkeypatch):
    made = []
    batch = Pack.batch
    monkeypatch.setattr(Pack, "batch", lambda pack: made.append(pack) or batch(pack))
    planner = planner_of(unequal_data(), world_size=3)
    shares = [planner.share(0, 0, rank) for rank in range(3)]
    own = [sum(len(pack["batch"].pairs) > 0 for pack in share["packs"]) for share in shares]
    assert len(made) == sum(own) == len(planner.planned(0, 0)) and len({len(share["packs"]) for share in shares}) == 1
    for kind in range(3):
        assert shares[0]["counts"][kind] == sum(pack["counts"][kind] for share in shares for pack in share["packs"])


@pytest.mark.parametrize("packing", ["tree", "distinct", "pairs"])
@pytest.mark.parametrize("values", ["pairs", "path", "labelled"])
def test_values_count_once_over_all_blocks(values, packing):
    data = unequal_data(sft=True)
    data.trees.append(tiny_trees.random_tree(9, depth=2, children=2))  # without a pair
    data = TrainData(data.trees, [*data.pairs, np.zeros((0, 2))], [*data.sft, [1, 2]])
    planner = planner_of(data, values=values, once=True, packing=packing, pairs_per_step=5)
    assert len(planner) > 5
    targets, sft, pairs = [], [], 0
    for step in range(len(planner)):
        share = planner.share(0, step, 0)
        for pack in share["packs"]:
            nodes = list(map(tuple, pack["batch"].node_of_step.tolist()))
            counted = [node for node, q in zip(nodes, pack["batch"].value_targets.tolist(), strict=True) if q == q]
            assert pack["counts"] == (len(pack["batch"].pairs), len(counted), len(pack["batch"].sft_steps))
            targets += counted
            sft += [nodes[place] for place in pack["batch"].sft_steps.tolist()]
        pairs += share["counts"][0]
    assert len(set(targets)) == len(targets) and planner.totals() == (pairs, len(targets), len(sft))
    assert len(targets) == data.num_targets(values)
    assert sorted(sft) == [(t, i) for t, nodes in enumerate(data.sft) for i in sorted(nodes.tolist())]


@pytest.mark.parametrize("preset", [dict(preset="svpo", values="path"), dict(preset="svpo", values="labelled"),
                                    dict(preset="step_dpo", sft_weight=0.5)])
def test_an_evaluation_in_blocks_is_that_in_one(tmp_path, monkeypatch, preset):
    held_out = unequal_data(((3, 2), (2, 3)), sft="sft_weight" in preset)
    found = []
    for block in (1024, 7):
        monkeypatch.setattr(trainer_module, "BLOCK", block)
        found.append(make_trainer(tmp_path / str(block), eval_data=held_out, **preset).evaluate())
    for name, value in found[0].items():
        if not name.startswith(("eval_runtime", "eval_samples", "eval_steps", "eval_compute")):
            assert found[1][name] == pytest.approx(value, rel=1e-5), name


def test_references_in_blocks_are_those_in_one(tmp_path, monkeypatch):
    found = []
    for block in (1024, 7):
        monkeypatch.setattr(trainer_module, "BLOCK", block)
        data = unequal_data(references=False)
        make_trainer(tmp_path / str(block), data=data, values="labelled").prepare_reference(data)
        found.append([node.ref_logp for tree in data.trees for node in tree.nodes if node.ref_logp is not None])
    assert len(found[0]) > 30 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_step_of_a_large_tree_looks_at_the_nodes_it_needs(monkeypatch):
    rng = random.Random(0)
    nodes = [StepNode(-1 if i < 4 else i // 4 - 1, [rng.randrange(50) for _ in range(5)], rng.uniform(-1, 1))
             for i in range(4000)]
    tree = StepTree([1, 2], nodes)
    data = TrainData([tree], [select_pairs(tree, "all")], [np.arange(0, 4000, 3)])
    parts = []
    made = Part.__init__
    monkeypatch.setattr(Part, "__init__", lambda part, *given: made(part, *given) or parts.append(part))
    for values in ("pairs", "path", "labelled"):
        planner = planner_of(data, max_tokens=4096, pairs_per_step=64, values=values)
        parts.clear()
        assert planner.share(0, 40, 0)["counts"][0] == 64
        assert 40 < sum(len(part.node) for part in parts) < 400
