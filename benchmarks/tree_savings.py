"""What packing saves under other rules and models than the README's: `python -m benchmarks.tree_savings`.

No model is run. Baselines and kinds of attention as in svpo_kernels/bench/trees.py; saved against pairwise / distinct.
"""

from __future__ import annotations

from typing import Any

import svpo_kernels as sk
from svpo_kernels.bench.trees import MODELS, count_flops, count_tokens, deep_tree

from .trees import GAP, real_pairs, real_trees

RULES: dict[str, dict[str, Any]] = {
    f"every two siblings, gap > {GAP}": {},
    "two best against two worst": dict(rule="top_bottom", min_gap=0.0),
    "best against worst": dict(rule="best_worst", min_gap=0.0),
}


def show(title: str, trees: list[sk.StepTree], pairs: list[Any], models: list[str]) -> None:
    print(title)
    rows = [count_tokens("all", trees, pairs)]
    rows += [count_flops("all", trees, pairs, model, kind) for model in models for kind in ("dense", "exact")]
    for row in rows:
        print(f"  {row.case.removeprefix('all, '):55s} {row.note}")


def main() -> None:
    print(__doc__)
    trees = real_trees()
    for name, rule in RULES.items():
        for dedup in (True, False):
            title = f"three real trees, {name}, any kind, duplicate texts {'once' if dedup else 'kept'}"
            show(title, trees, real_pairs(trees, dedup=dedup, **rule), list(MODELS) if dedup else [])
    deep = deep_tree()
    show("depth 6, 4 children, every two siblings", [deep], [sk.select_pairs(deep, "all")],
         ["tiny 256 x 4", "Llama-3-8B"])


if __name__ == "__main__":
    main()
