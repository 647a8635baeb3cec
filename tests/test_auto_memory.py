"""max_tokens: auto stays within the memory of the device, as counted from the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from training_ import make_config, make_trainer, small_lm, unequal_data

from svpo_kernels import select_pairs
from svpo_kernels.trainer import memory
from svpo_kernels.trainer import trainer as trainer_module
from svpo_kernels.trees.flops import choose_max_tokens
from svpo_kernels.trees.request import pair_tokens

GIB = 2**30


def arguments(**changes):
    return SimpleNamespace(**dict(bf16=False, fp16=False, optim="adamw_torch", fsdp=None, world_size=1,
                                  logits_budget_mb=512, gradient_checkpointing=False) | changes)


def llama_7b(dtype=torch.bfloat16, attention="sdpa"):
    config = hf.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                            num_attention_heads=32, attn_implementation=attention)
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config, dtype=dtype)


def test_the_count_of_a_7b_model():
    """Weights, gradients and two states of 6.74e9 weights in bf16; 6.8 MB of activations a token (a layer's linear
    outputs, the inputs of its two products back, its norms' inputs)."""
    model = llama_7b()
    weights = sum(p.numel() for p in model.parameters())
    assert memory.state_bytes(model, arguments()) == 8 * weights + 512 * 2**20
    assert 3.4e6 < memory.token_bytes(model, arguments()) < 7e6
    frozen = llama_7b()
    frozen.requires_grad_(False)
    assert memory.state_bytes(frozen, arguments()) == 2 * weights + 512 * 2**20
    flex = llama_7b(attention="flex_attention") if hasattr(torch.nn.attention, "flex_attention") else frozen
    flex.requires_grad_(False)
    fits = [memory.tokens_that_fit(flex, arguments(), size * GIB) for size in (16, 80, 140)]
    assert fits[0] < 2000 and 8_000 < fits[1] < 20_000 and fits[1] < fits[2] < 38_070
    held = memory.tokens_that_fit(flex, arguments(gradient_checkpointing=True), 80 * GIB)
    assert held > 5 * fits[1]
    assert memory.tokens_that_fit(model, arguments(), 40 * GIB) == 1


def test_attention_that_writes_its_weights_out_holds_fewer():
    fits = {kind: memory.tokens_that_fit(small_lm(attn_implementation=kind), arguments(), 2 * GIB)
            for kind in ("eager", "sdpa")}
    assert fits["eager"] < fits["sdpa"]
    lm = small_lm(attn_implementation="eager")
    T, layers, heads = fits["eager"], lm.config.num_hidden_layers, lm.config.num_attention_heads
    used = memory.state_bytes(lm, arguments()) + T * memory.token_bytes(lm, arguments())
    assert used + 4 * T * T * (2 * layers * heads + 1) == pytest.approx(0.9 * 2 * GIB, rel=1e-3)


def test_the_choice_is_bounded_but_holds_every_pair(tmp_path, monkeypatch):
    data = unequal_data()
    least = max(pair_tokens(tree, w, l) for tree, rows in zip(data.trees, data.pairs, strict=True)
                for w, l in rows.tolist())
    free = make_trainer(tmp_path / "free", data=data, max_tokens="auto").settings.max_tokens
    assert free > least
    for bound in (least + 3, 5):
        monkeypatch.setattr(memory, "tokens_that_fit", lambda *given, bound=bound: bound)
        found = make_trainer(tmp_path / str(bound), data=data, max_tokens="auto").settings.max_tokens
        assert least <= found <= max(least, bound)
    assert trainer_module.memory is memory and make_config(tmp_path).max_tokens == 4096


def test_exact_attention_is_bounded_too():
    data = unequal_data()
    config = small_lm().config
    config._attn_implementation = "flex_attention"
    whole = choose_max_tokens(data.trees, data.pairs, config)
    assert choose_max_tokens(data.trees, [select_pairs(tree, "all") for tree in data.trees], config, at_most=200) == 200
    assert whole > 200


def test_what_is_counted_is_near_what_is_held():
    """Bytes that autograd keeps for a pack, as its hooks see them, against the count."""
    lm = small_lm(hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    held: dict[int, int] = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = lm.model(torch.randint(0, 50, (1, 512))).last_hidden_state
    found = sum(size for storage, size in held.items() if storage not in weights) / 512
    assert kept.shape[1] == 512
    assert 0.9 < memory.token_bytes(lm, arguments()) / found < 1.2
