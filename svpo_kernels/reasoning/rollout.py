"""`svpo rollout`: step trees grown for prompts, written as the flat tree format, a prompt a line.

    prompts -> engine -> grow -> trees.jsonl (ids as generated, log-probs, priors, visits, values)

A killed run goes on behind its last whole line; prompt i draws from its own generator, so that it comes out the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from svpo_kernels.data.formats import DataError
from svpo_kernels.data.formats.files import iterate_rows
from svpo_kernels.trainer.resume import file_digest

from .engines import LocalEngine, Prefix, Sampling
from .grow import Growth, Node, grow
from .lines import Lines
from .verifiers import Verifier, verifier

PROMPTS = ("prompt", "question", "problem", "query")
ANSWERS = ("answer", "final_answer", "ground_truth", "gt", "tests")
VALUES = ("rollouts", "head")


@dataclass
class RolloutConfig:
    """All settings of `svpo rollout`."""

    prompts_file: str = ""
    model_name_or_path: str = ""
    output_file: str = "trees.jsonl"
    endpoint: str | None = None
    tokenizer_name_or_path: str | None = None
    verifier: str = "numeric"
    unsafe_verifier: bool = False
    value: str = "rollouts"
    rollouts: int = 4
    budget_tokens: int | None = None
    max_prompts: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    growth: Growth = field(default_factory=Growth)


HELP = {
    "prompts_file": "JSONL with a prompt (prompt, question, problem) and its answer (answer, tests ...) a row.",
    "model_name_or_path": "The model that generates: a directory or a hub name; with endpoint the name it serves.",
    "output_file": "Where the trees go.",
    "endpoint": "An OpenAI-compatible server instead of a model here, up to /v1; SVPO_API_KEY is its key.",
    "tokenizer_name_or_path": "The tokenizer, where it is not beside the model.",
    "verifier": "exact, numeric, boxed (math-verify), code (the row's tests), or package.module:function.",
    "unsafe_verifier": "Run code where no process without network can be made.",
    "value": "What a leaf is worth: rollouts (their mean verdict) or head (the value head beside the model).",
    "rollouts": "Answers drawn from a leaf to the end, with value: rollouts.",
    "budget_tokens": "Stop before the next prompt once so many tokens were generated.",
    "max_prompts": "Only the first so many prompts.",
    "seed": "Seed of every prompt's generator.",
    "dtype": "Dtype the weights are loaded in.",
    "device": "Where the model runs; default: cuda where there is one.",
    "trust_remote_code": "Let the model's repository run its own code.",
}

SAMPLING_HELP = {
    "temperature": "Of the draws; 0 takes the likeliest token.",
    "top_p": "Draw from the smallest set of tokens with this share.",
    "max_step_tokens": "Most tokens of one step.",
    "max_tokens": "Most tokens of a whole answer.",
    "step_separator": "What ends a step.",
}
GROWTH_HELP = {
    "simulations": "Selections of a tree.",
    "children": "Steps drawn where a leaf is expanded.",
    "c_puct": "Weight of the prior against the value.",
    "max_depth": "Most steps of an answer.",
    "leaves": "Leaves expanded together, in one batch.",
}


@dataclass
class Asked:
    """A prompt of the file. number: its row."""

    number: int
    prompt: Any
    answer: Any


def settings_of(values: dict[str, Any]) -> RolloutConfig:
    """A configuration from flat keys; those of Sampling and Growth stand among the others.

    Raises ValueError that names a key of the wrong type, and what is missing.
    """
    parts: dict[str, dict[str, Any]] = {"": {}, "sampling": {}, "growth": {}}
    for key, value in values.items():
        place = next(name for name, kind in (("sampling", Sampling), ("growth", Growth), ("", RolloutConfig))
                     if key in {entry.name for entry in fields(kind)})
        default = getattr({"": RolloutConfig, "sampling": Sampling, "growth": Growth}[place](), key)
        parts[place][key] = typed(key, value, default, {"budget_tokens": int, "max_prompts": int})
    config = RolloutConfig(**parts[""], sampling=Sampling(**parts["sampling"]), growth=Growth(**parts["growth"]))
    for key in ("prompts_file", "model_name_or_path"):
        if not getattr(config, key):
            raise ValueError(f"config: {key} is missing")
    if config.value not in VALUES:
        raise ValueError(f"config: value must be one of {', '.join(VALUES)}, got {config.value!r}")
    if config.rollouts < 1:
        raise ValueError(f"config: rollouts must be at least 1, got {config.rollouts}")
    if config.endpoint and config.value == "head":
        raise ValueError("config: value must be rollouts with an endpoint: a server gives no hidden states")
    return config


def describe_keys() -> list[str]:
    """"key: default" and its help, a line each."""
    lines = []
    for kind, texts in ((RolloutConfig, HELP), (Sampling, SAMPLING_HELP), (Growth, GROWTH_HELP)):
        lines += [f"{key}: {json.dumps(getattr(kind(), key))}\n    {text}" for key, text in texts.items()]
    return lines


def known_keys() -> list[str]:
    own = [entry.name for entry in fields(RolloutConfig) if entry.name not in ("sampling", "growth")]
    return [*own, *(entry.name for kind in (Sampling, Growth) for entry in fields(kind))]


def typed(key: str, value: Any, default: Any, kinds: dict[str, type]) -> Any:
    """A value of its key's type, that of the default or of `kinds` (else str) where that is None. Raises ValueError."""
    kind = kinds.get(key, str) if default is None else type(default)
    if value is None and default is None:
        return None
    if isinstance(value, str) and kind is not str:
        value = yaml.safe_load(value)  # from the command line
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config: {key} must be of type {kind.__name__}, got {value!r}")
    return value


