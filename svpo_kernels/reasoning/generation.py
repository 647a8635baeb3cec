"""What `svpo rollout` and `svpo search` share: settings as flat keys, prompts with answers, the engine.

A class of settings is a dataclass whose fields carry their help; a field that is a dataclass of its own (`Sampling`)
stands among the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import yaml

from svpo_kernels.data.formats import DataError
from svpo_kernels.data.formats.files import iterate_rows
from svpo_kernels.trainer.settings import key

from .engines import LocalEngine, Sampling

PROMPTS = ("prompt", "question", "problem", "query")
ANSWERS = ("answer", "final_answer", "ground_truth", "gt", "tests")
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
Settings = TypeVar("Settings")


@dataclass
class Generation:
    """Settings of whatever generates answers to prompts."""

    prompts_file: str = key("", "JSONL with a prompt (prompt, question, problem) and its answer (answer, tests ...) a "
                            "row.")
    model_name_or_path: str = key("", "The model that generates: a directory or a hub name; with endpoint the name it "
                                  "serves.")
    endpoint: str | None = key(None, "An OpenAI-compatible server instead of a model here, up to /v1; SVPO_API_KEY is "
                               "its key.")
    tokenizer_name_or_path: str | None = key(None, "The tokenizer, where it is not beside the model.")
    verifier: str = key("numeric", "exact, numeric, boxed (math-verify), code (the row's tests), or "
                        "package.module:function.")
    unsafe_verifier: bool = key(False, "Run code where no process without network can be made.")
    max_prompts: int | None = key(None, "Only the first so many prompts.")
    seed: int = key(0, "Seed of every prompt's generator.")
    dtype: str = key("auto", "Dtype the weights are loaded in.")
    device: str | None = key(None, "Where the model runs; default: cuda where there is one.")
    trust_remote_code: bool = key(False, "Let the model's repository run its own code.")
    sampling: Sampling = field(default_factory=Sampling)


def make(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings of a class from flat keys. Raises ValueError naming a key of the wrong type or one that is missing."""
    own: dict[str, Any] = {}
    for entry in fields(kind):
        if is_dataclass(entry.default_factory):
            own[entry.name] = make(entry.default_factory, values)
        elif entry.name in values:
            own[entry.name] = _typed(entry, values[entry.name])
    made = kind(**own)
    for name in ("prompts_file", "model_name_or_path") if isinstance(made, Generation) else ():
        if not getattr(made, name):
            raise ValueError(f"config: {name} is missing")
    return made


def known_keys(kind: type) -> list[str]:
    return [entry.name for entry in _entries(kind)]


def describe_keys(kind: type) -> list[str]:
    """"key: default" and its help, a line each."""
    return [f"{entry.name}: {json.dumps(entry.default)}\n    {entry.metadata['help']}" for entry in _entries(kind)]


def _entries(kind: type) -> Iterator[Field]:
    inner = []
    for entry in fields(kind):
        if is_dataclass(entry.default_factory):
            inner.append(entry.default_factory)
        else:
            yield entry
    for each in inner:
        yield from _entries(each)


def _typed(entry: Field, value: Any) -> Any:
    """A value of its field's type; text stands for other types as in YAML, for it may come from the command line."""
    name = entry.type.removesuffix(" | None")
    kind = TYPES[name]
    if value is None and name != entry.type:
        return None
    if isinstance(value, str) and kind is not str:
        value = yaml.safe_load(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config: {entry.name} must be of type {name}, got {value!r}")
    return value


@dataclass
class Asked:
    """A prompt of the file. number: its row."""

    number: int
    prompt: Any
    answer: Any


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
