"""What a pair rule drops is counted by direction and length, and said where a person sees it."""

from __future__ import annotations

import json
import random

import pytest
from test_data import GOOD, write

from svpo_kernels import StepNode, StepTree, select_pairs
from svpo_kernels.data.audit import report
from svpo_kernels.data.load import load
from svpo_kernels.trees import pair_counts
from svpo_kernels.trees.pair_counts import PairCounts, add_up, count_pairs


def tree(*steps):
    """Siblings (q_value, terminal, text)."""
    return StepTree([0], [StepNode(-1, [i], q, terminal=ends, text=text) for i, (q, ends, text) in enumerate(steps)])


BRANCH = tree((1.0, True, "so it is five"), (0.5, False, "count"), (-0.5, False, "guess and go on"), (-1.0, True, "6"),
              (0.5, False, "count"))


@pytest.mark.parametrize("rule", ["best_worst", "top_bottom", "all"])
@pytest.mark.parametrize("same_kind", [True, False])
@pytest.mark.parametrize("max_pairs", [None, 1])
def test_the_pairs_are_those_of_select_pairs(rule, same_kind, max_pairs):
    used, counts = count_pairs(BRANCH, rule, 0.1, max_pairs, same_kind=same_kind)
    assert used.tolist() == select_pairs(BRANCH, rule, 0.1, max_pairs, True, same_kind).tolist()
    assert counts.used == len(used) and counts.pairs == len(select_pairs(BRANCH, rule, 0.1, None, False, False))
    assert counts.beyond_max == len(select_pairs(BRANCH, rule, 0.1, None, True, same_kind)) - len(used)


def test_mixed_pairs_by_direction_and_length():
    _, counts = count_pairs(BRANCH, "all", 0.1)
    # distinct: 5-count, 5-guess, 5-6, count-guess, count-6, guess-6
    assert counts == PairCounts(pairs=9, distinct=6, used=2, finished=2, finished_longer=1, inner=2, inner_longer=2)
    assert counts.lines() == [
        "dedup dropped 3 of 9 pairs: their texts are equal to another's",
        "same_kind dropped 4 of 6 pairs of a step that ends its solution with one that does not: 2 a finished step "
        "over an inner one (longer in 1), 2 an inner step over a finished one (longer in 2); 2 are left"]


def test_pairs_that_run_one_way_are_a_warning():
    one_way = tree((1.0, True, "so it is five"), (0.5, False, "a"), (0.0, False, "b"))
    _, counts = count_pairs(one_way, "all", same_kind=False)
    assert counts.lines(same_kind=False) == [
        'warning: 2 of 3 pairs run one way, 2 a finished step over an inner one (longer in 2): they train "finish now" '
        "whatever the steps say; same_kind=true drops them"]
    half = PairCounts(4, 4, 4, finished=2, inner=2)
    assert half.lines(same_kind=False) == [] and add_up([half, half]).finished == 4
    assert "do not finish" in PairCounts(3, 3, 3, inner=2).lines(same_kind=False)[0]


def test_given_pairs_are_kept_and_only_warned_of(tmp_path):
    row = {**GOOD["step_dpo"]}  # its chosen step ends the solution, its rejected one does not
    result = report(write(tmp_path / "rows.jsonl", row, row))
    assert [c.used for c in result.pairs] == [2] and len(result.dropped) == 1
    assert result.dropped[0].startswith("warning: 2 of 2 pairs run one way") and "same_kind" not in result.dropped[0]


def test_the_sample_trees(shared_data):
    path = shared_data / "aps_trees.jsonl"
    kept, any_kind = report(path, min_gap=0.6), report(path, min_gap=0.6, same_kind=False)
    assert kept.dropped[1].startswith("same_kind dropped 143 of 157 pairs") and "(longer in 120)" in kept.dropped[1]
    assert any_kind.dropped[1].startswith("warning: 143 of 157 pairs run one way")


