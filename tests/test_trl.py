"""integrations.trl against the installed TRL: the same loss, metrics and gradients as its own head, by trainer."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers as hf
from tiny_models import one_thread  # noqa: F401
from training_ import relative_error

pytest.importorskip("trl")
import trl  # noqa: E402
import trl_cases as cases  # noqa: E402
from peft import LoraConfig  # noqa: E402

from svpo_kernels.integrations.trl import SVPODPOTrainer, use_fused_head, with_lora_on_head  # noqa: E402

LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
          "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]


def assert_equal_to_trl(trainer, inputs):
    """TRL's own head, ours, TRL's again, on the same trainer, model and batch."""
    loss, gradients, metrics = cases.step(trainer, inputs)
    with use_fused_head(trainer):
        ours, found, said = cases.step(trainer, inputs)
    assert cases.step(trainer, inputs)[0] == loss  # restored, to the bit
    assert ours == pytest.approx(loss, rel=1e-6, abs=1e-6)
    difference = sum((found[name] - value).double().square().sum() for name, value in gradients.items())
    assert (difference / sum(value.double().square().sum() for value in gradients.values())).sqrt() <= 1e-6
    assert relative_error(found, gradients) <= 3e-6  # each parameter, against its largest entry
    assert said == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    return loss, metrics


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    trainer = cases.trainer("dpo", tmp_path_factory.mktemp("dpo"))
    return trainer, cases.batch_of(trainer)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_dpo_loss(dpo, loss_type):
    trainer, inputs = dpo
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [loss_type], [1.0], 0.1
    trainer.args.discopop_tau = 1.0  # at 0.05 this loss itself multiplies a rounding of the log-probs by 20
    loss, metrics = assert_equal_to_trl(trainer, inputs)
    assert abs(loss) > 1e-3 and metrics["entropy"] > 0 and metrics["logits/chosen"] != 0


def test_the_losses_above_are_all_that_trl_has():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert all(f'"{name}"' in source for name in LOSSES)
    assert source.count("loss_type ==") == len(LOSSES)


@pytest.mark.parametrize("settings", [
    dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], ld_alpha=0.5), dict(use_weighting=True),
    dict(precompute_ref_log_probs=True, loss_type=["ipo"]), dict(max_length=12),
    dict(f_divergence_type="js_divergence"),
], ids=lambda s: "-".join(s))
def test_dpo_settings(tmp_path, settings):
    trainer = cases.trainer("dpo", tmp_path, **settings)
    assert_equal_to_trl(trainer, cases.batch_of(trainer))


@pytest.mark.parametrize("name", [name for name in cases.CONFIGS if name != "llama"])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_heads_with_a_softcap_a_scale_or_a_bias(tmp_path, kind, name):
    trainer = cases.trainer(kind, tmp_path, cases.model(name))
    assert_equal_to_trl(trainer, cases.batch_of(trainer))


@pytest.mark.parametrize("kind, settings", [
    ("sft", dict()), ("sft", dict(loss_type="dft")), ("kto", dict()), ("kto", dict(precompute_ref_log_probs=True)),
    ("grpo", dict(beta=0.1, temperature=0.7)), ("grpo", dict(entropy_coef=0.05, loss_type="dr_grpo")),
    ("grpo", dict(top_entropy_quantile=0.5)), ("rloo", dict(beta=0.1, temperature=1.3))],
    ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_the_other_trainers(tmp_path, kind, settings):
    trainer = cases.trainer(kind, tmp_path, **settings)
    assert_equal_to_trl(trainer, cases.batch_of(trainer))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, reentrant):
    trainer = cases.trainer("dpo", tmp_path, gradient_checkpointing=True,
                            gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.enable_input_require_grads()
    assert_equal_to_trl(trainer, cases.batch_of(trainer))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_peft(tmp_path, kind):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    make = cases.KINDS[kind][0]
    trainer = cases.trainer(kind, tmp_path, make=lambda lm, **rest: make(lm, peft_config=config, **rest),
                            reference=False)
    assert_equal_to_trl(trainer, cases.batch_of(trainer))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_lora_on_the_head_equals_a_head_of_its_sum(tmp_path, name):
    """TRL's own trainer on the merged weights: its dW gives both factors' gradients."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], task_type="CAUSAL_LM")
    lm = cases.model(name)
    lm.config.tie_word_embeddings = False
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    merged = copy.deepcopy(lm)
    with pytest.raises(ValueError, match="not supported"):
        cases.trainer("dpo", tmp_path, copy.deepcopy(lm), reference=False,
                      make=lambda lm, **rest: trl.DPOTrainer(lm, peft_config=config, **rest))
    trainer = cases.trainer("dpo", tmp_path / "ours", lm, reference=False,
                            make=lambda lm, **rest: with_lora_on_head(trl.DPOTrainer, lm, peft_config=config, **rest))
    inputs = cases.batch_of(trainer)
    layer = trainer.model.get_output_embeddings()
    A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    theirs = cases.trainer("dpo", tmp_path / "theirs", merged,
                           make=lambda m, **rest: trl.DPOTrainer(m, **rest | {"ref_model": copy.deepcopy(merged)}))
    with torch.no_grad():
        merged.lm_head.weight.add_(2.0 * B @ A)
    loss, found, metrics = cases.step(trainer, inputs)
    expected, truth, said = cases.step(theirs, inputs)
    dW = truth["lm_head.weight"]
    names = {part: next(n for n in found if f"lora_{part}.default" in n) for part in "AB"}
    assert loss == pytest.approx(expected, rel=1e-5) and abs(loss - 0.6931) > 1e-4
    assert relative_error({"A": found[names["A"]], "B": found[names["B"]]},
                          {"A": 2.0 * B.detach().T @ dW, "B": 2.0 * dW @ A.detach().T}) <= 2e-5
    assert metrics == pytest.approx(said, rel=1e-4, abs=1e-4)
    with pytest.raises(ValueError, match="without LoRA on its vocabulary head"):
        trainer.fused_head.restore()


