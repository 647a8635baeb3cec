"""The configuration: YAML and key=value, types, and one clear error a mistake."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from svpo_kernels import PRESETS, svpo_loss
from svpo_kernels.trainer.config import LOSS_KEYS, ConfigError, SVPOConfig, load_config
from svpo_kernels.trainer.settings import valid_keys

PROMISED = ("model_name_or_path", "ref_model_name_or_path", "train_file", "eval_file", "output_dir", "preset",
            "pair_rule", "min_gap", "max_pairs", "max_tokens", "max_path_tokens", "step_separator", "pairs_per_step",
            "pair_weight", "disable_dropout", "packing", "learning_rate", "num_train_epochs", "bf16", "deepspeed",
            "fsdp")


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_overrides(tmp_path):
    path = write(tmp_path, 'output_dir: o\nlearning_rate: 1e-6\nmin_gap: 0.6\nstep_separator: "\\n"\nbeta: 0.3\n'
                           "lr_scheduler_kwargs: {num_cycles: 2}\nvalue_range: [0, 10]\nsave_total_limit: 3\n")
    config = load_config(path, ["beta=0.2", "max_tokens=4096", "step_end=\\n", "save_total_limit=null", "seed=7",
                                "report_to=[tensorboard]", "bf16=false", "fsdp=false"])
    assert (config.learning_rate, config.min_gap, config.step_separator, config.beta) == (1e-6, 0.6, "\n", 0.2)
    assert (config.max_tokens, config.step_end, config.save_total_limit, config.seed) == (4096, "\n", None, 7)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2} and config.value_range == [0.0, 10.0]
    assert config.report_to == ["tensorboard"] and config.bf16 is False and not config.fsdp


def test_defaults_are_offline_and_exact(tmp_path):
    config = load_config(None, output_dir=str(tmp_path))
    assert config.report_to == [] and not config.push_to_hub and not config.trust_remote_code
    assert config.disable_dropout and config.packing == "auto" and config.max_tokens == "auto"
    assert not config.disable_tqdm and not config.logging_nan_inf_filter


def test_every_promised_key_is_there():
    assert set(PROMISED) <= set(valid_keys())
    scalars = set(inspect.signature(svpo_loss).parameters) - {
        "step_logps", "pairs", "ref_step_logps", "values", "value_targets", "pair_weights", "sft_steps", "counts",
        "reference_free", "backend"}
    assert set(LOSS_KEYS) == scalars
    assert all(field.metadata.get("help") for field in dataclasses.fields(SVPOConfig) if field.name in PROMISED)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_with_keys_on_top(tmp_path, preset):
    config = load_config(None, ["beta=0.7", f"preset={preset}"], output_dir=str(tmp_path))
    assert config.loss_arguments() == {**PRESETS[preset], "beta": 0.7}


@pytest.mark.parametrize("override, message", [
    ("pair_per_step=3", "unknown key 'pair_per_step'; did you mean 'pairs_per_step'?"),
    ("learning_rte=3", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
    ("beta=much", "beta: invalid float value: 'much'"),
    ("learning_rate=much", "config: learning_rate: invalid float value: 'much'"),
    ("beta=-1", "config: beta must be > 0, got float -1.0"),
    ("preference=dpo", "config: preference must be one of 'sigmoid', 'ipo', 'hinge', got str 'dpo'"),
    ("rank=list", "config: rank must be one of 'hinge', 'logistic', 'implicit', got str 'list'"),
    ("backend=gpu", "config: backend must be one of auto, cuda, triton, cpu, reference, got 'gpu'"),
    ("logits_budget_mb=0", "config: logits_budget_mb must be at least 1, got 0"),
    ("min_gap=-1", "config: min_gap must be at least 0, got -1.0"),
    ("max_pairs=-1", "config: max_pairs must be at least 0 or null, got -1"),
    ("max_path_tokens=0", "config: max_path_tokens must be at least 1, got 0"),
    ("packing=flat", "packing must be one of auto, tree, distinct, pairs, stream, got 'flat'"),
    ("preset=dpo", r"preset must be one of svpo, step_dpo, mcts_dpo, rstar, alphamath, ipo, simpo, dvo \(objective "
                   r"policy: ppo, grpo, .*\), got 'dpo'"),
    ("max_tokens=many", "max_tokens must be a number of tokens or auto, got 'many'"),
    ("max_tokens=0", "max_tokens must be at least 1, got 0"),
    ("pairs_per_step=0", "pairs_per_step must be at least 1, got 0"),
    ("per_device_train_batch_size=4", "per_device_train_batch_size must be 1"),
    ("value_range=[1]", r"value_range must be \[least, greatest\], got \[1.0\]"),
    ("beta", "an override must look like key=value, got 'beta'"),
    ("bf16=maybe", "bf16: .*maybe"),
])
def test_mistakes_name_the_key(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override], output_dir=str(tmp_path))


@pytest.mark.parametrize("words, values, sft_nodes", [
    ([], "pairs", "chosen"), (["values=path", "sft_nodes=good"], "path", "good"), (["preset=rstar"], "pairs", "chosen"),
    (["preset=alphamath"], "labelled", "good"), (["preset=alphamath", "value_weight=0"], "pairs", "good"),
    (["preset=alphamath", "value_weight=0", "values=path"], "path", "good"),
    (["preset=alphamath", "rank_weight=1"], "pairs", "chosen"),
    (["preference_weight=0", "rank_weight=0"], "labelled", "chosen")])
def test_steps_are_of_whole_trees_where_no_term_is_over_pairs(tmp_path, words, values, sft_nodes):
    config = load_config(None, words, output_dir=str(tmp_path))
    assert (config.values, config.sft_nodes) == (values, sft_nodes)
    assert ("values" in config.explicit()) == any(word.startswith("values=") for word in words)


@pytest.mark.parametrize("words, message", [
    (["preset=alphamath", "values=pairs"], "config: values must be labelled, got 'pairs': with preset alphamath no "
     "term is over pairs"),
    (["preset=alphamath", "sft_nodes=chosen"], "config: sft_nodes must be good, got 'chosen': with preset alphamath"),
    (["preset=alphamath", "values=path"], "config: values must be labelled, got 'path'"),
    (["preset=step_dpo", "preference_weight=0"], "config: nothing would be trained: preference_weight, rank_weight, "
     "value_weight and sft_weight are all 0 with preset step_dpo"),
])
def test_a_loss_that_trains_nothing_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, words, output_dir=str(tmp_path))


@pytest.mark.parametrize("text, message", [
    ("beta: 0.1\nmin_gap: 1\nbeta: 0.5", "key 'beta' stands twice in .*run.yaml, on lines 1 and 3"),
    ("lr_scheduler_kwargs: {a: 1, a: 2}", "key 'a' stands twice in .*run.yaml, on lines 1 and 1"),
    ("a: b: c", "is not valid YAML"), ("- one\n- two", "must hold `key: value` lines, got a list"),
    ("train_fil: x", "unknown key 'train_fil' in .*run.yaml; did you mean 'train_file'?")])
def test_files_that_are_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_explicit_settings_repeat_the_run(tmp_path):
    config = load_config(None, ["min_gap=0.6", "preset=step_dpo", "hub_token=secret"], output_dir=str(tmp_path))
    assert config.explicit() == {"output_dir": str(tmp_path), "min_gap": 0.6, "preset": "step_dpo"}
    assert load_config(None, **config.explicit()).loss_arguments() == config.loss_arguments()
