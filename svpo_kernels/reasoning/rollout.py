"""`svpo rollout`: step trees grown for prompts, written as the flat tree format, a prompt a line.

    prompts -> engine -> grow -> trees.jsonl (ids as generated, log-probs, priors, visits, values)

A killed run goes on behind its last whole line; prompt i draws from its own generator, so that it comes out the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from svpo_kernels.trainer.resume import file_digest
from svpo_kernels.trainer.settings import key

from .engines import Prefix
from .generation import Asked, Generation, load_engine, make, read_prompts
from .grow import Growth, Node, grow
from .lines import Lines
from .verifiers import Verifier, verifier

VALUES = ("rollouts", "head")


@dataclass
class RolloutConfig(Generation):
    """All settings of `svpo rollout`."""

    output_file: str = key("trees.jsonl", "Where the trees go.")
    value: str = key("rollouts", "What a leaf is worth: rollouts (their mean verdict) or head (the value head beside "
                     "the model).")
    rollouts: int = key(4, "Answers drawn from a leaf to the end, with value: rollouts.")
    budget_tokens: int | None = key(None, "Stop before the next prompt once so many tokens were generated.")
    growth: Growth = field(default_factory=Growth)


def settings_of(values: dict[str, Any]) -> RolloutConfig:
    """A configuration from flat keys; those of Sampling and Growth stand among the others.

    Raises ValueError that names a key of the wrong type, and what is missing.
    """
    config = make(RolloutConfig, values)
    if config.value not in VALUES:
        raise ValueError(f"config: value must be one of {', '.join(VALUES)}, got {config.value!r}")
    if config.rollouts < 1:
        raise ValueError(f"config: rollouts must be at least 1, got {config.rollouts}")
    if config.endpoint and config.value == "head":
        raise ValueError("config: value must be rollouts with an endpoint: a server gives no hidden states")
    return config


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
