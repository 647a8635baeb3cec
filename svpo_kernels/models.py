"""A Hugging Face model's parts: the model inside its wrappers, its decoder, its config, its vocabulary head."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ._checks import describe, fail

MULTIPLIES = ("logit_scale", "lm_head_multiplier")  # config keys: Cohere, Falcon-H1
DIVIDES = ("logits_scaling",)  # Granite
UNKNOWN = ("output_multiplier_scale", "mup_width_multiplier", "dim_model_base")  # scaled, but each code its own way


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside DistributedDataParallel, torch.compile or PEFT wrappers."""
    return list(wrappers(model))[-1]


def wrappers(model: Any) -> Iterator[nn.Module]:
    """The model as given, what it wraps, and so on, down to the Hugging Face model itself."""
    while True:
        yield model
        inner: Any = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return
        model = inner


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def decoder(model: nn.Module) -> nn.Module:
    """The part of an unwrapped model that gives hidden states: a causal LM without its head."""
    part = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return part if isinstance(part, nn.Module) else getattr(model, "model", model)  # Llama-4 names a part it has not


def num_experts(config: Any) -> int:
    """Experts of a text config's mixture layers, under any of the names in use; 0 without any."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def cache_argument(module: nn.Module) -> str:
    """What a forward calls the cache that it is given: "cache", in older transformers "past_key_values"."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# -- the vocabulary head ----------------------------------------------------------------------------------------------


def head(model: nn.Module) -> dict[str, Any]:
    """The vocabulary head of a Hugging Face causal LM as keyword arguments of `linear_step_logps`.

    model: a causal LM, also inside PEFT, DistributedDataParallel or torch.compile; call it where the head's weight is
    whole (inside the wrapped forward under FSDP and ZeRO-3).

    Returns a dict of weight (V, D), bias (V,) or None, lora_a (r, D), lora_b (V, r) or None, lora_scaling (of the
    adapter in force on the head), softcap (Gemma) or None, temperature (Granite divides), logit_scale (Cohere and
    Falcon-H1 multiply). The tensors are the model's own, so that gradients reach its parameters.

    Raises ValueError, naming the model and the reason, for a head that the op cannot repeat: none with a plain weight,
    a quantised one, a trained copy (modules_to_save), an adapter that is more than one pair of low-rank factors, a
    scale of the logits whose form is not known.
    """
    model = unwrap(model)
    layer = output_layer(model)
    return {**_factors(layer), **_transform(model)}


def output_layer(model: Any) -> Any:
    """The module of an unwrapped model's vocabulary head, an adapter on it included. Raises ValueError as `head`."""
    name = type(model).__name__
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        fail("head", "model", "one with a vocabulary head that has a weight (a causal LM)", f"{name} without one")
    if hasattr(layer, "modules_to_save"):
        fail("head", "model", "one whose vocabulary head is no trained copy (leave lm_head out of modules_to_save)",
             f"{name} with a copy of it")
    if hasattr(layer, "base_layer") and (reason := _adapter_reason(layer)):
        fail("head", "model", "one pair of low-rank factors on the vocabulary head, or lm_head left out of the "
             "adapter's target_modules", f"{name}, whose adapter there is not supported: {reason}")
    if layer.weight.dim() != 2 or not layer.weight.is_floating_point():
        fail("head", "model", "a vocabulary head (V, D) in floating point", f"{name} with {describe(layer.weight)}")
    return layer


def _factors(layer: Any) -> dict[str, Any]:
    """weight, bias and, where LoRA on the head is in force, its factors and scaling."""
    base = getattr(layer, "base_layer", layer)
    parts = {"weight": base.weight, "bias": getattr(base, "bias", None), "lora_a": None, "lora_b": None,
             "lora_scaling": 1.0}
    if base is layer or layer.disable_adapters or layer.merged:
        return parts
    for name in _active_lora(layer):
        parts.update(lora_a=layer.lora_A[name].weight, lora_b=layer.lora_B[name].weight,
                     lora_scaling=layer.scaling[name])
    return parts


def _active_lora(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _adapter_reason(layer: Any) -> str | None:
    """Why adapters on the vocabulary head are more than one pair of low-rank factors; None where they are not."""
    if not hasattr(layer, "lora_A"):
        return f"{type(layer).__name__} is no LoRA layer"
    for adapter in _active_lora(layer):
        if getattr(layer.lora_dropout[adapter], "p", 0.0) > 0:
            return "it has dropout; set disable_dropout=true"
        if (getattr(layer, "use_dora", None) or {}).get(adapter) or adapter in getattr(layer, "lora_variant", {}):
            return "it is a variant of LoRA (DoRA or the like)"
        if (getattr(layer, "lora_bias", None) or {}).get(adapter):
            return "its second factor has a bias"
    active = _active_lora(layer)
    return f"several adapters are active on it: {', '.join(active)}" if len(active) > 1 else None


def _transform(model: nn.Module) -> dict[str, float | None]:
    """softcap, temperature and logit_scale with which the model turns h W^T into logits."""
    config = text_config(model)
    for key in UNKNOWN:
        if getattr(config, key, None) not in (None, 1, 1.0):
            fail("head", "model", "logits that are h W^T + b, scaled, softcapped", f"{type(model).__name__}, whose "
                 f"config.{key} = {getattr(config, key)} scales them in a form that is not known here")
    softcap = getattr(config, "final_logit_softcapping", None)
    divided, multiplied = (math.prod(float(getattr(config, key, None) or 1.0) for key in keys)
                           for keys in (DIVIDES, MULTIPLIES))
    return {"softcap": float(softcap) if softcap else None, "temperature": divided, "logit_scale": multiplied}
