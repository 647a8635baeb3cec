"""A model that scores: what lies in a directory, which scorer reads it, and its forward over a pack."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from svpo_kernels.linear_step_logps import linear_step_logps
from svpo_kernels.models import decoder, head, text_config, unwrap
from svpo_kernels.prm import prm_scores, prm_scores_from_lm_head
from svpo_kernels.trainer import head_files, start
from svpo_kernels.trainer.heads import ClassHead, ValueHead, two_rows, unit_scores
from svpo_kernels.trees.attention import unpackable
from svpo_kernels.trees.layers import use_tree_attention
from svpo_kernels.trees.packing import StepBatch
from svpo_kernels.trees.text import TextOptions

from .scorers import SCORERS, Head, Implicit, Scorer


@dataclass
class ScoringModel:
    """scorer: text to ids and positions. lm: the Hugging Face model. head: of `trainer/heads.py`, None where two rows
    of lm_head or log-ratios are the score. reference: of implicit rewards. said: what to tell the user."""

    scorer: Scorer
    lm: nn.Module
    head: nn.Module | None = None
    reference: nn.Module | None = None
    said: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @property
    def limit(self) -> int | None:
        """Most tokens of one run that the model has positions for."""
        return getattr(text_config(unwrap(self.lm)), "max_position_embeddings", None)

    @torch.no_grad()
    def scores(self, batch: StepBatch, parents: list[int]) -> Tensor:
        """(S,) fp32 in [0, 1] on the CPU. parents: for every step the one before it in this batch, -1: none (read by
        implicit rewards alone)."""
        batch = batch.to(self.device)
        hidden = _hidden(self.lm, batch)
        if isinstance(self.scorer, Implicit):
            ratio = self._logps(self.lm, hidden, batch)
            if self.reference is not None:
                ratio = ratio - self._logps(self.reference, _hidden(self.reference, batch), batch)
            ratio = ratio.double().cpu()
            for step, above in enumerate(parents):
                if above >= 0:
                    ratio[step] += ratio[above]
            return torch.sigmoid(self.scorer.beta * ratio).float()
        if self.head is None:
            return token_scores(unwrap(self.lm), hidden, batch.value_positions, *self.scorer.tokens).cpu()
        return unit_scores(self.head, hidden, batch.value_positions).cpu()

    @staticmethod
    def _logps(lm: nn.Module, hidden: Tensor, batch: StepBatch) -> Tensor:
        return linear_step_logps(hidden, labels=batch.plan, **head(unwrap(lm)))


def _hidden(lm: nn.Module, batch: StepBatch) -> Tensor:
    inner = unwrap(lm)
    return decoder(inner)(**batch.model_inputs(inner), use_cache=False).last_hidden_state


def token_scores(model: nn.Module, hidden: Tensor, positions: Tensor, good: int, bad: int) -> Tensor:
    """(S,): the softmax of two tokens' logits, the good one's share, as the model's own logits give it."""
    parts = head(model)
    weight, bias = two_rows(parts, good, bad)
    if not parts["softcap"]:
        return prm_scores(hidden, positions, weight, bias, good=0)
    if bias is not None:
        raise ValueError("svpo score: a vocabulary head with a bias and a softcap is not known")
    return prm_scores_from_lm_head(hidden, positions, weight, 0, 1, softcap=parts["softcap"] / parts["temperature"])


# -- loading ----------------------------------------------------------------------------------------------------------


def load_scoring_model(directory: str, scorer: str = "auto", *, dtype: str = "auto", device: str | None = None,
                       trust_remote_code: bool = False, options: Mapping[str, Any] | None = None) -> ScoringModel:
    """The model of a directory or the hub and the scorer that reads it.

    scorer: a name of SCORERS, or "auto": a head beside the model, or Qwen2.5-Math-PRM by its own head's names; what no
    file says (which tokens judge) is asked for. options: step_separator; of a judge prompt, good, bad; of implicit
    rewards beta and reference, their second model.

    Raises ValueError for a scorer that cannot be told, a head that does not fit the model, a tag that the tokenizer
    splits.
    """
    directory = local(directory)
    described = head_files.description(directory)
    found = head_files.read(directory)
    name = scorer if scorer != "auto" else tell_scorer(directory, described, found)
    if name not in SCORERS:
        raise ValueError(f"svpo score: scorer must be auto or one of {', '.join(SCORERS)}, got {name!r}")
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    made = _make_scorer(name, tokenizer, described, dict(options or {}))
    config = SimpleNamespace(dtype=dtype, attn_implementation=None, hub_token=None, peft="none",
                             trust_remote_code=trust_remote_code)
    if name == "qwen":  # its class is the repository's own code: a plain decoder, and a head that is read apart
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        lm = AutoModel.from_pretrained(directory, dtype=kind, trust_remote_code=trust_remote_code)
    else:
        lm = start.load_lm(config, directory)
    model = ScoringModel(made, lm)
    model.head = _make_head(name, directory, lm, found, described)
    if name == "implicit":
        reference = (options or {}).get("reference") or described.get("reference")
        if reference is None:
            raise ValueError("svpo score: implicit rewards need their reference model: --reference DIR")
        model.reference = start.load_lm(config, reference)
    _settle(model, device)
    if described.get("chat_template") not in (None, getattr(tokenizer, "chat_template", None)):
        model.said.append("the tokenizer's chat template is another than the one in svpo_head.json: the text is not "
                          "what the head was trained on")
    return model


