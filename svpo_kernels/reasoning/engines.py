"""Where steps come from: here a model in this process, in `endpoint.py` an OpenAI-compatible completions server.

Both go on from the ids or the text of a prefix, n times, until a step ends (its separator is in it), the turn ends, or
max_step_tokens are there. Ids are kept as they were generated; where a server hands over no ids a step has text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svpo_kernels.models import cache_argument, unwrap
from svpo_kernels.trainer.heads import unit_scores
from svpo_kernels.trainer.settings import key
from svpo_kernels.trees.template import Template, Turn, turn_end
from svpo_kernels.trees.text import TextOptions, find_turn, own_ids


@dataclass(frozen=True)
class Sampling:
    """How steps are drawn."""

    temperature: float = key(1.0, "Of the draws; 0 takes the likeliest token.")
    top_p: float = key(1.0, "Draw from the smallest set of tokens with this share.")
    max_step_tokens: int = key(256, "Most tokens of one step.")
    max_tokens: int = key(2048, "Most tokens of a whole answer.")
    step_separator: str = key("\n\n", "What ends a step.")

    def __post_init__(self) -> None:
        for name, holds, rule in (("temperature", self.temperature >= 0, "at least 0"),
                                  ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                                  ("max_step_tokens", self.max_step_tokens >= 1, "at least 1"),
                                  ("max_tokens", self.max_tokens >= 1, "at least 1"),
                                  ("step_separator", bool(self.step_separator), "a text")):
            if not holds:
                raise ValueError(f"engines: {name} must be {rule}, got {getattr(self, name)!r}")


class Step(NamedTuple):
    """What was generated. ids, logps: as generated, None where a server gives none; logps (len(ids),) in nats, of the
    model at its temperature, before top_p. ended: the turn is over. tokens: how many, where there are no ids too."""

    text: str
    ended: bool
    ids: list[int] | None = None
    logps: list[float] | None = None
    tokens: int = 0


class Prefix(NamedTuple):
    """A prompt and the steps so far. ids: of both, None behind a step without ids. text: of the answer so far, and used
    its tokens; prompt: the text in front of it."""

    ids: list[int] | None
    text: str
    used: int = 0
    prompt: str = ""

    def then(self, step: Step) -> Prefix:
        ids = None if self.ids is None or step.ids is None else [*self.ids, *step.ids]
        return self._replace(ids=ids, text=self.text + step.text, used=self.used + step.tokens)


def begin(template: Template, prompt: Any, options: TextOptions) -> tuple[Turn, Prefix]:
    """The assistant's turn behind a prompt (text or messages), and the prefix that an answer goes on from."""
    turn, _, _ = find_turn(template, prompt, options)
    ids = template.tokenizer(turn.generation, add_special_tokens=turn.special, verbose=False)["input_ids"]
    return turn, Prefix(list(ids), "", prompt=turn.generation)


@dataclass
class Spent:
    """generated: tokens drawn; read: tokens of prefixes that were run, each distinct prefix of a call once."""

    generated: int = 0
    read: int = 0


