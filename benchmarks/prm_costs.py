"""What a process reward model costs on the real samples: one epoch packed, distinct and naive; scoring the best of 8.

    python -m benchmarks.prm_costs [ROUNDS]

The model is a random Llama (D 256, 4 layers, V 32,000) on one thread; ways are interleaved, seconds are medians. Naive
training runs every labelled step's path alone. Scoring is compared with one run a solution that makes full logits, and
with one run a step that re-encodes its prefix; the answers of all three must agree.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import svpo_kernels as sk
from svpo_kernels.data.load import encode, load
from svpo_kernels.reasoning.loading import ScoringModel
from svpo_kernels.reasoning.score import Runner
from svpo_kernels.reasoning.scorers import Head
from svpo_kernels.reasoning.solutions import read_problems
from svpo_kernels.trainer.heads import ClassHead

from .trees import data_folder, tokenizers_

PROBLEMS = 3  # of the 20 of the sample: a round stays under a minute
V, D = 32_000, 256


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192))


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(rounds):
        for name, run in ways.items():
            begin = time.perf_counter()
            answers[name] = run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in seconds.items()}, answers


def epoch(rounds: int) -> None:
    """Forward and backward of prm_loss over every labelled step of prm800k_rows.jsonl."""
    data = load(data_folder() / "prm800k_rows.jsonl")
    texts = [text for record in data.records for text in (record.prompt, *(node.text for node in record.nodes))]
    trees = encode(data, tokenizers_.qwen(texts)).trees
    lm, head = sk.use_tree_attention(make_model()), ClassHead(D)
    none = [torch.zeros(0, 2, dtype=torch.int64)] * len(trees)
    nodes = [(tree, i) for tree in trees for i, node in enumerate(tree.nodes) if node.q_value is not None]
    packed = sk.pack_trees(trees, none, max_tokens=8192, values="labelled")
    distinct = [sk.distinct_batch([tree], none[:1], values="labelled") for tree in trees]

    def loss_of(batch: Any) -> Tensor:
        hidden = lm.model(**batch.model_inputs(lm), use_cache=False).last_hidden_state
        return head(hidden, batch.value_positions, (batch.value_targets + 1) / 2).losses.sum()

    def alone() -> Tensor:
        total = 0.0
        for tree, i in nodes:
            hidden = lm.model(torch.tensor([tree.path(i)])).last_hidden_state
            at = torch.tensor([tree.value_end(i) - 1])
            loss = head(hidden, at, torch.tensor([(tree.nodes[i].q_value + 1) / 2])).losses.sum()
            loss.backward()
            total += loss.item()
        return gradient()

    def batches(each: list[Any]) -> Tensor:
        for batch in each:
            loss_of(batch).backward()
        return gradient()

    def gradient() -> Tensor:
        parts = [p.grad.flatten() for p in (*lm.model.parameters(), *head.parameters())]
        for module in (lm, head):
            module.zero_grad(set_to_none=True)
        return torch.cat(parts)

    seconds, found = timed({"packed": lambda: batches(packed), "distinct": lambda: batches(distinct),
                            "naive": alone}, rounds)
    tokens = {"packed": sum(b.input_ids.numel() for b in packed), "distinct": sum(b.distinct_tokens for b in packed),
              "naive": sum(tree.length[i] for tree, i in nodes)}
    for name in seconds:
        error = ((found[name] - found["naive"]).norm() / found["naive"].norm()).item()
        print(f"epoch of prm800k_rows.jsonl ({len(nodes)} labelled steps), {name}: {tokens[name]:,} tokens, "
              f"{seconds[name]:.2f} s ({seconds['naive'] / seconds[name]:.2f}x naive), gradients differ by {error:.1e}")


def scoring(rounds: int) -> None:
    """Two rows of lm_head at the step ends, over some problems of best_of_8.jsonl."""
    path, lm = data_folder() / "best_of_8.jsonl", make_model().eval()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scorer = Head(tokenizers_.qwen([text for row in rows for text in (row["question"], *row["response"])], 4000))
    scorer.tokens = (10, 11)
    problems = read_problems(path, scorer)
    group = [solution for each in problems.groups[:PROBLEMS] for solution in each]
    runner = Runner(ScoringModel(scorer, sk.use_tree_attention(lm)), say=lambda text: None)
    encoded = runner.encode(group, problems.ledger)
    runner.score(encoded[:2])  # how packs run is found out once a run

    def ours() -> Tensor:
        runner.counts.tokens = runner.counts.alone = runner.counts.again = 0
        return torch.tensor([score for each in runner.score(encoded) for score in each.scores])

    @torch.no_grad()
    def full_logits() -> Tensor:
        found = []
        for _, readings in encoded:
            ids, rows = readings[-1].ids, [reading.positions[0] for reading in readings]
            logits = lm(torch.tensor([ids]), use_cache=False).logits[0]
            found.append(F.log_softmax(logits, -1)[rows][:, [10, 11]].softmax(-1)[:, 0])
        return torch.cat(found)

    @torch.no_grad()
    def every_prefix() -> Tensor:
        found = []
        for _, readings in encoded:
            for reading in readings:
                logits = lm(torch.tensor([reading.ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
                found.append(logits[[10, 11]].softmax(-1)[:1])
        return torch.cat(found)

    seconds, found = timed({"packed": ours, "full logits": full_logits, "every prefix": every_prefix}, rounds)
    counts = runner.counts
    tokens = {"packed": counts.tokens, "full logits": counts.alone, "every prefix": counts.again}
    for name in seconds:
        error = (found[name] - found["packed"]).abs().max().item()
        print(f"{PROBLEMS} problems of best_of_8.jsonl ({len(group)} solutions, {len(found['packed'])} steps), {name}: "
              f"{tokens[name]:,} tokens, {seconds[name]:.2f} s ({seconds[name] / seconds['packed']:.2f}x ours), scores "
              f"differ by {error:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = json.loads(sys.argv[1]) if len(sys.argv) > 1 else 3
    epoch(count)
    scoring(count)
