"""Growing step trees: engines against plain forwards, the search on a scripted engine, files, kills, servers."""

from __future__ import annotations

import http.server
import json
import threading
from types import SimpleNamespace

import pytest
import tokenizers_
import torch
import transformers as hf
from tiny_models import SMALL, one_thread  # noqa: F401
from typer.testing import CliRunner

import svpo_kernels as sk
from svpo_kernels.cli import main as cli
from svpo_kernels.data.formats import DataError
from svpo_kernels.data.load import load
from svpo_kernels.reasoning import generation
from svpo_kernels.reasoning.endpoint import EndpointEngine
from svpo_kernels.reasoning.engines import LocalEngine, Prefix, Sampling, Spent, Step
from svpo_kernels.reasoning.grow import Growth, grow
from svpo_kernels.reasoning.rollout import RolloutConfig, run_rollout, settings_of
from svpo_kernels.trainer.heads import ValueHead

TEXTS = ["Two and two are four. So the answer is 4.", "First add. Then take away. The answer is 12."] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers_.qwen(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(3)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | dict(vocab_size=len(tokenizer), eos_token_id=2))).eval()
    return model


def engine_of(model, tokenizer, **options):
    given = dict(max_step_tokens=7, max_tokens=24, step_separator=" ") | options
    return LocalEngine(model, tokenizer, Sampling(**given))


# -- the engine in this process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ids_and_log_probs_are_those_of_a_plain_forward(model, tokenizer, temperature):
    engine = engine_of(model, tokenizer, temperature=temperature)
    prefixes = [engine.begin("How many?"), engine.begin("A longer question: how many are there in all?")]
    assert len(prefixes[0].ids) < len(prefixes[1].ids)  # one is padded
    found = engine.go_on(prefixes, 3, torch.Generator().manual_seed(0))
    for prefix, steps in zip(prefixes, found, strict=True):
        assert len(steps) == 3 and len({tuple(step.ids) for step in steps}) > 1
        for step in steps:
            ids = torch.tensor([[*prefix.ids, *step.ids]])
            logps = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
            at = torch.arange(len(prefix.ids) - 1, ids.shape[1] - 1)
            assert torch.allclose(torch.tensor(step.logps), logps[at, ids[0, at + 1]], atol=1e-5)
            closed = " " in step.text and step.text.strip()
            assert step.ended == (step.ids[-1] in engine._ends) and (step.ended or closed or len(step.ids) == 7)
            assert step.text == tokenizer.decode(step.ids, skip_special_tokens=True)
    assert engine.spent == Spent(sum(len(step.ids) for steps in found for step in steps),
                                 sum(len(prefix.ids) for prefix in prefixes))


def test_greedy_answers_are_those_of_generate(model, tokenizer):
    engine = engine_of(model, tokenizer, temperature=0, max_tokens=12)
    prefixes = [engine.begin("How many?"), engine.begin("A longer question: how many are there in all?")]
    found = engine.go_on(prefixes, 1, torch.Generator(), to_the_end=True)
    for prefix, (step,) in zip(prefixes, found, strict=True):
        theirs = model.generate(torch.tensor([prefix.ids]), attention_mask=torch.ones(1, len(prefix.ids)),
                                do_sample=False, max_new_tokens=12, eos_token_id=sorted(engine._ends), pad_token_id=0)
        assert step.ids == theirs[0, len(prefix.ids):].tolist()


def test_top_p_draws_from_the_smallest_set(model, tokenizer):
    engine = engine_of(model, tokenizer, top_p=0.5)
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1]]))
    generator = torch.Generator().manual_seed(0)
    drawn = [engine._draw(logits, generator) for _ in range(200)]
    assert {int(token[0]) for token, _ in drawn} == {0, 1} and {int(token[1]) for token, _ in drawn} == {0}
    assert all(torch.allclose(logp, logits.gather(1, token[:, None])[:, 0], atol=1e-6) for token, logp in drawn)


def test_values_come_from_the_last_token_that_is_text(model, tokenizer):
    head = ValueHead(SMALL["hidden_size"])
    torch.nn.init.normal_(head.summary.weight)
    engine = engine_of(model, tokenizer)
    engine.head = head
    prefixes = [engine.begin("How many?"), engine.begin("A longer question: how many are there in all?")]
    scores, steps = engine.advance(prefixes, 1, torch.Generator(), keep=lambda scores: [])
    assert steps == [[], []]
    for score, prefix in zip(scores, prefixes, strict=True):
        assert tokenizer.decode(prefix.ids[-1:]) == "\n"  # white space behind "assistant"
        hidden = model.model(torch.tensor([prefix.ids])).last_hidden_state
        assert 2 * score - 1 == pytest.approx(torch.tanh(head.summary(hidden[0, -2])).item(), abs=1e-5)


