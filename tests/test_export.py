"""`svpo export`: names and keys of each layout, the same scores from it; `svpo_head.json` and its plain reader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import prm_models
import pytest
import tokenizers_
import torch
import transformers as hf
from prm_models import PROBLEM, SOLUTIONS
from safetensors.torch import load_file
from test_score import HEADS
from test_scorers import scored, solutions
from tiny_models import SMALL, one_thread  # noqa: F401
from training_ import make_config
from typer.testing import CliRunner

from svpo_kernels.cli import main as cli
from svpo_kernels.reasoning.export import export
from svpo_kernels.reasoning.loading import load_scoring_model
from svpo_kernels.trainer import StepModel, SVPOTrainer, head_files
from svpo_kernels.trainer.heads import ClassHead, ValueHead

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM), "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
          "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM)}
TEMPLATES = {"chatml": tokenizers_.CHATML, "llama3": prm_models.LLAMA3.replace("{{- bos_token }}", "")}


def saved(folder, kind="two", family="qwen2", template="chatml"):
    """A model and its head, written by the trainer itself; the head's module."""
    tokenizer = tokenizers_.qwen(prm_models.TEXTS, vocab_size=500)
    tokenizer.chat_template = TEMPLATES[template]
    config, cls = MODELS[family]
    lm = prm_models.randomise(cls(config(**SMALL | {"vocab_size": len(tokenizer)})))
    head = prm_models.randomise(HEADS[kind](lm.config.hidden_size, tokenizer), 1)
    settings = {"preset": "svpo"} if kind == "value" else {
        "objective": "prm", "head": head.kind, "head_outputs": 1 if kind == "one" else 2,
        "head_hidden_layer": kind == "hidden layer"}
    arguments = make_config(folder, step_separator="\n\n", **settings)
    trainer = SVPOTrainer(StepModel(lm, head), arguments, processing_class=tokenizer,
                          ref_model=StepModel(lm, False) if kind == "value" else None)
    trainer.save_model(str(folder))
    return lm, head, tokenizer


def ids_and_scores(folder):
    """The ids of a whole solution, the rows where its steps are read, and our scores there."""
    model = load_scoring_model(str(folder))
    readings = model.scorer.encode(PROBLEM, SOLUTIONS[0])
    return readings[-1].ids, [reading.positions[0] for reading in readings], scored(model, solutions([SOLUTIONS[0]]))[0]


def test_a_hidden_layer_on_qwen_becomes_vllms_reward_classes(tmp_path):
    saved(tmp_path / "model", "hidden layer")
    said = []
    export(str(tmp_path / "model"), tmp_path / "out", "vllm", say=said.append)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForProcessRewardModel"] and config["num_labels"] == 2
    assert config["model_type"] == "qwen2"
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"} == {
        name for name in names if name.startswith("score.")}
    assert all(name.startswith(("model.", "score.")) for name in names) and "model.norm.weight" in names
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1  # vLLM reads every one of them
    # the card's own code of that class reads it: the names are those of Qwen2.5-Math-PRM
    theirs = prm_models.QwenPRM(hf.Qwen2Config(**{key: config[key] for key in SMALL if key in config}
                                               | {"rope_parameters": config["rope_parameters"]})).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    ids, rows, ours = ids_and_scores(tmp_path / "model")
    with torch.no_grad():
        probabilities = theirs(torch.tensor([ids]))[0][0].softmax(-1)[rows, 1]
    torch.testing.assert_close(torch.tensor(ours[0]), probabilities, rtol=2e-5, atol=2e-6)
    assert any("SGLang's class of this name pools the last row" in line for line in said)


