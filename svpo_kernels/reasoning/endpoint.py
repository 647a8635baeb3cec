"""Steps from an OpenAI-compatible completions server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from svpo_kernels.trees.template import Template
from svpo_kernels.trees.text import TextOptions

from .engines import Prefix, Sampling, Spent, Step, begin

# what OpenAI's completions API has not: some servers refuse a request that names them
EXTRAS = ("return_token_ids", "logprobs", "include_stop_str_in_output")


class _Refused(ValueError):
    """The server does not take a request as it stands."""


@dataclass
class EndpointEngine:
    """An OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp, `transformers serve`).

    url: up to and with /v1. model: the name it serves. tokenizer: renders the prompt; the server sees text. Ids and
    log-probs are taken only where the server returns them (`return_token_ids`); else a step has none. Where it refuses
    `n`, it is called n times. Where it does not say what stopped it (`stop_reason`), it is not asked to stop at the
    separator, and the step is cut here: more tokens, and no doubt about the end of a turn. api_key: a bearer token.
    """

    url: str
    model: str
    tokenizer: Any
    sampling: Sampling = field(default_factory=Sampling)
    text_options: TextOptions = field(default_factory=TextOptions)
    api_key: str | None = None
    timeout: float = 600.0
    spent: Spent = field(default_factory=Spent)
    gives_ids: bool | None = None  # not known before the first answer
    extras: bool = True
    one_by_one: bool = False
    stops: bool = True

    head = None  # a server gives no hidden states: values come from a second model or from rollouts

    def __post_init__(self) -> None:
        self._template = Template(self.tokenizer, self.text_options.chat_template_kwargs,
                                  self.text_options.template_date)

    def begin(self, prompt: Any) -> Prefix:
        return begin(self._template, prompt, self.text_options)[1]

    def go_on(self, prefixes: Sequence[Prefix], n: int, generator: torch.Generator, *,
              to_the_end: bool = False) -> list[list[Step]]:
        """As `LocalEngine.go_on`; a request a prefix, seeded from the generator."""
        found = []
        for prefix in prefixes:
            left = self.sampling.max_tokens - prefix.used
            most = left if to_the_end else min(left, self.sampling.max_step_tokens)
            seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
            body = {"model": self.model, "prompt": prefix.prompt + prefix.text, "max_tokens": max(most, 1),
                    "temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "seed": seed, "n": n,
                    "logprobs": 0, "return_token_ids": True}
            choices = self._choices(body | ({} if to_the_end else self._stop()), n)
            if not to_the_end and self.stops and any(map(self._in_doubt, choices)):
                self.stops = False
                choices = self._choices(body, n)
            found.append([self._step(choice, to_the_end) for choice in choices])
        return found

    def _stop(self) -> dict[str, Any]:
        return {"stop": [self.sampling.step_separator], "include_stop_str_in_output": True} if self.stops else {}

    def _in_doubt(self, choice: dict[str, Any]) -> bool:
        """Whether a stop may be the separator's or the turn's."""
        silent = choice.get("finish_reason") == "stop" and "stop_reason" not in choice
        return silent and self.sampling.step_separator not in choice.get("text", "")

    def _choices(self, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        """n choices. A server that refuses a request is asked again without what OpenAI's own API has not, then without
        `n`; it is remembered."""
        while True:
            asked = {key: value for key, value in body.items() if self.extras or key not in EXTRAS}
            if self.one_by_one:
                seeds = [(body["seed"] + i) % (2**31 - 1) for i in range(n)]
                return [self._ask(asked | {"n": 1, "seed": seed})["choices"][0] for seed in seeds]
            try:
                answer = self._ask(asked)
                if len(answer["choices"]) == n:
                    return answer["choices"]
                self.one_by_one = True  # it takes no notice of n
            except _Refused as refused:
                if self.extras:
                    self.extras = False
                elif n > 1:
                    self.one_by_one = True
                else:
                    raise ValueError(str(refused)) from None

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("n") == 1:
            body = {key: value for key, value in body.items() if key != "n"}  # some refuse the very word
        answer = self._post(body)
        usage = answer.get("usage") or {}
        self.spent.generated += int(usage.get("completion_tokens") or 0)
        self.spent.read += int(usage.get("prompt_tokens") or 0)
        return answer

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = f"engines: {self.url} answered {error.code}: {error.read().decode(errors='replace')[:300]}"
            raise (_Refused if error.code in (400, 422) else ValueError)(said) from None
        except (urllib.error.URLError, TimeoutError, json.JSONDecodeError) as error:
            raise ValueError(f"engines: {self.url} does not answer: {error}") from None

    def _step(self, choice: dict[str, Any], to_the_end: bool) -> Step:
        """What a choice says, cut behind the first separator. Text that is cut or put back has no ids any more."""
        text, ids = choice.get("text", ""), choice.get("token_ids")
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        separator, stopped = self.sampling.step_separator, choice.get("finish_reason") == "stop"
        if ids is not None and (logps is None or len(logps) != len(ids) or None in logps):
            ids = logps = None
        if to_the_end:
            own, closed = text, False
        elif choice.get("stop_reason") == separator and separator not in text:
            own, closed = text + separator, True
        else:
            before, found, _ = text.partition(separator)
            own, closed = before + found, bool(found)
        if own != text:
            ids = logps = None
        self.gives_ids = self.gives_ids is not False and ids is not None
        tokens = len(ids) if ids is not None else len(self.tokenizer(own, add_special_tokens=False)["input_ids"])
        return Step(own, stopped and not closed, ids, logps if ids is not None else None, tokens)