def test_a_dead_end_of_tokens(model, tokenizer):
    engine = engine_of(model, tokenizer, max_tokens=3)
    (step,), = engine.go_on([engine.begin("How many?")], 1, torch.Generator().manual_seed(0), to_the_end=True)
    assert len(step.ids) <= 3
    (empty,), = engine.go_on([engine.begin("x")._replace(used=3)], 1, torch.Generator())
    assert empty.ids == [] and not empty.ended


@pytest.mark.parametrize("options, said", [
    ({"temperature": -1}, "temperature must be at least 0"), ({"top_p": 0}, "top_p must be in"),
    ({"max_step_tokens": 0}, "max_step_tokens must be at least 1"),
    ({"step_separator": ""}, "step_separator must be a")])
def test_sampling_is_checked(options, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**options)


# -- the search -------------------------------------------------------------------------------------------------------


class Scripted:
    """An engine whose steps are given: prefix text -> steps as (text, mean log-prob, ended)."""

    def __init__(self, script):
        self.script, self.sampling, self.spent, self.calls = script, Sampling(max_tokens=100), Spent(), []

    def begin(self, prompt):
        return Prefix([0], "")

    def go_on(self, prefixes, n, generator, *, to_the_end=False):
        self.calls += [prefix.text for prefix in prefixes]
        return [[Step(text, ended, [ord(c) for c in text], [logp] * len(text), len(text))
                 for text, logp, ended in self.script[prefix.text]] for prefix in prefixes]


def test_the_search_by_hand():
    engine = Scripted({"": [("a", 0.0, False), ("b", -1.0, False), ("a", 0.0, False)], "a": [("x", -0.5, True)],
                       "b": [("y", -0.5, True), ("z", -0.5, True)]})
    values = {"": 0.0, "a": -0.5, "b": 0.25}
    root = grow(engine, "q", lambda prefix: 1.0 if prefix.text == "by" else -1.0,
                lambda prefixes: [values[prefix.text] for prefix in prefixes],
                Growth(simulations=7, children=3, leaves=1, c_puct=1.0), torch.Generator())
    a, b = root.children  # the second "a" is the first
    assert (a.prior, b.prior) == pytest.approx((torch.softmax(torch.tensor([0.0, -1.0]), 0)).tolist())
    # 1: the root itself. 2: a, whose prior is larger: -0.5. 3: b: 0.25, unvisited and better. Then b's children.
    assert engine.calls[:3] == ["", "a", "b"]
    assert root.visits == 7 and root.visits == 1 + a.visits + b.visits
    assert b.children[0].value == 1.0 and b.children[1].value in (0.0, -1.0)
    for node in (root, a, b):
        own = {"": 0.0}.get(node.prefix.text, values.get(node.prefix.text))
        assert node.total == pytest.approx(own + sum(child.total for child in node.children))


def test_leaves_of_one_batch_are_distinct_and_leave_no_virtual_loss():
    script = {"": [(c, 0.0, False) for c in "abcd"]} | {c: [(c + "!", 0.0, True)] for c in "abcd"}
    engine = Scripted(script)
    root = grow(engine, "q", lambda prefix: 1.0, lambda prefixes: [0.5] * len(prefixes),
                Growth(simulations=9, children=4, leaves=4), torch.Generator())
    assert engine.calls == ["", "a", "b", "c", "d"] and root.visits == 9
    assert root.total == pytest.approx(5 * 0.5 + 4 * 1.0)


def test_a_node_without_a_way_on_is_a_dead_end():
    root = grow(Scripted({"": [("  ", 0.0, False)]}), "q", lambda prefix: -1.0, lambda prefixes: [0.0] * len(prefixes),
                Growth(simulations=3, children=1), torch.Generator())
    assert root.closed and root.visits == 3 and root.total == -3.0


def test_an_answer_is_judged_once_however_often_it_is_visited():
    judged = []
    root = grow(Scripted({"": [("a", 0.0, True), ("b", 0.0, True)]}), "q",
                lambda prefix: judged.append(prefix.text) or 1.0, lambda prefixes: [0.0] * len(prefixes),
                Growth(simulations=9, children=2, leaves=1), torch.Generator())
    assert sorted(judged) == ["a", "b"] and sum(child.visits for child in root.children) == 8


def test_a_leaf_is_worth_the_heads_score_of_the_forward_that_goes_on(model, tokenizer):
    engine = engine_of(model, tokenizer)
    engine.head = ValueHead(SMALL["hidden_size"])
    torch.nn.init.normal_(engine.head.summary.weight)
    root = grow(engine, "How many?", lambda prefix: 0.0, None, Growth(simulations=1, children=2),
                torch.Generator().manual_seed(0))
    (score,), _ = engine.advance([root.prefix], 1, torch.Generator(), keep=lambda scores: [])
    assert root.total == pytest.approx(2 * score - 1) and engine.spent.read == 2 * len(root.prefix.ids)


