"""`svpo score`: lines, aggregates, first errors, F1 of a known answer, best of N, thresholds, resuming, bad rows."""

from __future__ import annotations

import json

import prm_models
import pytest
import tokenizers_
import torch
import transformers as hf
from safetensors.torch import save_file
from tiny_models import SMALL, one_thread  # noqa: F401
from typer.testing import CliRunner

from svpo_kernels import StepNode, tree_from_text
from svpo_kernels.cli import main as cli
from svpo_kernels.reasoning import choose
from svpo_kernels.reasoning.loading import load_scoring_model
from svpo_kernels.reasoning.run import ScoreOptions, run_score
from svpo_kernels.reasoning.solutions import final_answer, read_problems, same_answer
from svpo_kernels.trainer import head_files, prm_metrics
from svpo_kernels.trainer.heads import ClassHead, TokenHead, ValueHead

PROBLEM, SOLUTIONS = prm_models.PROBLEM, prm_models.SOLUTIONS
HEADS = {"value": lambda D, tokenizer: ValueHead(D), "one": lambda D, tokenizer: ClassHead(D, 1),
         "two": lambda D, tokenizer: ClassHead(D, 2), "hidden layer": lambda D, tokenizer: ClassHead(D, 2, True),
         "tokens": lambda D, tokenizer: TokenHead(*(tokenizer.encode(sign)[0] for sign in "+-"))}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_model(folder, kind="two", seed=0):
    """A tiny Llama with one of our heads beside it, as a run leaves it."""
    tokenizer = tokenizers_.qwen(prm_models.TEXTS, vocab_size=500)
    lm = prm_models.randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)})), seed)
    head = prm_models.randomise(HEADS[kind](lm.config.hidden_size, tokenizer), seed + 1)
    prm_models._save(lm, tokenizer, folder)
    tokens = {name: getattr(head, name) for name in ("good_token", "bad_token") if hasattr(head, name)}
    head_files.write(head.kind, head.state_dict(), {
        "kind": head.kind, "activation": head.activation, "good": 1, **tokens, "step_separator": "\n",
        "step_end": "", "turn_end": "auto", "chat_template": tokenizer.chat_template}, folder)
    return lm, head, tokenizer


def literal(lm, head, tokenizer, problem, steps, kind):
    """One run a step, on the path to the end of its own text."""
    nodes = [StepNode(i - 1, text=text, terminal=i == len(steps) - 1) for i, text in enumerate(steps)]
    tree = tree_from_text(tokenizer, problem, nodes, step_separator="\n")
    found = []
    for i in range(len(tree)):
        ids = torch.tensor([tree.path(i)[:tree.value_end(i)]])
        with torch.no_grad():
            hidden = lm.model(ids).last_hidden_state[0, -1]
            if kind == "tokens":
                found.append(lm.lm_head(hidden)[[head.bad_token, head.good_token]].softmax(-1)[1])
            elif kind == "value":
                found.append((head.summary(hidden)[0].tanh() + 1) / 2)
            else:
                z = head.score(hidden)
                found.append(z[0].sigmoid() if len(z) == 1 else z.softmax(-1)[1])
    return torch.stack(found)


