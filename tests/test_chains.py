"""Sequences without padding: one row of chains, with the numbers of padded batches and of packed trees."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import one_thread  # noqa: F401
from training_ import make_trainer, relative_error, small_lm, unequal_data
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

import svpo_kernels as sk
from svpo_kernels.trainer.attention import runs_chains
from svpo_kernels.trees.chains import without_padding

CONFIGS = tiny_models.configs()


def padded():
    data = unequal_data()
    return data, sk.distinct_batch(data.trees, data.pairs, values="labelled")


def test_every_token_stands_in_its_own_chain():
    data, batch = padded()
    row = without_padding(batch)
    T = int(batch.lengths.sum())
    assert row.input_ids.shape == row.position_ids.shape == (1, T) and row.lengths is None
    start = 0
    for b, length in enumerate(batch.lengths.tolist()):
        assert torch.equal(row.input_ids[0, start : start + length], batch.input_ids[b, :length])
        assert torch.equal(row.position_ids[0, start : start + length], torch.arange(length))
        start += length
        assert (row.subtree_end[start - length : start] == start).all()
    for (t, i), end in zip(row.node_of_step.tolist(), row.step_ends.tolist(), strict=True):
        path = torch.as_tensor(data.trees[t].path(i))
        assert torch.equal(row.input_ids[0, end + 1 - len(path) : end + 1], path)
    assert torch.equal(row.plan.labels, batch.plan.labels) and torch.equal(row.plan.counts, batch.plan.counts)
    assert without_padding(row) is row


@pytest.mark.parametrize("name", CONFIGS)
def test_models_run_chains_as_they_run_padded_sequences(name):
    _, batch = padded()
    model = tiny_models.build(CONFIGS[name])
    found = []
    for each in (batch, without_padding(batch)):
        hidden = model.model(**each.model_inputs(model), use_cache=False).last_hidden_state
        found.append(sk.linear_step_logps(hidden, labels=each.plan, **sk.head(model)))
        sk.use_tree_attention(model)
    assert runs_chains(model)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packing", ["distinct", "pairs"])
@pytest.mark.parametrize("settings", [{}, {"values": "labelled"}, {"sft_weight": 0.3}],
                         ids=["svpo", "values", "sft"])
def test_steps_without_padding_equal_packed_trees(tmp_path, packing, settings):
    """Small packs, so that trees and their sequences are spread over several."""
    found = {}
    for way, lm in (("tree", small_lm()), (packing, sk.use_tree_attention(small_lm()))):
        trainer = make_trainer(tmp_path / way, unequal_data(sft=bool(settings.get("sft_weight"))), lm, packing=way,
                               max_tokens=200, **settings)
        assert trainer.settings.padded == (way == "tree")
        trainer.train()
        found[way] = trainer.state.log_history[0], trainer.gradients.steps[0], trainer.planner.packs(0, 0)
    packs = found[packing][2]
    assert len(packs) > 2 and all(pack["batch"].lengths is None for pack in packs)
    if not settings:  # other settings bring sequences of their own, with the first pairs of a tree
        assert all(pack["cost"] <= 200 or len(pack["batch"].pairs) == 1 for pack in packs)
    assert relative_error(found[packing][1], found["tree"][1]) <= 1e-4
    assert found[packing][0]["loss"] == pytest.approx(found["tree"][0]["loss"], rel=1e-5)


def test_models_without_exact_trees_keep_their_padding():
    refused = tiny_models.refused()
    for name in ("qwen3-next", "falcon-h1", "bloom", "llama4-chunked", "dynamic-ntk"):
        model = tiny_models.build(refused[name][0], "eager")
        assert not runs_chains(model)
        if name == "dynamic-ntk":
            assert not runs_chains(sk.use_tree_attention(model))
    assert not runs_chains(tiny_models.build(CONFIGS["llama"])), "under a dense mask a row costs T * T"


def test_a_model_that_fails_the_check_falls_back_to_padding(tmp_path, capsys, monkeypatch):
    from svpo_kernels.trainer import preparing

    def fails(model, batch):
        raise sk.PackingError("check_packing: it differs")

    monkeypatch.setattr(preparing, "check_packing", fails)
    trainer = make_trainer(tmp_path, lm=sk.use_tree_attention(small_lm()), packing="distinct")
    trainer.train()
    assert "falling back to padded sequences: check_packing: it differs" in capsys.readouterr().out
    assert trainer.settings.padded and trainer.planner.packs(0, 0)[0]["batch"].lengths is not None


def test_flash_attention_takes_chains_by_their_positions_and_no_trees():
    data, batch = padded()
    row, model = without_padding(batch), tiny_models.build(CONFIGS["llama"])
    model.config._attn_implementation = "flash_attention_2"  # the package is no part of the tests: its inputs are
    inputs = row.model_inputs(model)
    assert inputs["attention_mask"] is None and runs_chains(model)
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(inputs["position_ids"])
    assert ends.diff().tolist() == batch.lengths.tolist() and longest == batch.lengths.max()
    pack, = sk.pack_trees(data.trees, data.pairs, max_tokens=10**6)
    with pytest.raises(sk.PackingError, match="'flash_attention_2' takes no mask per token"):
        pack.model_inputs(model)
