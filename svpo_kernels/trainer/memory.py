"""How many tokens of a pack fit the device, counted from the model's weights: the bound of `max_tokens: auto`.

Kept for the backward are, per token and layer, what every product gives out, what the products back to the hidden
size take in (from a gate both factors), and what norms take in, in fp32, and give out; with checkpointing a hidden
state per layer and one layer at a time. Beside them lie weights, gradients, optimizer states and the head's budget.
Counted, not measured: the same on every start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from svpo_kernels.models import decoder, num_experts

SPARE = 0.9  # of a device's memory; the rest is for the context, libraries and fragmentation


def device_bytes(device: torch.device) -> int:
    """All memory of the device a process trains on, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(model: nn.Module, args: Any) -> int:
    """Weights, gradients, and two optimizer states a trained weight (of one byte each where their name says 8bit)."""
    every = [(p.numel() * p.element_size(), p.numel(), p.requires_grad) for p in model.parameters()]
    weights = sum(size for size, _, _ in every)
    trained = sum(size for size, _, trains in every if trains)
    count = sum(count for _, count, trains in every if trains)
    states = 2 * count if "8bit" in str(args.optim) else 2 * trained
    casts = weights // 2 if (args.bf16 or args.fp16) and not _low(model) else 0  # autocast keeps a copy of two bytes
    shards = args.world_size if args.fsdp else 1
    return (weights + trained + states) // shards + casts + args.logits_budget_mb * 2**20


def token_bytes(model: nn.Module, args: Any) -> float:
    """What one token of a pack keeps for the backward."""
    config = model.config.get_text_config()
    size = 2 if args.bf16 or args.fp16 or _low(model) else 4
    experts = num_experts(config)
    kept = 0.0
    for name, out, into, stacked in _products(decoder(model)):
        routed = experts and ".experts." in f".{name}." and "shared" not in name
        share = config.num_experts_per_tok * (1 if stacked else 1 / experts) if routed else 1.0
        back = (into if into == out else 2 * into) if out == config.hidden_size else 0  # 2: a gate's factors
        kept += size * share * (out + back)
    kept += (4 + size) * config.hidden_size * sum(name.endswith("norm.weight") for name, _ in model.named_parameters())
    layers = config.num_hidden_layers
    if args.gradient_checkpointing:
        return layers * config.hidden_size * size + kept / layers
    return kept


def _products(model: nn.Module) -> Iterator[tuple[str, int, int, bool]]:
    """(name, out, in, whether it is one of many in one weight) of every matrix that rows are multiplied with. A
    quantised layer's weight is packed: what its layer says counts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or hasattr(module, "base_layer"):
            continue
        if hasattr(module, "in_features"):
            yield name, module.out_features, module.in_features, False
        else:
            for weight in module.parameters(recurse=False):
                if weight.dim() >= 2:
                    yield name, *weight.shape[-2:], weight.dim() > 2


def tokens_that_fit(model: nn.Module, args: Any, total: int) -> int:
    """The most tokens of a pack on a device of `total` bytes, at least 1. An attention that writes its weights out
    (eager) keeps T x T numbers a head; the dense masks of sdpa and eager are one of T x T."""
    config = model.config.get_text_config()
    free = SPARE * total - state_bytes(model, args)
    kind = getattr(config, "_attn_implementation", None) or "sdpa"
    square = {"eager": 2.0 * config.num_attention_heads * config.num_hidden_layers + 1, "sdpa": 1.0}.get(kind, 0.0)
    square *= 2 if args.bf16 or args.fp16 or _low(model) else 4
    each = token_bytes(model, args)
    if free <= 0:
        return 1
    root = (each * each + 4 * square * free) ** 0.5
    return max(1, int(2 * free / (each + root)))  # square T^2 + each T = free


def _low(model: nn.Module) -> bool:
    """Whether the model computes in two bytes by itself."""
    dtype = getattr(model, "dtype", torch.float32)
    return dtype in (torch.bfloat16, torch.float16)