@dataclass
class LocalEngine:
    """A Hugging Face causal LM. head: a value head (or any head of `trainer/heads.py`) read at the last token of a
    prefix's own text, from the hidden states of the very forward that goes on from it: no second model or forward."""

    model: nn.Module
    tokenizer: Any
    sampling: Sampling = field(default_factory=Sampling)
    head: nn.Module | None = None
    text_options: TextOptions = field(default_factory=TextOptions)
    spent: Spent = field(default_factory=Spent)

    gives_ids = True

    def __post_init__(self) -> None:
        self._template = Template(self.tokenizer, self.text_options.chat_template_kwargs,
                                  self.text_options.template_date)
        self._ends: set[int] = set()
        self._cache_name = cache_argument(unwrap(self.model))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def begin(self, prompt: Any) -> Prefix:
        """The prefix that an answer to this prompt (text or messages) goes on from, as a generating model meets it."""
        turn, prefix = begin(self._template, prompt, self.text_options)
        end, _ = turn_end(self._template, turn, "auto") if self.tokenizer.eos_token or turn.end else ("", "")
        self._ends = self._end_ids(end)
        if not self._ends:
            raise ValueError("engines: the tokenizer and the model name no token that ends an answer")
        return prefix

    def _end_ids(self, end: str) -> set[int]:
        given = getattr(getattr(unwrap(self.model), "generation_config", None), "eos_token_id", None)
        found = set(given if isinstance(given, list) else [given]) | {self.tokenizer.eos_token_id}
        last = self.tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"][-1:] if end else []
        return {int(token) for token in [*found, *last] if token is not None}

    def go_on(self, prefixes: Sequence[Prefix], n: int, generator: torch.Generator, *,
              to_the_end: bool = False) -> list[list[Step]]:
        """n steps behind each prefix; to_the_end: n whole answers."""
        return self.advance(prefixes, n, generator, to_the_end=to_the_end)[1]

    @torch.no_grad()
    def advance(self, prefixes: Sequence[Prefix], n: int, generator: torch.Generator, *, to_the_end: bool = False,
                keep: Callable[[list[float]], list[int]] | None = None) -> tuple[list[float], list[list[Step]]]:
        """(the head's score of each prefix, in [0, 1], n steps behind it): one forward a prefix, then all are drawn.

        keep: told the scores, names the prefixes that go on; the others get no step.
        """
        logits, cache, scores, mask = self._run(prefixes)
        kept = list(range(len(prefixes))) if keep is None else keep(scores)
        found: list[list[Step]] = [[] for _ in prefixes]
        if kept:
            rows = torch.tensor([i for i in kept for _ in range(n)], device=self.device)
            cache.batch_select_indices(rows)
            steps = self._steps([prefixes[i] for i in kept], n, generator, to_the_end, cache, logits[rows], mask[rows])
            for place, i in enumerate(kept):
                found[i] = steps[place * n:(place + 1) * n]
        return scores, found

    def _steps(self, prefixes: list[Prefix], n: int, generator: torch.Generator, to_the_end: bool, cache: Any,
               logits: Tensor, mask: Tensor) -> list[Step]:
        """n steps a prefix, token by token in one batch. logits (B n, V) of the next token."""
        rows = len(prefixes) * n
        left = torch.tensor([self._left(prefix, to_the_end) for prefix in prefixes for _ in range(n)])
        ids: list[list[int]] = [[] for _ in range(rows)]
        logps: list[list[float]] = [[] for _ in range(rows)]
        running, ended = left > 0, [False] * rows
        while running.any():
            token, logp = self._draw(logits, generator)
            drawn, known = token.tolist(), logp.tolist()
            for i in running.nonzero().flatten().tolist():
                ids[i].append(drawn[i])
                logps[i].append(known[i])
                ended[i] = ids[i][-1] in self._ends
                closed = not to_the_end and self._closed(ids[i])
                running[i] = not (ended[i] or closed or len(ids[i]) >= left[i])
            if running.any():
                mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
                position = mask.sum(1, keepdim=True) - 1
                out = self.model(input_ids=token[:, None], attention_mask=mask, position_ids=position,
                                 use_cache=True, **{self._cache_name: cache})
                logits, cache = out.logits[:, -1].float(), out.past_key_values
        self.spent.generated += sum(map(len, ids))
        return [Step(self._text(each), end, each, logp, len(each))
                for each, end, logp in zip(ids, ended, logps, strict=True)]

    def _left(self, prefix: Prefix, to_the_end: bool) -> int:
        left = self.sampling.max_tokens - prefix.used
        return left if to_the_end else min(left, self.sampling.max_step_tokens)

    def _run(self, prefixes: Sequence[Prefix]) -> tuple[Tensor, Any, list[float], Tensor]:
        """(logits of the next token (B, V), cache, the head's scores, mask): prefixes padded on the left."""
        width = max(len(prefix.ids) for prefix in prefixes)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(prefixes), width), pad)
        mask = torch.zeros_like(ids)
        for i, prefix in enumerate(prefixes):
            ids[i, width - len(prefix.ids):] = torch.tensor(prefix.ids)
            mask[i, width - len(prefix.ids):] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True,
                         output_hidden_states=self.head is not None, logits_to_keep=1)
        self.spent.read += int(mask.sum())
        scores: list[float] = []
        if self.head is not None:
            ends = [width - len(prefix.ids) + own_ids(self.tokenizer, prefix.ids) - 1 for prefix in prefixes]
            rows = torch.arange(len(prefixes)) * width + torch.tensor(ends)
            scores = unit_scores(self.head, out.hidden_states[-1], rows.to(self.device)).tolist()
        return out.logits[:, -1].float(), out.past_key_values, scores, mask

    def _draw(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A token of each row and its log-probability at the temperature (1 where it is 0)."""
        greedy = self.sampling.temperature == 0
        logps = torch.log_softmax(logits if greedy else logits / self.sampling.temperature, -1)
        if greedy:
            token = logps.argmax(-1)
        else:
            probs = logps.exp()
            if self.sampling.top_p < 1:
                order = probs.argsort(-1, descending=True)
                before = probs.gather(-1, order).cumsum(-1) - probs.gather(-1, order)
                probs = probs.masked_fill((before >= self.sampling.top_p).scatter(-1, order, before >=
                                                                                  self.sampling.top_p), 0)
            token = torch.multinomial(probs.cpu(), 1, generator=generator).to(logits.device).squeeze(-1)
        return token, logps.gather(-1, token[:, None]).squeeze(-1)

    def _closed(self, ids: list[int]) -> bool:
        """Whether the separator stands behind some text of the step."""
        text = self._text(ids)
        return self.sampling.step_separator in text and bool(text.strip())

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