def test_training_says_it_before_it_starts(tmp_path):
    import tokenizers_

    from svpo_kernels.trainer.config import load_config
    from svpo_kernels.trainer.run import load_data

    row = json.loads(json.dumps(GOOD["nested_tree"]))
    row["reasoning_steps"]["children"][1].update(text="The answer is 7.", mc_value=1.0)
    path = str(write(tmp_path / "rows.jsonl", row))
    tokenizer = tokenizers_.qwen([json.dumps(row)], vocab_size=400)
    said: list[str] = []
    load_data(load_config(None, (), output_dir=str(tmp_path / "out"), use_cpu=True), path, tokenizer, said.append)
    assert any("same_kind dropped 1 of 2 pairs" in line for line in said)
    said.clear()
    config = load_config(None, (), output_dir=str(tmp_path / "out"), use_cpu=True, same_kind=False, min_gap=0.4,
                         max_pairs=1)
    load_data(config, path, tokenizer, said.append)
    assert any("max_pairs dropped 1 pairs" in line for line in said)
    assert load(path).ledger.kept == 1


@pytest.mark.parametrize(("name", "keys", "message"), [
    ("stepwise", {}, "stepwise labels holds labels of steps: objective: prm trains on them"),
    ("trl_pairs", {"objective": "prm"}, "TRL pairs holds pairs: objective: preference trains on them")])
def test_the_wrong_objective_for_a_file_names_the_right_one(tmp_path, name, keys, message):
    import tokenizers_

    from svpo_kernels.trainer.config import ConfigError, load_config
    from svpo_kernels.trainer.run import load_data

    path = str(write(tmp_path / "rows.jsonl", GOOD[name]))
    config = load_config(None, (), output_dir=str(tmp_path / "out"), use_cpu=True, **keys)
    with pytest.raises(ConfigError, match=message):
        load_data(config, path, tokenizers_.qwen([json.dumps(GOOD[name])], vocab_size=400), lambda line: None)


@pytest.mark.parametrize(("all_of_them", "said_of_it"), [
    (True, "no model is run for it"), (False, "all are computed anew")])
def test_reference_log_probs_of_the_file_are_said(tmp_path, all_of_them, said_of_it):
    import tokenizers_
    from test_data import with_ids

    from svpo_kernels.trainer.config import load_config
    from svpo_kernels.trainer.run import load_data

    row = with_ids(pairs=[["0.0.0", "0.0.1"]])
    if not all_of_them:
        del row["rstar"]["0.0.1"]["ref_logp"]
    path, said = str(write(tmp_path / "rows.jsonl", row)), []
    config = load_config(None, (), output_dir=str(tmp_path / "out"), use_cpu=True)
    load_data(config, path, tokenizers_.qwen([json.dumps(row)], vocab_size=400), said.append)
    (line,) = (line for line in said if "ref_logp" in line)
    assert line == (f"{path}: {2 if all_of_them else 1} of 2 referenced steps bring a ref_logp of their own: "
                    + ("they are the reference, " if all_of_them else "") + said_of_it)


@pytest.mark.parametrize("seed", range(8))
def test_all_pairs_are_counted_without_being_made(seed, monkeypatch):
    """The account under max_pairs is that of the whole list, also where parents have equal texts."""
    rng = random.Random(seed)
    nodes = [StepNode(-1, [1], 0.5, text="a"), StepNode(-1, [2], -0.5, text="a" if seed % 2 else "b"),
             *(StepNode(rng.choice([0, 1]), [3 + i], rng.choice([None, *(k / 4 - 1 for k in range(9))]),
                        text="t" * rng.randrange(1, 9), terminal=rng.random() < 0.4) for i in range(30))]
    tree = StepTree([1], nodes)
    for dedup, same_kind, gap in ((True, True, 0.0), (True, False, 0.3), (False, True, 0.5), (False, False, 0.0)):
        for most in (3, 40, 10**6):
            found = count_pairs(tree, "all", gap, most, dedup=dedup, same_kind=same_kind)
            with monkeypatch.context() as patch:
                patch.setattr(pair_counts, "_count_all", lambda *given: None)
                used, counts = count_pairs(tree, "all", gap, most, dedup=dedup, same_kind=same_kind)
            assert found[0].tolist() == used.tolist() and found[1] == counts
