"""Trees that the tree benchmarks share: the three real ones (SVPO_DATA or ../shared/data) and deep synthetic ones."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import svpo_kernels as sk

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tokenizers_ import qwen  # noqa: E402  the tokenizers that the tests train, too

GAP = 0.6  # on the mapped scale: 0.3 of a probability

def data_folder() -> Path:
    return Path(os.environ.get("SVPO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real_trees(chat: bool = True) -> list[sk.StepTree]:
    """The three trees of aps_trees.jsonl under a Qwen-style tokenizer trained on their text, with its chat template."""
    from svpo_kernels.trainer.data import encode, load

    data = load(data_folder() / "aps_trees.jsonl")
    texts = [text for record in data.records for text in (record.prompt, *(node.text for node in record.nodes))]
    return [example.tree for example in encode(data, qwen(texts, chat=chat)).examples]


def deep_tree(seed: int = 0, *, depth: int = 6, children: int = 4, tokens: tuple[int, int] = (20, 60),
              prompt: int = 100, vocab: int = 2000) -> sk.StepTree:
    """A full tree of random steps of tokens[0] ... tokens[1] ids, with random values."""
    rng = random.Random(seed)
    nodes: list[sk.StepNode] = []
    level = [-1]
    for _ in range(depth):
        below = []
        for parent in level:
            for _ in range(children):
                below.append(len(nodes))
                ids = [rng.randrange(vocab) for _ in range(rng.randint(*tokens))]
                nodes.append(sk.StepNode(parent, ids, rng.uniform(-1, 1)))
        level = below
    return sk.StepTree([rng.randrange(vocab) for _ in range(prompt)], nodes)
