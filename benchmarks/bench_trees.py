"""Packed trees against the runs they replace: one forward and backward of the same loss over all pairs, wall time.

The pairwise run takes padded batches of eight pairs of similar length, two whole sequences each; the distinct run (real
trees) each distinct sequence once in one padded batch. All use the library's ops, so that only the packing differs.
The naive runs take minutes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import svpo_kernels as sk

from .race import race
from .trees import GAP, data_folder, deep_tree, real_trees


def make_model(vocab: int, hidden: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096))


def backward(model, batches: list[sk.StepBatch], P: int) -> list[torch.Tensor]:
    """Gradients of the mean preference loss over all P pairs."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        hidden = model.model(**batch.model_inputs(model), use_cache=False).last_hidden_state.flatten(0, 1)
        step_logps = sk.linear_step_logps(hidden, model.lm_head.weight, batch.plan)
        sk.svpo_loss(step_logps, batch.pairs, counts=(P, 0, 0)).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def pairwise_batches(trees: list[sk.StepTree], pairs: list[Any]) -> list[sk.StepBatch]:
    """Eight pairs a batch, of similar length, each as a tree of its own: nothing is shared."""
    alone = []
    for tree, own in zip(trees, pairs, strict=True):
        for pair in own.tolist():
            nodes = [sk.StepNode(-1, path_ids=tree.path(i), start=tree.start[i]) for i in pair]
            alone.append(sk.StepTree(tree.path(tree.nodes[pair[0]].parent), nodes))
    alone.sort(key=lambda tree: max(tree.length))
    return [sk.distinct_batch(alone[i:i + 8], [[[0, 1]]] * len(alone[i:i + 8])) for i in range(0, len(alone), 8)]


def check_and_race(record, case: str, trees: list[sk.StepTree], pairs: list[Any], target: str = "") -> None:
    model, P = make_model(2000, 128), sum(map(len, pairs))
    size = sk.choose_max_tokens(trees, pairs, model.config)
    batches = {"packed": sk.pack_trees(trees, pairs, max_tokens=size), "pairwise": pairwise_batches(trees, pairs)}
    if len(trees) > 1:
        batches["distinct"] = [sk.distinct_batch(trees, pairs)]
    expected = [g.clone() for g in backward(model, batches["pairwise"], P)]
    norm = sum((g**2).sum() for g in expected) ** 0.5
    errors = []
    for name in batches.keys() - {"pairwise"}:
        got = backward(model, batches[name], P)
        errors.append(float(sum(((a - b) ** 2).sum() for a, b in zip(got, expected, strict=True)) ** 0.5 / norm))
    assert max(errors) <= 1e-4
    naive, distinct = (sum(b[name] for b in batches["packed"]) for name in ("pairwise_tokens", "distinct_tokens"))
    packed = sum(batch.input_ids.shape[1] for batch in batches["packed"])
    note = (f"{P} pairs, tokens {naive} pairwise, {distinct} distinct, {packed} packed (max_tokens {size}); gradients "
            f"differ by {max(errors):.1e}")
    variants = {name: lambda own=own: backward(model, own, P) for name, own in batches.items()}
    targets = {"pairwise": target} if target else {}
    record(race(case, variants, ours="packed", targets=targets, rounds=3, warm=True, note=note),
           variants["packed"])


@pytest.mark.skipif(not data_folder().is_dir(), reason="the real samples are not here; set SVPO_DATA to their folder")
def test_real_trees(record) -> None:
    trees = real_trees()
    pairs = [sk.select_pairs(tree, "all", GAP, same_kind=False) for tree in trees]
    check_and_race(record, "three real trees, gap > 0.6, any kind, Llama 128 x 2", trees, pairs)


def test_deep_tree(record) -> None:
    tree = deep_tree(tokens=(4, 8), prompt=50)
    pairs = [sk.select_pairs(tree, "all")]
    check_and_race(record, "depth 6, 4 children, every two siblings, Llama 128 x 2", [tree], pairs, ">= 6")