@pytest.mark.parametrize("kind", HEADS)
def test_our_heads_score_as_one_run_a_step(tmp_path, kind):
    lm, head, tokenizer = make_model(tmp_path / "model", kind)
    rows = [{"question": PROBLEM, "responses": ["\n".join(steps) for steps in SOLUTIONS]}]
    summary = run_score(write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "model"), tmp_path / "out.jsonl",
                        options=ScoreOptions(threshold=0.6), say=lambda text: None)
    lines = read_rows(tmp_path / "out.jsonl")
    assert [line["solution"] for line in lines] == [0, 1, 2] and summary["kept"] == summary["read"] == 1
    for line, steps in zip(lines, SOLUTIONS, strict=True):
        wanted = literal(lm, head, tokenizer, PROBLEM, steps, kind)
        scores = torch.tensor(line["scores"])
        torch.testing.assert_close(scores, wanted, rtol=2e-5, atol=2e-6)
        assert line["steps"] == steps and line["aggregates"]["mean"] == pytest.approx(scores.mean().item())
        assert line["aggregates"]["prod"] == pytest.approx(scores.prod().item(), rel=1e-5)
        assert line["aggregates"]["geomean"] == pytest.approx(scores.log().mean().exp().item(), rel=1e-5)
        assert line["score"] == line["aggregates"]["min"] == scores.min().item()
        below = (scores < 0.6).nonzero().flatten().tolist()
        assert line["first_below"] == (below[0] if below else -1) and line["aggregates"]["last"] == scores[-1].item()
    assert sorted(line["rank"] for line in lines) == [1, 2, 3]
    assert max(lines, key=lambda line: line["score"])["rank"] == 1
    assert summary["tokens"] < summary["tokens_alone"] < summary["tokens_again"]


