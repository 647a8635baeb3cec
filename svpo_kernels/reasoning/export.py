"""`svpo export`: a model with its head in the layout that others serve, in a directory of its own.

| as           | what goes                                    | layout                                            |
| ------------ | -------------------------------------------- | ------------------------------------------------- |
| vllm         | class head with a hidden layer, on Qwen2     | Qwen2ForProcessRewardModel (2 outputs),           |
|              |                                              | Qwen2ForRewardModel (1)                           |
|              | value head, class head of one layer          | the model's own *ForTokenClassification           |
| mario        | value head, class head of one layer          | the model, and value_head.pth at the top          |
| llamafactory | the same                                     | the model, and value_head.safetensors at the top  |

Anything else is refused by name. vLLM pools over every token; which row to read, how the text is made and which
activation is meant, `svpo_head.json` says. A value v in [-1, 1] is served there as (v + 1) / 2.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as TOKEN_CLASSES

from svpo_kernels.models import decoder, unwrap
from svpo_kernels.trainer import head_files, start
from svpo_kernels.trainer.heads import ClassHead, ValueHead

from .loading import local

KINDS = ("vllm", "mario", "llamafactory")
ONE_OUTPUT = ("the one output is a logit: whether the server applies the sigmoid depends on its version and settings",)
REWARD_CLASSES = {1: "Qwen2ForRewardModel", 2: "Qwen2ForProcessRewardModel"}  # by outputs, as vLLM has them


def export(directory: str, out: str | Path, kind: str, *, dtype: str = "auto", trust_remote_code: bool = False,
           say: Callable[[str], None] = print) -> str:
    """Write the model of a directory and its head as `kind`; returns what was written, in words.

    Raises ValueError, naming head and model, for what the layout cannot hold; FileExistsError for an `out` with files.
    """
    if kind not in KINDS:
        raise ValueError(f"svpo export: as must be one of {', '.join(KINDS)}, got {kind!r}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already; name an empty directory")
    directory = local(directory)
    described, found = head_files.description(directory), head_files.read(directory)
    _check_kind(described, found, directory)
    config = SimpleNamespace(dtype=dtype, attn_implementation=None, hub_token=None, peft="none",
                             trust_remote_code=trust_remote_code)
    hidden_layer = "score.2.weight" in found.state
    _check_layout(kind, start.model_config(config, directory), found, hidden_layer)
    lm = unwrap(start.load_lm(config, directory))
    out.mkdir(parents=True, exist_ok=True)
    if kind != "vllm":
        wrote = _value_layout(lm, found, kind, out)
    elif hidden_layer:
        wrote = _reward_model(lm, found, out)
    else:
        wrote = _token_classifier(lm, found, out)
    AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code).save_pretrained(out)
    contract = described | {"served_as": wrote, "weights": None}
    (out / "svpo_head.json").write_text(json.dumps(contract, indent=1, ensure_ascii=False), encoding="utf-8")
    said = f"{out}: {wrote['layout']}"
    for line in [said, *wrote["notes"]]:
        say(line)
    return said


def _check_kind(described: dict[str, Any], found: head_files.Head | None, directory: str) -> None:
    kind = described.get("kind")
    if kind in ("token", "implicit"):
        what = "two rows of lm_head: serve the model as it is and read two log-probs" if kind == "token" else (
            "a log-ratio of two models")
        raise ValueError(f"svpo export: {directory} has a head of kind {kind}, which has no weights to export; it is "
                         f"{what}")
    if found is None or not found.state:
        raise ValueError(f"svpo export: {directory} has no head beside the model")


def _check_layout(kind: str, config: Any, found: head_files.Head, hidden_layer: bool) -> None:
    """What a layout cannot hold is said before weights are loaded."""
    family, outputs = config.model_type, found.outputs("svpo export")
    if kind != "vllm" and hidden_layer:
        raise ValueError(f"svpo export: a class head with a hidden layer ({outputs} outputs) is no value head, "
                         f"which is all that {kind} reads")
    if kind == "vllm" and hidden_layer and family != "qwen2":
        raise ValueError("svpo export: a class head with a hidden layer is served by vLLM on qwen2 alone "
                         f"({', '.join(REWARD_CLASSES.values())}), not on {family}")
    if kind == "vllm" and not hidden_layer and family not in TOKEN_CLASSES:
        raise ValueError(f"svpo export: a head of one layer is served as *ForTokenClassification, and transformers has "
                         f"none for {family}")
    if kind == "vllm" and not hidden_layer and not TOKEN_CLASSES[family].endswith("ForTokenClassification"):
        raise ValueError(f"svpo export: {family} has another token classifier: {TOKEN_CLASSES[family]}")


def _reward_model(lm: nn.Module, found: head_files.Head, out: Path) -> dict[str, Any]:
    """vLLM's two classes: model.*, score.0.*, score.2.*, num_labels; class 1 is the good one."""
    outputs = found.outputs("svpo export")
    head = ClassHead(lm.config.hidden_size, outputs, hidden_layer=True)
    head_files.load_into(head, _good_last(found))
    model = _Reward(lm.config, decoder(lm), head.score.to(lm.dtype))
    model.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"], config["num_labels"] = [REWARD_CLASSES[outputs]], outputs
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"layout": f"{REWARD_CLASSES[outputs]}, {outputs} labels", "architecture": REWARD_CLASSES[outputs],
            "activation": "softmax" if outputs == 2 else "sigmoid",
            "notes": ["pooled over every token (no step tag): read the rows that svpo_head.json names; SGLang's class "
                      "of this name pools the last row: one score a request, so send one prefix a step",
                      *(ONE_OUTPUT if outputs == 1 else ())]}


