"""`packing: stream` trains what `packing: tree` trains, and the models with a state that trees are refused for."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from doubles import all_in_double
from streams import HYBRIDS, build, difference, pack
from test_trainer_equal import SAME
from test_trainer_prm import HEADS, head_for, labelled_data, train_once, worst
from training_ import make_config, make_trainer, relative_error, run_once, small_lm, unequal_data

import svpo_kernels as sk
from svpo_kernels.trainer import StepModel, SVPOTrainer
from svpo_kernels.trainer.config import ConfigError
from svpo_kernels.trees.flops import count_flops, model_cost, stream_flops
from svpo_kernels.trees.stream_check import check_streaming

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("settings", [
    {}, {"max_tokens": 20}, {"gradient_checkpointing": True},
    {"sft_weight": 0.5, "values": "path", "rank": "implicit", "pair_weight": "tree"}, {"logp_reduction": "mean"},
], ids=lambda settings: "-".join(settings) or "plain")
def test_the_step_of_packed_trees(tmp_path, settings):
    def run(name, **changes):
        sft = "sft_weight" in settings
        return run_once(tmp_path / name, data=unequal_data(((2, 3), (1, 2), (3, 2)), sft=sft), **settings | changes)

    (metrics, ours), (expected, theirs) = run("stream", packing="stream"), run("tree", packing="tree", max_tokens=4096)
    assert set(SAME) <= metrics.keys()
    for name in SAME:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    assert difference(ours, theirs) <= 1e-6


def test_weights_references_and_evaluation_after_three_steps(tmp_path):
    """References computed by each way itself, evaluation streamed too; weights within 1e-6 of the packed run's."""
    found = {}
    for packing in ("tree", "stream"):
        data, held_out = (unequal_data(sizes, references=False) for sizes in (((2, 3), (3, 2)), ((2, 2), (1, 3))))
        trainer = make_trainer(tmp_path / packing, data=data, eval_data=held_out, packing=packing, max_steps=3,
                               pairs_per_step=6, optim="sgd", learning_rate=1e-2)
        trainer.train()
        found[packing] = (trainer.state.log_history[:3], dict(trainer.model.named_parameters()), trainer.evaluate())
    (logs, weights, evaluated), (expected, truth, told) = found["stream"], found["tree"]
    for step, other in zip(logs, expected, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert step["rewards/margins"] == pytest.approx(other["rewards/margins"], rel=1e-5, abs=1e-5)
    with torch.no_grad():
        assert relative_error(weights, truth) <= 1e-6
    for name in ("eval_loss", "eval_logps/chosen", "eval_value/mse"):
        assert evaluated[name] == pytest.approx(told[name], rel=1e-6), name


@pytest.mark.parametrize("head", HEADS)
def test_process_reward_heads(tmp_path, head):
    """Two numbers a step from one call of the head: its score, and its loss against the step's label."""
    data, runs = labelled_data(), {}
    for packing in ("tree", "stream"):
        lm = small_lm(torch.float64)
        runs[packing] = train_once(tmp_path / packing, data, head_for(lm, head), lm=lm, packing=packing)
    (logged, ours), (expected, theirs) = runs["stream"], runs["tree"]
    assert logged["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    assert logged["prm/auroc"] == expected["prm/auroc"]
    assert worst(ours, theirs) < 1e-6


def test_implicit_rewards_of_paths(tmp_path):
    """A row counts for every path that passes it: one prediction, several steps. The model itself is the reference."""
    runs = [train_once(tmp_path / packing, labelled_data(paths=True), None, "implicit_prm", small_lm(torch.float64),
                       packing=packing, beta=0.2) for packing in ("tree", "stream")]
    assert runs[1][0]["loss"] == pytest.approx(runs[0][0]["loss"], rel=1e-6)
    assert worst(runs[1][1], runs[0][1]) < 1e-6


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "falcon-h1"])
def test_models_with_a_state_train(tmp_path, name):
    """Against packing=distinct, each sequence of its own: in fp64 throughout, the first step's loss and gradients."""
    data, found = unequal_data(((2, 2), (1, 3))), {}
    with pytest.raises(sk.PackingError, match="packing=stream runs models with a state"):
        make_trainer(tmp_path / "refused", data=data, lm=build(name), packing="tree").train()
    for packing in ("distinct", "stream"):
        trainer = make_trainer(tmp_path / packing, data=data, lm=build(name), packing=packing, backend="reference",
                               preset="step_dpo", beta=0.1)
        step = trainer.training_step

        def in_double(*given, step=step, **options):
            with all_in_double():
                return step(*given, **options)

        trainer.training_step = in_double
        trainer.train()
        found[packing] = trainer.state.log_history[0], trainer.gradients.steps[0]
    assert found["stream"][0]["loss"] == pytest.approx(found["distinct"][0]["loss"], rel=1e-6)
    (_, ours), (_, theirs) = found["stream"], found["distinct"]
    assert worst(ours, theirs) < 1e-6


