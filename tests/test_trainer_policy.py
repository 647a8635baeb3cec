"""`objective: policy`: loss and every gradient of packs against one literal run a path; cuts, epochs, resume, files."""

from __future__ import annotations

import random

import pytest
import runs_
import torch
from tiny_trees import random_tree
from training_ import Gradients, make_config, small_lm

from svpo_kernels import tree_advantages
from svpo_kernels.trainer import StepModel, SVPOTrainer, policy
from svpo_kernels.trainer.config import ConfigError, load_config
from svpo_kernels.trainer.run import make_data
from svpo_kernels.trees.tree import StepNode, StepTree

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def rollouts(old=True, sizes=((2, 2), (1, 3), (2, 3), (3, 1))):
    """Trees of unequal size; all leaves end a solution, one tree has a step without a value."""
    rng = random.Random(5)
    trees = []
    for seed, (depth, children) in enumerate(sizes):
        tree = random_tree(seed, depth=depth, children=children)
        for i, node in enumerate(tree.nodes):
            node.terminal = not tree.children[i]
            node.old_logps = [-rng.uniform(3.5, 5.5) for _ in tree.step_ids(i)] if old else None
            node.q_value = None if seed == 2 and i == 1 else node.q_value
        trees.append(StepTree(tree.prompt_ids, tree.nodes))
    return trees


def make_trainer(folder, trees=None, lm=None, ref=None, **settings):
    config = make_config(folder, **{"preset": "treerpo", **settings})
    trees = rollouts() if trees is None else trees
    kept = Gradients()
    trainer = SVPOTrainer(StepModel(small_lm() if lm is None else lm, False), config,
                          make_data(config, trees, [()] * len(trees)), callbacks=[kept],
                          ref_model=None if ref is None else StepModel(ref, False))
    trainer.gradients = kept.steps
    return trainer


def run_once(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer.state.log_history[0], trainer.gradients[0]


# -- the literal run ---------------------------------------------------------------------------------------------------


def token_logps(model, ids, start):
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[start:])[:, None])[:, 0], -(logits.exp() * logits).sum(-1)


def member_loss(config, new, old, A):
    """l of one member with ratio token, or of a whole step: (tokens,) or ()."""
    if config.ratio == "step":
        new, old = new.sum(), old.sum()
    elif config.ratio == "step_mean":
        new, old = new.mean(), old.mean()
    rho, (low, high) = (new - old).exp(), config.clip
    clipped = rho.clamp(1 - low, 1 + high)
    if config.kind == "cispo":
        return -clipped.detach() * A * new
    if config.kind == "sapo":
        t = config.tau[0] if A > 0 else config.tau[1]
        return -A * torch.sigmoid(t * (rho - 1)) * 4 / t
    return torch.maximum(-rho * A, -clipped * A)


def chain_of(tree, node):
    chain = [node]
    while (parent := tree.nodes[chain[-1]].parent) != -1:
        chain.append(parent)
    return chain[::-1]


def literal(config, trees, lm, ref=None):
    """Loss and gradients of one separate run of every path, sums and denominators as the averages are said."""
    policy_sum, other, members, tokens, sequences, sizes, seen = 0.0, 0.0, 0, 0, 0, [], set()
    for t, tree in enumerate(trees):
        if config.policy_steps == "paths":
            leaves = [i for i in range(len(tree)) if not tree.children[i]]
            r = torch.tensor([tree.nodes[i].q_value for i in leaves], dtype=F64)
            scale = r.std() + 1e-6 if config.advantage == "group_norm" and len(r) > 1 else 1.0
            A = dict(zip(leaves, ((r - r.mean()) / scale).tolist() if len(r) > 1 else (), strict=len(r) > 1))
        else:
            A = {i: a for i, a in enumerate(tree_advantages(tree, config.advantage, groups=config.advantage_groups,
                                                            gamma=config.gamma, lam=config.lam).tolist()) if a == a}
        for leaf in [i for i in range(len(tree)) if not tree.children[i]]:
            chain = chain_of(tree, leaf)
            first = tree.start[chain[0]]
            new, entropy = token_logps(lm, tree.path(leaf), first)
            old = torch.tensor([x for i in chain for x in tree.nodes[i].old_logps], dtype=F64)
            with torch.no_grad():
                d = (token_logps(ref, tree.path(leaf), first)[0] - new.detach() if ref else torch.zeros_like(new))
            d = d + new.detach() - new if ref else d
            pieces = [(leaf, slice(0, len(new)))] if config.policy_steps == "paths" else [
                (i, slice(tree.start[i] - first, tree.length[i] - first)) for i in chain]
            pieces = [(i, where) for i, where in pieces if i in A]
            if not pieces:
                continue
            losses = [member_loss(config, new[where], old[where], A[i]) for i, where in pieces]
            kl = [(d[where].exp() - d[where] - 1) * config.kl_weight - config.entropy_weight * entropy[where]
                  for _, where in pieces]
            length = sum(loss.numel() for loss in losses)
            if config.average == "token_mean":
                for (i, _), loss, more in zip(pieces, losses, kl, strict=True):
                    if (t, i) in seen:
                        continue
                    seen.add((t, i))
                    policy_sum, other = policy_sum + loss.sum(), other + more.sum()
                    members, tokens = members + loss.numel(), tokens + more.numel()
            else:
                share = 1 / length if config.average == "sequence_mean" else 1.0
                policy_sum = policy_sum + share * sum(loss.sum() for loss in losses)
                other = other + share * sum(more.sum() for more in kl)
                sequences += 1
                sizes.append(length)
    if config.average != "token_mean":
        members = tokens = sequences * (max(sizes) if config.average == "dr_grpo" else 1)
    loss = policy_sum / members + other / tokens
    lm.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {f"lm.{name}": p.grad.clone() for name, p in lm.named_parameters()}


