"""Scorers: how a solution becomes ids, at which rows its steps are read, and what is made of those rows.

| scorer        | ids                                                            | read at              | score       |
| ------------- | -------------------------------------------------------------- | -------------------- | ----------- |
| head          | as the head was trained: `tree_from_text`, `svpo_head.json`    | a step's own last id | the head's  |
| implicit      | the same, to each step's end; sigmoid(beta * its log-ratio)    | all of the path      | sigmoid     |
| qwen          | chat template, fixed system prompt, `<extra_0>` after a step   | `<extra_0>`          | class 1     |
| math_shepherd | "question steps", a tag after each step, newlines between      | the tag              | `+` or `-`  |
| rlhflow       | a user's message a step, the assistant always says `+`         | the row before `+`   | `+` or `-`  |
| skywork       | bos, problem, newline; each step alone, and the step token     | the step token       | sigmoid     |
| judge         | a prompt for each step that ends before the verdict            | the prompt's last id | yes or no   |

A public model's ids are those of its own card's snippet. A scorer only hands over ids and positions; `score.py` packs
and runs them. Scores are in [0, 1]: a value v of [-1, 1] becomes (v + 1) / 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from svpo_kernels.data.formats import RowProblem
from svpo_kernels.trainer.heads import one_token
from svpo_kernels.trees.template import Template
from svpo_kernels.trees.text import TextOptions, build
from svpo_kernels.trees.tree import StepNode

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
JUDGE_PROMPT = ("Problem:\n{problem}\n\nSolution so far:\n{solution}\n\nIs its last step right? Answer with "
                "one word, {good} or {bad}.")


class Reading(NamedTuple):
    """One run of the model. ids: from the first token on. positions: ascending, the rows of ids that are read.
    steps: the index of the step that each of them judges. start: where the scored ids begin (implicit rewards)."""

    ids: list[int]
    positions: list[int]
    steps: list[int]
    start: int = 1


class Scorer:
    """What all scorers share. name; takes: the options it has; separator: between the steps of a solution given as one
    text; empty: whether an empty piece between two separators is a step too. tokens: (good, bad) ids where the score is
    two rows of lm_head."""

    name, separator, empty = "", "\n\n", False
    takes: tuple[str, ...] = ()
    tokens: tuple[int, int] | None = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def split(self, text: str) -> list[str]:
        """The steps of a solution given as one text."""
        pieces = text.split(self.separator) if self.separator else [text]
        return pieces if self.empty else [piece for piece in pieces if piece.strip()]

    def encode(self, prompt: Any, steps: Sequence[str], *, terminal: bool = True, separator: str | None = None,
               template_kwargs: Mapping[str, Any] | None = None) -> list[Reading]:
        """The runs that score these steps. Raises RowProblem for a solution that this scorer cannot take."""
        raise NotImplementedError

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))


class Head(Scorer):
    """A head of ours, or one that lies beside a model: text as it was trained, read at a step's own last token."""

    name = "head"

    def __init__(self, tokenizer: Any, options: TextOptions | None = None) -> None:
        super().__init__(tokenizer)
        self.options = options or TextOptions()
        self.separator = self.options.step_separator
        self._templates: dict[str, Template] = {}

    def _template(self, kwargs: Mapping[str, Any]) -> Template:
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._templates:
            self._templates[key] = Template(self.tokenizer, kwargs, self.options.template_date)
        return self._templates[key]

    def encode(self, prompt: Any, steps: Sequence[str], *, terminal: bool = True, separator: str | None = None,
               template_kwargs: Mapping[str, Any] | None = None) -> list[Reading]:
        options = self.options
        own = {} if separator is None else {"step_separator": separator, "step_end": ""}
        kwargs = {**options.chat_template_kwargs, **(template_kwargs or {})}
        options = TextOptions(**{**vars(options), **own, "chat_template_kwargs": kwargs})
        nodes = [StepNode(i - 1, text=text, terminal=terminal and i == len(steps) - 1) for i, text in enumerate(steps)]
        tree, _ = build(self._template(kwargs), prompt, nodes, options)
        return [self._reading(tree, i) for i in range(len(tree))]

    def _reading(self, tree: Any, i: int) -> Reading:
        end = tree.value_end(i)
        return Reading(tree.path(i)[:end], [end - 1], [i])


class Implicit(Head):
    """Implicit rewards: sigmoid(beta * log-ratio of the path to a step's end), against a reference model."""

    name, takes = "implicit", ("beta", "reference")

    def __init__(self, tokenizer: Any, options: TextOptions | None = None, beta: float = 0.05) -> None:
        super().__init__(tokenizer, options)
        self.beta = beta

    def _reading(self, tree: Any, i: int) -> Reading:
        return Reading(tree.path(i), [tree.length[i] - 1], [i], tree.start[0])


class Qwen(Scorer):
    """Qwen2.5-Math-PRM: one chat, `<extra_0>` behind every step."""

    name, tag = "qwen", "<extra_0>"

    def __init__(self, tokenizer: Any, system: str = QWEN_SYSTEM) -> None:
        super().__init__(tokenizer)
        self.system, self.tag_id = system, one_tag(tokenizer, self.tag)

    def encode(self, prompt: Any, steps: Sequence[str], **_: Any) -> list[Reading]:
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": user_text(prompt)},
                    {"role": "assistant", "content": self.tag.join(steps) + self.tag}]
        ids = self._ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        return [at_tags(ids, self.tag_id, self.tag, len(steps))]


