"""attn_implementation in `svpo train`: what auto takes, and why; explicit names; what is said."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import one_thread  # noqa: F401
from training_ import make_config, unequal_data

from svpo_kernels.trainer import SVPOTrainer
from svpo_kernels.trainer.attention import settle
from svpo_kernels.trainer.model import build_model

CONFIGS = tiny_models.configs()


def settled(tmp_path, lm, **settings):
    return settle(make_config(tmp_path, **settings), lm), lm.config._attn_implementation


@pytest.mark.parametrize("name", CONFIGS)
def test_auto_takes_tree_attention_for_every_model_that_packs(tmp_path, name):
    line, chosen = settled(tmp_path, tiny_models.build(CONFIGS[name]))
    assert chosen == "svpo_tree" and line == "attention: svpo_tree (auto: exact for this model, (T, T) is never built)"


@pytest.mark.parametrize("name, dtype, settings, why", [
    ("qwen3-next", torch.float32, {}, "layer 0 is of type 'linear_attention'"),
    ("falcon-h1", torch.float32, {}, "hybrid"),
    ("bloom", torch.float32, {}, "alibi"),
    ("llama", torch.float64, {}, "which has no kernel for float64 on cpu"),
    ("llama", torch.float32, {"packing": "stream"}, "segments run from the model's own cache"),
])
def test_auto_says_why_not(tmp_path, name, dtype, settings, why):
    config = CONFIGS.get(name) or tiny_models.refused()[name][0]
    lm = tiny_models.build(config, "eager", dtype)
    line, chosen = settled(tmp_path, lm, **settings)
    assert chosen == "eager" and line.startswith("attention: eager (auto: not svpo_tree, ") and why in line


@pytest.mark.parametrize("asked", ["sdpa", "eager", "svpo_tree", "flex_attention"])
def test_explicit_names_are_taken_by_given_models_too(tmp_path, asked):
    line, chosen = settled(tmp_path, tiny_models.build(CONFIGS["llama"], "sdpa"), attn_implementation=asked)
    assert chosen == asked and line == f"attention: {asked} (asked for)"


def test_null_leaves_the_model_as_it_is(tmp_path):
    line, chosen = settled(tmp_path, tiny_models.build(CONFIGS["llama"], "eager"), attn_implementation=None)
    assert chosen == "eager" and line == "attention: eager (the model's own)"


def test_flash_attention_says_that_trees_need_another(tmp_path):
    lm = tiny_models.build(CONFIGS["llama"])
    lm.config._attn_implementation = "flash_attention_2"  # as it stands in a model loaded with it
    line, _ = settled(tmp_path, lm, attn_implementation="flash_attention_2")
    assert "flash_attention_2 (asked for; sequences without a branch only: packed trees need svpo_tree, sdpa" in line


def test_dropout_that_stays_on_keeps_the_models_own(tmp_path):
    import transformers as hf

    lm = tiny_models.build(hf.LlamaConfig(**tiny_models.SMALL, attention_dropout=0.1))
    line, chosen = settled(tmp_path, lm, disable_dropout=False)
    assert chosen == "sdpa" and "no dropout (attention_dropout = 0.1)" in line
    assert settled(tmp_path, lm)[1] == "svpo_tree"


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"dtype": "bfloat16"}], ids=["float32", "autocast", "bf16"])
def test_a_run_is_the_same_under_both(tmp_path, settings):
    """The default, from a directory, against sdpa: first loss and gradient norm, in every precision."""
    tiny_models.build(CONFIGS["llama"]).save_pretrained(tmp_path / "model")
    found, said = {}, []
    for asked in ("auto", "sdpa"):
        config = make_config(tmp_path / asked, model_name_or_path=str(tmp_path / "model"), max_tokens=80,
                             attn_implementation=asked, **settings)
        trainer = SVPOTrainer(build_model(config, say=said.append), config, unequal_data())
        trainer.train()
        found[asked] = trainer.state.log_history[0]
    assert said[0].startswith("attention: svpo_tree (auto") and said[1] == "attention: sdpa (asked for)"
    low = 0.03 if settings else 1e-5
    for name in ("loss", "grad_norm"):
        assert found["auto"][name] == pytest.approx(found["sdpa"][name], rel=low), name