# -- running ----------------------------------------------------------------------------------------------------------


def run_rollout(config: RolloutConfig, engine: Any = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Grow a tree for every prompt and write it to output_file, which appears when it is complete.

    engine: None loads what the config names. Returns counts: prompts, tokens, the share of prompts with a right answer.
    Raises ValueError, FileExistsError and DataError in one line.
    """
    out = Path(config.output_file)
    check = verifier(config.verifier, unsafe=config.unsafe_verifier)
    asked = read_prompts(config.prompts_file, config.max_prompts)
    lines = Lines(out, "svpo rollout", {"prompts": file_digest(config.prompts_file), **{
        key: value for key, value in asdict(config).items()
        if key not in ("output_file", "budget_tokens", "prompts_file", "device")}})
    engine = engine if engine is not None else load_engine(config)
    if lines.rows:
        say(f"{len(lines.rows):,} prompts were done before: going on behind them")
    with lines:  # prompts are done in the file's order
        for each in tqdm(asked[len(lines.rows):], desc="prompts", unit="tree", disable=not sys.stderr.isatty()):
            if config.budget_tokens is not None and engine.spent.generated >= config.budget_tokens:
                break
            lines.add([_one(config, engine, each, check)])
    left = len(asked) - len(lines.rows)
    if left:
        say(f"the budget of {config.budget_tokens:,} tokens is spent: {left:,} of {len(asked):,} prompts have no tree; "
            f"{lines.partial} is taken up when the run is started again with more")
        return _summary(lines.rows, engine, say)
    lines.finish()
    return _summary(lines.rows, engine, say) | {"output_file": str(out)}


def _one(config: RolloutConfig, engine: Any, asked: Asked, check: Verifier) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + asked.number)

    def judge(prefix: Prefix) -> float:
        return 1.0 if check(prefix.text, asked.answer) else -1.0

    def rollouts(prefixes: list[Prefix]) -> list[float]:
        ends = engine.go_on(prefixes, config.rollouts, generator, to_the_end=True)
        return [sum(judge(prefix.then(step)) for step in steps) / len(steps)
                for prefix, steps in zip(prefixes, ends, strict=True)]

    leaf_value = rollouts if config.value == "rollouts" else None
    return _row(grow(engine, asked.prompt, judge, leaf_value, config.growth, generator), asked)


def read_prompts(path: str, most: int | None = None) -> list[Asked]:
    """The prompts of a file with their answers. Raises DataError naming the row that lacks one."""
    found = []
    for raw in iterate_rows(path):
        if raw.problem is not None:
            raise DataError(f"{path}:{raw.line}: {raw.problem.detail}")
        prompt = next((raw.value[key] for key in PROMPTS if key in raw.value), None)
        answer = next((raw.value[key] for key in ANSWERS if key in raw.value), None)
        if prompt is None or answer is None:
            lacks = f"a prompt ({', '.join(PROMPTS)})" if prompt is None else f"an answer ({', '.join(ANSWERS)})"
            raise DataError(f"{path}:{raw.line}: expected {lacks}, got the keys {', '.join(map(str, raw.value))}")
        found.append(Asked(raw.row, prompt, answer))
        if most is not None and len(found) == most:
            break
    if not found:
        raise DataError(f"{path}: no prompt in it")
    return found


def load_engine(config: Any) -> Any:
    """The engine that a configuration names: a model here with the value head beside it, or a server."""
    from transformers import AutoTokenizer

    from .endpoint import EndpointEngine
    from .loading import load_generator

    name = config.tokenizer_name_or_path or config.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    if config.endpoint:
        return EndpointEngine(config.endpoint, config.model_name_or_path, tokenizer, config.sampling,
                              api_key=os.environ.get("SVPO_API_KEY"))
    model, head = load_generator(config.model_name_or_path, dtype=config.dtype, device=config.device,
                                 trust_remote_code=config.trust_remote_code)
    if getattr(config, "value", None) == "head" and head is None:
        raise ValueError(f"config: value is head, but {config.model_name_or_path} has no value head beside it")
    return LocalEngine(model, tokenizer, config.sampling, head)


# -- rows -------------------------------------------------------------------------------------------------------------


def _row(root: Node, asked: Asked) -> dict[str, Any]:
    """A line of the flat tree format. Nodes never visited have no value; ids go in where every node has them."""
    nodes = list(_walk(root, "0"))
    with_ids = all(node.step.ids is not None for _, node in nodes)
    states: dict[str, Any] = {"0": {"text": "", "visit_count": root.visits, "q_value": root.value}}
    for tag, node in nodes:
        state: dict[str, Any] = {"text": node.step.text, "terminal": node.step.ended, "prior": node.prior,
                                 "visit_count": node.visits}
        if node.visits:
            state["q_value"] = max(-1.0, min(1.0, node.value))
        if with_ids:
            state |= {"token_ids": node.step.ids, "old_logps": node.step.logps}
        states[tag] = state
    key = "question" if isinstance(asked.prompt, str) else "prompt"
    row = {"row": asked.number, key: asked.prompt, "answer": asked.answer if isinstance(asked.answer, str) else
           json.dumps(asked.answer), "step_separator": ""}
    if with_ids:
        row["prompt_ids"] = root.prefix.ids
    else:
        row["retokenised"] = True  # the server gave text alone: no behaviour log-probs, no ids of its own
    row["solved"] = any(node.step.ended and node.verdict == 1 for _, node in nodes)
    return row | {"rstar": states}


def _walk(node: Node, tag: str) -> Iterator[tuple[str, Node]]:
    for i, child in enumerate(node.children):
        yield f"{tag}.{i}", child
        yield from _walk(child, f"{tag}.{i}")


def _summary(rows: list[dict[str, Any]], engine: Any, say: Callable[[str], None]) -> dict[str, Any]:
    steps = sum(len(row["rstar"]) - 1 for row in rows)
    found = {"prompts": len(rows), "steps": steps, "solved": sum(row["solved"] for row in rows) / max(len(rows), 1),
             "generated": engine.spent.generated, "read": engine.spent.read}
    say(f"{len(rows):,} trees, {steps:,} steps; {found['solved']:.1%} of the prompts were solved in their tree; "
        f"{found['generated']:,} tokens generated, {found['read']:,} read")
    if any("retokenised" in row for row in rows):
        say("the server returned no ids: its text is tokenised again, and `objective: policy` refuses these trees")
    return found
