"""Which models can be streamed: what breaks the equality with separate runs is refused, naming it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._checks import fail
from ..models import decoder, text_config, unwrap, wrappers
from .attention import PackingError, never_exact, rope_reason
from .cache import empty
from .check import random_reason


def require_streamable(op: str, model: nn.Module, batch: Any) -> None:
    """Raises PackingError for a model whose segments are not exact, ValueError for adapters that have no rows."""
    inner = unwrap(model)
    for part in wrappers(model):
        for name, config in getattr(part, "peft_config", {}).items():
            if getattr(config, "is_prompt_learning", False):
                fail(op, "model", "one without prompt-tuning adapters, whose virtual tokens have no row in the pack",
                     f"adapter {name!r} ({type(config).__name__})")
    reason = unstreamable(inner, batch.path_lengths) or random_reason(decoder(inner)) or _noise(inner)
    if reason is not None:
        raise PackingError(f"{op}: {type(inner).__name__} cannot be streamed: {reason}")


def unstreamable(model: nn.Module, path_lengths: tuple[int, int] = (0, 0)) -> str | None:
    """Why segments are not exact for this (unwrapped) model, as far as its config tells; None if nothing does."""
    config = text_config(model)
    try:
        empty(config)
    except ValueError as error:
        return str(error)
    return never_exact(config) or rope_reason(config, *path_lengths)


def _noise(model: nn.Module) -> str | None:
    """NEFTune's noise on embeddings, where it is on."""
    for name, module in model.named_modules():
        if module.training and getattr(module, "neftune_noise_alpha", None):
            return f"{name} adds noise to embeddings (neftune_noise_alpha = {module.neftune_noise_alpha})"
    return None
