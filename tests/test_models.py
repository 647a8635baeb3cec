"""Real Hugging Face models on packs: equal to separate runs, or refused with the layer type named."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import tiny_trees
import torch
import transformers as hf
from tiny_models import one_thread  # noqa: F401

import svpo_kernels as sk
from svpo_kernels import PackingError, check_packing
from svpo_kernels.trees.attention import model_inputs, unpackable
from svpo_kernels.trees.check import telling_path

CONFIGS = tiny_models.configs()
REFUSED = tiny_models.refused()


def trees_and_pairs(children=2):
    trees = [tiny_trees.random_tree(s, depth=3, children=children) for s in range(2)]
    return trees, [sk.select_pairs(tree, "all") for tree in trees]


def pack(**options):
    batch, = sk.pack_trees(*trees_and_pairs(), max_tokens=10**6, **options)
    return batch


def difference(a, b):
    """Largest relative difference of a row."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@torch.no_grad()
def compare(model, batch, trees):
    """Logits of every path of a batch against the path's own run, through no mask of ours."""
    logits = model(**batch.model_inputs(model), use_cache=False).logits.flatten(0, 1)
    L = batch.input_ids.shape[1]
    worst = 0.0
    for (t, i), row in zip(batch.node_of_step.tolist(), batch.step_ends.tolist(), strict=True):
        path = (batch.subtree_end[:row + 1] > row).nonzero().flatten() if batch.lengths is None else \
            torch.arange(row // L * L, row + 1)
        alone = model(input_ids=torch.tensor([trees[t].path(i)]), use_cache=False).logits[0]
        worst = max(worst, difference(logits[path], alone))
    return worst


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_path_equals_its_separate_run(name, implementation):
    trees, _ = trees_and_pairs()
    batch = pack(values="labelled")
    model = tiny_models.build(CONFIGS[name], implementation)
    assert compare(model, batch, trees) <= 1e-5
    check = check_packing(model, batch)
    assert check.error <= 1e-5 and 20 < len(check.path) < batch.input_ids.shape[1]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "window" in name or name == "gemma3"])
def test_the_windows_bite(name):
    """With a wider window in the mask than in the model, the table above would fail."""
    trees, _ = trees_and_pairs()
    batch = pack()
    model = tiny_models.build(CONFIGS[name])
    inputs = batch.model_inputs(model)
    wrong = sk.tree_attention_mask(batch.subtree_end)
    assert batch.path_lengths[1] > 3 * tiny_models.WINDOW
    with torch.no_grad():
        right, other = (model(**inputs | {"attention_mask": mask}).logits for mask in (inputs["attention_mask"], wrong))
    assert difference(other, right) > 1e-2


