"""Trees that the tree benchmarks share: the three real ones (SVPO_DATA or ../shared/data) and deep synthetic ones."""

from __future__ import annotations

import os
import random
from pathlib import Path

import svpo_kernels as sk

GAP = 0.6  # on the mapped scale: 0.3 of a probability

# Pre-tokenisation as in Qwen2: a word takes one leading non-letter, digits stand alone.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def data_folder() -> Path:
    return Path(os.environ.get("SVPO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def real_trees() -> list[sk.StepTree]:
    """The three trees of aps_trees.jsonl under a byte-level BPE tokenizer trained on their text."""
    from svpo_kernels.trainer.data import encode, load

    data = load(data_folder() / "aps_trees.jsonl")
    texts = [text for record in data.records for text in (record.prompt, *(node.text for node in record.nodes))]
    return [example.tree for example in encode(data, _tokenizer(texts)).examples]


def _tokenizer(texts: list[str]):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


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
