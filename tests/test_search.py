"""Search: beams and early stops by hand, with a model's own head, with a second model; thresholds; the command."""

from __future__ import annotations

import json

import pytest
import tokenizers_
import torch
import transformers as hf
from tiny_models import SMALL, one_thread  # noqa: F401
from typer.testing import CliRunner

from svpo_kernels.cli import main as cli
from svpo_kernels.reasoning.engines import LocalEngine, Prefix, Sampling, Spent, Step
from svpo_kernels.reasoning.generation import describe_keys, known_keys
from svpo_kernels.reasoning.search import Attempt, Beams, Outcome, accuracies, fit_stop, outcome, search
from svpo_kernels.reasoning.search_run import SearchConfig, run_search, settings_of
from svpo_kernels.trainer import head_files
from svpo_kernels.trainer.heads import ValueHead

TEXTS = ["Two and two are four. So the answer is 4.", "First add. Then take away. The answer is 12."] * 4


class Scripted:
    """Steps and scores are given by text; n draws take the script's steps by turns."""

    head = "scripted"

    def __init__(self, script, scores):
        self.script, self.scores, self.sampling, self.spent, self.went_on = script, scores, Sampling(), Spent(), []

    def begin(self, prompt):
        return Prefix([0], "")

    def advance(self, prefixes, n, generator, *, to_the_end=False, keep=None):
        scores = [self.scores.get(prefix.text, 0.0) for prefix in prefixes]
        kept = list(range(len(prefixes))) if keep is None else keep(scores)
        found = [[] for _ in prefixes]
        for i in kept:
            self.went_on.append(prefixes[i].text)
            ways = self.script[prefixes[i].text]
            found[i] = [Step(text, ended, [1], [0.0], 1) for text, ended in (ways[k % len(ways)] for k in range(n))]
            self.spent.generated += n
        return scores, found

    def go_on(self, prefixes, n, generator, *, to_the_end=False):
        return self.advance(prefixes, n, generator)[1]


SCRIPT = {"": [("a", False), ("b", False), ("c", False)], "a": [("1", True), ("2", True)], "b": [("3", False)],
          "b3": [("4", True)], "c": [("5", True)]}
SCORES = {"a": 0.6, "b": 0.9, "c": 0.1, "a1": 0.7, "a2": 0.2, "b3": 0.8, "b34": 0.5, "c5": 0.9}


def texts(attempts):
    return [attempt.prefix.text for attempt in attempts]


def test_best_of_n_runs_every_attempt_to_its_end():
    engine = Scripted(SCRIPT, SCORES)
    attempts = search(engine, "q", Beams(width=3, branch=1), torch.Generator())
    assert texts(attempts) == ["a1", "c5", "b34"] and not any(attempt.stopped for attempt in attempts)
    assert [attempt.scores for attempt in attempts] == [[0.6, 0.7], [0.1, 0.9], [0.9, 0.8, 0.5]]


def test_an_attempt_below_the_threshold_is_stopped_and_costs_no_more():
    engine = Scripted(SCRIPT, SCORES)
    attempts = search(engine, "q", Beams(width=3, branch=1, threshold=0.5), torch.Generator())
    assert texts(attempts) == ["c", "a1", "b34"] and [attempt.stopped for attempt in attempts] == [True, False, False]
    assert "c" not in engine.went_on and engine.spent.generated == 3 + 2 + 1
    same = search(Scripted(SCRIPT, SCORES), "q", Beams(width=3, branch=1, threshold=0.1), torch.Generator())
    assert texts(same) == ["a1", "c5", "b34"]  # at the threshold is not below it


def test_a_beam_keeps_the_best_and_branches():
    engine = Scripted(SCRIPT, SCORES)
    attempts = search(engine, "q", Beams(width=1, branch=3), torch.Generator())
    assert engine.went_on == ["", "b", "b3"] and texts(attempts) == ["b34"] * 3
    engine = Scripted(SCRIPT, SCORES)
    attempts = search(engine, "q", Beams(width=2, branch=2), torch.Generator())  # draws a b c a
    assert engine.went_on[:3] == ["", "a", "b"]