def worst(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)).item() for name in theirs)


def reference_lm():
    ref = small_lm(F64)
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.mul_(1.02)
    return ref


ALL = [*((name, {}) for name in policy.PRESETS),
       ("treerpo", {"entropy_weight": 0.01, "kl_weight": 0.1, "advantage_groups": "depth"}),
       ("turn_ppo", {"ratio": "step", "average": "sequence_sum", "kl_weight": 0.05}),
       ("grpo", {"policy_steps": "nodes", "average": "dr_grpo", "advantage": "group_mean"})]


@pytest.mark.parametrize(("preset", "more"), ALL, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "as it is")
def test_presets_are_one_literal_run_a_path(tmp_path, preset, more):
    settings = {"preset": preset, "dtype": "float64", "backend": "reference", **more}
    config, ref = make_config(tmp_path, **settings), reference_lm()
    loss, gradients = literal(config, rollouts(), small_lm(F64), ref if config.kl_weight else None)
    cuts = {"packed": {}, "cut": {"max_tokens": 60, "gradient_accumulation_steps": 3}}
    for name, cut in list(cuts.items())[:2 if preset in ("treerpo", "grpo", "turn_ppo") else 1]:
        logged, ours = run_once(tmp_path / name, lm=small_lm(F64), ref=ref, **settings, **cut)
        assert logged["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-7)
        assert worst(ours, gradients) < 1e-6


SAME = ("loss", "loss/policy", "policy/kl", "policy/ratio", "policy/clip_fraction", "policy/approx_kl")


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4},
                                      {"max_tokens": 50}, {"packing": "distinct"}, {"packing": "pairs"},
                                      {"packing": "stream", "max_tokens": 60}],
                         ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_cut_changes_nothing(tmp_path, settings):
    common = {"preset": "grpo", "kl_weight": 0.1, "entropy_weight": 0.01, "policy_steps": "nodes",
              "average": "token_mean"}
    runs = [run_once(tmp_path / str(i), lm=small_lm(F64), ref=reference_lm(), **common, **more)
            for i, more in enumerate(({}, settings))]
    for name in (*SAME, "policy/entropy"):
        assert runs[1][0][name] == pytest.approx(runs[0][0][name], rel=1e-6), name
    assert worst(runs[1][1], runs[0][1]) < 1e-6
    assert 0 < runs[0][0]["policy/clip_fraction"] < 1 and "loss/preference" not in runs[0][0]
    assert "value/mse" not in runs[0][0] and "rewards/chosen" not in runs[0][0]


def test_computed_old_logps_are_the_starting_models_and_stay(tmp_path):
    """Without old_logps in the data the first step has ratio 1; later epochs keep the first log-probs."""
    trainer = make_trainer(tmp_path, trees=rollouts(old=False), max_steps=3, learning_rate=1e-2)
    trainer.train()
    logs = trainer.state.log_history
    assert logs[0]["policy/ratio"] == pytest.approx(1, abs=1e-5) and logs[0]["policy/clip_fraction"] == 0
    assert abs(logs[2]["policy/ratio"] - 1) > 1e-3 and logs[2]["policy/clip_fraction"] > 0
    start, old = small_lm(), trainer.train_data.rollouts.old
    for t, nodes in enumerate(old.referenced()):
        for i in nodes.tolist():
            tree = trainer.train_data.trees[t]
            expected = token_logps(start, tree.path(i), tree.start[i])[0]
            assert old.reference(t, i) == pytest.approx(expected.detach().numpy(), abs=1e-4)
    assert list((tmp_path / "svpo").glob("reference-*.safetensors"))
    assert "policy/kl" not in logs[0] and "policy/entropy" not in logs[0]  # neither was looked at


def test_resume_over_several_epochs(tmp_path):
    settings = dict(trees=rollouts(old=False), pairs_per_step=2, max_steps=5, save_strategy="steps", save_steps=3,
                    learning_rate=1e-2, preset="grpo")
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    again = make_trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(again.gradients) == 2
    for (name, ours), (_, theirs) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match=r"clip was \[0.2, 0.2\] and is \[0.2, 0.3\]"):
        make_trainer(tmp_path / "run", **settings, clip=[0.2, 0.3]).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="data was"):
        make_trainer(tmp_path / "run", **settings | {"trees": rollouts()}).train(resume_from_checkpoint=True)


