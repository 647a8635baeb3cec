"""The inputs that a Hugging Face model takes packed trees through, unpatched, and which models are exact on them.

`check.py` compares a model's packed run with separate runs.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import nn

from ..models import decoder, text_config, unwrap
from .layers import TREE
from .masks import run_dtype, tree_attention_mask

KINDS = {"sdpa": "additive", "eager": "additive", "flex_attention": "block", TREE: "integers"}  # implementation -> mask
BY_POSITIONS = ("flash_attention_2", "flash_attention_3")  # sequences end where positions begin anew
PACKABLE = ("full_attention", "sliding_attention")
WHY_NOT = {
    "linear_attention": "it carries a state from token to token",
    "mamba": "it carries a state from token to token",
    "recurrent": "it carries a state from token to token",
    "hybrid": "it carries a state from token to token beside its attention",
    "hybrid_sliding": "it carries a state from token to token beside its attention",
    "conv": "its convolution mixes neighbouring rows, whatever the mask",
    "chunked_attention": "its chunks are counted in rows, not in positions along a path",
}
STATEFUL = ("Mamba", "SSM", "DeltaNet", "Rwkv", "RecurrentBlock", "LinearAttention", "LightningAttention", "Retention",
            "ShortConv", "GatedLinear")  # parts of module class names


class PackingError(ValueError, RuntimeError):
    """This model cannot run packed trees exactly; the message names the layer type and the reason."""


# -- models ---------------------------------------------------------------------------------------------------------


def model_inputs(batch: Any, model: nn.Module) -> dict[str, Any]:
    """input_ids, position_ids and attention_mask of a StepBatch for this Hugging Face model, on the batch's device.

    A pack's mask is 4D, in the form that the model's attention implementation takes (additive for sdpa and eager, in
    the autocast dtype where autocast is on, else in the model's; a BlockMask for flex_attention), shared by all layers,
    one per layer type where some layers have a window; after `use_tree_attention` it is (1, 1, 2, T) integers,
    subtree_end and position_ids. Chains under flash_attention_2 have none: their positions begin anew. A padded batch
    has a plain (B, L) padding mask.

    Raises PackingError, naming the layer type, for a model that a pack is not exact for.
    """
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.lengths is not None:
        L = batch.input_ids.shape[1]
        mask = torch.arange(L, device=batch.lengths.device) < batch.lengths[:, None]
        return inputs | {"attention_mask": mask.to(torch.int64)}
    model = unwrap(model)
    config = text_config(model)
    reason = why_not(model, batch)
    if reason is not None:
        raise PackingError(f"model_inputs: {type(model).__name__} cannot run a pack: {reason}; distinct_batch can do")
    if config._attn_implementation in BY_POSITIONS:
        return inputs | {"attention_mask": None}
    kind = KINDS[config._attn_implementation]
    if kind == "integers":  # windows come to the attention function from its layer
        rows = [batch.subtree_end, batch.position_ids.reshape(-1)]
        return inputs | {"attention_mask": torch.stack(rows)[None, None]}
    own: Any = model.dtype
    dtype = run_dtype(batch.subtree_end.device, own) if kind == "additive" else None
    masks = {}
    for layer_type, window in layer_windows(config).items():
        masks[layer_type] = tree_attention_mask(batch.subtree_end, kind, window=window, dtype=dtype,
                                                position_ids=batch.position_ids)
    mask = masks if len(masks) > 1 else next(iter(masks.values()))  # one kind of layer: every model takes a tensor
    return inputs | {"attention_mask": mask}


def layer_windows(config: Any) -> dict[str, int | None]:
    """Window of each layer type of a packable model; the rule of transformers' own `create_masks_for_generate`."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return {"full_attention": None} if window is None else {"sliding_attention": window}
    return {t: window if t == "sliding_attention" else None for t in sorted(set(layer_types))}


def unpackable(model: nn.Module, path_lengths: tuple[int, int] = (0, 0)) -> str | None:
    """Why packs are not exact for this (unwrapped) model, as far as config and modules tell; None if nothing does.

    path_lengths: the shortest and longest separate run, for RoPE that depends on length.
    """
    return unmixed(model, path_lengths) or _implementation_reason(text_config(model))


def why_not(model: nn.Module, batch: Any) -> str | None:
    """`unpackable` for one batch: chains need no mask where attention parts them by their positions."""
    by_positions = batch.get("chains", False) and text_config(model)._attn_implementation in BY_POSITIONS
    return (unmixed if by_positions else unpackable)(model, batch.path_lengths)


def unmixed(model: nn.Module, path_lengths: tuple[int, int] = (0, 0)) -> str | None:
    """`unpackable` but for the attention implementation: why sequences in one row are not kept apart by it alone."""
    config = text_config(model)
    return _layers_reason(model, config) or _position_reason(config) or rope_reason(config, *path_lengths)


def _layers_reason(model: nn.Module, config: Any) -> str | None:
    layers = next((m for n, m in decoder(model).named_modules() if isinstance(m, nn.ModuleList) and n == "layers"), ())
    types = getattr(config, "layer_types", None) or []
    for i, layer_type in enumerate(types):
        if layer_type not in PACKABLE:
            name = f" ({type(layers[i]).__name__})" if i < len(layers) else ""
            why = WHY_NOT.get(layer_type, "it is not known to see other tokens through a mask and positions only")
            return f"layer {i} is of type {layer_type!r}{name}: {why}"
    if getattr(config, "attention_chunk_size", None) and "full_attention" not in types:
        return f"its layers are of type 'chunked_attention': {WHY_NOT['chunked_attention']}"
    for name, module in decoder(model).named_modules():
        made: Any = type(module)
        if layer_type := _mixer_type(made):
            kind = type(module).__name__
            return f"{name or kind} is of type {layer_type!r} ({kind}): {WHY_NOT[layer_type]}"
    if "sliding_attention" in layer_windows(config):
        code = sys.modules[type(decoder(model)).__module__]
        if not hasattr(code, "create_sliding_window_causal_mask"):
            return "its config has a window ('sliding_attention'), but its code makes no windowed mask"
    return None


@cache
def _mixer_type(kind: Any) -> str | None:
    """The layer type of a module class that mixes rows whatever the mask says; None for every other class."""
    if issubclass(kind, nn.Conv1d | nn.Conv2d):
        return "conv"
    return "linear_attention" if any(part in kind.__name__ for part in STATEFUL) else None


def _implementation_reason(config: Any) -> str | None:
    chosen = getattr(config, "_attn_implementation", None)
    if chosen in KINDS:
        return None
    return (f"attention implementation {chosen!r} takes no mask per token (its layers would see other branches); "
            f"load it with attn_implementation one of {', '.join(KINDS)}")


def _position_reason(config: Any) -> str | None:
    if (getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
            or getattr(config, "position_embedding_type", "") == "alibi" or config.model_type == "bloom"):
        return "its attention layers are of type 'alibi': the bias counts rows, not positions along a path"
    return never_exact(config)


def never_exact(config: Any) -> str | None:
    """Why neither packs nor segments of one can be exact, whatever the layers; None where nothing is known."""
    if getattr(config, "is_encoder_decoder", False):
        return "its layers are of type 'encoder_decoder'"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        return "its layers are of type 'bidirectional_attention': a token sees later ones"
    if getattr(config, "output_router_logits", False):
        return "its 'sparse' layers add a router loss over all rows (output_router_logits=True), once per shared token"
    return None


def rope_reason(config: Any, shortest: int, longest: int) -> str | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = {layer: table for layer, table in rope.items() if isinstance(table, dict)} or {"every": rope}
    for layer, table in tables.items():
        kind = table.get("rope_type", table.get("type", "default"))
        limit = table.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
        limit = limit or getattr(config, "max_position_embeddings", 0)
        unequal = shortest <= limit if kind == "longrope" else kind == "dynamic" and shortest < longest
        if longest > limit and unequal:
            return (f"the RoPE of {layer} layer is of type {kind!r}: above {limit} positions it depends on the length "
                    f"of the run, and the paths have {shortest} to {longest} tokens; padded batches of them differ "
                    f"from separate runs too, paths of at most {limit} tokens (max_path_tokens) do not")
    return None
