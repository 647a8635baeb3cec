"""`tree_attention` as an attention implementation of transformers: "svpo_tree"."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .._checks import fail
from ..models import text_config, unwrap
from ..tree_attention import attend

TREE = "svpo_tree"
OP = "use_tree_attention"


def use_tree_attention(model: nn.Module) -> nn.Module:
    """Switch a Hugging Face model to `tree_attention` for packs, and return it.

    Registers the attention and mask functions "svpo_tree" with transformers and sets the model's implementation.
    `batch.model_inputs(model)` then gives a (1, 1, 2, T) integer mask, rows subtree_end and position_ids: 4D masks pass
    transformers' own mask code untouched, and sdpa and eager raise on this one. Scaling, window, softcap and sinks come
    from each layer. Every other mask (none, or of padded batches) is served as by sdpa; where the layers have a softcap
    or sinks, as by eager.

    Raises ValueError for a model whose attention cannot be replaced, and, in the forward of a pack, for dropout above
    0, a cache longer than the queries, and attention that is not causal.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    inner = unwrap(model)
    if not hasattr(inner, "set_attn_implementation"):
        fail(OP, "model", "a Hugging Face model", f"a {type(inner).__name__}")
    AttentionInterface.register(TREE, tree_attention_forward)
    AttentionMaskInterface.register(TREE, other_mask)
    inner.set_attn_implementation(TREE)
    if text_config(inner)._attn_implementation != TREE:
        fail(OP, "model", "one whose attention implementation can be chosen", type(inner).__name__)
    return model


def tree_attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                           scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
                           softcap: float | None = None, s_aux: Tensor | None = None,
                           **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function: query (B, H, T, Dh), key and value (B, Hkv, T, .) -> ((B, T, H, Dv), None)."""
    if not is_tree_mask(attention_mask):
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, **kwargs}
        options |= {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
        return other_function(module)(module, query, key, value, attention_mask, **options)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    for what, wrong in ((f"dropout {dropout}", dropout > 0), ("attention that is not causal", not causal),
                        (f"{key.shape[2]} keys for {query.shape[2]} queries", key.shape[2] != query.shape[2])):
        if wrong:
            fail("svpo_tree", "attention", "causal, without dropout and without a cache", what)
    out = attend(query, key, value, attention_mask[:, 0, 0], scale=scaling, window=sliding_window,
                 position_ids=attention_mask[:, 0, 1], softcap=softcap, sinks=s_aux, low=True)
    return out.transpose(1, 2), None


def is_tree_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 4 and not mask.is_floating_point() and mask.dtype.itemsize > 1


def other_function(module: nn.Module) -> Any:
    """What serves the masks that are no pack's: sdpa, or the model's own eager function where sdpa cannot."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _needs_eager(module.config):
        return sdpa_attention_forward
    return sys.modules[type(module).__module__].eager_attention_forward


def other_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask function: as `other_function` takes it."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    config = kwargs.get("config")
    return (eager_mask if config is not None and _needs_eager(config) else sdpa_mask)(*args, **kwargs)


def _needs_eager(config: Any) -> bool:
    return bool(getattr(config, "attn_logit_softcapping", None)) or config.model_type == "gpt_oss"
