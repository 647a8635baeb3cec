"""The case table that every backend of the row ops is tested with, and the inputs each case stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

# (backend, device) of every backend that is judged against the oracle; GPU ones are marked and skipped without one.
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("reference", "cuda", id="reference-gpu", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda-gpu", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class RowCase:
    """Rows, predictions and options of one call. `predictions`: "dense" (one label a row) or "branching"."""

    name: str
    B: int = 2
    L: int = 60
    V: int = 127
    S: int = 40
    scored: float = 0.6
    dtype: torch.dtype = torch.float32
    layout: str = (
        "contiguous"  # "wide": a slice of wider rows; "shifted": logits[:, :-1]; "transposed": (L, B, V) transposed
    )
    scale: float = 3.0
    temperature: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    reduction: str = "sum"
    predictions: str = "dense"
    special: str = ""  # "confident": p of the label near 1; "sibling": two likely labels; "inf": -inf logits
    bias: bool = False

    @property
    def options(self) -> dict[str, object]:
        return {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "vocab_size": self.vocab_size,
            "reduction": self.reduction,
        }


_F32 = [
    RowCase("plain"),
    RowCase("one_column", V=1),
    RowCase("three_columns", V=3),
    RowCase("sixty_three", V=63),
    RowCase("thousand", V=1000, L=5),
    RowCase("odd_large", V=32001, B=1, L=4),
    RowCase("qwen_vocab", V=151936, B=1, L=2),
    RowCase("one_row", B=1, L=1, S=1, scored=1.0),
    RowCase("all_scored", scored=1.0),
    RowCase("all_masked", scored=0.0),
    RowCase("no_rows", L=0),
    RowCase("no_steps", S=0, scored=0.0),
    RowCase("many_steps", S=200),
    RowCase("long_steps", L=300, V=17, S=2, scored=0.9),
    RowCase("mean", reduction="mean"),
    RowCase("none", reduction="none"),
    RowCase("temperature", temperature=0.7),
    RowCase("softcap", softcap=5.0, scale=8.0),
    RowCase("softcap_temperature", softcap=30.0, temperature=1.7, reduction="mean", scale=20.0),
    RowCase("padded_vocab", V=129, vocab_size=127),
    RowCase("wide", layout="wide"),
    RowCase("shifted", layout="shifted"),
    RowCase("transposed", layout="transposed"),
    RowCase("branching", predictions="branching", scored=1.0),
    RowCase("branching_softcap", predictions="branching", softcap=4.0, temperature=0.9, scale=6.0, reduction="mean"),
    RowCase("branching_none", predictions="branching", reduction="none"),
    RowCase("confident", special="confident", predictions="branching", reduction="none", V=257),
    RowCase("confident_sum", special="confident", V=257),
    RowCase("sibling", special="sibling", predictions="branching", V=257),
    RowCase("minus_infinity", special="inf"),
    RowCase("extreme", scale=1e4),
    RowCase("flat", scale=0.0),
]
_HALF = (
    "plain",
    "thousand",
    "odd_large",
    "softcap_temperature",
    "padded_vocab",
    "wide",
    "branching",
    "confident",
    "sibling",
    "minus_infinity",
    "none",
    "all_masked",
    "three_columns",
)
ROW_CASES = _F32 + [
    replace(case, name=f"{case.name}_{name}", dtype=dtype)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for case in _F32
    if case.name in _HALF
]


@dataclass
class Predictions:
    """(N,) rows, labels and steps by ascending row, as plain lists of what is scored."""

    rows: Tensor
    labels: Tensor
    step_ids: Tensor


def make_logits(case: RowCase, device: str = "cpu") -> Tensor:
    """(B, L, V) with the case's strides; what is not scored is poisoned later by the test."""
    B, L, V = case.B, case.L, case.V
    shape = {"wide": (B, L, V + 5), "shifted": (B, L + 1, V), "transposed": (L, B, V)}.get(case.layout, (B, L, V))
    base = (torch.randn(shape) * case.scale).to(case.dtype).to(device)
    view = {
        "wide": lambda: base[..., 3:-2],
        "shifted": lambda: base[:, :-1],
        "transposed": lambda: base.transpose(0, 1),
    }
    return view.get(case.layout, lambda: base)()


def make_predictions(case: RowCase) -> Predictions:
    T, V = case.B * case.L, case.vocab_size or case.V
    rows = torch.nonzero(torch.rand(T) < case.scored).squeeze(1)
    if case.predictions == "branching" and rows.numel():
        rows = rows.repeat_interleave(torch.randint(1, 5, rows.shape))
    labels = torch.randint(0, V, rows.shape)
    if case.predictions == "branching" and rows.numel() > 3:
        labels[1::3] = labels[0::3][: labels[1::3].shape[0]]  # some equal (row, label) when the rows agree
    return Predictions(rows, labels, torch.randint(0, max(case.S, 1), rows.shape))


def make_special(case: RowCase, logits: Tensor, given: Predictions) -> Tensor:
    """The same logits with the rows that the case is about."""
    if not case.special or not given.rows.numel():
        return logits
    flat = logits.detach().clone().reshape(-1, case.V)
    if case.special == "inf":
        flat[:, ::3] = -torch.inf
        flat[given.rows, given.labels] = 1.0
        flat[given.rows[0]] = -torch.inf
        flat[given.rows[0], given.labels[0]] = 0.5  # a row with one finite logit: log-prob exactly 0
        return flat.view(logits.shape)
    # p of the label from 0.999 to 1 - 1e-7, by its distance to the rest
    first = torch.ones_like(given.rows, dtype=torch.bool)
    first[1:] = given.rows[1:] != given.rows[:-1]
    rows, labels = given.rows[first], given.labels[first]
    top = torch.linspace(12.0, 22.0, rows.numel()).to(flat)
    flat[rows] *= 0.1
    flat[rows, labels] = top
    if case.special == "sibling":  # a second label of the row takes nearly all the rest
        others = ~first
        flat[given.rows[others], given.labels[others]] = 11.0
    return flat.view(logits.shape)


def make_rows(case: RowCase, device: str = "cpu") -> tuple[Tensor, Predictions]:
    """Logits on the device; predictions on the CPU, where plans are made of them."""
    given = make_predictions(case)
    logits = make_logits(case, device)
    return make_special(case, logits, given), given