def test_a_reference_in_accelerates_mixed_precision_wrapper(tmp_path):
    trainer = cases.trainer("dpo", tmp_path, bf16=True)
    assert "_original_forward" in vars(trainer.ref_model)  # the constructor has prepared it
    inputs = cases.batch_of(trainer)
    trainer.accelerator.prepare_model(trainer.model)
    assert "_original_forward" in vars(trainer.model)
    loss, _, metrics = cases.step(trainer, inputs)
    with use_fused_head(trainer):
        ours, _, said = cases.step(trainer, inputs)
    assert cases.step(trainer, inputs)[0] == loss
    assert ours == pytest.approx(loss, rel=1e-2) and ours != loss
    assert said == pytest.approx(metrics, rel=0.05, abs=0.05)


def test_prompt_rows_never_reach_the_head_and_nothing_of_trl_is_patched(dpo, monkeypatch):
    import trl.trainer.utils as utils

    from svpo_kernels.integrations import trl as ours

    trainer, inputs = dpo
    rows, op = [], ours.linear_step_logps
    monkeypatch.setattr(ours, "linear_step_logps", lambda hidden, *args, **options: rows.append(len(hidden)) or op(
        hidden, *args, **options))
    kernel, compact, generation = utils._ChunkedLogProbFunction, utils._use_triton, trainer.model.forward
    other = copy.deepcopy(trainer.model)
    with use_fused_head(trainer):
        assert (utils._ChunkedLogProbFunction, utils._use_triton) == (kernel, compact)
        cases.step(trainer, inputs)
        other(input_ids=inputs["input_ids"], labels=inputs["input_ids"], fused_lm_head=True)
        assert trainer.model(input_ids=inputs["input_ids"]).logits.shape == (*inputs["input_ids"].shape, 300)
    assert rows == [int(inputs["completion_mask"][:, 1:].sum())] * 2  # policy and reference; not the copy
    assert trainer.model.forward.__func__ is generation.__func__


def test_a_batch_without_a_scored_token_still_has_gradients(dpo):
    trainer, inputs = dpo
    with use_fused_head(trainer):
        labels = torch.full_like(inputs["input_ids"], -100)
        out = trainer.model(input_ids=inputs["input_ids"], labels=labels, fused_lm_head=True)
    trainer.model.zero_grad()
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_trained_by_trainer_train(tmp_path):
    """Whole runs, the switch on before train(): the logged losses are TRL's."""
    logs = []
    for switch in (False, True):
        trainer = cases.trainer("dpo", tmp_path / str(switch), max_steps=3, logging_steps=1, save_strategy="no",
                                learning_rate=1e-3)
        if switch:
            use_fused_head(trainer)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3 and logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_the_trainer_with_the_head_built_in(tmp_path):
    trainer = cases.trainer("dpo", tmp_path, make=SVPODPOTrainer, loss_type=["ipo"])
    inputs = cases.batch_of(trainer)
    loss, gradients, _ = cases.step(trainer, inputs)
    trainer.fused_head.restore()
    expected, truth, _ = cases.step(trainer, inputs)
    assert loss == pytest.approx(expected, rel=1e-6) and relative_error(gradients, truth) <= 2e-6


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_trl_is_named(dpo, monkeypatch):
    import trl.kernels

    trainer, _ = dpo
    before = trainer.model.forward
    changed = type("ChunkedLogProbFunction", (), {"forward": staticmethod(lambda ctx, hidden, head: None)})
    monkeypatch.setattr(trl.kernels, "ChunkedLogProbFunction", changed)
    monkeypatch.setattr(trl, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"trl must be a version whose .* \(tested: 1.16\), got TRL 9.9: ctx, hidden"):
        use_fused_head(trainer)
    monkeypatch.delattr(trl.kernels, "ChunkedLogProbFunction")
    with pytest.raises(ValueError, match="got TRL 9.9: one without it"):
        use_fused_head(trainer)
    assert trainer.model.forward == before


def test_a_trainer_without_trls_head_is_named(tmp_path):
    plain = hf.Trainer(cases.model(), hf.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="must be a TRL trainer .*, got Trainer of TRL .* with LlamaForCausalLM"):
        use_fused_head(plain)


def test_zero_3_is_refused(dpo, monkeypatch):
    import transformers.integrations.deepspeed as deepspeed

    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="got DeepSpeed ZeRO-3"):
        use_fused_head(dpo[0])
