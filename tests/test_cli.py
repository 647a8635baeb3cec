"""The command line: help that teaches, errors in one line, and real runs of every command."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers_
import torch
import yaml
from processes import TESTS, environment
from tiny_models import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import svpo_kernels as sk
from svpo_kernels.cli import main as cli
from svpo_kernels.trainer.config import SVPOConfig
from svpo_kernels.trainer.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})


def invoke(*words):
    return runner.invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def tiny_model(shared_data, tmp_path_factory):
    """A model directory: tiny random Llama, BPE tokenizer trained on the sample text."""
    folder = tmp_path_factory.mktemp("model")
    texts = [row["prompt"] for row in json.loads((shared_data / "rstar_pairs.json").read_text())]
    texts += (shared_data / "aps_trees.jsonl").read_text().splitlines()
    tokenizer = tokenizers_.gpt2(texts, vocab_size=600)
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | dict(vocab_size=len(tokenizer), max_position_embeddings=4096))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words, taught", [
    ([], ["svpo demo", "svpo data FILE", "svpo train CONFIG.yaml"]),
    (["train"], ["model_name_or_path:", "min_gap: 0.6", "svpo train run1.yaml learning_rate=5e-7", "torchrun"]),
    (["data"], ["svpo data trees.jsonl --min-gap 0.6", "--tokenizer", "--value-range", "--on-bad"]),
    (["demo"], ["--quick", "--steps", "No file and no download"]),
    (["doctor"], ["versions, devices"]),
])
def test_help_teaches(words, taught):
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for phrase in taught:
        assert phrase in text, phrase


def test_train_lists_its_keys():
    result = invoke("train", "--keys")
    assert result.exit_code == 0, result.output
    given = {key: json.loads(value) for key, value in re.findall(r"^(\w+): (\S+)$", result.output, flags=re.M)}
    config = {field.name: field.default for field in dataclasses.fields(SVPOConfig)}
    assert given == {name: config[name] for name in Settings.__annotations__}
    assert "values: null\n    Steps whose value is trained: those in pairs (pairs)" in result.output


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "settings.yaml"],
                                   ["train", "good.yaml", "learning_rat=3"]])
def test_help_and_a_wrong_key_are_answered_before_torch_is_imported(words, tmp_path):
    (tmp_path / "settings.yaml").write_text("learning_rat: 3\n")
    (tmp_path / "good.yaml").write_text("learning_rate: 3\n")
    code = ("import sys\nfrom svpo_kernels.cli.main import app\ntry:\n    app(sys.argv[1:])\nfinally:\n"
            "    print('heavy:', [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path,
                          env=environment())
    assert "heavy: []" in done.stdout, done.stderr
    assert "--help" in words or "unknown key 'learning_rat'" in done.stderr and "'learning_rate'" in done.stderr


@pytest.mark.parametrize("first", ["import svpo_kernels.linear_step_logps", "import svpo_kernels.tree_attention.blocks",
                                   "from svpo_kernels import step_logps", "from svpo_kernels import *",
                                   "from svpo_kernels.trees import packing", "import svpo_kernels; dir(svpo_kernels)"])
def test_the_public_names_are_the_same_whatever_is_imported_first(first):
    code = (f"{first}\nimport svpo_kernels as sk\nassert set(sk.__all__) <= set(dir(sk))\n"
            "assert all(callable(getattr(sk, name)) for name in sk.__all__ if name.lower() == name != '__version__')\n"
            "try:\n    sk.no_such_name\nexcept AttributeError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "module 'svpo_kernels' has no attribute 'no_such_name'\n", done.stderr


def test_ops_with_the_name_of_their_folder_are_known():
    folders = {path.name for path in Path(sk.__file__).parent.iterdir() if path.is_dir()}
    assert set(sk.SAME_NAME) == folders & set(sk.__all__)


def test_importing_the_package_or_the_command_line_does_not_import_transformers():
    code = "import sys, svpo_kernels, svpo_kernels.cli.main; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS, env=environment(),
                          check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("devices, environment, expected", [
    (0, {}, None), (1, {}, None), (4, {"WORLD_SIZE": "4"}, None), (4, {"LOCAL_RANK": "0"}, None),
    (4, {}, ["--num_processes", "4"])])
def test_more_than_one_gpu_relaunches(devices, environment, expected):
    command = cli.launcher(["train", "run.yaml", "seed=3"], devices, environment)
    if expected is None:
        assert command is None
    else:
        at = command.index("--num_processes")
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        assert command[at : at + 2] == expected and command[-3:] == ["train", "run.yaml", "seed=3"]


@pytest.mark.parametrize("text, words, message", [
    ("train_fil: x", [], "unknown key 'train_fil'"),
    ("{}", ["beta=much"], "beta: invalid float value: 'much'"),
    ("{}", [], "model_name_or_path is missing"),
    ("{model_name_or_path: m}", [], "train_file is missing"),
    ("{model_name_or_path: m, train_file: nowhere.jsonl}", [], "train_file: there is no file nowhere.jsonl"),
])
def test_mistakes_end_in_one_line(tmp_path, text, words, message):
    (tmp_path / "run.yaml").write_text(text)
    result = invoke("train", tmp_path / "run.yaml", f"output_dir={tmp_path}", *words)
    assert result.exit_code == 1
    assert message in result.output and len(result.output.strip().splitlines()) == 1


def test_doctor_lists_every_op_and_device():
    result = invoke("doctor")
    assert result.exit_code == 0
    for word in ("svpo_kernels", "torch", "step_logps", "linear_step_logps", "svpo_loss", "reference", "usable", "cpu",
                 "cuda is not usable"):
        assert word in result.output, word


def test_data_on_the_real_trees(shared_data, tiny_model):
    result = invoke("data", shared_data / "aps_trees.jsonl", "--min-gap", "0.6", "--any-kind", "--tokenizer",
                    tiny_model)
    assert result.exit_code == 0, result.output
    for count in ("143", "90", "24", "29", "108", "20"):
        assert count in result.output, count
    assert "2v - 1" in result.output


def test_data_names_a_bad_row(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 3}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("data", tmp_path / "bad.jsonl")
    assert result.exit_code == 0 and "2 read = 1 kept + 0 truncated + 1 dropped" in result.output
    assert "missing key" in result.output
    stopped = invoke("data", tmp_path / "bad.jsonl", "--on-bad", "error")
    assert stopped.exit_code == 1 and "bad.jsonl:2" in stopped.output.replace("\n", "")


def test_data_that_leave_no_row_end_in_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("not a data file\n" * 400)
    result = invoke("data", tmp_path / "notes.txt")
    assert result.exit_code == 1 and result.output.startswith("error: ") and result.output.count("\n") == 1
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": 3, "rejected": "b"}))
    result = invoke("data", tmp_path / "bad.jsonl")
    assert result.exit_code == 1 and "1 read = 0 kept + 0 truncated + 1 dropped" in result.output
    assert "error: no row is left to train on" in result.output


@pytest.mark.parametrize("words, message", [
    (["min_gap=5"], "rstar_pairs.json has no pair"),
    (["preset=alphamath"], "config: nothing would be trained: value_weight = 0.01 trains nothing: FILE has no step "
     "with a value by values = labelled; sft_weight = 1 trains nothing: FILE has no SFT step by sft_nodes = good"),
    (["backend=triton"], "config: backend: linear_step_logps: backend 'triton' cannot run this call"),
    (["ref_model_name_or_path=./nowhere"], "config: ref_model_name_or_path: there is no directory ./nowhere"),
])
def test_what_cannot_train_ends_before_it_starts(shared_data, tiny_model, tmp_path, words, message):
    file = "aps_trees.jsonl" if words == ["min_gap=5"] else "rstar_pairs.json"
    settings = dict(model_name_or_path=str(tiny_model), train_file=str(shared_data / file), use_cpu=True,
                    output_dir=str(tmp_path / "out"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = invoke("train", tmp_path / "run.yaml", *words)
    message = message.replace("rstar_pairs.json", file).replace("FILE", str(shared_data / file))
    assert result.exit_code == 1 and message in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_tokenizer_that_is_not_there_ends_in_its_message(shared_data):
    result = invoke("data", shared_data / "aps_trees.jsonl", "--tokenizer", "no/such-model")
    assert result.exit_code == 1 and result.output.startswith("error: ") and "Traceback" not in result.output


def test_train_on_the_real_pairs(shared_data, tiny_model, tmp_path):
    """Step pairs without values: Step-DPO, LoRA, in this process."""
    settings = dict(model_name_or_path=str(tiny_model), train_file=str(shared_data / "rstar_pairs.json"),
                    preset="step_dpo", peft="lora", lora_r=4, max_steps=2, pairs_per_step=4, use_cpu=True,
                    output_dir=str(tmp_path / "out"), save_strategy="no", learning_rate=1e-2, disable_tqdm=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = invoke("train", tmp_path / "run.yaml", "seed=3")
    assert result.exit_code == 0, result.output
    assert "5 rows read, 5 kept" in result.output and "rewards/accuracies" in result.output
    out = tmp_path / "out"
    assert (out / "curves.png").is_file() and len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((out / "svpo_config.yaml").read_text())["seed"] == 3
    assert not (out / "value_head.pth").exists()
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.slow
def test_demo_in_its_smallest_form(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "svpo_kernels.cli.main", "demo", "--quick", "--output-dir",
                           str(tmp_path / "made")], capture_output=True, text=True, timeout=300, cwd=TESTS,
                          env=environment(COLUMNS="120"))
    assert done.returncode == 0, done.stderr[-3000:]
    for phrase in ("preference accuracy", "value accuracy", "loss", "naive pairs", "packed trees", "tokens", "FLOPs",
                   "seconds", "curves:"):
        assert phrase in done.stdout, phrase
    assert all(word not in done.stderr for word in ("%|", "Traceback", "Warning")), done.stderr  # no terminal, no bar
    assert (tmp_path / "made" / ".gitignore").read_text() == "*\n"  # git status shows nothing of it
    assert len(list(tmp_path.rglob("curves.png"))) == 1
    print(f"{time.monotonic() - began:.0f} s")