def test_trees_are_never_cut(tmp_path):
    trainer = make_trainer(tmp_path, packing="stream", max_tokens=8, gradient_accumulation_steps=4)
    packs = trainer.planner.packs(0, 0)
    assert len(packs) == len(trainer.train_data.trees)
    assert all(pack["batch"].streamed == 8 and len(set(pack["batch"].node_of_step[:, 0].tolist())) == 1
               for pack in packs)
    assert sorted(pack["batch"].node_of_step[0, 0].item() for pack in packs) == list(range(len(packs)))
    config = make_config(tmp_path / "auto", packing="stream", max_tokens="auto")
    found = SVPOTrainer(StepModel(small_lm()), config, unequal_data()).settings.max_tokens
    assert found == max(max(tree.length) for tree in unequal_data().trees)


def test_what_a_run_says_and_counts(tmp_path):
    from svpo_kernels.trainer.run import describe

    trainer = make_trainer(tmp_path, packing="stream")
    assert "packing=stream" in describe(trainer) and "forward twice: 4/3 of a pack's FLOPs a token" in describe(trainer)
    trainer.train()
    logs, batches = trainer.state.log_history[0], [pack["batch"] for pack in trainer.planner.packs(0, 0)]
    config = trainer.model.config
    assert logs["compute/saved"] == pytest.approx(1 - sum(batch.input_ids.numel() for batch in batches) / sum(
        batch.pairwise_tokens for batch in batches))
    exact = count_flops(config, batches, "exact").packed
    counted = sum(stream_flops(config, batch) for batch in batches)
    assert counted == pytest.approx(exact * 4 / 3, rel=1e-6)
    assert sum(stream_flops(config, batch, recompute=True) for batch in batches) == pytest.approx(exact * 5 / 3)
    assert logs["compute/saved_flops"] == pytest.approx(1 - counted / count_flops(config, batches).pairwise, rel=1e-6)
    assert model_cost(HYBRIDS["falcon-h1"]).attention == ((None, 3 * 2 * 4 * (8 + 8)),)  # beside the scan, in each


def test_sharding_is_refused_where_it_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="packing = stream needs whole parameters on every process.*fsdp"):
        make_config(tmp_path, packing="stream", fsdp="full_shard")


# -- the check before training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3-next", "lfm2", "bamba", "falcon-h1", "qwen3.5"])
def test_the_check_passes_where_it_should(name, dtype):
    found = check_streaming(build(name, dtype), pack()[1])
    assert 0 <= found.error <= found.allowed and len(found.path) > 4


def test_the_check_names_the_layer_that_differs(tmp_path, monkeypatch):
    """A layer that fills its cache and does not read it sees its own segment only."""
    attention = hf.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def forgetful(self, *args, **given):
        if self.layer_idx == 1:
            forward(self, *args, **given)
            given |= {"cache": None, "attention_mask": None}
        return forward(self, *args, **given)

    monkeypatch.setattr(attention, "forward", forgetful)
    model = build("llama", torch.float32)
    with pytest.raises(sk.PackingError, match=r"streamed than alone: .*first at layer 1, of type 'attention'"):
        check_streaming(model, pack()[1])
    with pytest.raises(sk.PackingError, match="Set packing=distinct"):
        make_trainer(tmp_path / "stop", packing="stream").train()
    trainer = make_trainer(tmp_path / "fall", packing="stream", packing_fallback="distinct", max_tokens=200)
    trainer.train()
    assert trainer.settings.packing == "distinct" and trainer.state.global_step == 1