class _Reward(transformers.Qwen2PreTrainedModel):
    def __init__(self, config: Any, model: nn.Module, score: nn.Module) -> None:
        super().__init__(copy.deepcopy(config))
        self.model, self.score = model, score


def _token_classifier(lm: nn.Module, found: head_files.Head, out: Path) -> dict[str, Any]:
    """transformers' own class: its decoder, score.{weight,bias}, num_labels. One output: of sigmoid."""
    outputs = found.outputs("svpo export")
    head = ClassHead(lm.config.hidden_size, outputs)
    value = found.is_value
    head_files.load_into(head, _good_last(found._replace(activation="tanh") if value else found))
    name, config = TOKEN_CLASSES[lm.config.model_type], copy.deepcopy(lm.config)
    config.num_labels = outputs
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    setattr(model, model.base_model_prefix, decoder(lm))
    model.score = head.score.to(lm.dtype)
    model.save_pretrained(out)
    notes = ["pooled over every token: read the rows that svpo_head.json names; SGLang has no class of this kind",
             *(ONE_OUTPUT if outputs == 1 else ())]
    if value:
        notes.append("the value v in [-1, 1] is served as the probability (v + 1) / 2")
    return {"layout": f"{name}, {outputs} label{'s' if outputs > 1 else ''}", "architecture": name,
            "activation": "softmax" if outputs == 2 else "sigmoid", "notes": notes}


def _value_layout(lm: nn.Module, found: head_files.Head, kind: str, out: Path) -> dict[str, Any]:
    """The model unchanged, and v_head.summary.{weight,bias} at the top, as value_head.pth or .safetensors."""
    head = ValueHead(lm.config.hidden_size)
    head_files.load_into(head, found)
    lm.save_pretrained(out)
    state = {f"v_head.{name}": tensor.detach().contiguous() for name, tensor in head.state_dict().items()}
    if kind == "mario":
        torch.save(state, out / "value_head.pth")
        notes = ["the value is tanh of the head's output"]
    else:
        safetensors.torch.save_file(state, out / "value_head.safetensors", metadata={"format": "pt"})
        notes = ["the value is tanh of the head's output; LLaMA-Factory and ms-swift read the output itself, which "
                 "ranks the same", "vLLM reads every safetensors file at the top of a directory: serve it from another"]
    return {"layout": f"{type(lm).__name__} and value_head.{'pth' if kind == 'mario' else 'safetensors'}",
            "architecture": type(lm).__name__, "activation": "tanh", "notes": notes}


def _good_last(found: head_files.Head) -> head_files.Head:
    """With class 1 as the good one."""
    if found.good == 1:
        return found
    last = max(key for key in found.state if key.endswith("weight")).removesuffix("weight")
    return found._replace(good=1, state={key: tensor.flip(0) if key.startswith(last) else tensor
                                         for key, tensor in found.state.items()})