def test_one_output_becomes_the_other_reward_class(tmp_path):
    lm, _, tokenizer = saved(tmp_path / "model", "hidden layer")
    head = prm_models.randomise(ClassHead(lm.config.hidden_size, 1, True))
    head_files.write("class", head.state_dict(), head_files.description(tmp_path / "model") | {
        "activation": "sigmoid", "outputs": 1}, tmp_path / "model")
    export(str(tmp_path / "model"), tmp_path / "out", "vllm", say=lambda text: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForRewardModel"] and config["num_labels"] == 1
    assert load_file(tmp_path / "out" / "model.safetensors")["score.2.weight"].shape == (1, 32)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("kind", ["two", "one", "value"])
def test_a_plain_head_becomes_a_token_classifier(tmp_path, kind, family):
    saved(tmp_path / "model", kind, family)
    export(str(tmp_path / "model"), tmp_path / "out", "vllm", say=lambda text: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = {"qwen2": "Qwen2ForTokenClassification", "llama": "LlamaForTokenClassification"}[family]
    assert config["architectures"] == [name]
    theirs, info = hf.AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == name and theirs.config.num_labels == (2 if kind == "two" else 1)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {"score.weight", "score.bias"} < set(load_file(tmp_path / "out" / "model.safetensors"))
    ids, rows, ours = ids_and_scores(tmp_path / "model")
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor([ids])).logits[0, rows]
    served = logits.softmax(-1)[:, 1] if kind == "two" else logits[:, 0].sigmoid()
    torch.testing.assert_close(torch.tensor(ours[0]), served, rtol=2e-5, atol=2e-6)
    contract = json.loads((tmp_path / "out" / "svpo_head.json").read_text())
    assert contract["served_as"]["architecture"] == name and contract["weights"] is None


@pytest.mark.parametrize(("layout", "file"), [("mario", "value_head.pth"),
                                              ("llamafactory", "value_head.safetensors")])
@pytest.mark.parametrize("kind", ["value", "two"])
def test_value_heads_at_the_top(tmp_path, layout, file, kind):
    saved(tmp_path / "model", kind)
    export(str(tmp_path / "model"), tmp_path / "out", layout, say=lambda text: None)
    read = load_file(tmp_path / "out" / file) if file.endswith("safetensors") else torch.load(
        tmp_path / "out" / file, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        "v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)}
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _, _, ours = ids_and_scores(tmp_path / "model")
    (tmp_path / "out" / "svpo_head.json").unlink()
    _, _, again = ids_and_scores(tmp_path / "out")  # the scorer takes a value head at the top up
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(again[0]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("kind", "family", "layout", "message"), [
    ("tokens", "qwen2", "vllm", "head of kind token, which has no weights to export"),
    ("hidden layer", "llama", "vllm", r"on qwen2 alone \(Qwen2For.*, Qwen2ForProcess.*\), not on llama"),
    ("two", "olmo2", "vllm", r"\*ForTokenClassification, and transformers has none for olmo2"),
    ("hidden layer", "qwen2", "mario", "hidden layer .* is no value head, which is all that mario reads"),
    ("two", "qwen2", "sglang", "as must be one of vllm, mario, llamafactory, got 'sglang'")])
def test_what_no_layout_holds_is_refused_by_name(tmp_path, kind, family, layout, message):
    saved(tmp_path / "model", kind, family)
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "model"), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_files_or_without_a_head_is_refused(tmp_path):
    lm, _, _ = saved(tmp_path / "model")
    with pytest.raises(FileExistsError, match="name an empty directory"):
        export(str(tmp_path / "model"), tmp_path / "model", "vllm")
    lm.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no head beside the model"):
        export(str(tmp_path / "bare"), tmp_path / "out", "vllm")
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path / "bare"), str(tmp_path / "out"), "--as", "vllm"])
    assert result.exit_code == 1 and "has no head beside" in result.output and result.output.count("\n") == 1
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--as", "vllm"])
    assert result.exit_code == 0 and "Qwen2ForTokenClassification, 2 labels" in result.output


# -- the contract ------------------------------------------------------------------------------------------------------


def plain_reader():
    """The reader of the guide, as printed."""
    text = (ROOT / "docs" / "guides" / "prm.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "svpo_head.json" in block)
    assert "svpo_kernels" not in code and sum(bool(line.strip()) for line in code.splitlines()) <= 24
    found = {}
    exec(compile(code, "prm.md", "exec"), found)
    return found["step_scores"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["two", "one", "value"])
def test_a_reader_in_plain_transformers_needs_the_contract_alone(tmp_path, kind, template):
    saved(tmp_path / "model", kind, template=template)
    read = plain_reader()
    for steps in SOLUTIONS:
        ours, _ = scored(load_scoring_model(str(tmp_path / "model")), solutions([steps]))
        found = torch.tensor(read(str(tmp_path / "model"), PROBLEM, steps))
        found = (found + 1) / 2 if kind == "value" else found
        torch.testing.assert_close(torch.tensor(ours[0]), found, rtol=2e-5, atol=2e-6)


def test_the_contract_says_all_of_it(tmp_path):
    _, head, tokenizer = saved(tmp_path / "model", "hidden layer")
    found = head_files.description(tmp_path / "model")
    assert found == {
        "version": 1, "kind": "class", "outputs": 2, "hidden_layer": True, "activation": "softmax", "good": 1,
        "range": [0.0, 1.0], "weights": "class_head.safetensors", "hidden": found["hidden"],
        "position": found["position"], "step_separator": "\n\n", "step_end": "", "turn_end": "auto",
        "turn_start": "auto", "chat_template": tokenizer.chat_template, "chat_template_kwargs": {}, "opening": "",
        "generation_dropped": 0, "end_of_turn": "<|im_end|>", "add_special_tokens": False}
    assert (tmp_path / "model" / "svpo" / found["weights"]).is_file()
    value = ValueHead(32)
    assert value.activation == "tanh" and head.activation == found["activation"]


def test_implicit_rewards_leave_a_contract_too(tmp_path):
    tokenizer = tokenizers_.qwen(prm_models.TEXTS, vocab_size=500)
    lm = prm_models.randomise(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)})))
    config = make_config(tmp_path, objective="implicit_prm", beta=0.1, model_name_or_path=str(tmp_path / "start"))
    lm.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = SVPOTrainer(StepModel(lm, False), config, processing_class=tokenizer, ref_model=StepModel(lm, False))
    trainer.save_model(str(tmp_path / "model"))
    found = head_files.description(tmp_path / "model")
    assert (found["kind"], found["beta"], found["reference"]) == ("implicit", 0.1, str(tmp_path / "start"))
    scores, _ = scored(load_scoring_model(str(tmp_path / "model")), solutions())
    assert set(sum(scores, [])) == {0.5}  # the model is its reference still
