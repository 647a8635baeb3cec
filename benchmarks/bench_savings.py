"""What packing saves, as figures for the README: tokens and training FLOPs, counted; no model is run.

Pairs: every two siblings with a gap above 0.6 on [-1, 1], distinct texts, any kind (the deep tree: every two siblings).
"""

from __future__ import annotations

import pytest

import svpo_kernels as sk

from .race import Result
from .tree_savings import config, one_pack
from .trees import GAP, data_folder, deep_tree, real_trees

TARGETS = {  # saved against pairwise and against each distinct sequence once, as factors: 80 % less is 5 times fewer
    "tokens": (80, 45),
    "tiny 768 x 4, dense mask": (70, 25),
    "Qwen2.5-0.5B, dense mask": (70, 25),  # the smallest model that people train on steps
    "Llama-3-8B, dense mask": (76, 40),
    "Llama-3-8B, exact attention": (79, 47),
}


def saved(case: str, unit: str, packed: int, pairwise: int, distinct: int, target: tuple[int, int] | None) -> Result:
    factors = [f">= {1 / (1 - share / 100):.4f}" for share in target or ()]
    names = ("pairwise", "each distinct sequence once")
    medians = {"packed": packed, **dict(zip(names, (pairwise, distinct), strict=True))}
    note = f"saved {100 * (1 - packed / pairwise):.1f} % / {100 * (1 - packed / distinct):.1f} %"
    return Result(case, "packed", unit, medians, {}, dict(zip(names, factors, strict=False)), note)


@pytest.mark.skipif(not data_folder().is_dir(), reason="the real samples are not here; set SVPO_DATA to their folder")
def test_real_trees(record) -> None:
    trees = real_trees()
    pairs = [sk.select_pairs(tree, "all", GAP, same_kind=False) for tree in trees]
    assert [len(own) for own in pairs] == [29, 108, 20]
    groups = {f"tree {t + 1} alone": [t] for t in range(3)} | {"three real trees": [0, 1, 2]}
    for name, own in groups.items():
        batch = one_pack([trees[t] for t in own], [pairs[t] for t in own])
        tokens = batch.input_ids.shape[1], batch.pairwise_tokens, batch.distinct_tokens
        target = TARGETS["tokens"] if len(own) == 3 else None
        record.again(saved(f"{name}, tokens", "tokens", *tokens, target))
    for shape in ("tiny 768 x 4", "Qwen2.5-0.5B", "Llama-3-8B", "Qwen2.5-7B"):
        size = sk.choose_max_tokens(trees, pairs, config(shape))
        dense = sk.count_flops(config(shape), sk.pack_trees(trees, pairs, max_tokens=size))
        exact = sk.count_flops(config(shape), one_pack(trees, pairs), "exact")
        for kind, count in (("dense mask", dense), ("exact attention", exact)):
            case = f"{shape}, {kind}"
            result = saved(f"three real trees, training FLOPs, {case}", "FLOPs", *count, TARGETS.get(case))
            result.note += f", max_tokens {size}" if kind == "dense mask" else ""
            record.again(result)


def test_deep_tree(record) -> None:
    tree = deep_tree()
    pairs = [sk.select_pairs(tree, "all")]
    whole = one_pack([tree], pairs)
    tokens = whole.input_ids.shape[1], whole.pairwise_tokens, whole.distinct_tokens
    bound = saved("deep synthetic tree (depth 6, 4 children), tokens", "tokens", *tokens, None)
    record.again(bound)
    exact = sk.count_flops(config("Llama-3-8B"), whole, "exact")
    result = saved("deep synthetic tree, training FLOPs, Llama-3-8B, exact attention", "FLOPs", *exact, None)
    share = exact.saved[0] / (1 - tokens[0] / tokens[1])
    result.note += f"; {100 * share:.1f} % of the bound by tokens alone (to reach: 95 %)"
    record.again(result)
