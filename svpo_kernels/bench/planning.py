"""What planning costs: many pairs through every pass of a run, a step of a large tree, a long chain. No model runs.

A figure is taken only where every pair was planned once and the packs hold the tokens that they have to hold. Growth is
measured against a smaller case, times the ratio of the sizes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import svpo_kernels as sk
from svpo_kernels.trainer import TrainData, reference
from svpo_kernels.trainer.planner import EpochPlanner, PackSettings

from .race import Result, Weigh

FAMILY = "planning"
LIMIT = "the limit"
PROMPT, ANSWER = 256, 400  # tokens of a pair


@dataclass(frozen=True)
class Sizes:
    pairs: int
    nodes: int
    steps: int
    part: int = 4  # how many times smaller the case is that growth is measured from


SCALES = {"cpu": Sizes(60_000, 100_000, 1000), "tiny": Sizes(400, 6000, 40)}


def pairs_data(count: int) -> TrainData:
    """Preference pairs of random ids: a prompt and two answers each, which share nothing."""
    rng = np.random.default_rng(0)

    def ids(first: int, many: int) -> np.ndarray:
        found = rng.integers(5, 100_000, many, dtype=np.int32)
        found[0] = first
        return found

    trees = [sk.StepTree(ids(t, PROMPT), [sk.StepNode(-1, ids(side, ANSWER), 0.5 - side) for side in range(2)])
             for t in range(count)]
    return TrainData(trees, [np.array([[0, 1]])] * count)


def every_pass(data: TrainData, max_tokens: int) -> None:
    """Fingerprints, the reference's pass, an epoch in steps of 64 pairs, one evaluation; each is checked."""
    data.fingerprint()
    reference.data_fingerprint(data)
    whole = PackSettings(max_tokens=max_tokens, pairs_per_step=1024, once=True)
    for settings in (whole, PackSettings(max_tokens=max_tokens), whole):
        planner = EpochPlanner(data, settings, None if settings.once else 0)
        seen = tokens = 0
        for step in range(len(planner)):
            for pack in planner.share(0, step, 0)["packs"]:
                seen += len(pack["batch"].pairs)
                tokens += pack["batch"].input_ids.numel()
        wanted = (data.num_pairs, data.num_pairs * (PROMPT + 2 * ANSWER))
        if (seen, tokens) != wanted:
            raise RuntimeError(f"planning: {seen} pairs and {tokens} tokens were planned, expected {wanted}")
        reference.set_references(data, dict.fromkeys(reference.places(data), -1.0))


