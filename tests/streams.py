"""What the tests of streaming share: architectures, trees whose segments have one token and more, runs of each path."""

from __future__ import annotations

import tiny_models
import tiny_trees
import torch
import transformers as hf

import svpo_kernels as sk
from svpo_kernels.models import decoder

S = tiny_models.SMALL
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
              layer_types=["linear_attention", "full_attention", "linear_attention"])
HYBRIDS = {
    "qwen3.5": hf.Qwen3_5TextConfig(**S, **LINEAR),
    "qwen3-next": tiny_models.refused()["qwen3-next"][0],
    "lfm2": hf.Lfm2Config(**S, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    "falcon-h1": tiny_models.refused()["falcon-h1"][0],
    "bamba": tiny_models.refused()["bamba"][0],
}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MORE_HYBRIDS = {
    "qwen3.5-moe": hf.Qwen3_5MoeTextConfig(**S, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16),
    "lfm2-moe": hf.Lfm2MoeConfig(**S, **EXPERTS, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1),
    "olmo-hybrid": hf.OlmoHybridConfig(**S, **LINEAR),
    "mamba2": hf.Mamba2Config(**S, num_heads=8, state_size=8, n_groups=1, chunk_size=8),
    "zamba2": hf.Zamba2Config(**S, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16, mamba_d_state=8, chunk_size=8,
                              layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, hybrid_layer_ids=[1]),
    "nemotron-h": hf.NemotronHConfig(**S, layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=4,
                                     mamba_head_dim=16, n_groups=1, ssm_state_size=8, chunk_size=8),
    "granite-hybrid": hf.GraniteMoeHybridConfig(
        **S, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
        mamba_d_state=8, mamba_chunk_size=8, num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16),
}
ATTENTION = tiny_models.configs() | {
    "gemma2": hf.Gemma2Config(**S, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
                              sliding_window=tiny_models.WINDOW),
    "gpt-oss": hf.GptOssConfig(**S, num_local_experts=4, num_experts_per_tok=2, sliding_window=tiny_models.WINDOW,
                               layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "llama4-chunked": tiny_models.refused()["llama4-chunked"][0],
    "bloom": tiny_models.refused()["bloom"][0],
    "gemma3n": hf.Gemma3nTextConfig(**S | dict(num_hidden_layers=4, intermediate_size=[48] * 4), laurel_rank=4,
                                    hidden_size_per_layer_input=8, vocab_size_per_layer_input=tiny_models.VOCAB,
                                    sliding_window=tiny_models.WINDOW, num_kv_shared_layers=2, altup_num_inputs=2,
                                    layer_types=["sliding_attention", "full_attention"] * 2,
                                    activation_sparsity_pattern=[0.0] * 4),
    "gpt2": hf.GPT2Config(vocab_size=tiny_models.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


EAGER = ("gemma2", "gpt-oss", "bloom", "mamba2")


def build(name, dtype=torch.float64):
    config = (ATTENTION | HYBRIDS | MORE_HYBRIDS)[name]
    model = tiny_models.build(config, "eager" if name in EAGER else "sdpa", dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products have no fp64
    return model


def pack(sizes=((3, 2), (2, 3)), tokens=(1, 4)):
    """Trees of (depth, children) each; many segments are one token long, and several leaves of a parent are alike."""
    trees = [tiny_trees.random_tree(seed, depth=depth, children=children, tokens=tokens)
             for seed, (depth, children) in enumerate(sizes)]
    batch, = sk.pack_trees(trees, [sk.select_pairs(tree, "all") for tree in trees], max_tokens=10**6)
    return trees, batch


def separate(model, trees, batch, head, loss):
    """loss(logps (S,), values (S, ...)) of every step run alone, whole sequence, no cache; gradients are added.

    Returns logps and values, detached.
    """
    logps, values = [], []
    for t, i in batch.node_of_step.tolist():
        ids, start = torch.tensor(trees[t].path(i)), trees[t].start[i]
        hidden = decoder(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        logits = model.lm_head(hidden[start - 1 : -1])
        softcap = getattr(model.config, "final_logit_softcapping", None)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        logits = logits * getattr(model.config, "lm_head_multiplier", 1.0)
        logits = logits / getattr(model.config, "logits_scaling", 1.0)
        logps.append(logits.log_softmax(-1).gather(1, ids[start:, None]).sum())
        values.append(head(hidden[trees[t].value_end(i) - 1]))
    logps, values = torch.stack(logps), torch.stack(values)
    loss(logps, values).backward()
    return logps.detach(), values.detach()


def taken_gradients(*modules):
    """{name: gradient}, and none is left."""
    found = {f"{place}.{name}": p.grad for place, module in enumerate(modules)
             for name, p in module.named_parameters() if p.grad is not None}
    for module in modules:
        module.zero_grad(set_to_none=True)
    return found


def difference(ours, theirs):
    """Relative difference of all gradients together."""
    assert ours.keys() == theirs.keys()
    return (sum(((ours[name] - x) ** 2).sum() for name, x in theirs.items())
            / sum((x**2).sum() for x in theirs.values())).sqrt().item()
