"""Process rewards at the step ends: two rows of lm_head, against full logits and against re-encoding each prefix."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import svpo_kernels as sk

from .machine import Rates, Work
from .race import Result, check_same, peak_memory, race

FAMILY = "prm"
FULL, GATHERED, PREFIXES = "eager, full logits", "eager, gathered rows and two columns", "re-encode every prefix"
REPEATS = 200


@dataclass(frozen=True)
class ScoreShape:
    """S step ends among T rows of D, two words of a head (V, D)."""

    T: int
    D: int
    V: int
    S: int = 32

    def __str__(self) -> str:
        return f"prm_scores_from_lm_head, {self.S} steps of {self.T} tokens, head ({self.V}, {self.D}), float32"


@dataclass(frozen=True)
class Responses:
    """What a best-of-N scorer gets: token ids of each response behind its problem, and where each step ends."""

    ids: list[list[int]]
    ends: list[list[int]]  # index of the last token of each step
    what: str

    def __str__(self) -> str:
        steps = sum(map(len, self.ends))
        return f"{len(self.ids)} responses, {sum(map(len, self.ids))} tokens, {steps} steps, {self.what}"


def cases(scale: str) -> list[ScoreShape | Responses]:
    if scale == "tiny":
        return [ScoreShape(64, 32, 1000, 8), made_responses(problems=1, steps=3, tokens=(2, 5))]
    return [ScoreShape(512, 1024, 128256), made_responses()]


def made_responses(problems: int = 2, responses: int = 8, steps: int = 8, tokens: tuple[int, int] = (15, 45),
                   prompt: int = 60, vocab: int = 2000) -> Responses:
    """Random ids in the shape of MATH solutions: 8 responses a problem, about 8 steps of 30 tokens."""
    rng = random.Random(0)
    ids, ends = [], []
    for _ in range(problems):
        question = [rng.randrange(vocab) for _ in range(prompt)]
        for _ in range(responses):
            ids.append(list(question))
            ends.append([])
            for _ in range(rng.randint(max(1, steps // 2), steps + steps // 2)):
                ids[-1] += [rng.randrange(vocab) for _ in range(rng.randint(*tokens))]
                ends[-1].append(len(ids[-1]) - 1)
    return Responses(ids, ends, "made")


def run(case: ScoreShape | Responses, rates: Rates, **limits: Any) -> Iterator[Result]:
    yield from (score_responses if isinstance(case, Responses) else score_rows)(case, rates, limits)


@torch.no_grad()
def score_rows(shape: ScoreShape, rates: Rates, limits: dict[str, Any]) -> Iterator[Result]:
    torch.manual_seed(0)
    good, bad = 10, 12
    hidden, weight = torch.randn(shape.T, shape.D), torch.randn(shape.V, shape.D) / shape.D**0.5
    positions = torch.sort(torch.randperm(shape.T)[: shape.S]).values

    def full_logits() -> torch.Tensor:
        return (hidden @ weight.t())[positions][:, [good, bad]].softmax(-1)[:, 0]

    def gathered() -> torch.Tensor:
        return (hidden[positions] @ weight[[good, bad]].t()).softmax(-1)[:, 0]

    def ours() -> torch.Tensor:
        return sk.prm_scores_from_lm_head(hidden, positions, weight, good, bad)

    for function in (ours, gathered):
        check_same([full_logits()], [function()], rtol=1e-4, atol=1e-6)

    def repeat(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def again() -> None:
            for _ in range(REPEATS):
                function()

        return again

    work = Work(4.0 * (shape.S + 2) * shape.D)
    yield race(str(shape), {"ours": ours, FULL: full_logits}, ours="ours", targets={FULL: ">= 100"}, family=FAMILY,
               work=vars(work), floor_ms=rates.floor_ms(work), headline=True, weighed=True, **limits)
    often = {"ours": repeat(ours), GATHERED: repeat(gathered)}
    yield race(f"{shape}, {REPEATS} times", often, ours="ours", targets={GATHERED: ">= 1.3"}, family=FAMILY,
               headline=True, **limits)


def make_model(vocab: int, hidden: int, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=4096)).eval()


@torch.no_grad()
def score_responses(case: Responses, rates: Rates, limits: dict[str, Any], *, vocab: int = 32000,
                    hidden: int = 128) -> Iterator[Result]:
    """Whole scoring passes of a tiny Llama with a real vocabulary: one forward of each response, padded by eights."""
    model = make_model(vocab, hidden)
    good, bad = 10, 12
    batches = [_padded(case.ids[i : i + 8], case.ends[i : i + 8]) for i in range(0, len(case.ids), 8)]

    def full_logits() -> torch.Tensor:
        """As the model cards do: all logits, then the two words at the step ends."""
        scores = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., [good, bad]]
                  .softmax(-1)[..., 0].flatten()[positions] for ids, mask, positions in batches]
        return torch.cat(scores)

    def ours() -> torch.Tensor:
        scores = []
        for ids, mask, positions in batches:
            out = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            scores.append(sk.prm_scores_from_lm_head(out, positions, model.lm_head.weight, good, bad))
        return torch.cat(scores)

    def prefixes() -> torch.Tensor:
        """One more forward for every step: each prefix of a response as a sequence of its own, logits of its end."""
        scores = []
        for ids, ends in zip(case.ids, case.ends, strict=True):
            rows, mask, _ = _padded([ids[: end + 1] for end in ends], [[end] for end in ends])
            out = model.model(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state
            last = out[torch.arange(len(ends)), torch.tensor(ends)]
            scores.append(model.lm_head(last)[:, [good, bad]].softmax(-1)[:, 0])
        return torch.cat(scores)

    variants = {"ours": ours, FULL: full_logits, PREFIXES: prefixes}
    memory, found = {}, {}
    for name, function in variants.items():
        memory[name], found[name] = peak_memory(function)
        check_same([found["ours"]], [found[name]], rtol=1e-4, atol=1e-5)
    yield race(f"scoring every step of {case}, Llama {hidden} x 2, V {vocab}", variants, ours="ours", targets={},
               warm=True, family=FAMILY, memory=memory, headline=case.what != "made", **{"rounds": 3, **limits})


def _padded(ids: list[list[int]], ends: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, L) ids padded on the right, their mask, and the step ends as rows of the flattened batch."""
    L = max(map(len, ids))
    rows = torch.tensor([own + [0] * (L - len(own)) for own in ids])
    mask = torch.tensor([[1] * len(own) + [0] * (L - len(own)) for own in ids])
    return rows, mask, torch.tensor([b * L + end for b, own in enumerate(ends) for end in own])