def test_a_value_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\], got 2"):
        grow(Scripted({"": [("a", 0.0, False)]}), "q", lambda prefix: 1.0, lambda prefixes: [2.0], Growth(), None)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(prompts, out, **more):
    return settings_of({"prompts_file": str(prompts), "model_name_or_path": "given", "output_file": str(out),
                        "verifier": "numeric", "simulations": 5, "children": 2, "rollouts": 2, "max_depth": 3} | more)


def test_trees_are_read_back_id_by_id(prompts, tmp_path, model, tokenizer):
    engine, out = engine_of(model, tokenizer), tmp_path / "trees.jsonl"
    said = []
    found = run_rollout(config_of(prompts, out), engine, said.append)
    assert found["prompts"] == 3 and found["generated"] == engine.spent.generated > 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    data = load(out, warn=False)
    assert data.ledger.kept == 3 and not out.with_name("trees.jsonl.partial").exists()
    for row, record in zip(rows, data.records, strict=True):
        states = [state for tag, state in row["rstar"].items() if tag != "0"]
        assert record.prompt_ids == row["prompt_ids"] == engine.begin(row["question"]).ids
        assert sorted(node.text for node in record.nodes) == sorted(state["text"] for state in states)
        assert all(len(node.token_ids) == len(node.old_logps) for node in record.nodes)
        assert row["rstar"]["0"]["visit_count"] == 5
    trees = load(out, warn=False)
    tree = sk.StepTree(trees.records[0].prompt_ids, trees.records[0].nodes)
    assert sk.pack_trees([tree], [torch.zeros(0, 2, dtype=torch.int64)], max_tokens=512, values="labelled")


class Dies(Exception):
    pass


def test_a_killed_run_goes_on_and_comes_out_the_same(prompts, tmp_path, model, tokenizer):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run_rollout(config_of(prompts, whole), engine_of(model, tokenizer), lambda line: None)

    class Mortal(LocalEngine):
        left = 2

        def begin(self, prompt):
            Mortal.left -= 1
            if Mortal.left < 0:
                raise Dies
            return super().begin(prompt)

    mortal = Mortal(model, tokenizer, engine_of(model, tokenizer).sampling)
    with pytest.raises(Dies):
        run_rollout(config_of(prompts, killed), mortal, lambda line: None)
    partial = killed.with_name("killed.jsonl.partial")
    with partial.open("a") as file:
        file.write('{"row": 3, "torn')
    with pytest.raises(ValueError, match="another run left: seed was 0, is 1"):
        run_rollout(config_of(prompts, killed, seed=1), engine_of(model, tokenizer), lambda line: None)
    said = []
    run_rollout(config_of(prompts, killed), engine_of(model, tokenizer), said.append)
    assert said[0].startswith("2 prompts were done before") and killed.read_text() == whole.read_text()
    with pytest.raises(FileExistsError):
        run_rollout(config_of(prompts, killed), engine_of(model, tokenizer), lambda line: None)


def test_a_budget_stops_between_prompts_and_is_said(prompts, tmp_path, model, tokenizer):
    said, out = [], tmp_path / "trees.jsonl"
    run_rollout(config_of(prompts, out, budget_tokens=1), engine_of(model, tokenizer), said.append)
    assert any("2 of 3 prompts have no tree" in line for line in said) and not out.exists()
    run_rollout(config_of(prompts, out), engine_of(model, tokenizer), said.append)
    assert out.exists()


@pytest.mark.parametrize("more, said", [
    ({"verifier": "magic"}, "verifier: must be one of"), ({"value": "guess"}, "value must be one of"),
    ({"simulations": 0}, "simulations must be at least 1"), ({"rollouts": "many"}, "rollouts must be of type int"),
    ({"endpoint": "http://x/v1", "value": "head"}, "must be rollouts with an endpoint"),
    ({"model_name_or_path": ""}, "model_name_or_path is missing"), ({"verifier": "no.module:f"}, "cannot be imported")])
def test_settings_are_checked(prompts, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        run_rollout(config_of(prompts, tmp_path / "o.jsonl", **more), SimpleNamespace(), lambda line: None)


def test_a_row_without_an_answer_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match="p.jsonl:1: expected an answer"):
        generation.read_prompts(str(path))


