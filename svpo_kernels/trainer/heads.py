"""Heads that read one number a step at its last token: value, class and token heads, each with its own forward.

| head  | weights                                              | score                                   |
| ----- | ---------------------------------------------------- | --------------------------------------- |
| value | `summary` (1, D)                                     | tanh, in [-1, 1]                        |
| class | `score` (C, D), or `score.0` (D, D), `score.2` (C, D)| C = 1: sigmoid; C = 2: softmax, class 1 |
| token | none: two rows of the model's own `lm_head`          | softmax of the good token's row         |

A head is a module of its own, so that sharding wraps and gathers it apart from a model in another dtype; its weights
are fp32 (fp64 under an fp64 model) and nothing of a row is computed but where a step ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svpo_kernels.prm import prm_loss, prm_scores


class HeadOutputs(NamedTuple):
    """scores (S,) fp32. losses (S,): of each step against its label, 0 where there is none; None without labels."""

    scores: Tensor
    losses: Tensor | None


class ValueHead(nn.Module):
    """Linear (1, D), tanh on top. Starts at 0, the middle of the scale [-1, 1]."""

    kind, activation = "value", "tanh"

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor, positions: Tensor, labels: Tensor | None = None, *, backend: str = "auto",
                **_: Any) -> HeadOutputs:
        """hidden (B, L, D), positions (S,) of flattened rows -> scores in [-1, 1]; its loss is the objective's own."""
        scores = prm_scores(hidden, positions, self.summary.weight, self.summary.bias, activation="tanh",
                            backend=backend)
        return HeadOutputs(scores, None)


def unit_scores(head: nn.Module, hidden: Tensor, positions: Tensor) -> Tensor:
    """(S,) fp32 in [0, 1] of any head with a forward of its own: a value v of [-1, 1] is (v + 1) / 2."""
    scores = head(hidden, positions).scores.float()
    return (scores + 1) / 2 if isinstance(head, ValueHead) else scores


class ClassHead(nn.Module):
    """C = 1 or 2 outputs, of a linear layer or of Linear-ReLU-Linear as Qwen2.5-Math-PRM has it, names included."""

    kind = "class"

    def __init__(self, hidden_size: int, outputs: int = 2, hidden_layer: bool = False,
                 dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        last = nn.Linear(hidden_size, outputs, dtype=dtype)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.zeros_(last.bias)
        if hidden_layer:
            self.score = nn.Sequential(nn.Linear(hidden_size, hidden_size, dtype=dtype), nn.ReLU(), last)
        else:
            self.score = last

    @property
    def last(self) -> nn.Linear:
        return self.score[2] if isinstance(self.score, nn.Sequential) else self.score

    @property
    def activation(self) -> str:
        return "sigmoid" if self.last.out_features == 1 else "softmax"

    def forward(self, hidden: Tensor, positions: Tensor, labels: Tensor | None = None, *, backend: str = "auto",
                **_: Any) -> HeadOutputs:
        """hidden (B, L, D), positions (S,), labels (S,) in [0, 1], NaN: none -> scores in [0, 1] and losses."""
        if isinstance(self.score, nn.Sequential):
            hidden = self.score[:2](hidden.flatten(0, -2)[positions].to(self.last.weight.dtype))
            positions = torch.arange(len(positions), device=positions.device)
        weight, bias = self.last.weight, self.last.bias
        return _outputs(hidden, positions, labels, weight, bias, backend, single=self.last.out_features == 1)


class TokenHead(nn.Module):
    """No weights of its own: the rows of two tokens of `lm_head`, the good one first."""

    kind, activation = "token", "softmax"

    def __init__(self, good_token: int, bad_token: int) -> None:
        super().__init__()
        self.good_token, self.bad_token = good_token, bad_token

    def forward(self, hidden: Tensor, positions: Tensor, labels: Tensor | None = None, *, lm_head: dict[str, Any],
                backend: str = "auto") -> HeadOutputs:
        """As ClassHead, with the good token as class 1. lm_head: what `sk.head(model)` says; two rows are read.

        Raises ValueError for a vocabulary head with a softcap, which the loss has not.
        """
        if lm_head["softcap"]:
            raise ValueError(NO_SOFTCAP)
        weight, bias = two_rows(lm_head, self.bad_token, self.good_token)
        return _outputs(hidden, positions, labels, weight, bias, backend, single=False)


NO_SOFTCAP = ("config: head=token reads two of the model's own logits, and this model's softcap is not in the loss; "
              "head=class trains rows of its own")


def two_rows(lm_head: dict[str, Any], first: int, second: int) -> tuple[Tensor, Tensor | None]:
    """(weight (2, D), bias (2,) or None) with which hidden rows give the model's own logits of two tokens, before a
    softcap: adapters on the head, scale and temperature included."""
    rows = torch.tensor([first, second], device=lm_head["weight"].device)
    weight, scale = lm_head["weight"][rows], lm_head["logit_scale"] / lm_head["temperature"]
    if lm_head["lora_a"] is not None:
        weight = weight + lm_head["lora_scaling"] * (lm_head["lora_b"][rows] @ lm_head["lora_a"])
    bias = None if lm_head["bias"] is None else lm_head["bias"][rows]
    if scale == 1.0:
        return weight, bias
    return weight * scale, None if bias is None else bias * scale


def _outputs(hidden: Tensor, positions: Tensor, labels: Tensor | None, weight: Tensor, bias: Tensor | None,
             backend: str, single: bool) -> HeadOutputs:
    """Class 1 is the good one, and so is the one output of a head with one."""
    losses = None
    if labels is not None:
        losses = prm_loss(hidden, positions, labels, weight, bias, reduction="none", backend=backend)
    with torch.set_grad_enabled(torch.is_grad_enabled() and labels is None):
        scores = prm_scores(hidden, positions, weight, bias, activation="sigmoid" if single else None, backend=backend)
    return HeadOutputs(scores, losses)


def make_head(config: Any, hidden_size: int, dtype: torch.dtype, tokenizer: Any = None) -> nn.Module | None:
    """The head that the configuration asks for, fresh. Raises ValueError for tokens that are not one token each."""
    if config.head == "none":
        return None
    if config.head == "value":
        return ValueHead(hidden_size, dtype)
    if config.head == "token":
        return TokenHead(one_token(tokenizer, "good_token", config.good_token),
                         one_token(tokenizer, "bad_token", config.bad_token))
    return ClassHead(hidden_size, config.head_outputs, config.head_hidden_layer, dtype)


def one_token(tokenizer: Any, key: str, text: str) -> int:
    """The id of a text that is one token. Raises ValueError naming the key, the text and its tokens otherwise."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"config: {key} must be one token of this tokenizer, got {text!r}, which is {len(ids)}: {ids}")
    return ids[0]