class MathShepherd(Scorer):
    """math-shepherd-mistral-7b-prm: plain text, a tag behind every step, `+` against `-` at the tag."""

    name, separator, tag = "math_shepherd", "\n", "ки"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.tag_id = one_tag(tokenizer, self.tag)
        found = self._ids("+ -")[1:]  # behind the BOS
        if len(found) != 2:
            raise ValueError(f"svpo score: '+ -' must be two tokens behind a BOS for scorer math_shepherd, got {found}")
        self.tokens = (found[0], found[1])

    def encode(self, prompt: Any, steps: Sequence[str], **_: Any) -> list[Reading]:
        output = "\n".join(f"{step} {self.tag}" for step in steps)
        return [at_tags(self._ids(f"{user_text(prompt)} {output}"), self.tag_id, self.tag, len(steps))]


class RLHFlow(Scorer):
    """RLHFlow's PRMs: a user says each step, the assistant `+`; read where `+` is predicted."""

    name = "rlhflow"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.tokens = (self._ids("+")[-1], self._ids("-")[-1])

    def encode(self, prompt: Any, steps: Sequence[str], **_: Any) -> list[Reading]:
        chat: list[dict[str, str]] = []
        positions, ids = [], []
        for k, step in enumerate(steps):
            chat += [{"role": "user", "content": f"{user_text(prompt)} {step}" if k == 0 else step},
                     {"role": "assistant", "content": "+"}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False)
            before, ids = ids, list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if ids[:len(before)] != before or ids[-2] != self.tokens[0]:
                raise RowProblem("another template", "scorer rlhflow reads three tokens before the end of a chat, "
                                 f"where '+' is predicted; this template ends in the ids {ids[-3:]}")
            positions.append(len(ids) - 3)
        return [Reading(ids[:positions[-1] + 1], positions, list(range(len(steps))))]


class Skywork(Scorer):
    """Skywork-o1-Open-PRM: each step tokenised alone, then the step token, where `v_head` is read."""

    name, separator, empty = "skywork", "\n", True

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if not tokenizer.bos_token:
            raise ValueError("svpo score: scorer skywork begins with the tokenizer's bos_token, which this one lacks")

    def encode(self, prompt: Any, steps: Sequence[str], **_: Any) -> list[Reading]:
        ids = self._ids(f"{self.tokenizer.bos_token}{user_text(prompt)}\n")
        positions, token = [], self._ids(self.separator)[-1]
        for step in steps:
            for piece in step.split(self.separator):  # a step of several lines is read at its last
                ids += [*(self._ids(piece) if piece else []), token]
            positions.append(len(ids) - 1)
        return [Reading(ids, positions, list(range(len(steps))))]


class Judge(Scorer):
    """A chat model that says yes or no of each step, read where the verdict begins: no rationale may come before it."""

    name, takes = "judge", ("prompt", "good", "bad")

    def __init__(self, tokenizer: Any, prompt: str = JUDGE_PROMPT, good: str = "Yes", bad: str = "No") -> None:
        super().__init__(tokenizer)
        self.good, self.bad = good, bad
        self.tokens = (one_token(tokenizer, "good_token", good), one_token(tokenizer, "bad_token", bad))
        for part in ("{problem}", "{solution}"):
            if part not in prompt:
                raise ValueError(f"svpo score: a judge's prompt must hold {{problem}} and {{solution}}, got {prompt!r}")
        self.prompt = prompt

    def encode(self, prompt: Any, steps: Sequence[str], **_: Any) -> list[Reading]:
        readings = []
        for k, step in enumerate(steps):
            ids = self._prompt_ids({"{problem}": user_text(prompt), "{solution}": self.separator.join(steps[:k + 1]),
                                    "{step}": step, "{good}": self.good, "{bad}": self.bad})
            readings.append(Reading(ids, [len(ids) - 1], [k]))
        return readings

    def _prompt_ids(self, fields: Mapping[str, str]) -> list[int]:
        text, at = "", 0  # filled in one pass: braces inside a solution are its own
        while at < len(self.prompt):
            name = next((name for name in fields if self.prompt.startswith(name, at)), None)
            text += self.prompt[at] if name is None else fields[name]
            at += 1 if name is None else len(name)
        if getattr(self.tokenizer, "chat_template", None) is None:
            return self._ids(text)
        chat = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                  add_generation_prompt=True)
        return list(self.tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"])


SCORERS: dict[str, type[Scorer]] = {
    kind.name: kind for kind in (Head, Implicit, Qwen, MathShepherd, RLHFlow, Skywork, Judge)}


def user_text(prompt: Any) -> str:
    """The problem of a row: its text, or the one user's message. Raises RowProblem for a longer chat."""
    if isinstance(prompt, str):
        return prompt
    said = [message["content"] for message in prompt if message["role"] != "system"]
    if len(said) != 1 or not isinstance(said[0], str):
        raise RowProblem("a chat", "the prompt of a public process reward model is one text, got "
                         f"{len(said)} messages")
    return said[0]


def one_tag(tokenizer: Any, tag: str) -> int:
    """The id of a step tag. Raises ValueError for a tag that the tokenizer splits."""
    ids = tokenizer.encode(tag, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"svpo score: the step tag {tag!r} must be one token of this tokenizer, got {len(ids)}: {ids}")
    return ids[0]


def at_tags(ids: list[int], tag_id: int, tag: str, count: int) -> Reading:
    """A run that is read at every tag. Raises RowProblem where there are not as many as steps."""
    positions = [i for i, token in enumerate(ids) if token == tag_id]
    if len(positions) != count:
        raise RowProblem("tag inside a step", f"the tag {tag!r} must stand once a step ({count}), its id stands "
                         f"{len(positions)} times")
    return Reading(ids[:positions[-1] + 1], positions, list(range(count)))