def test_a_judge_of_its_own_gives_the_same():
    ours = search(Scripted(SCRIPT, SCORES), "q", Beams(width=3, branch=1, threshold=0.5), torch.Generator())
    beams = Beams(3, 1, 0.5, judge=lambda attempts: [SCORES[attempt.prefix.text] for attempt in attempts])
    theirs = search(Scripted(SCRIPT, {}), "q", beams, torch.Generator())
    assert texts(ours) == texts(theirs) and [a.scores for a in ours] == [a.scores for a in theirs]


def test_the_longest_answer_ends():
    attempts = search(Scripted({"": [("a", False)], "a": [("a", False)], "aa": [("a", False)]}, {}), "q",
                      Beams(width=1, max_depth=2), torch.Generator())
    assert texts(attempts) == ["aa"] and not attempts[0].steps[-1].ended


@pytest.mark.parametrize("options, said", [
    ({"width": 0}, "width must be at least 1"), ({"branch": 0}, "branch must be"),
    ({"threshold": 1.5}, r"threshold must be in \[0, 1\]")])
def test_beams_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        Beams(**options)


# -- what attempts are worth ------------------------------------------------------------------------------------------


def made(answers, *, answer="4"):
    """answers: (last step's text, scores, stopped)."""
    attempts = [Attempt(Prefix([0], text), [Step(text, not stopped)], scores, stopped)
                for text, scores, stopped in answers]
    return outcome(attempts, answer, 10, lambda text, answer: text == answer)


def test_accuracies_by_hand():
    found = made([("4", [0.9, 0.2], False), ("5", [0.6, 0.6], False), ("5", [0.1, 0.3], False), ("4", [1.0], True)])
    assert found.right == [True, False, False, False] and found.whole == [0, 1, 2]
    shares = accuracies([found, made([("4", [0.0], True)])])
    assert shares["any"] == 0.5 and shares["majority"] == 0.0
    assert shares["weighted_majority"] == 0.0  # 0.2 against 0.6 + 0.1
    easy = accuracies([found, made([("4", [0.9], False), ("5", [0.1], False)])])
    ways = ("majority", "weighted_majority", "best_by_min", "best_by_prod")
    assert easy["any"] == 1 and all(easy[name] == 0.5 for name in ways)
    assert shares["best_by_mean"] == 0.0 and shares["best_by_min"] == 0.0 and shares["best_by_last"] == 0.0


def test_a_threshold_keeps_its_recall():
    right = [made([("4", [low, 0.9, 1.0], False)]) for low in (0.1, 0.3, 0.5, 0.7)]
    wrong = made([("5", [0.0, 0.0], False)])
    assert fit_stop([*right, wrong], 1.0) == (0.1, 1.0)
    assert fit_stop([*right, wrong], 0.75) == (0.3, 0.75)
    assert fit_stop([*right, wrong], 0.6) == (0.3, 0.75)
    with pytest.raises(ValueError, match="there is none"):
        fit_stop([wrong], 0.9)
    with pytest.raises(ValueError, match="recall must be in"):
        fit_stop(right, 0)
    assert isinstance(right[0], Outcome)


