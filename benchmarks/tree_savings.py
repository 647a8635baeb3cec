"""What packing saves, counted: `python -m benchmarks.tree_savings`. Tokens and training FLOPs, no model is run.

Baselines, named with every figure: pairwise, two whole sequences a pair; distinct, each distinct sequence once, no tree
mask. Both unpadded, with lm_head on the scored rows only, as for us. dense: the mask costs T * T a pack, cut where that
is least (`max_tokens: auto`); exact: attention that never builds (T, T), one pack, and causal sequences likewise.
"""

from __future__ import annotations

from typing import Any

import svpo_kernels as sk

from .trees import GAP, deep_tree, real_trees

SHAPES = {
    "tiny 256 x 4": dict(vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
                         num_attention_heads=4),
    "tiny 768 x 4": dict(vocab_size=2000, hidden_size=768, intermediate_size=2064, num_hidden_layers=4,
                         num_attention_heads=12),
    "Qwen2.5-0.5B": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "Llama-3-8B": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8),
    "Qwen2.5-7B": dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4),
}
RULES: dict[str, dict[str, Any]] = {
    "every two siblings, gap > 0.6": dict(rule="all", min_gap=GAP),
    "two best against two worst": dict(rule="top_bottom"),
    "best against worst": dict(rule="best_worst"),
}


def percent(saved: tuple[float, float]) -> str:
    return f"{100 * saved[0]:5.1f} / {100 * saved[1]:5.1f} %"


def config(name: str) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    return (Qwen2Config if "Qwen" in name else LlamaConfig)(**SHAPES[name])


def one_pack(trees: list[sk.StepTree], pairs: list[Any]) -> sk.StepBatch:
    return sk.pack_trees(trees, pairs, max_tokens=10**9)[0]


def tokens_table(trees: list[sk.StepTree], **rule: Any) -> None:
    pairs = [sk.select_pairs(tree, same_kind=False, **rule) for tree in trees]
    for name, own in [*((f"tree {t + 1}", [t]) for t in range(len(trees))), ("all", range(len(trees)))]:
        batch = one_pack([trees[t] for t in own], [pairs[t] for t in own])
        T = batch.input_ids.shape[1]
        saved = 1 - T / batch.pairwise_tokens, 1 - T / batch.distinct_tokens
        print(f"  {name:8s} {len(batch.pairs):5d} pairs  pairwise {batch.pairwise_tokens:8d}  distinct "
              f"{batch.distinct_tokens:7d}  packed {T:6d}  saved {percent(saved)}")


def flops_table(trees: list[sk.StepTree], shapes: list[str], **rule: Any) -> None:
    pairs = [sk.select_pairs(tree, same_kind=False, **rule) for tree in trees]
    whole = one_pack(trees, pairs)
    T = whole.input_ids.shape[1]
    print(f"  {'tokens alone':14s} {percent((1 - T / whole.pairwise_tokens, 1 - T / whole.distinct_tokens))}")
    for name in shapes:
        size = sk.choose_max_tokens(trees, pairs, config(name))
        batches = sk.pack_trees(trees, pairs, max_tokens=size)
        dense = sk.count_flops(config(name), batches).saved
        exact = sk.count_flops(config(name), whole, "exact").saved
        print(f"  {name:14s} dense {percent(dense)} (max_tokens {size}, {len(batches)} packs)   exact {percent(exact)}"
              f"   dense / exact {dense[0] / exact[0]:.3f}")


def main() -> None:
    print(__doc__)
    trees = real_trees()
    for dedup in (True, False):
        print(f"three real trees, every two siblings with a gap above {GAP}, any kind, duplicate texts "
              f"{'once' if dedup else 'kept'}: tokens saved against pairwise / distinct")
        tokens_table(trees, rule="all", min_gap=GAP, dedup=dedup)
    for name, rule in RULES.items():
        print(f"three real trees, {name}, any kind: saved against pairwise / distinct")
        flops_table(trees, list(SHAPES), **rule)
    print("a synthetic tree, depth 6, 4 children, steps of 20 to 60 tokens, every two siblings: saved against the same")
    flops_table([deep_tree()], ["tiny 256 x 4", "Llama-3-8B"], rule="all")


if __name__ == "__main__":
    main()
