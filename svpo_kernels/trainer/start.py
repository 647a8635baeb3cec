"""Where a run starts: a plain model, our own output (a LoRA adapter's directory), a quantised model.

A directory of LoRA adapters means base + adapter, for the policy and for the reference. What does not fit (a tokenizer
larger than the embedding, full training of quantised weights) ends in one line before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from . import attention, packages
from .config import ConfigError
from .train_data import TrainData

LORA = ("lora_r", "lora_alpha", "lora_target_modules")  # keys that a loaded adapter decides


def adapter_config(config: Any, path: str) -> Any:
    """The PeftConfig of a directory (or hub repository) that holds an adapter, None for a plain model's."""
    found = find_adapter_config_file(path, token=config.hub_token)
    if found is None:
        return None
    if not packages.installed("peft"):
        raise ConfigError(f"config: {path} holds an adapter, which needs the package peft: pip install peft")
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(path, token=config.hub_token)
    if not adapter.base_model_name_or_path:
        raise ConfigError(f"config: the adapter in {path} does not say its base model (base_model_name_or_path)")
    return adapter


def model_config(config: Any, path: str) -> Any:
    """The configuration of a model, or of the base of an adapter, without its weights."""
    adapter = adapter_config(config, path)
    return AutoConfig.from_pretrained(adapter.base_model_name_or_path if adapter else path, token=config.hub_token,
                                      trust_remote_code=config.trust_remote_code)


def load_plain(config: Any, path: str) -> nn.Module:
    """A causal LM as the configuration asks for it, from a directory or the hub; `attention.settle` comes after."""
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attention.to_load(config), token=config.hub_token,
        trust_remote_code=config.trust_remote_code)


def load_lm(config: Any, path: str, train: bool = False) -> nn.Module:
    """The model of a directory or the hub; of an adapter's directory base + adapter.

    train: with peft = lora the adapter stays one and trains on (a PeftModel). Else it is merged into the base; into a
    quantised base it is not merged but stays on top.
    """
    adapter = adapter_config(config, path)
    if adapter is None:
        return load_plain(config, path)
    from peft import PeftModel

    on = train and config.peft == "lora"
    if on:
        _check_adapter(config, path, adapter)
    lm = PeftModel.from_pretrained(load_plain(config, adapter.base_model_name_or_path), path, is_trainable=on)
    return lm if on or is_quantised(lm.get_base_model()) else lm.merge_and_unload()


def _check_adapter(config: Any, path: str, adapter: Any) -> None:
    """The adapter that trains on decides its own shape: a key that says another is refused."""
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if kind != "LORA":
        raise ConfigError(f"config: peft = lora cannot train on what {path} holds, an adapter of type {kind}; peft = "
                          "none merges it")
    given = config.explicit()
    for key, theirs in zip(LORA, (adapter.r, adapter.lora_alpha, adapter.target_modules), strict=True):
        ours = given.get(key)
        named = sorted(theirs) if isinstance(theirs, (set, list)) else theirs
        wanted = sorted(part.strip() for part in ours.split(",")) if isinstance(ours, str) else ours
        if ours is not None and wanted not in (named, [named]):
            raise ConfigError(f"config: {key} is {ours}, but the adapter in {path} trains on and has {named}; leave "
                              f"{key} out, or set peft=none to merge it first")


def is_quantised(lm: nn.Module) -> bool:
    return bool(getattr(lm, "is_quantized", False) or getattr(lm, "quantization_method", None))


def keep_training_layout(lm: nn.Module) -> None:
    """On CPUs with AVX-512 BF16 the first evaluation makes bitsandbytes repack 4-bit weights, for good, into a layout
    without a backward: the reference pass would end the training."""
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_quantised(config: Any, lm: nn.Module | None) -> None:
    """Quantised weights do not train: without adapters embeddings, norms and head would, and nothing else."""
    if lm is not None:
        quantised = is_quantised(lm)
    else:
        described = getattr(model_config(config, config.model_name_or_path), "quantization_config", None)
        described = described if isinstance(described, dict) or described is None else described.to_dict()
        method = str((described or {}).get("quant_method", ""))
        method = method.rpartition(".")[2].lower()
        lack = packages.quantiser(method)
        if lack is not None:
            raise ConfigError(f"config: {config.model_name_or_path} cannot be loaded: {lack}")
        quantised = bool(method) and not described.get("dequantize", False)
    if quantised and config.peft == "none":
        raise ConfigError("config: peft is none, but the weights are quantised and do not train; set peft=lora, or "
                          "start from the model before it was quantised")


def check_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase, data: Iterable[TrainData | None],
                     lm: nn.Module | None) -> None:
    """Every id of the data has a row in the embedding of the model and of its reference; one line names both sizes."""
    largest = max((each.largest_id() for each in data if each is not None), default=0)
    sizes = []
    if lm is not None:
        sizes.append(("the model", lm.get_input_embeddings().weight.shape[0]))
    else:
        sizes.append((config.model_name_or_path, _rows(config, config.model_name_or_path)))
    if config.ref_model_name_or_path and config.reference != "none":
        sizes.append((config.ref_model_name_or_path, _rows(config, config.ref_model_name_or_path)))
    for name, rows in sizes:
        if rows is not None and largest >= rows:
            raise ConfigError(
                f"config: the tokenizer has {len(tokenizer)} tokens and {name} embeds {rows}: the data hold the id "
                f"{largest} ({tokenizer.convert_ids_to_tokens(largest)!r}). Resize and save the model first "
                "(resize_token_embeddings), or name its own tokenizer in tokenizer_name_or_path")


def _rows(config: Any, path: str) -> int | None:
    found = model_config(config, path)
    return getattr(found.get_text_config(), "vocab_size", None)
