"""Public process reward models: packed scores equal to the snippets of their cards, and to padded batches of them."""

from __future__ import annotations

import prm_models
import pytest
import tokenizers_
import torch
import transformers as hf
from prm_models import PROBLEM, PUBLIC, SOLUTIONS
from tiny_models import SMALL, one_thread  # noqa: F401

from svpo_kernels.data.formats import RowProblem
from svpo_kernels.data.formats.ledger import Ledger
from svpo_kernels.reasoning.loading import load_scoring_model
from svpo_kernels.reasoning.score import Runner
from svpo_kernels.reasoning.scorers import SCORERS
from svpo_kernels.reasoning.solutions import Solution


def solutions(each=SOLUTIONS, problem=PROBLEM):
    return [Solution(1, 1, i, problem, list(steps)) for i, steps in enumerate(each)]


def scored(model, group, **settings):
    runner = Runner(model, **settings)
    encoded = runner.encode(group, Ledger("here", warn=False))
    return [each.scores for each in runner.score(encoded)], runner


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """name -> (directory, the card's model, tokenizer)."""
    made = {}
    for name, (make, _) in PUBLIC.items():
        folder = tmp_path_factory.mktemp("public") / name
        made[name] = (folder, *make(folder))
    return made


@pytest.mark.parametrize("packing", ["tree", "distinct"])
@pytest.mark.parametrize("name", PUBLIC)
def test_scores_are_the_snippets(public, name, packing):
    folder, model, tokenizer = public[name]
    ours, runner = scored(load_scoring_model(str(folder), "auto" if name == "qwen" else name), solutions(),
                          packing=packing)
    for pad in (False, True):
        theirs = PUBLIC[name][1](model, tokenizer, PROBLEM, SOLUTIONS, pad)
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(mine), wanted, rtol=2e-5, atol=2e-6)
    flat = torch.tensor(sum(ours, []))
    assert flat.std() > 0.01 and len(flat) == sum(map(len, SOLUTIONS))
    assert runner._way == packing and runner.counts.steps == len(flat)
    if packing == "tree":  # the problem and what is in front of it is run once
        assert runner.counts.tokens < runner.counts.alone < runner.counts.again


@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_scores_of_0_and_1_are_kept(public, bias):
    """The card's own `sample[sample != 0]` drops a probability that is exactly 0, and shifts all behind it."""
    folder, _, _ = public["qwen"]
    model = load_scoring_model(str(folder))
    model.head.last.bias.data = torch.tensor([-bias, bias])
    found, _ = scored(model, solutions())
    assert [len(each) for each in found] == [len(steps) for steps in SOLUTIONS]
    assert set(sum(found, [])) == {float(bias > 0)}


def test_a_trailing_separator_gives_skywork_one_score_more(public):
    folder, model, tokenizer = public["skywork"]
    ours = load_scoring_model(str(folder), "skywork")
    text = "\n".join(SOLUTIONS[0]) + "\n"
    steps = ours.scorer.split(text)
    assert len(steps) == len(SOLUTIONS[0]) + 1 and steps[-1] == ""
    mine, _ = scored(ours, solutions([steps]))
    wanted = prm_models.skywork_snippet(model, tokenizer, PROBLEM, [[*SOLUTIONS[0], ""]], False)
    torch.testing.assert_close(torch.tensor(mine[0]), wanted[0], rtol=2e-5, atol=2e-6)


def test_the_steps_of_several_lines_are_read_at_their_last(public):
    folder, model, tokenizer = public["skywork"]
    mine, _ = scored(load_scoring_model(str(folder), "skywork"), solutions([["a\nb", "c"]]))
    wanted = prm_models.skywork_snippet(model, tokenizer, PROBLEM, [["a", "b", "c"]], False)[0]
    torch.testing.assert_close(torch.tensor(mine[0]), wanted[1:], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_a_judge_reads_yes_against_no_where_the_verdict_begins(tmp_path, kind):
    """As the softmax of two of the model's own logits, softcap and scale included, one run a step."""
    tokenizer = tokenizers_.qwen([*prm_models.TEXTS, "Yes", "No"] * 2, vocab_size=500)
    small = SMALL | {"vocab_size": len(tokenizer)}
    lm = prm_models.randomise({
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**small, final_logit_softcapping=3.0,
                                                               query_pre_attn_scalar=8)),
        "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**small, logit_scale=0.25)),
    }[kind]())
    prm_models._save(lm, tokenizer, tmp_path / "judge")
    options = {"prompt": "{problem} | {solution} | {step}: {good} or {bad}?"}
    mine, _ = scored(load_scoring_model(str(tmp_path / "judge"), "judge", options=options), solutions())
    yes, no = (tokenizer.encode(word)[0] for word in ("Yes", "No"))
    for steps, scores in zip(SOLUTIONS, mine, strict=True):
        for k in range(len(steps)):
            text = f"{PROBLEM} | " + "\n\n".join(steps[:k + 1]) + f" | {steps[k]}: Yes or No?"
            ids = tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                          add_generation_prompt=True))["input_ids"]
            with torch.no_grad():
                logits = lm(torch.tensor([ids])).logits[0, -1, [yes, no]]
            assert scores[k] == pytest.approx(logits.softmax(-1)[0].item(), abs=2e-6, rel=2e-5)


def test_a_tag_that_the_tokenizer_splits_is_one_line(tmp_path):
    tokenizer = tokenizers_.qwen(["a b"], vocab_size=300)
    with pytest.raises(ValueError, match=r"step tag '<extra_0>' must be one token of this tokenizer, got \d+"):
        SCORERS["qwen"](tokenizer)
    with pytest.raises(ValueError, match="bos_token, which this one lacks"):
        SCORERS["skywork"](tokenizer)
    with pytest.raises(ValueError, match="good_token must be one token"):
        SCORERS["judge"](tokenizer, good="Surely so")
    with pytest.raises(ValueError, match="must hold {problem} and {solution}"):
        SCORERS["judge"](tokenizers_.qwen(["Yes", "No"] * 5), prompt="Well?")


def test_a_tag_inside_a_step_and_a_chat_are_bad_rows(public):
    qwen = load_scoring_model(str(public["qwen"][0])).scorer
    with pytest.raises(RowProblem, match="must stand once a step"):
        qwen.encode(PROBLEM, ["a <extra_0> b"])
    with pytest.raises(RowProblem, match="got 3 messages"):
        qwen.encode([{"role": role, "content": "x"} for role in ("user", "assistant", "user")], ["a"])
    chatml = SCORERS["rlhflow"](tokenizers_.qwen(prm_models.TEXTS))
    with pytest.raises(RowProblem, match="this template ends in the ids"):
        chatml.encode(PROBLEM, ["a"])


@pytest.mark.parametrize("name, message", [
    ("math_shepherd", "does not say how it is read; it has no head beside it"),
    ("skywork", "Skywork's --scorer skywork")])
def test_what_no_file_says_is_asked_for(public, name, message):
    with pytest.raises(ValueError, match=message):
        load_scoring_model(str(public[name][0]))


def test_a_head_that_does_not_fit_is_one_line(public):
    with pytest.raises(ValueError, match="has no head for scorer skywork"):
        load_scoring_model(str(public["math_shepherd"][0]), "skywork")
    with pytest.raises(ValueError, match="scorer must be auto or one of"):
        load_scoring_model(str(public["qwen"][0]), "qwem")
    with pytest.raises(ValueError, match="there is no directory ./nowhere"):
        load_scoring_model("./nowhere")
