"""`objective: prm | implicit_prm`: the loss and every gradient of packs against the literal formula, one run a node."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from training_ import Gradients, make_config, small_lm, unequal_data

from svpo_kernels import StepNode, StepTree, pack_trees
from svpo_kernels.trainer import StepModel, SVPOTrainer, TrainData, prm_metrics, report
from svpo_kernels.trainer.config import ConfigError
from svpo_kernels.trainer.heads import ClassHead, TokenHead
from svpo_kernels.trainer.prm_metrics import first_error_metrics, step_metrics, step_sums

HEADS = {"one": lambda D: ClassHead(D, 1), "two": lambda D: ClassHead(D, 2),
         "hidden layer": lambda D: ClassHead(D, 2, True), "tokens": lambda D: TokenHead(5, 9)}
F64 = torch.float64


def labelled_data(paths=False):
    """Trees of unequal size, three quarters of their steps labelled, with visit counts."""
    data = unequal_data(((2, 2), (1, 3), (3, 1)), references=False)
    for tree in data.trees:
        for index, node in enumerate(tree.nodes):
            node.visits = 1 + index % 5
            node.q_value = None if index % 4 == 3 else round(node.q_value, 2)
    return TrainData(data.trees, [rows[:0] for rows in data.pairs], paths=paths)


def head_for(lm, name):
    torch.manual_seed(3)
    return HEADS[name](lm.config.hidden_size).to(next(lm.parameters()).dtype)


def train_once(tmp_path, data, head, objective="prm", lm=None, **settings):
    kind = {"prm": "token" if isinstance(head, TokenHead) else "class"}.get(objective, "auto")
    config = make_config(tmp_path, objective=objective, head=kind, **settings)
    model = StepModel(small_lm() if lm is None else lm, head or False)
    gradients = Gradients()
    trainer = SVPOTrainer(model, config, data, callbacks=[gradients])
    trainer.train()
    return trainer.state.log_history[0], gradients.steps[0]


def labelled_paths(data):
    return [(tree, i, node) for tree in data.trees for i, node in enumerate(tree.nodes) if node.q_value is not None]


def literal_prm(lm, head, data, trials=False, good_weight=1.0, threshold=None):
    """Loss and gradients of one separate run a labelled node."""
    total = sum(node.visits if trials else 1 for _, _, node in labelled_paths(data))
    loss = 0.0
    for tree, i, node in labelled_paths(data):
        hidden = lm.model(torch.tensor([tree.path(i)])).last_hidden_state[0, -1]
        y = (node.q_value + 1) / 2
        if threshold is not None:
            y = float(y > threshold)
        if isinstance(head, TokenHead):
            good, bad = F.linear(hidden, lm.lm_head.weight[[5, 9]]).log_softmax(-1)
        elif head.last.out_features == 2:
            bad, good = head.score(hidden).log_softmax(-1)
        else:
            z = head.score(hidden)[0]
            good, bad = F.logsigmoid(z), F.logsigmoid(-z)
        each = -(y * good + (1 - y) * bad) * (1 + (good_weight - 1) * y) * (node.visits if trials else 1)
        loss = loss + each / total
    loss.backward()
    named = {f"lm.{name}": p.grad for name, p in lm.named_parameters() if p.grad is not None}
    return loss.item(), named | {f"v_head.{name}": p.grad for name, p in head.named_parameters()}


def worst(ours, theirs):
    """Largest error of a gradient relative to its norm, or to a hundredth of the largest where it cancels to less."""
    assert ours.keys() == theirs.keys()
    least = max(gradient.norm().item() for gradient in theirs.values()) / 100
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(least)).item() for name in theirs)


@pytest.mark.parametrize(("name", "dtype", "more"), [
    *((name, F64, {}) for name in HEADS), ("two", torch.float32, {}), ("two", F64, {"packing": "distinct"}),
    ("tokens", F64, {"max_tokens": 60, "gradient_accumulation_steps": 3})])
def test_loss_and_gradients_are_the_literal_ones(tmp_path, name, dtype, more):
    data, lm = labelled_data(), small_lm(F64)
    loss, gradients = literal_prm(lm, head_for(lm, name), data)
    lm = small_lm(dtype)
    logged, ours = train_once(tmp_path, data, head_for(lm, name), lm=lm, **more)
    assert logged["loss"] == pytest.approx(loss, rel=1e-6)
    assert worst(ours, gradients) < (1e-6 if dtype == F64 else 1e-5)  # labels and losses are fp32 in both
    assert "loss/preference" not in logged and 0 <= logged["prm/auroc"] <= 1


@pytest.mark.parametrize("settings", [{"label_trials": True}, {"good_weight": 0.25}, {"label_threshold": 0.5}],
                         ids=lambda settings: next(iter(settings)))
def test_trials_weights_and_hard_labels(tmp_path, settings):
    data, lm = labelled_data(), small_lm(F64)
    loss, gradients = literal_prm(lm, head_for(lm, "two"), data, settings.get("label_trials", False),
                                  settings.get("good_weight", 1.0), settings.get("label_threshold"))
    logged, ours = train_once(tmp_path, data, head_for(lm, "two"), lm=small_lm(F64), max_tokens=80, **settings)
    assert logged["loss"] == pytest.approx(loss, rel=1e-6) and worst(ours, gradients) < 1e-6


@pytest.mark.parametrize("more", [{}, {"max_tokens": 60}, {"packing": "distinct"}], ids=["packed", "cut", "distinct"])
def test_implicit_rewards_are_those_of_whole_paths(tmp_path, more):
    data, lm = labelled_data(paths=True), small_lm(F64)
    reference = small_lm(F64)

    def path_logp(model, tree, i):
        ids = torch.tensor(tree.path(i))
        node = i
        while tree.nodes[node].parent != -1:
            node = tree.nodes[node].parent
        start = tree.start[node]
        logps = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        return logps.gather(1, ids[start:, None]).sum()

    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.01)
    loss = 0.0
    for tree, i, node in labelled_paths(data):
        with torch.no_grad():
            ref = path_logp(reference, tree, i)
        y = torch.tensor((node.q_value + 1) / 2, dtype=F64)
        z = 0.2 * (path_logp(lm, tree, i) - ref)
        loss = loss + F.binary_cross_entropy_with_logits(z, y) / len(labelled_paths(data))
    loss.backward()
    expected = {f"lm.{name}": p.grad for name, p in lm.named_parameters()}
    lm.zero_grad(set_to_none=True)
    config = make_config(tmp_path, objective="implicit_prm", beta=0.2, **more)
    gradients = Gradients()
    trainer = SVPOTrainer(StepModel(lm, False), config, data, ref_model=StepModel(reference, False),
                          callbacks=[gradients])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert worst(gradients.steps[0], expected) < 1e-6


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_step_metrics_are_the_exact_ones_up_to_a_bin():
    torch.manual_seed(0)
    labels = torch.rand(400).mul(4).round().div(4)
    scores = (labels * 0.5 + torch.rand(400) * 0.5).clamp(0, 1)
    labels[::7] = torch.nan
    first, second = (step_sums(scores[part], labels[part]) for part in (slice(0, 150), slice(150, None)))
    found = step_metrics(*((first[name] + second[name]).numpy() for name in first))
    known = ~labels.isnan() & (labels != 0.5)
    good = labels[known] > 0.5
    s = scores[known]
    assert found["prm/accuracy"] == pytest.approx(((s >= 0.5) == good).float().mean().item())
    wins = (s[good][:, None] > s[~good]).float() + 0.5 * (s[good][:, None] == s[~good]).float()
    assert found["prm/auroc"] == pytest.approx(wins.mean().item(), abs=5e-3)
    assert step_metrics(*(step_sums(labels, labels)[name].numpy() for name in first))["prm/ece"] < 5e-3


def test_the_f1_of_a_known_answer():
    solutions = [([0.9, 0.2, 0.1], 1), ([0.9, 0.8], 1), ([0.4], 0), ([0.9, 0.9], -1), ([0.9, 0.3], -1)]
    found = first_error_metrics(solutions)
    a, b = 2 / 3, 1 / 2
    assert found["prm/error_accuracy"] == pytest.approx(a) and found["prm/correct_accuracy"] == pytest.approx(b)
    assert found["prm/f1"] == pytest.approx(2 * a * b / (a + b)) and found["prm/first_error_accuracy"] == 3 / 5


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"objective": "prm", "head": "value"}, "head must be class or token with objective prm, got 'value'"),
    ({"objective": "implicit_prm", "head": "class"}, "head must be none with objective implicit_prm"),
    ({"objective": "implicit_prm", "reference": "none"}, "reference must be cache or online"),
    ({"objective": "prm", "head_outputs": 3}, "head_outputs must be 1 or 2, got 3"),
    ({"objective": "prm", "good_weight": 0}, "good_weight must be above 0"),
    ({"objective": "orm"}, "objective must be one of preference, prm, implicit_prm, policy, got 'orm'"),
])
def test_settings_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **settings)


# -- evaluation --------------------------------------------------------------------------------------------------------


def solution_data():
    """Chains as ProcessBench has them, right and wrong ones, two problems with several; truth said for some."""
    torch.manual_seed(4)
    trees, correct = [], []
    for problem in range(3):
        prompt = torch.randint(0, 97, (6,)).tolist()
        for solution in range(4):
            steps = 2 + (problem + solution) % 3
            wrong = steps if solution % 2 else (problem + solution) % steps
            values = [1.0 if i < wrong else -1.0 if i == wrong else None for i in range(steps)]
            trees.append(StepTree(prompt, [StepNode(i - 1, torch.randint(0, 97, (3 + i,)).tolist(), q)
                                           for i, q in enumerate(values)]))
            correct.append(None if problem == 2 else wrong == steps)
    return TrainData(trees, [torch.zeros(0, 2).long().numpy()] * len(trees), correct=correct)


@pytest.mark.parametrize("more", [{}, {"max_tokens": 30}, {"packing": "distinct"}], ids=["packed", "cut", "distinct"])
def test_evaluation_judges_whole_solutions(tmp_path, more):
    """First errors, F1 and the best of N equal to those of scores from one run a step, whatever the packs."""
    data, lm = solution_data(), small_lm(F64)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(6)
    head = head_for(lm, "two")
    with torch.no_grad():
        head.score.weight.mul_(40)
    trainer = SVPOTrainer(StepModel(lm, head), make_config(tmp_path, objective="prm", head="class", **more), data, data)
    found = trainer.evaluate()
    scores = []
    for tree in data.trees:
        with torch.no_grad():
            hidden = lm.model(torch.tensor([tree.path(len(tree) - 1)])).last_hidden_state[0]
            ends = torch.tensor(tree.length) - 1
            scores.append(head.score(hidden[ends]).softmax(-1)[:, 1].tolist())
    wrong = [prm_metrics.first_error([None if n.q_value is None else (n.q_value + 1) / 2 for n in tree.nodes])
             for tree in data.trees]
    assert {-1} < set(wrong) and len(wrong) == 12
    expected = first_error_metrics(zip(scores, wrong, strict=True))
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert 0 < expected["prm/first_error_accuracy"] < 1
    for how in prm_metrics.AGGREGATES:
        chosen = []
        for problem in range(2):  # the third says of no solution that it is right, and its wrong ones end unlabelled
            group = [prm_metrics.aggregates(each)[how] for each in scores[4 * problem : 4 * problem + 4]]
            chosen.append(data.correct[4 * problem + max(range(4), key=group.__getitem__)])
        assert found[f"eval_prm/best_of/{how}"] == sum(chosen) / 2
    assert found["eval_prm/best_of/oracle"] == 1.0 and found["eval_prm/best_of/first"] == 0.0


def test_evaluation_is_drawn_and_logged(tmp_path):
    trainer = SVPOTrainer(StepModel(small_lm(), head_for(small_lm(), "two")), make_config(
        tmp_path, objective="prm", head="class", eval_strategy="steps", eval_steps=1), solution_data(), solution_data())
    trainer.train()
    history = trainer.state.log_history
    assert "eval_prm/f1" in history[1] or "eval_prm/correct_accuracy" in history[1]
    assert report.draw_curves(history, tmp_path / "curves.png").stat().st_size > 10_000
    table = report.summary_table(history, "run")
    assert "eval_prm/best_of/min" in list(table.columns[0].cells)


def test_implicit_rewards_are_evaluated_on_labelled_steps(tmp_path):
    data = solution_data()
    data.paths = True
    config = make_config(tmp_path, objective="implicit_prm", beta=0.2)
    found = SVPOTrainer(StepModel(small_lm(), False), config, data, data,
                        ref_model=StepModel(small_lm(), False)).evaluate()
    assert found["eval_prm/correct_accuracy"] == 1.0  # the reference is the model itself: every score is 0.5
    assert found["eval_prm/error_accuracy"] == 0.0 and found["eval_prm/f1"] == 0.0


# -- token heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["granite", "cohere", "adapter on lm_head"])
def test_a_token_head_reads_the_models_own_logits(kind):
    """Scales and adapters of the vocabulary head are in its scores and losses."""
    small = tiny_models.SMALL
    if kind == "granite":
        lm = hf.GraniteForCausalLM(hf.GraniteConfig(**small, logits_scaling=4.0))
    elif kind == "cohere":
        lm = hf.CohereForCausalLM(hf.CohereConfig(**small, logit_scale=0.25))
    else:
        peft = pytest.importorskip("peft")
        lm = peft.get_peft_model(small_lm(), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
        torch.nn.init.normal_(lm.base_model.model.lm_head.lora_B["default"].weight)
    model = StepModel(lm, TokenHead(5, 9)).eval()
    data = labelled_data()
    batch = pack_trees(data.trees, data.pairs, max_tokens=4096, values="labelled")[0]
    labels = (batch.value_targets + 1) / 2
    out = model(batch, want_logps=False, labels=labels)
    for step, (tree, node) in enumerate(batch.node_of_step.tolist()):
        with torch.no_grad():
            two = lm(torch.tensor([data.trees[tree].path(node)])).logits[0, -1, [9, 5]].log_softmax(-1)
        assert out["values"][step].item() == pytest.approx(two[1].exp().item(), rel=1e-4)
        loss = -(labels[step] * two[1] + (1 - labels[step]) * two[0])
        assert out["step_losses"][step].item() == pytest.approx(loss.item(), rel=1e-4)


def test_a_token_head_on_a_softcap_is_refused():
    lm = hf.Gemma2ForCausalLM(hf.Gemma2Config(**tiny_models.SMALL, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="softcap is not in the loss; head=class"):
        StepModel(lm, TokenHead(5, 9))
