"""A run that is killed and started again ends bit by bit where the uninterrupted run ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import tokenizers_
import torch
import yaml
from processes import TESTS, environment
from tiny_models import SMALL
from tiny_trees import all_texts, real_texts
from training_ import history_of, make_trainer, small_lm, unequal_data
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from svpo_kernels.trainer import checkpoint, head_files, prm_metrics
from svpo_kernels.trainer.metrics import Sums, as_vector, by_name

pytestmark = pytest.mark.usefixtures("one_thread")


def svpo(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "svpo_kernels.cli.main", *map(str, words)], cwd=TESTS,
                            env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)


def tensors(folder):
    """All weights of a model directory: model and value head."""
    found = {}
    for name in ("model.safetensors", head_files.VALUE_HEAD):
        found.update(safetensors.torch.load_file(folder / name))
    return found


def assert_bitwise(folder, other):
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys() and "v_head.summary.weight" in ours
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def real_run(shared_data, tmp_path_factory):
    """A configuration on the real trees: tiny Llama, tokenizer trained on their text."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = tokenizers_.qwen(all_texts(real_texts(shared_data / "aps_trees.jsonl")), vocab_size=700)
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | dict(vocab_size=len(tokenizer), max_position_embeddings=2048))
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = dict(model_name_or_path=str(folder / "model"), train_file=str(shared_data / "aps_trees.jsonl"),
                    pair_rule="all", min_gap=0.6, same_kind=False, pairs_per_step=24, max_tokens=1500, max_steps=10,
                    logging_steps=3, save_steps=2, save_total_limit=2, learning_rate=1e-3, preset="svpo", use_cpu=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.slow
def test_sigkill_and_resume_on_real_trees(real_run):
    config = real_run / "run.yaml"
    whole = svpo("train", config, f"output_dir={real_run / 'whole'}")
    killed = real_run / "killed"
    run = svpo("train", config, f"output_dir={killed}")
    deadline = time.monotonic() + 280
    while not (killed / "checkpoint-4" / checkpoint.MANIFEST).is_file():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0][-3000:]
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL and not (killed / "model.safetensors").exists()
    assert not (killed / "checkpoint-10").exists() and len(history_of(killed)) < 4  # in the middle
    again = svpo("train", config, f"output_dir={killed}")
    outputs = [process.communicate(timeout=280)[0] for process in (again, whole)]
    assert again.returncode == whole.returncode == 0, outputs
    assert "resuming from" in outputs[0] and "resuming from" not in outputs[1]
    assert_bitwise(killed, real_run / "whole")
    assert [path.name for path in checkpoint.checkpoints(killed)] == ["checkpoint-10", "checkpoint-8"]
    assert history_of(killed) == history_of(real_run / "whole") and len(history_of(killed)) == 4


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "packing": "distinct"},
                                      {"objective": "implicit_prm", "logging_steps": 2}])  # histograms in a window
def test_resume_in_the_middle_of_an_epoch(tmp_path, settings):
    settings = dict(pairs_per_step=9, max_steps=7, save_strategy="steps", save_steps=3, value_head_learning_rate=0.05,
                    lr_scheduler_type="cosine", **settings)
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    again = make_trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(again.gradients.steps) == 4
    again.save_model(str(tmp_path / "again"))
    if again.config.head == "value":
        assert_bitwise(tmp_path / "again", tmp_path / "whole")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("again", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.state.log_history[:-1] == whole.state.log_history[:-1]  # the last holds seconds


def test_sums_of_a_window_come_back_where_they_were(tmp_path):
    """To the bit on as many processes; on another number the first has all of them."""
    torch.manual_seed(0)
    every = [Sums() for _ in range(3)]
    for sums in every:
        sums.add(loss=torch.rand((), dtype=torch.float64), steps=1 / 3,
                 **{name: torch.rand(prm_metrics.BINS, dtype=torch.float64) for name in prm_metrics.HISTOGRAMS})
    checkpoint.write_sums([by_name(sums.vector()) for sums in every], by_name(every[0].vector()), tmp_path)
    windows, total = checkpoint.read_sums(tmp_path)
    assert torch.equal(as_vector(total), every[0].vector())
    for world_size in (3, 2):
        again = [Sums() for _ in range(world_size)]
        for rank, sums in enumerate(again):
            sums.restore(windows, rank, world_size)
        if world_size == 3:
            assert all(torch.equal(ours.vector(), theirs.vector()) for ours, theirs in zip(again, every, strict=True))
        else:
            assert torch.equal(again[0].vector(), sum(sums.vector() for sums in every)) and not again[1].vector().any()


def test_torn_checkpoints_are_passed_over(tmp_path):
    trainer = make_trainer(tmp_path, pairs_per_step=9, max_steps=4, save_strategy="steps", save_steps=1)
    trainer.train()
    newest = [tmp_path / f"checkpoint-{step}" for step in (4, 3, 2)]
    (newest[0] / checkpoint.MANIFEST).unlink()
    weights = newest[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    path, notes = checkpoint.newest_complete(tmp_path)
    assert path == newest[2]
    assert [note.split(":")[0] for note in notes] == ["checkpoint-4 is passed over", "checkpoint-3 is passed over"]
    assert "does not match its hash" in notes[1]
    with pytest.raises(ValueError, match="checkpoint-3.*model.safetensors does not match its hash"):
        make_trainer(tmp_path, pairs_per_step=9).train(resume_from_checkpoint=str(newest[1]))


def test_another_plan_is_refused(tmp_path):
    make_trainer(tmp_path, pairs_per_step=9, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="pairs_per_step was 9 and is 10"):
        make_trainer(tmp_path, pairs_per_step=10, max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="data was"):
        make_trainer(tmp_path, pairs_per_step=9, max_steps=2, data=unequal_data(((2, 3),))).train(
            resume_from_checkpoint=True)


def test_checkpoint_loads_as_it_is(tmp_path):
    """AutoModelForCausalLM takes the directory unchanged; the value head has the keys others read."""
    lm = small_lm()
    trainer = make_trainer(tmp_path, lm=lm, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    head = safetensors.torch.load_file(tmp_path / "checkpoint-1" / "svpo" / "value_head.safetensors")
    top = [path.name for path in (tmp_path / "checkpoint-1").glob("*.safetensors")]
    assert top == ["model.safetensors"]  # vLLM reads all of them
    assert {name: tuple(t.shape) for name, t in head.items()} == {"v_head.summary.weight": (1, 32),
                                                                  "v_head.summary.bias": (1,)}
    assert torch.equal(head["v_head.summary.weight"], trainer.model.v_head.summary.weight)


def test_adapters_resume_and_load(tmp_path):
    """LoRA: the reference is the model without adapters, the checkpoint is an adapter that AutoModel loads."""
    from training_ import make_config

    from svpo_kernels.trainer.model import add_adapters

    small_lm().save_pretrained(tmp_path / "base")

    def trainer():
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(3)
        lm = add_adapters(make_config(tmp_path, peft="lora", lora_r=4), lm)
        return make_trainer(tmp_path / "run", lm=lm, pairs_per_step=9, max_steps=4, save_strategy="steps", save_steps=2,
                            learning_rate=1e-2)

    whole = trainer()
    whole.train()
    assert all("lora_" in name or name.startswith("v_head") for name in whole.gradients.steps[0])
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, ours), (_, theirs) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    ids = torch.arange(1, 9)[None]
    assert torch.allclose(loaded(ids).logits, whole.model.lm(ids).logits, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(loaded(ids).logits, base(ids).logits, atol=1e-4)