def test_paths_keep_ids_and_log_probs():
    tree = rollouts()[0]
    found = policy.as_paths(tree)
    leaves = [i for i in range(len(tree)) if not tree.children[i]]
    assert [found.path(i) for i in range(len(found))] == [tree.path(leaf) for leaf in leaves]
    for node, leaf in zip(found.nodes, leaves, strict=True):
        assert node.q_value == tree.nodes[leaf].q_value and node.terminal
        assert list(node.old_logps) == [x for i in chain_of(tree, leaf) for x in tree.nodes[i].old_logps]
    short = StepTree([1], [StepNode(-1, [2, 3], old_logps=[-1.0, -2.0]),
                           StepNode(0, None, 0.5, path_ids=[1, 2, 4], start=2, old_logps=[-3.0])])
    (only,) = policy.as_paths(short).nodes  # the child leaves its parent before the parent's end
    assert list(only.old_logps) == [-1.0, -3.0] and list(only.path_ids) == [1, 2, 4]


# -- configuration and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["preset=grpo", "objective=prm"], "objective must be policy with preset grpo, got 'prm'"),
    (["objective=policy", "beta=0.1"], "beta is read by objective preference only"),
    (["ratio=token"], "ratio is read by objective policy only, got 'token' with objective preference"),
    (["preset=grpo", "reference=none"], "reference must be cache or online with kl_weight 0.04"),
    (["objective=policy", "advantage=best"], "advantage must be one of group_mean, group_norm, rloo, gain, gae"),
    (["objective=policy", "clip=[1]"], "clip must be two numbers"),
    (["objective=policy", "preset=svpo"], "preset must be one of ppo, .* with objective policy, got 'svpo'"),
    (["objective=policy", "head=value"], "head must be none with objective policy"),
    (["objective=policy", "values=pairs"], "values must be labelled"),
    (["preset=grpo", "longest=9"], "longest must be None with how='sequence_mean'"),
])
def test_wrong_keys_are_named(tmp_path, words, message):
    with pytest.raises(ConfigError, match=f"config: {message}"):
        load_config(None, words, output_dir=str(tmp_path), use_cpu=True)


def rollout_rows(logps=True):
    """Flat trees with ids and log-probs, as a sampler writes them."""
    def state(ids, q, **more):
        own = {"text": "".join(map(chr, ids)), "token_ids": ids, "q_value": q, **more}
        return own | ({"old_logps": [-1.0 - i / 4 for i in range(len(ids))]} if logps else {})

    return [{"question": f"{k}+1?", "answer": str(k + 1), "prompt_ids": [50 + k, 46, 52], "react": {
        "0": {"text": ""}, "0.1": state([70 + k, 71], 0.5), "0.2": state([80, 81, 82], -0.5),
        "0.1.1": state([90, 91], 1.0, final_answer=str(k + 1)), "0.1.2": state([92], -1.0, final_answer="0")}}
        for k in range(3)]


def test_files_say_what_they_hold(tmp_path):
    model = runs_.tiny(tmp_path / "model")
    file = runs_.write_rows(tmp_path / "rollouts.jsonl", rollout_rows())
    result, said = runs_.run(model, file, tmp_path / "out", preset="treerpo")
    assert "12 steps with an advantage (group_norm, policy_steps nodes), 0 of them 0" in said
    assert "old log-probs: all from the file" in said
    assert result.history[0]["policy/ratio"] != pytest.approx(1, abs=1e-3)
    result, said = runs_.run(model, runs_.write_rows(tmp_path / "plain.jsonl", rollout_rows(logps=False)),
                             tmp_path / "plain", preset="grpo")
    assert "9 steps with an advantage (group_norm, policy_steps paths)" in said
    assert "3 of these paths do not end a solution" in said
    assert "old log-probs: not in the file, so the starting model is taken" in said
    assert result.history[0]["policy/ratio"] == pytest.approx(1, abs=1e-5)
    _, said = runs_.run(model, file, tmp_path / "preference", preset="step_dpo")
    assert "12 steps bring old_logps, which objective preference does not read: objective: policy trains" in said
    with pytest.raises(ConfigError, match="holds pairs: objective: preference trains on them"):
        runs_.run(model, runs_.write_rows(tmp_path / "pairs.jsonl"), tmp_path / "wrong", preset="grpo")
    chain = [{"prompt": "1+1?", "completions": ["It is 2.", "Done."], "labels": [True, False]}]
    with pytest.raises(ConfigError, match="no step with an advantage by advantage = group_norm; .*objective: prm tr"):
        runs_.run(model, runs_.write_rows(tmp_path / "labels.jsonl", chain), tmp_path / "labels", preset="treerpo")
