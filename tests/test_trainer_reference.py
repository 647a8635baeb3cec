"""Reference log-probs: computed once, cached under a fingerprint of model and data, or taken per batch."""

from __future__ import annotations

import pytest
import torch
from training_ import make_config, small_lm, unequal_data
from transformers import LlamaForCausalLM

from svpo_kernels.trainer import StepModel, SVPOTrainer
from svpo_kernels.trainer.model import add_adapters
from svpo_kernels.trainer.reference import cache_path, model_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


def other_lm():
    lm = small_lm()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.5)
    return lm


def expected_logp(lm, tree, node):
    path, start = torch.tensor(tree.path(node)), tree.start[node]
    with torch.no_grad():
        logps = lm.eval()(path[None]).logits[0].double().log_softmax(-1)
    return logps[torch.arange(start - 1, len(path) - 1), path[start:]].sum().item()


def trainer_with(tmp_path, ref_lm=None, lm=None, data=None, **settings):
    config = make_config(tmp_path, **settings)
    ref = None if ref_lm is None else StepModel(ref_lm, value_head=False)
    data = unequal_data(references=False) if data is None else data
    return SVPOTrainer(StepModel(small_lm() if lm is None else lm), config, data, ref_model=ref)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("packing", ["tree", "distinct"])
def test_computed_before_training(tmp_path, second, packing):
    trainer = trainer_with(tmp_path, other_lm() if second else None, packing=packing, max_tokens=200)
    trainer.train()
    lm = other_lm() if second else small_lm()
    for tree, pairs in zip(trainer.train_data.trees, trainer.train_data.pairs, strict=True):
        for node in set(pairs.ravel().tolist()):
            assert tree.nodes[node].ref_logp == pytest.approx(expected_logp(lm, tree, node), rel=1e-5)
    log = trainer.state.log_history[0]
    if second:
        assert abs(log["rewards/margins"]) > 1e-3
    else:
        assert log["loss/preference"] == pytest.approx(0.6931472, abs=1e-5)


def test_the_cache_is_read_and_its_name_depends_on_model_and_data(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.train()
    (path,) = tmp_path.glob("svpo/reference-*.safetensors")
    expected = [node.ref_logp for tree in trainer.train_data.trees for node in tree.nodes]
    again = trainer_with(tmp_path)
    again._reference_logps = None  # a computation would fail
    again.prepare_reference(again.train_data)
    assert [node.ref_logp for tree in again.train_data.trees for node in tree.nodes] == expected
    data = unequal_data(references=False)
    assert cache_path(tmp_path / "svpo", model_fingerprint(small_lm()), data, "no True") == path
    less = unequal_data(((2, 2),), references=False)
    names = {cache_path(path.parent, model_fingerprint(lm), *key) for lm, *key in (
        (small_lm(), data, "no True"), (other_lm(), data, "no True"), (small_lm(), less, "no True"),
        (small_lm(), data, "bf16 True"))}
    assert len(names) == 4


def test_the_cache_depends_on_what_the_weights_do_not_tell(tmp_path):
    """The same weights under another RoPE base or norm are another reference; where a config lies changes nothing."""
    data = unequal_data(references=False)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    paths = [cache_path(tmp_path / "svpo", model_fingerprint(small_lm(**changes)), data, "no True")
             for changes in ({}, {"rms_norm_eps": 1e-3}, {"rope_parameters": rope})]
    assert len(set(paths)) == 3
    small_lm().save_pretrained(tmp_path / "saved")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert cache_path(tmp_path / "svpo", model_fingerprint(saved), data, "no True") == paths[0]
    wide, narrow = (trainer_with(tmp_path / "run", lm=small_lm(rms_norm_eps=eps)) for eps in (1e-3, 1e-6))
    for trainer in (wide, narrow):
        trainer.train()
        tree, node = trainer.train_data.trees[0], int(trainer.train_data.pairs[0][0, 0])
        lm = small_lm(rms_norm_eps=trainer.model.config.rms_norm_eps)
        assert tree.nodes[node].ref_logp == pytest.approx(expected_logp(lm, tree, node), rel=1e-5)


def test_adapters_off_is_the_reference(tmp_path):
    """Adapters that already say something: the reference is the model without them, cached or per batch."""
    logs = []
    for reference in ("cache", "online"):
        torch.manual_seed(3)
        lm = add_adapters(make_config(tmp_path, peft="lora", lora_r=4), small_lm())
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        trainer = trainer_with(tmp_path / reference, lm=lm, reference=reference, max_steps=3)
        trainer.train()
        logs.append(trainer.state.log_history)
        tree, node = trainer.train_data.trees[0], int(trainer.train_data.pairs[0][0, 0])
        if reference == "cache":
            assert tree.nodes[node].ref_logp == pytest.approx(expected_logp(small_lm(), tree, node), rel=1e-5)
    for cached, online in zip(*logs, strict=True):
        for name in ("loss", "rewards/margins") if "loss" in cached else ():
            assert cached[name] == pytest.approx(online[name], rel=1e-5, abs=1e-6)
    assert abs(logs[0][0]["rewards/margins"]) > 1e-3


def test_no_reference(tmp_path):
    trainer = trainer_with(tmp_path, reference="none")
    trainer.train()
    log = trainer.state.log_history[0]
    beta = trainer.objective.arguments["beta"]
    assert log["rewards/chosen"] == pytest.approx(beta * log["logps/chosen"], rel=1e-5)
    assert not list(tmp_path.rglob("reference-*"))


def test_data_that_come_too_late_are_refused(tmp_path):
    trainer = trainer_with(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="the reference is the model before training, which has begun"):
        trainer.evaluate(unequal_data(((2, 2),), references=False))