def time_pairs(scale: str, max_tokens: int = 8192) -> Result:
    sizes = SCALES[scale]
    few = _seconds(lambda data: every_pass(data, max_tokens), pairs_data(sizes.pairs // sizes.part))
    data = pairs_data(sizes.pairs)
    with Weigh() as weigh:
        many = _seconds(lambda data: every_pass(data, max_tokens), data)
    smaller = f"a {sizes.part}th of the pairs, {sizes.part} times"
    return Result(
        f"{sizes.pairs:,} pairs of {PROMPT} + 2 x {ANSWER} tokens: references, an epoch, an evaluation", "planned", "s",
        {"planned": many, LIMIT: 180.0, smaller: sizes.part * few}, {}, {LIMIT: ">= 1", smaller: ">= 0.8"},
        f"{max_tokens} tokens a pack, {weigh.mebibytes:,.0f} MiB beyond the data (limit 2,048)", FAMILY,
        memory={"planned": weigh.mebibytes})


def wide_tree(nodes: int) -> tuple[sk.StepTree, np.ndarray]:
    """A tree of four children a node with random steps of 20 to 40 ids, and the best against the worst siblings."""
    rng, ids = random.Random(0), np.random.default_rng(0)
    made = [sk.StepNode(i // 4 - 1, ids.integers(5, 100_000, rng.randint(20, 40)), rng.uniform(-1, 1))
            for i in range(nodes)]
    tree = sk.StepTree(ids.integers(5, 100_000, 100), made)
    return tree, sk.select_pairs(tree).numpy()


def step_of(tree: sk.StepTree, pairs: np.ndarray) -> float:
    """Milliseconds of a step of 64 pairs, median over 20; its packs hold the 128 paths, each node once where one pack
    holds all."""
    planner = EpochPlanner(TrainData([tree], [pairs]), PackSettings(max_tokens=8192), 0)
    steps = np.linspace(0, len(planner) - 2, 20).astype(int).tolist()
    planner.steps(0)
    times = []
    for step in steps:
        before = time.perf_counter()
        share = planner.share(0, step, 0)
        times.append((time.perf_counter() - before) * 1e3)
        needed: set[int] = set()
        for _, pair in planner.steps(0)[step]:
            for i in pairs[pair].tolist():
                while i != -1 and i not in needed:
                    needed.add(i)
                    i = tree.nodes[i].parent
        least = len(tree.prompt_ids) + sum(len(tree.paths.own(i)) for i in needed)
        packs = [pack["batch"] for pack in share["packs"]]
        found = sum(batch.input_ids.numel() for batch in packs), sum(len(batch.pairs) for batch in packs)
        if found[1] != 64 or not (found[0] == least if len(packs) == 1 else found[0] > least):
            raise RuntimeError(f"planning: step {step} has (tokens, pairs) = {found}, expected {(least, 64)}")
    return statistics.median(times)


def time_tree(scale: str) -> Result:
    nodes = SCALES[scale].nodes
    smaller = f"a tree of {nodes // 10:,} nodes"
    found = {"planned": step_of(*wide_tree(nodes)), LIMIT: 20.0, smaller: step_of(*wide_tree(nodes // 10))}
    return Result(f"a step of 64 pairs of a tree of {nodes:,} nodes", "planned", "ms", found, {},
                  {LIMIT: ">= 1", smaller: ">= 0.5"}, "", FAMILY)


def chain(steps: int) -> Callable[[], tuple[int, int]]:
    """A chain of steps of text, with another first step beside it: tokenised, packed with all values."""
    tokenizer, rng = _tokenizer(), random.Random(0)
    words = "let us add the sum of x and y so that it gives 12 or 7 = a prime number .".split()
    texts = [" ".join(rng.choice(words) for _ in range(20)) for _ in range(steps + 1)]

    def made() -> tuple[int, int]:
        nodes = [sk.StepNode(i - 1, q_value=0.5, text=text) for i, text in enumerate(texts[:-1])]
        tree = sk.tree_from_text(tokenizer, "A question.\n", [*nodes, sk.StepNode(-1, q_value=0.0, text=texts[-1])])
        whole = tokenizer("A question.\n" + "".join(f"{text}\n\n" for text in texts[:-1]))["input_ids"]
        if tree.path(steps - 1) != whole:
            raise RuntimeError("planning: the chain's ids are not those of its whole text")
        batch, = sk.pack_trees([tree], [[]], max_tokens=10**9, values="labelled")
        return batch.counts[1], batch.input_ids.numel()

    return made


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def time_chain(scale: str) -> Result:
    steps = SCALES[scale].steps
    times = {}
    for many in (steps // 2, steps):
        made = chain(many)
        if made()[0] != many + 1:
            raise RuntimeError("planning: a step of the chain is missing")
        times[many] = statistics.median(_seconds(lambda made: made(), made) for _ in range(3))
    half = "half the steps, twice"
    return Result(f"a chain of {steps:,} steps from its text to its pack", "planned", "s",
                  {"planned": times[steps], LIMIT: 1.0, half: 2 * times[steps // 2]}, {},
                  {LIMIT: ">= 1", half: ">= 0.5"}, f"{made()[1]:,} tokens (bytes)", FAMILY)


def _seconds(work: Callable[[Any], Any], given: Any) -> float:
    before = time.perf_counter()
    work(given)
    return time.perf_counter() - before