def test_layer_types_get_masks_of_their_own():
    batch = pack()
    masks = model_inputs(batch, tiny_models.build(CONFIGS["gemma3"]))["attention_mask"]
    assert set(masks) == {"full_attention", "sliding_attention"}
    expected = sk.tree_attention_mask(batch.subtree_end, window=tiny_models.WINDOW, position_ids=batch.position_ids)
    assert torch.equal(masks["sliding_attention"] == 0, expected)
    assert torch.equal(masks["full_attention"] == 0, sk.tree_attention_mask(batch.subtree_end))
    one = model_inputs(batch, tiny_models.build(CONFIGS["mistral-window"], "eager", torch.bfloat16))["attention_mask"]
    assert one.dtype == torch.bfloat16 and torch.equal(one == 0, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next", "falcon-h1", "bloom", "llama4-chunked"])
def test_a_distinct_batch_runs_on_every_model(name):
    trees, pairs = trees_and_pairs()
    config = CONFIGS.get(name) or REFUSED[name][0]
    model = tiny_models.build(config, "eager")
    batch = sk.distinct_batch(trees, pairs)
    assert compare(model, batch, trees) <= 1e-5
    assert len(check_packing(model, batch).path) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_layer_type_named(name):
    config, named = REFUSED[name]
    model, batch = tiny_models.build(config, "eager"), pack()
    with pytest.raises(PackingError, match=rf"check_packing: \w+ cannot run a pack: .*({named})"):
        check_packing(model, batch)
    with pytest.raises(ValueError, match=rf"model_inputs: .*({named}).*distinct_batch"):
        batch.model_inputs(model)
    assert issubclass(PackingError, RuntimeError)


def test_length_dependent_rope_is_refused_only_where_it_bites():
    trees = [sk.StepTree([1] * 6, [sk.StepNode(-1, [3] * 6, 1.0), sk.StepNode(-1, [4] * 6, -1.0)])]
    short, = sk.pack_trees(trees, [[[0, 1]]], max_tokens=99)
    for name in ("longrope", "dynamic-ntk"):
        model = tiny_models.build(REFUSED[name][0])
        assert short.path_lengths == (12, 12) and check_packing(model, short).error <= 1e-5
        assert unpackable(model, (17, 18)) is None if name == "longrope" else "dynamic" in unpackable(model, (17, 18))
        assert "longrope" in unpackable(model, (16, 17)) if name == "longrope" else unpackable(model, (17, 17)) is None
        assert "paths of at most 16 tokens (max_path_tokens) do not" in unpackable(model, (16, 17))


def test_wrong_models_that_the_config_does_not_tell_are_found_by_their_numbers():
    """GPT-Neo's local attention counts its window in rows, in a buffer of its own: only a run can show it."""
    config = hf.GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, window_size=6,
                             attention_types=[[["global", "local"], 1]], max_position_embeddings=512)
    batch = pack()
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.build(config, "eager", dtype)
        assert unpackable(model, batch.path_lengths) is None
        with pytest.raises(PackingError, match=r"relative difference [1-9].*e-0[12], .* layer 1, of type 'local'"):
            check_packing(model, batch)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_low_precision_is_judged_by_its_own_noise(name):
    batch = pack()
    # torch 2.6 rounds bf16 products on the CPU by the number of rows: a random router then sends a quarter of the
    # tokens elsewhere (0.09 ... 0.37 between two separate runs).
    noisy = name == "mixtral" and torch.__version__ < "2.7"
    for dtype in (torch.bfloat16, torch.float16):
        check = check_packing(tiny_models.build(CONFIGS[name], "sdpa", dtype), batch)
        assert check.error <= check.allowed and (check.allowed < 0.2 or noisy)
    with torch.autocast("cpu", torch.bfloat16):
        check = check_packing(tiny_models.build(CONFIGS[name]), batch)
        assert check.error <= check.allowed and check.allowed > 1e-3


def test_dropout_and_router_noise_are_refused_while_training():
    batch = pack()
    model = tiny_models.build(hf.LlamaConfig(**tiny_models.SMALL, attention_dropout=0.1))
    check_packing(model, batch)
    with pytest.raises(PackingError, match=r"layers.0.self_attn.attention_dropout is of type 'dropout' \(= 0.1\)"):
        check_packing(model.train(), batch)
    model = tiny_models.build(hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=512)).train()
    with pytest.raises(PackingError, match=r"drop is of type 'dropout' \(p = 0.1\) in training mode"):
        check_packing(model, batch)
    model = tiny_models.build(hf.MixtralConfig(**tiny_models.SMALL, sliding_window=None, router_jitter_noise=0.1))
    with pytest.raises(PackingError, match="jitter_noise is of type 'dropout'"):
        check_packing(model.train(), batch)


def test_lora_dropout_counts_and_wrappers_are_seen_through():
    import peft

    batch = pack()
    model = tiny_models.build(CONFIGS["llama"])
    inside = copy.deepcopy(model)
    lora = peft.get_peft_model(inside, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.1))
    check_packing(lora.eval(), batch)
    with pytest.raises(PackingError, match="lora_dropout.* is of type 'dropout'"):
        check_packing(lora.train(), batch)
    assert torch.equal(model_inputs(batch, lora)["attention_mask"], model_inputs(batch, model)["attention_mask"])
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert check_packing(wrapped, batch).error <= 1e-5


def test_attention_without_a_mask_per_token_is_refused():
    model, batch = tiny_models.build(CONFIGS["llama"]), pack()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PackingError, match="'flash_attention_2' takes no mask per token .* sdpa, eager, flex"):
        batch.model_inputs(model)


def test_flex_attention_gets_a_block_mask():
    model, batch = tiny_models.build(CONFIGS["llama"]), pack()
    model.config._attn_implementation = "flex_attention"
    mask = batch.model_inputs(model)["attention_mask"]
    assert type(mask).__name__ == "BlockMask" and tuple(mask.shape) == (1, 1, *2 * batch.input_ids.shape[1:])


def test_the_tested_path_is_long_and_has_others_before_it():
    trees, _ = trees_and_pairs()
    batch = pack(values="labelled")
    path = telling_path(batch)
    end = int(path[-1])
    lengths = [len(trees[t].path(i)) for t, i in batch.node_of_step.tolist()]
    assert len(path) >= sorted(lengths)[len(lengths) // 2] and end + 1 >= 2 * len(path)
