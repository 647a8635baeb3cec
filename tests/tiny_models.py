"""Tiny random Hugging Face models of every architecture that packing is tested on."""

from __future__ import annotations

import pytest
import torch
import transformers as hf


@pytest.fixture(autouse=True)
def one_thread():
    """Imported where models are too small for two threads: threads that wait on a busy machine cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


VOCAB = 97
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
WINDOW = 6


def configs():
    """name -> config, of models that packs are exact for."""
    return {
        "llama": hf.LlamaConfig(**SMALL),
        "qwen2": hf.Qwen2Config(**SMALL),
        "qwen3": hf.Qwen3Config(**SMALL),
        "mixtral": hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        "mistral-window": hf.MistralConfig(**SMALL, sliding_window=WINDOW),
        "qwen2-window": hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "gemma3": hf.Gemma3TextConfig(**SMALL, sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=[
            "sliding_attention", "full_attention", "sliding_attention"]),
    }


def refused():
    """name -> (config, what the refusal must name)."""
    rope = dict(rope_theta=10000.0)
    return {
        "qwen3-next": (hf.Qwen3NextConfig(
            **SMALL, layer_types=["linear_attention", "full_attention", "linear_attention"], num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
            "linear_attention"),
        "falcon-h1": (hf.FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
                                        mamba_d_state=8, mamba_chunk_size=8), "hybrid"),
        "bamba": (hf.BambaConfig(**SMALL, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
                                 mamba_d_state=8, mamba_chunk_size=8), "linear_attention|mamba"),
        "llama4-chunked": (hf.Llama4TextConfig(**SMALL, intermediate_size_mlp=48, num_local_experts=1,
                                               attention_chunk_size=8), "chunked_attention"),
        "longrope": (hf.LlamaConfig(**SMALL, rope_parameters=dict(
            rope, rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
            original_max_position_embeddings=16)), "longrope"),
        "dynamic-ntk": (hf.LlamaConfig(**SMALL | dict(max_position_embeddings=16), rope_parameters=dict(
            rope, rope_type="dynamic", factor=2.0)), "dynamic"),
        "bloom": (hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "alibi"),
        "router-loss": (hf.MixtralConfig(**SMALL, num_local_experts=4, sliding_window=None,
                                         output_router_logits=True), "router"),
    }


def build(config, implementation="sdpa", dtype=torch.float32):
    """A random causal LM in evaluation mode, its norms and biases random too, so that nothing is trivial."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.3)  # at the usual 0.02 attention is flat and a wrong mask hardly shows
    return model
