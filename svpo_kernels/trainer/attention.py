"""Which attention a run takes: `attn_implementation: auto` is `tree_attention` where that is exact and faster.

Measured, forward and backward of a Llama 128 x 2, AMD EPYC, 2 cores, SDPA's time over tree_attention's: T = 128, 417,
1,331: 0.95, 1.2, 1.9 in fp32; 1.0, 1.4, 2.0 under bf16 autocast; 1.2, 1.4, 2.0 in bf16. On a device without a kernel
of its own `tree_attention` would be the dense reference, and SDPA stays.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from svpo_kernels import dispatch
from svpo_kernels.models import text_config, unwrap
from svpo_kernels.trees.attention import BY_POSITIONS, unmixed, unpackable
from svpo_kernels.trees.flops import EXACT
from svpo_kernels.trees.layers import TREE, use_tree_attention

AUTO = "auto"
UNBOUNDED = 1 << 40  # tokens of a path


def to_load(config: Any) -> str | None:
    """The attention that a model is loaded with: its own default where ours is switched on afterwards, or may be."""
    return None if config.attn_implementation in (AUTO, TREE) else config.attn_implementation


def settle(config: Any, lm: nn.Module) -> str:
    """Switch a model to the attention that the configuration asks for; the line that says which, and why."""
    asked = config.attn_implementation
    inner = unwrap(lm)
    why = "asked for" if asked is not None else "the model's own"
    if asked == TREE:
        use_tree_attention(lm)
    elif asked == AUTO:
        why = why_not_tree(config, lm)
        if why is None:
            use_tree_attention(lm)
            why = "auto: exact for this model, (T, T) is never built"
        else:
            why = f"auto: not {TREE}, {why}"
    elif asked is not None and text_config(inner)._attn_implementation != asked:
        inner.set_attn_implementation(asked)
    chosen = text_config(inner)._attn_implementation
    if chosen in BY_POSITIONS:
        why += "; sequences without a branch only: packed trees need svpo_tree, sdpa, eager or flex_attention"
    return f"attention: {chosen} ({why})"


def why_not_tree(config: Any, lm: nn.Module) -> str | None:
    """Why `auto` leaves a model the attention that it has; None where tree_attention is exact and faster."""
    inner = unwrap(lm)
    if config.packing == "stream":
        return "segments run from the model's own cache"
    reason = unpackable(inner)
    if reason is not None:
        return reason
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{type(inner).__name__} does not let its attention be chosen"
    dropout = getattr(text_config(inner), "attention_dropout", 0.0)
    if dropout and not config.disable_dropout:
        return f"which has no dropout (attention_dropout = {dropout:g})"
    device = config.device.type
    if dispatch.resolve("tree_attention", "auto", config.device, inner.dtype) == "reference":
        return f"which has no kernel for {str(inner.dtype).removeprefix('torch.')} on {device}"
    return None


def runs_chains(lm: nn.Module) -> bool:
    """Whether sequences run without padding, as chains in one row: where attention costs what is seen and nothing else
    crosses rows. RoPE that depends on the length of a run keeps its padded batches."""
    inner = unwrap(lm)
    fits = text_config(inner)._attn_implementation in (*EXACT, *BY_POSITIONS)
    return fits and unmixed(inner, (1, UNBOUNDED)) is None