def test_implicit_rewards_are_log_ratios_of_whole_paths(tmp_path):
    lm, _, tokenizer = make_model(tmp_path / "model")
    other, _, _ = make_model(tmp_path / "reference", seed=5)
    head_files.write("implicit", {}, {"kind": "implicit", "beta": 0.03, "step_separator": "\n",
                                      "reference": str(tmp_path / "reference")}, tmp_path / "model")
    (tmp_path / "model" / head_files.CLASS_HEAD).unlink()
    rows = [{"question": PROBLEM, "responses": ["\n".join(steps) for steps in SOLUTIONS]}]
    run_score(write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "model"), tmp_path / "out.jsonl",
              say=lambda text: None)
    for line, steps in zip(read_rows(tmp_path / "out.jsonl"), SOLUTIONS, strict=True):
        nodes = [StepNode(i - 1, text=text, terminal=i == len(steps) - 1) for i, text in enumerate(steps)]
        tree = tree_from_text(tokenizer, PROBLEM, nodes, step_separator="\n")
        for i, score in enumerate(line["scores"]):
            ids, start = torch.tensor(tree.path(i)), tree.start[0]
            with torch.no_grad():
                each = [model(ids[None]).logits[0, start - 1:-1].double().log_softmax(-1)
                        .gather(1, ids[start:, None]).sum() for model in (lm, other)]
            assert score == pytest.approx(torch.sigmoid(0.03 * (each[0] - each[1])).item(), rel=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "model"
    make_model(folder)
    return folder


def scores_of(model, steps):
    """What the model gives these steps, by the runner itself."""
    from test_scorers import scored, solutions
    return scored(load_scoring_model(str(model)), solutions([steps]))[0][0]


def test_f1_of_a_known_answer(tmp_path, model):
    """Labels set by what the model says: every first error found but one, one right solution taken for wrong."""
    firsts = []
    for steps in SOLUTIONS:
        scores = scores_of(model, steps)
        firsts.append(min(range(len(scores)), key=scores.__getitem__))
    lows = [min(scores_of(model, steps)) for steps in SOLUTIONS]
    threshold = max(lows) + 1e-4  # every solution has a step below it
    wanted = []
    for steps in SOLUTIONS:
        scores = scores_of(model, steps)
        wanted.append(next(i for i, score in enumerate(scores) if score < threshold))
    rows = [{"id": f"p{i}", "problem": PROBLEM, "steps": steps, "label": label, "final_answer_correct": label == -1}
            for i, (steps, label) in enumerate(zip(SOLUTIONS * 2, [wanted[0], wanted[1], -1, -1, wanted[1], 4],
                                                   strict=True))]
    rows.append(rows[0] | {"steps": ["First 3 * 4 = 12."], "label": -1})
    scores = scores_of(model, ["First 3 * 4 = 12."])
    hits_right = float(scores[0] >= threshold)
    said = []
    summary = run_score(write_rows(tmp_path / "bench.jsonl", rows), str(model), tmp_path / "out.jsonl",
                        options=ScoreOptions(threshold=threshold), say=said.append)
    wrong = (3 + (wanted[2] == 4)) / 4
    right = hits_right / 3
    assert summary["prm/error_accuracy"] == pytest.approx(wrong)
    assert summary["prm/correct_accuracy"] == pytest.approx(right)
    assert summary["prm/f1"] == pytest.approx(2 * wrong * right / (wrong + right) if right else 0.0)
    assert any("f1 " in line and "first errors of 7 solutions" in line for line in said)
    lines = read_rows(tmp_path / "out.jsonl")
    assert [line["first_error"] for line in lines] == [row["label"] for row in rows]
    assert lines[3]["id"] == "p3" and lines[3]["correct"] is True


def test_best_of_n_and_votes(tmp_path, model):
    aggregates = {i: prm_metrics.aggregates(scores_of(model, steps)) for i, steps in enumerate(SOLUTIONS)}
    best = max(aggregates, key=lambda i: aggregates[i]["mean"])
    rows = [{"question": PROBLEM, "responses": ["\n\n".join(steps) for steps in SOLUTIONS],
             "correct": [i == best for i in range(3)], "pred": ["a", "b", "a"], "gt": "c"},
            {"question": "Other?", "responses": ["It is 14.", "It is 20."], "gt": "20", "pred": ["14", "20.0"]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = ScoreOptions(aggregate="mean", step_separator="\n\n")
    summary = run_score(path, str(model), tmp_path / "out.jsonl", options=options, best_of=tmp_path / "best.jsonl",
                        say=lambda text: None)
    lines, chosen = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "best.jsonl")
    assert [line.get("correct") for line in lines] == [i == best for i in range(3)] + [False, True]
    scores = [line["score"] for line in lines]
    assert chosen[0]["solution"] == scores.index(max(scores[:3])) and chosen[0]["of"] == 3
    votes = "a" if scores[0] + scores[2] > scores[1] else "b"
    assert chosen[0]["weighted_majority"]["answer"] == votes
    second = scores[4] > scores[3]
    assert summary["best_of"]["mean"] == (lines[chosen[0]["solution"]]["correct"] + second) / 2
    assert summary["best_of"]["oracle"] == 1.0 and set(prm_metrics.AGGREGATES) < set(summary["best_of"])
    vote = 0 if votes == "a" and scores[0] > scores[2] else 2 if votes == "a" else 1
    assert summary["best_of"]["weighted_majority"] == (lines[vote]["correct"] + second) / 2


def test_choices():
    assert prm_metrics.best([0.5, float("nan"), 0.9, 0.9]) == 2
    assert choose.weighted_majority(["a", "b", "b", None], [0.9, 0.5, 0.6, 1.0]) == 2
    assert choose.weighted_majority([None], [1.0]) is None
    scores, wrong = [0.1, 0.2, 0.3, 0.4, 0.9, 0.15], [True, True, True, True, False, False]
    for recall, caught in ((0.25, 1), (0.5, 2), (0.74, 3), (1.0, 4)):
        threshold = choose.fit_threshold(scores, wrong, recall)
        assert sum(score < threshold for score in scores[:4]) == caught
    with pytest.raises(ValueError, match="no labelled step is wrong"):
        choose.fit_threshold([0.1], [False], 0.5)
    with pytest.raises(ValueError, match=r"recall must be in \(0, 1\], got 1.5"):
        choose.fit_threshold(scores, wrong, 1.5)


def test_answers():
    assert final_answer(r"so \boxed{\frac{1}{2}} and \boxed{\frac{3}{4}}.") == r"\frac{3}{4}"
    assert final_answer("a\n#### 1,234") == "1,234" and final_answer("nothing") is None
    assert same_answer("1,234", "1234.0") and same_answer(r"\frac {1}{2}", r"$\frac{1}{2}$")
    assert not same_answer("1", "2")


def test_a_threshold_is_fitted_on_held_out_labels(tmp_path, model):
    rows = [{"prompt": PROBLEM, "completions": steps, "labels": [i % 2 == 0 for i in range(len(steps))]}
            for steps in SOLUTIONS]
    held = write_rows(tmp_path / "held.jsonl", rows)
    wrong = [score for steps in SOLUTIONS for score in scores_of(model, steps)[1::2]]
    options = ScoreOptions(fit_on=held, recall=0.75)
    said = []
    summary = run_score(held, str(model), tmp_path / "out.jsonl", options=options, say=said.append)
    assert sum(score < summary["threshold"] for score in wrong) == 3 and len(wrong) == 4
    assert any("below it score 3 of 4 wrong steps" in line for line in said)
    assert read_rows(tmp_path / "out.jsonl")[0]["threshold"] == summary["threshold"]


def test_a_killed_run_goes_on_and_another_one_is_refused(tmp_path, model, monkeypatch):
    rows = [{"question": f"{PROBLEM} {i}", "responses": ["\n".join(steps) for steps in SOLUTIONS]} for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    whole = run_score(path, str(model), tmp_path / "whole.jsonl", max_tokens=64, say=lambda text: None)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    from svpo_kernels.reasoning import score as module
    real, calls = module.Runner.score, []

    def dies(self, encoded):
        calls.append(len(encoded))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, encoded)

    monkeypatch.setattr(module.Runner, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        run_score(path, str(model), out, max_tokens=64, say=lambda text: None)
    held = partial.read_text(encoding="utf-8")
    partial.write_text(held + '{"row": 3, "sol', encoding="utf-8")  # torn in the middle of a line
    assert not out.exists() and held.count("\n") == 1 + calls[0] < 19
    monkeypatch.setattr(module.Runner, "score", real)
    with pytest.raises(ValueError, match="is what another run left: aggregate was min, is prod"):
        run_score(path, str(model), out, options=ScoreOptions(aggregate="prod"), say=lambda text: None)
    said = []
    summary = run_score(path, str(model), out, max_tokens=64, say=said.append)
    assert any(f"{calls[0]} solutions were scored before" in line for line in said)
    ours, theirs = read_rows(out), read_rows(tmp_path / "whole.jsonl")
    assert [{**line, "scores": 0} for line in ours] == [{**line, "scores": 0} for line in theirs]
    assert not partial.exists() and summary["tokens"] < whole["tokens"]
    with pytest.raises(FileExistsError, match="is there already"):
        run_score(path, str(model), out, say=lambda text: None)


def test_bad_rows_are_counted(tmp_path, model):
    """kept + truncated + dropped = read, every reason on record."""
    long = [f"First {i} * 4 = 12." for i in range(40)]
    rows = [{"prompt": PROBLEM, "completions": ["a", "b"], "labels": [1]},
            {"prompt": PROBLEM, "completions": ["a", " "], "labels": [1, 0]},
            {"prompt": PROBLEM, "completions": ["a", "b"], "labels": [1, float("nan")]},
            {"prompt": PROBLEM, "completions": [], "labels": []},
            {"prompt": PROBLEM, "completions": long, "labels": [None] * 40},
            {"prompt": PROBLEM * 30, "completions": ["a"], "labels": [1]},
            {"prompt": PROBLEM, "completions": ["a"], "labels": [1]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    summary = run_score(path, str(model), tmp_path / "out.jsonl", options=ScoreOptions(max_path_tokens=200),
                        say=lambda text: None)
    assert {key: summary[key] for key in ("read", "kept", "truncated", "dropped")} == {
        "read": 7, "kept": 1, "truncated": 1, "dropped": 5}
    lines = read_rows(tmp_path / "out.jsonl")
    assert lines[0]["row"] == 5 and lines[0]["truncated"] == 40 - len(lines[0]["scores"]) > 0
    with pytest.raises(ValueError, match="rows.jsonl:1: labels must have one entry a completion"):
        run_score(path, str(model), tmp_path / "no.jsonl", options=ScoreOptions(on_bad="error"), say=print)


def test_bad_answers_of_a_row_are_counted(tmp_path, model):
    rows = [{"question": PROBLEM, "responses": ["It is 14.", "", " \n "]}, {"question": PROBLEM, "responses": [""]},
            {"question": PROBLEM, "responses": ["a", "b"], "correct": [True]}, {"question": PROBLEM}]
    scorer = load_scoring_model(str(model)).scorer
    found = read_problems(write_rows(tmp_path / "rows.jsonl", rows), scorer)
    ledger = found.ledger
    assert (ledger.read, ledger.kept, ledger.truncated, ledger.dropped) == (4, 0, 1, 3)
    assert [len(group) for group in found.groups] == [1]
    assert "2 of 3 answers left out" in ledger.summary() and "one entry an answer" in ledger.summary()


def test_trees_are_filled_with_scores(tmp_path, model):
    tree = {"question": PROBLEM, "rstar": {"0": {"text": ""}, "0.0": {"text": SOLUTIONS[0][0]},
            "0.0.0": {"text": SOLUTIONS[0][1], "q_value": 0.3}, "0.0.1": {"text": SOLUTIONS[2][1]},
            "0.1": {"text": SOLUTIONS[1][0]}}}
    path = write_rows(tmp_path / "some.jsonl", [tree])
    run_score(path, str(model), tmp_path / "out.jsonl", trees=tmp_path / "scored_trees.jsonl", say=lambda text: None)
    states = read_rows(tmp_path / "scored_trees.jsonl")[0]["rstar"]
    lines = read_rows(tmp_path / "out.jsonl")
    assert [line["nodes"] for line in lines] == [[1], [0, 2], [0, 3]]
    assert lines[1]["scores"][0] == pytest.approx(lines[2]["scores"][0], rel=1e-5)
    for tag, score in (("0.0", lines[1]["scores"][0]), ("0.0.0", lines[1]["scores"][1]),
                       ("0.0.1", lines[2]["scores"][1]), ("0.1", lines[0]["scores"][0])):
        assert states[tag]["q_value"] == pytest.approx(2 * score - 1)
    answers = write_rows(tmp_path / "rows.jsonl", [{"question": PROBLEM, "responses": ["a", "b"]}])
    with pytest.raises(ValueError, match="make no trees"):
        run_score(answers, str(model), tmp_path / "no.jsonl", trees=tmp_path / "no_trees.jsonl", say=print)


def test_the_command(tmp_path, model):
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    rows = [{"problem": PROBLEM, "steps": steps, "label": -1} for steps in SOLUTIONS]
    words = ["score", write_rows(tmp_path / "rows.jsonl", rows), "--model", str(model), "--out",
             str(tmp_path / "out.jsonl"), "--threshold", "0.3", "--device", "cpu"]
    result = runner.invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert "3 rows read, 3 kept" in result.output and "correct_accuracy" in result.output
    again = runner.invoke(cli.app, words)
    assert again.exit_code == 1 and "is there already" in again.output and len(again.output.splitlines()) == 1
    wrong = runner.invoke(cli.app, [*words[:5], str(tmp_path / "x.jsonl"), "--beta", "2"])
    assert wrong.exit_code == 1 and "beta is an option of scorer implicit, not of head" in wrong.output


def test_a_head_of_another_width_is_one_line(tmp_path):
    make_model(tmp_path / "model")
    path = tmp_path / "model" / head_files.CLASS_HEAD
    save_file({"score.weight": torch.zeros(2, 24), "score.bias": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"does not fit the model: score.weight must be \(C, 32\), got \(2, 24\)"):
        load_scoring_model(str(tmp_path / "model"))


def test_scores_that_are_not_finite_end_the_run(tmp_path):
    make_model(tmp_path / "model")
    model = load_scoring_model(str(tmp_path / "model"))
    model.head.last.bias.data.fill_(float("nan"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": PROBLEM, "responses": ["a\nb"]}])
    with pytest.raises(ValueError, match="2 of 2 scores are not finite"):
        run_score(rows, model, tmp_path / "out.jsonl", say=lambda text: None)
    assert not (tmp_path / "out.jsonl").exists()
