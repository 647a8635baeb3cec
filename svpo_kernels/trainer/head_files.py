"""Where a head lies on disk: in a folder `svpo/` beside the model, which holds no other weights at its top.

Our own is `svpo/{value,class}_head.safetensors` with `svpo/svpo_head.json`, all that serving needs. Heads of others are
read from `value_head.{safetensors,bin,pth}` at the top (Super_MARIO, LLaMA-Factory, ms-swift), from `v_head.*` inside
the weights (TRL, Skywork).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

FOLDER = "svpo"
VALUE_HEAD, CLASS_HEAD = f"{FOLDER}/value_head.safetensors", f"{FOLDER}/class_head.safetensors"
DESCRIPTION = f"{FOLDER}/svpo_head.json"
AT_THE_TOP = ("value_head.safetensors", "value_head.bin", "value_head.pth")


class Head(NamedTuple):
    """state: names as they lie there. activation: "tanh", "sigmoid", "softmax" or None where it is not said."""

    state: dict[str, Tensor]
    activation: str | None
    good: int
    where: str

    @property
    def is_value(self) -> bool:
        """Whether its score is a value in [-1, 1]: it says so, or is named as value heads are and says nothing."""
        return self.activation == "tanh" or (self.activation is None and any("summary" in key for key in self.state))

    def outputs(self, op: str) -> int:
        """Of its last layer. Raises ValueError, as op, for names that are not known."""
        ends = ("score.2.weight", "score.weight", "summary.weight")
        last = next((self.state[key] for end in ends for key in self.state if key.endswith(end)), None)
        if last is None:
            raise ValueError(f"{op}: the head in {self.where} has the names {', '.join(self.state)}; known are "
                             "summary.weight, score.weight and score.{0,2}.weight")
        return len(last)


def write(kind: str, state: dict[str, Tensor], description: dict[str, Any], directory: str | os.PathLike) -> None:
    """Write a head of `heads.py` (a token head has no weights) and what serving has to know of it.

    A value head has the names that others read too, v_head.summary.{weight,bias}.
    """
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "v_head." if kind == "value" else ""
    state = {f"{prefix}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if state:
        safetensors.torch.save_file(state, folder / f"{kind}_head.safetensors", metadata={"format": "pt"})
    text = json.dumps(description, indent=1, ensure_ascii=False)
    (Path(directory) / DESCRIPTION).write_text(text, encoding="utf-8")


def read(directory: str | os.PathLike) -> Head | None:
    """The head beside a model: ours, then one at the top, then one inside the weights; None without any."""
    directory = Path(directory)
    described = description(directory)
    for name in (VALUE_HEAD, CLASS_HEAD, *AT_THE_TOP):
        if (directory / name).is_file():
            known = {} if name in AT_THE_TOP else described
            return Head(_load(directory / name), known.get("activation"), int(known.get("good", 1)),
                        str(directory / name))
    state = inside(directory, "v_head.")
    return Head(state, None, 1, f"v_head.* in the weights of {directory}") if state else None


def description(directory: str | os.PathLike) -> dict[str, Any]:
    """What `svpo_head.json` says; empty without one."""
    path = Path(directory) / DESCRIPTION
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def inside(directory: str | os.PathLike, part: str) -> dict[str, Tensor]:
    """Tensors of a model's own files whose names begin with `part` or hold it behind a dot: "v_head.", "score."."""
    directory, state = Path(directory), {}
    for name in _files_with_head(directory, part):
        if name.endswith(".safetensors"):
            with safetensors.safe_open(directory / name, "pt") as file:
                state.update({key: file.get_tensor(key) for key in file.keys() if _is_head(key, part)})
        else:
            held = torch.load(directory / name, map_location="cpu", weights_only=True, mmap=True)
            state.update({key: tensor.clone() for key, tensor in held.items() if _is_head(key, part)})
    return state


def _files_with_head(directory: Path, part: str) -> list[str]:
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{kind}.index.json"
        if index.is_file():
            held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return sorted({file for key, file in held.items() if _is_head(key, part)})
        if (directory / kind).is_file():
            return [kind]
    return []


def _is_head(key: str, part: str) -> bool:
    return f".{part}" in f".{key}"


def load_into(module: nn.Module, head: Head, exact: bool = False) -> None:
    """Load a head into one of `heads.py`. exact: the same kind and names, as a checkpoint of the same run has them.

    Between kinds the score is kept where a formula keeps it: v = tanh(z) = 2p - 1 with p = sigmoid(2z), and the softmax
    over two classes is the sigmoid of their difference. Raises ValueError where none does.
    """
    prefix = "v_head."
    state = {name.removeprefix(prefix): tensor for name, tensor in head.state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    same = {name: tuple(tensor.shape) for name, tensor in state.items()} == wanted
    if not same or (head.activation not in (None, module.activation) and not exact):
        state = _converted(module, head, wanted)
    if exact and not same:
        raise ValueError(f"svpo train: the head in {head.where} has other weights than this run's: {wanted}")
    module.load_state_dict(state)


def _converted(module: nn.Module, head: Head, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The state of a one-layer head with z of one output such that the score is sigmoid(2 z) (value: 2 that - 1)."""
    weight, bias = _one_layer(head, wanted)
    if len(weight) == 2:
        good = head.good
        weight, bias = (weight[good] - weight[1 - good])[None] / 2, (bias[good] - bias[1 - good])[None] / 2
    elif head.activation == "sigmoid":
        weight, bias = weight / 2, bias / 2
    elif head.activation is None and module.activation != "tanh":  # taken for what the run's own head is
        weight, bias = weight / 2, bias / 2
    outputs = wanted[next(name for name in wanted if name.endswith("weight"))][0]
    if module.activation != "tanh":
        weight, bias = 2 * weight, 2 * bias
    if outputs == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    state = dict(zip(sorted(wanted, reverse=True), (weight, bias), strict=True))
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != wanted:
        raise _unlike(head, wanted)
    return state


def _one_layer(head: Head, wanted: dict[str, tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    weights = [tensor for name, tensor in head.state.items() if name.rpartition(".")[2] == "weight"]
    biases = [tensor for name, tensor in head.state.items() if name.rpartition(".")[2] == "bias"]
    linear = len(weights) == 1 and weights[0].dim() == 2 and weights[0].shape[0] in (1, 2) and len(biases) <= 1
    if not linear or len(wanted) != 2:
        raise _unlike(head, wanted)
    return weights[0].float(), biases[0].float() if biases else torch.zeros(len(weights[0]))


def _unlike(head: Head, wanted: dict[str, tuple[int, ...]]) -> ValueError:
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state.items()}
    return ValueError(f"svpo train: the head in {head.where} cannot be taken up: expected {wanted}, got {shapes}")