def test_every_setting_has_a_help_text():
    keys = generation.known_keys(RolloutConfig)
    assert len(set(keys)) == len(keys) and {"simulations", "top_p", "verifier"} <= set(keys)
    said = generation.describe_keys(RolloutConfig)
    assert len(said) == len(keys) and all(len(line.partition("\n    ")[2]) > 10 for line in said)
    assert "c_puct: 1.5\n    Weight of the prior" in "\n".join(said)


def test_the_command(prompts, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tmp_path / "rollout.yaml"
    config.write_text(f"prompts_file: {prompts}\nmodel_name_or_path: {tmp_path / 'model'}\nmax_tokens: 12\n"
                      f"output_file: {tmp_path / 'trees.jsonl'}\nsimulations: 3\nmax_step_tokens: 4\n")
    runner = CliRunner()
    done = runner.invoke(cli.app, ["rollout", str(config), "children=2", "rollouts=1", "step_separator= "])
    assert done.exit_code == 0 and "3 trees" in done.output, done.output
    assert load(tmp_path / "trees.jsonl", warn=False).ledger.kept == 3
    done = runner.invoke(cli.app, ["rollout", str(config), "childs=2"])
    assert done.exit_code == 1 and "did you mean 'children'" in done.output
    assert "simulations: 32" in runner.invoke(cli.app, ["rollout", "--keys"]).output


# -- servers ----------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Completions of a script. kind: full (n, ids, log-probs, stop_reason), plain (none of these), text (no ids)."""

    kind, bodies = "full", []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.bodies.append(body)
        if self.kind == "plain" and ("n" in body or "include_stop_str_in_output" in body):  # as transformers serve does
            return self._answer(422, {"detail": "Unexpected fields in the request"})
        choices = [self._choice(body, i) for i in range(body.get("n", 1))]
        return self._answer(200, {"choices": choices, "usage": {"completion_tokens": 4 * len(choices),
                                                                "prompt_tokens": 3}})

    def _choice(self, body, i):
        stops = bool(body.get("stop"))
        whole = f"step {i}\n\nanswer {i}"
        if not stops:
            choice = {"text": whole, "finish_reason": "stop"}
            return choice | ({} if self.kind == "plain" else {"stop_reason": None})
        if self.kind == "plain":
            return {"text": f"step {i}", "finish_reason": "stop"}
        choice = {"text": f"step {i}\n\n", "finish_reason": "stop", "stop_reason": "\n\n"}
        if self.kind == "full":
            choice |= {"token_ids": [5, 6, 7 + i], "logprobs": {"token_logprobs": [-0.1, -0.2, -0.3]}}
        return choice

    def _answer(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        return None


@pytest.fixture
def server():
    Server.bodies = []
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/v1"
    found.shutdown()


@pytest.mark.parametrize("kind", ["full", "text", "plain"])
def test_servers_of_three_kinds(server, tokenizer, kind, monkeypatch):
    monkeypatch.setattr(Server, "kind", kind)
    engine = EndpointEngine(server, "m", tokenizer)
    prefix = engine.begin("How many?")
    (first, second), = engine.go_on([prefix], 2, torch.Generator().manual_seed(1))
    assert [first.text, first.ended] == ["step 0\n\n", False] and second.text.startswith("step")
    assert (first.ids, first.logps) == (([5, 6, 7], [-0.1, -0.2, -0.3]) if kind == "full" else (None, None))
    assert engine.gives_ids == (kind == "full")
    assert (engine.one_by_one, engine.extras) == (kind == "plain", kind != "plain")
    assert engine.stops == (kind != "plain")  # a stop that nobody explains is not asked for again
    asked = Server.bodies[0]
    assert asked["prompt"].endswith("assistant\n") and asked["model"] == "m" and asked["return_token_ids"]
    (whole, _), = engine.go_on([prefix.then(first)], 2, torch.Generator(), to_the_end=True)
    assert whole.ended and whole.text.endswith("answer 0") and "stop" not in Server.bodies[-1]
    assert Server.bodies[-1]["prompt"].endswith("assistant\nstep 0\n\n")
    assert engine.spent.generated >= 16


def test_text_alone_is_marked(server, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "kind", "text")
    said, out = [], tmp_path / "trees.jsonl"
    run_rollout(config_of(prompts, out, endpoint=server), EndpointEngine(server, "m", tokenizer), said.append)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["retokenised"] and "prompt_ids" not in row for row in rows)
    assert any("tokenised again" in line for line in said) and load(out, warn=False).ledger.kept == 3


def test_a_server_that_is_not_there_is_one_line(tokenizer):
    engine = EndpointEngine("http://127.0.0.1:9/v1", "m", tokenizer)
    with pytest.raises(ValueError, match="does not answer"):
        engine.go_on([engine.begin("q")], 1, torch.Generator())