def load_generator(directory: str, *, dtype: str = "auto", device: str | None = None,
                   trust_remote_code: bool = False) -> tuple[nn.Module, nn.Module | None]:
    """A causal LM that generates, and the head that lies beside it or None. Raises as `load_scoring_model`."""
    directory = local(directory)
    config = SimpleNamespace(dtype=dtype, attn_implementation=None, hub_token=None, peft="none",
                             trust_remote_code=trust_remote_code)
    lm, found = start.load_lm(config, directory), head_files.read(directory)
    head = None if found is None else _make_head("head", directory, lm, found, head_files.description(directory))
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return lm.to(place).eval(), None if head is None else head.to(place).eval()


def local(name: str) -> str:
    """The folder of a model: itself, or the snapshot of a hub name. Raises ValueError for a path that is not there."""
    if os.path.isdir(name):
        return name
    if name.startswith((".", os.sep, "~")) or name.count("/") != 1:
        raise ValueError(f"svpo score: there is no directory {name}")
    from huggingface_hub import snapshot_download

    return snapshot_download(name)


def _settle(model: ScoringModel, device: str | None) -> None:
    """Evaluation mode, on its device, with attention over packs that builds no (T, T) where the CPU has it."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for part in (model.lm, model.head, model.reference):
        if part is not None:
            part.to(place).eval()
    for lm in (model.lm, model.reference):
        if lm is not None and place.type == "cpu" and unpackable(unwrap(lm)) is None:
            use_tree_attention(lm)


def tell_scorer(directory: str, described: Mapping[str, Any], found: Any) -> str:
    """The scorer that the files of a directory call for. Raises ValueError where they do not say."""
    if described:
        return "implicit" if described.get("kind") == "implicit" else "head"
    if "Process" in architecture(directory) or head_files.inside(directory, "score.2.weight"):
        return "qwen"
    if found is not None and not found.where.startswith("v_head.*"):
        return "head"  # at the top, as Super_MARIO, LLaMA-Factory and ms-swift write a value head
    what = "v_head in its weights: a value head is --scorer head, Skywork's --scorer skywork" if found else (
        "no head beside it: --scorer math_shepherd, rlhflow or judge reads two rows of lm_head, implicit log-ratios")
    raise ValueError(f"svpo score: {directory} does not say how it is read; it has {what}")


def architecture(directory: str) -> str:
    path = Path(directory) / "config.json"
    return " ".join(json.loads(path.read_text(encoding="utf-8")).get("architectures") or []) if path.is_file() else ""


def _make_scorer(name: str, tokenizer: Any, described: Mapping[str, Any], options: dict[str, Any]) -> Scorer:
    kind, separator = SCORERS[name], options.pop("step_separator", None)
    for key in options:
        if key not in kind.takes:
            takers = " or ".join(each.name for each in SCORERS.values() if key in each.takes)
            raise ValueError(f"svpo score: {key} is an option of scorer {takers}, not of {name}")
    options.pop("reference", None)
    if not issubclass(kind, Head):
        scorer = kind(tokenizer, **options)
        scorer.separator = scorer.separator if separator is None else separator
        return scorer
    text = {key: described[key] for key in ("step_separator", "step_end", "turn_end", "turn_start",
                                            "chat_template_kwargs") if described.get(key) is not None}
    text |= {} if separator is None else {"step_separator": separator}
    if kind is Implicit:
        return Implicit(tokenizer, TextOptions(**text), float(options.get("beta", described.get("beta", 0.05))))
    scorer = kind(tokenizer, TextOptions(**text))
    if described.get("kind") == "token":
        scorer.tokens = (int(described["good_token"]), int(described["bad_token"]))
    return scorer


def _make_head(name: str, directory: str, lm: nn.Module, found: head_files.Head | None,
               described: Mapping[str, Any]) -> nn.Module | None:
    """The head's module with its weights. Raises ValueError for one that does not fit the model."""
    if name in ("implicit", "math_shepherd", "rlhflow", "judge"):
        return None
    if described.get("kind") == "token" and name == "head":
        return None  # two rows of lm_head, as the scorer's tokens say
    if name == "qwen":
        found = head_files.Head(head_files.inside(directory, "score."), "softmax", 1, f"score.* of {directory}")
    if found is None or not found.state:
        raise ValueError(f"svpo score: {directory} has no head for scorer {name}; looked for: "
                         "svpo/*_head.safetensors, value_head.{safetensors,bin,pth}, v_head.*, score.* in the weights")
    if name == "skywork":
        found = found._replace(activation="sigmoid")
    state = {key.removeprefix("v_head."): tensor for key, tensor in found.state.items()}
    D = text_config(unwrap(lm)).hidden_size
    for key, tensor in state.items():
        if key.endswith("weight") and tensor.shape[-1] != D:
            raise ValueError(f"svpo score: the head in {found.where} does not fit the model: {key} must be (C, {D}), "
                             f"got {tuple(tensor.shape)}")
    outputs = found.outputs("svpo score")
    dtype = torch.promote_types(next(p.dtype for p in lm.parameters() if p.is_floating_point()), torch.float32)
    if found.is_value:
        module: nn.Module = ValueHead(D, dtype)
    else:
        module = ClassHead(D, outputs, "score.2.weight" in state, dtype)
    head_files.load_into(module, found)
    return module