# -- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a value head beside it, and prompts."""
    folder = tmp_path_factory.mktemp("search")
    tokenizer = tokenizers_.qwen(TEXTS, vocab_size=300)
    torch.manual_seed(3)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | dict(vocab_size=len(tokenizer), eos_token_id=2)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    head = ValueHead(SMALL["hidden_size"])
    torch.nn.init.normal_(head.summary.weight, std=3.0)
    head_files.write("value", head.state_dict(), {"kind": "value", "step_separator": " "}, folder / "model")
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_are_the_heads_at_the_end_of_a_steps_own_text(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    head = ValueHead(SMALL["hidden_size"])
    head_files.load_into(head, head_files.read(str(folder / "model")))
    engine = LocalEngine(model, tokenizer, Sampling(max_step_tokens=6, max_tokens=18, step_separator=" "), head)
    with torch.no_grad():
        attempts = search(engine, "What is it?", Beams(width=3, branch=2), torch.Generator().manual_seed(0))
        for attempt in attempts:
            ids = list(engine.begin("What is it?").ids)
            for step, score in zip(attempt.steps, attempt.scores, strict=True):
                ids += step.ids
                end = len(ids)
                while not tokenizer.decode([ids[end - 1]], skip_special_tokens=True).strip():
                    end -= 1
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, end - 1]
                assert score == pytest.approx((torch.tanh(head.summary(hidden)).item() + 1) / 2, abs=1e-5)


def test_the_command_compares_ways(folder, tmp_path):
    config = tmp_path / "search.yaml"
    config.write_text(f"prompts_file: {folder / 'prompts.jsonl'}\nmodel_name_or_path: {folder / 'model'}\nn: 3\n"
                      "methods: greedy,best_of_n,early_stop,beam\nmax_tokens: 12\nmax_step_tokens: 4\nwidth: 2\n"
                      f"threshold: 0.5\noutput_file: {tmp_path / 'out.jsonl'}\n")
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(cli.app, ["search", str(config), "step_separator= "])
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ("greedy", "best_of_n", "early_stop", "beam", "tokens a solved one"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and [row["method"] for row in rows[:4]] == ["greedy"] * 3 + ["best_of_n"]
    assert all(len(attempt["scores"]) == len(attempt["steps"]) for row in rows for attempt in row["attempts"])
    assert any(attempt["stopped"] for row in rows for attempt in row["attempts"] if row["method"] == "early_stop")
    assert sum(row["generated"] for row in rows[6:9]) < sum(row["generated"] for row in rows[3:6])
    done = runner.invoke(cli.app, ["search", str(config), "widht=2"])
    assert done.exit_code == 1 and "did you mean 'width'" in done.output


def test_a_second_model_judges_text(folder):
    """The same model as its own judge: scores of the text are those of its own hidden states where ids agree."""
    given = {"prompts_file": str(folder / "prompts.jsonl"), "model_name_or_path": str(folder / "model"), "n": 2,
             "methods": "best_of_n", "max_tokens": 8, "max_step_tokens": 4, "step_separator": " "}
    own = run_search(settings_of(given), say=lambda line: None)
    second = run_search(settings_of(given | {"prm": str(folder / "model")}), say=lambda line: None)
    assert own["best_of_n"].keys() == second["best_of_n"].keys()
    assert own["best_of_n"]["tokens_per_problem"] == second["best_of_n"]["tokens_per_problem"]


@pytest.mark.parametrize("more, said", [
    ({"methods": "magic"}, "methods must be some of"), ({"recall": 0.9}, "give both"),
    ({"methods": "early_stop"}, "early_stop needs a threshold"), ({"n": "x"}, "n must be of type int"),
    ({"endpoint": "http://x/v1"}, "prm must be given with an endpoint"),
    ({"prompts_file": ""}, "prompts_file is missing"),
    ({"recall": 0.9, "fit_file": "f", "threshold": 0.2}, "threshold must be left out with recall")])
def test_settings_are_checked(more, said):
    with pytest.raises(ValueError, match=said):
        settings_of({"prompts_file": "p", "model_name_or_path": "m"} | more)


def test_every_setting_has_a_help_text():
    keys = known_keys(SearchConfig)
    said = describe_keys(SearchConfig)
    assert len(set(keys)) == len(keys) == len(said) and {"prm", "temperature", "verifier"} <= set(keys)
    assert all(len(line.partition("\n    ")[2]) > 10 for line in said)
