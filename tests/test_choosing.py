"""packing: auto: what is counted, what is taken, what is said; never dearer than each distinct sequence once."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_trees
from tiny_models import one_thread  # noqa: F401
from training_ import make_trainer, relative_error, small_lm, unequal_data

import svpo_kernels as sk
from svpo_kernels.trainer import TrainData


def chains(many=6):
    """Solutions with a label at every step, as process labels come: nothing is shared."""
    trees = [tiny_trees.random_tree(seed, depth=4, children=1) for seed in range(many)]
    return TrainData(trees, [sk.select_pairs(tree, "all").numpy() for tree in trees])


def flops_of(trainer):
    return sum(trainer._count_flops(pack)[0] for step in range(len(trainer.planner))
               for pack in trainer.planner.packs(0, step))


@pytest.mark.parametrize("attention", ["sdpa", "svpo_tree"])
@pytest.mark.parametrize("name, data, settings", [
    ("trees", unequal_data, {"pairs_per_step": 16}), ("few pairs a step", unequal_data, {"pairs_per_step": 4}),
    ("chains", chains, {"preset": "alphamath", "pairs_per_step": 4}),
], ids=["trees", "few", "chains"])
def test_never_dearer_than_distinct(tmp_path, capsys, attention, name, data, settings):
    cost = {}
    for packing in ("tree", "distinct", "auto"):
        lm = small_lm()
        if attention == "svpo_tree":
            sk.use_tree_attention(lm)
        trainer = make_trainer(tmp_path / packing, data(), lm, packing=packing, max_tokens="auto", **settings)
        cost[packing] = flops_of(trainer)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("packing: ")]
    assert len(said) == 1 and f"packing: {trainer.settings.packing} (auto: " in said[0] and "FLOPs a step" in said[0]
    assert cost["auto"] == min(cost["tree"], cost["distinct"])
    if attention == "svpo_tree" and name == "trees":
        assert trainer.settings.packing == "tree" and cost["tree"] < 0.8 * cost["distinct"]


def test_the_choice_changes_no_number(tmp_path):
    found = {}
    for packing in ("auto", "tree"):
        trainer = make_trainer(tmp_path / packing, packing=packing, pairs_per_step=1000, max_tokens=4096)
        trainer.train()
        found[packing] = trainer.state.log_history[0]["loss"], trainer.gradients.steps[0]
    assert found["auto"][0] == pytest.approx(found["tree"][0], rel=1e-5)
    assert relative_error(found["auto"][1], found["tree"][1]) <= 1e-4


def test_models_that_cannot_be_packed_say_why(tmp_path, capsys):
    config, named = tiny_models.refused()["qwen3-next"]
    trainer = make_trainer(tmp_path, lm=tiny_models.build(config, "eager"), packing="auto", max_tokens="auto")
    assert trainer.settings.packing in ("distinct", "stream")
    said = capsys.readouterr().out
    assert "streamed trees" in said and "(no packed trees: " in said and named in said


def test_flash_attention_runs_sequences(tmp_path, capsys):
    lm = small_lm()
    lm.config._attn_implementation = "flash_attention_2"
    trainer = make_trainer(tmp_path, lm=lm, packing="auto", max_tokens="auto")
    assert trainer.settings.packing in ("distinct", "stream")
    assert "'flash_attention_2' takes no mask per token" in capsys.readouterr().out


def test_a_pack_that_repeats_much_is_streamed(tmp_path):
    """A cut that repeats the ancestors more than a third: whole trees at 4/3 cost less, under tree attention too."""
    tree = tiny_trees.random_tree(0, depth=3, children=3, prompt=150)
    data = TrainData([tree], [sk.select_pairs(tree, "all").numpy()])
    for node in tree.nodes:
        node.ref_logp = -20.0
    losses = {}
    for packing in ("auto", "tree"):
        lm = sk.use_tree_attention(small_lm())
        trainer = make_trainer(tmp_path / packing, data, lm, packing=packing, max_tokens=210, pairs_per_step=1000)
        trainer.train()
        losses[packing] = trainer.state.log_history[0]["loss"], trainer.gradients.steps[0]
        assert trainer.settings.packing == ("stream" if packing == "auto" else "tree")
    assert losses["auto"][0] == pytest.approx(losses["tree"][0], rel=1e-5)
    assert relative_error(losses["auto"][1], losses["tree"][1]) <= 1e-4
