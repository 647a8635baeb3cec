"""StepDPOTrainer: packed pairs of steps against TRL's own DPOTrainer on the same pairs."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from tiny_models import one_thread  # noqa: F401
from tiny_trees import random_tree
from training_ import relative_error

pytest.importorskip("trl")


import trl_cases as cases  # noqa: E402
from peft import LoraConfig  # noqa: E402

import svpo_kernels as sk  # noqa: E402
from svpo_kernels.integrations.trl import StepDPOTrainer, use_fused_head, with_lora_on_head  # noqa: E402

TREES = [random_tree(seed, depth=2, children=3, vocab=300) for seed in range(3)]


def step_trainer(folder, data, lm=None, make=StepDPOTrainer, **settings):
    own = {name: settings.pop(name) for name in ("rule", "min_gap") if name in settings}

    def build(lm, train_dataset, **rest):
        return make(lm, train_dataset=train_dataset if data is None else data, **rest, **own)

    return cases.trainer("dpo", folder, lm, make=build, **settings)


def theirs(trainer, inputs):
    """TRL's own forward and loss on the padded rows of the same batch."""
    for model, forward in zip(trainer.fused_head.models, trainer.fused_head.theirs, strict=True):
        trainer.fused_head.put(model, forward)
    return cases.step(trainer, {name: value for name, value in inputs.items() if name != "pack"})


def assert_equal(trainer, inputs):
    assert inputs["pack"].input_ids.shape[1] < int(inputs["attention_mask"].sum())
    loss, found, metrics = cases.step(trainer, inputs)
    expected, truth, said = theirs(trainer, inputs)
    assert loss == pytest.approx(expected, rel=2e-6) and abs(loss) > 1e-3
    difference = sum((found[name] - value).double().square().sum() for name, value in truth.items())
    assert (difference / sum(value.double().square().sum() for value in truth.values())).sqrt() <= 2e-6
    assert relative_error(found, truth) <= 2e-5
    assert metrics == pytest.approx(said, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name, settings", [
    ("llama", dict()), ("llama", dict(loss_type=["ipo", "sft"], loss_weights=[1.0, 0.1], ld_alpha=0.5)),
    ("llama", dict(use_weighting=True, max_length=20)), ("gemma2", dict()), ("granite", dict()),
    ("llama", dict(precompute_ref_log_probs=True, gradient_checkpointing=False))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_trees(tmp_path, name, settings):
    trainer = step_trainer(tmp_path, TREES, cases.model(name), rule="all", min_gap=0.1, **settings)
    inputs = cases.batch_of(trainer)
    assert inputs["input_ids"].shape[0] == 8
    assert_equal(trainer, inputs)


def test_pairs_of_a_tree_follow_each_other(tmp_path):
    trainer = step_trainer(tmp_path, TREES, rule="all")
    tree = torch.tensor(trainer.train_dataset["tree"])
    assert len(tree) == sum(len(sk.select_pairs(tree, "all")) for tree in TREES)
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(tree))) and order == list(sampler)
        assert len(tree[order].unique_consecutive()) == 3
        orders.append(tuple(order))
    assert len(set(orders)) > 1


def test_rows_as_trl_takes_them(tmp_path):
    """The same rows through TRL's own trainer: the same ids, loss and gradients."""
    trainer = step_trainer(tmp_path / "ours", None)
    inputs = cases.batch_of(trainer)
    other = cases.trainer("dpo", tmp_path / "theirs")
    same = cases.batch_of(other)
    assert all(torch.equal(inputs[name], value) for name, value in same.items())
    loss, found, metrics = cases.step(trainer, inputs)
    expected, truth, said = cases.step(other, same)
    assert loss == pytest.approx(expected, rel=2e-6)
    assert relative_error(found, truth) <= 2e-5 and metrics == pytest.approx(said, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("form", ["dataset", "file"])
def test_step_rows(tmp_path, form):
    first = dict(prompt="What is 3 + 4?", initial_reason_steps="Step 1: add.\n")
    rows = [first | dict(chosen="3 + 4 = 7.", rejected="It is 6."),
            dict(prompt="Take 2 from 9.", initial_reason_steps="", chosen="9 - 2 = 7.", rejected="It is 8.")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trainer = step_trainer(tmp_path, datasets.Dataset.from_list(rows) if form == "dataset" else path)
    inputs = cases.batch_of(trainer)
    assert inputs["input_ids"].shape[0] == 4
    scored = trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"])
    assert "7" in scored and "Step 1" not in scored
    assert_equal(trainer, inputs)


def test_lora_on_the_head(tmp_path):
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = step_trainer(tmp_path, TREES, rule="all", reference=False, make=lambda lm, **rest: with_lora_on_head(
        StepDPOTrainer, lm, peft_config=config, **rest))
    inputs = cases.batch_of(trainer)
    loss, found, _ = cases.step(trainer, inputs)
    padded = {name: value for name, value in inputs.items() if name != "pack"}
    expected, truth, _ = cases.step(trainer, padded)  # the fused head, unpacked
    assert loss == pytest.approx(expected, rel=2e-6) and relative_error(found, truth) <= 2e-5
    assert any("lm_head" in name and bool(value.any()) for name, value in found.items())


def test_trained_and_evaluated(tmp_path):
    trainer = step_trainer(tmp_path, TREES, rule="all", max_steps=3, logging_steps=1, save_strategy="no", bf16=True,
                           learning_rate=1e-3)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    said = trainer.evaluate()
    logged = trainer.state.log_history[0].keys()
    assert {"rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/chosen"} <= logged
    assert {"eval_loss", "eval_rewards/chosen"} <= said.keys()


def test_what_packing_would_change_is_refused(tmp_path):
    with pytest.raises(ValueError, match="StepDPOTrainer: truncation_mode must be .* got keep_end"):
        step_trainer(tmp_path, TREES, truncation_mode="keep_end")
    with pytest.raises(ValueError, match="trees with pairs under rule='best_worst', min_gap=2.0"):
        step_trainer(tmp_path, TREES, min_gap=2.0)
    trainer = step_trainer(tmp_path, TREES)
    with pytest.raises(ValueError, match="it has it from the start"):
        use_fused_head(trainer)
    trainer = step_trainer(tmp_path, TREES, disable_dropout=False)
    trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(sk.PackingError, match="dropout"):
        cases.step(trainer, cases.batch_of(trainer))
