"""Encoded trees are kept on disk: equal to encoding anew, told apart by all that decides them, mended when broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers_
import torch
from test_data import GOOD, with_ids, write
from test_pair_counts import tree as siblings

from svpo_kernels import StepNode, StepTree
from svpo_kernels.data import encoded
from svpo_kernels.data.encoded import Encoded
from svpo_kernels.data.load import read_trees
from svpo_kernels.trainer import run
from svpo_kernels.trainer.config import load_config
from svpo_kernels.trainer.run import load_data
from svpo_kernels.trainer.train_data import TrainData


def states(tree):
    keys = ("parent", "q_value", "terminal", "visits", "prior", "ref_logp", "text")
    return [([getattr(node, key) for key in keys], tree.path(i), tree.start[i], tree.value_end(i),
             node.old_logps if node.old_logps is None else list(node.old_logps)) for i, node in enumerate(tree.nodes)]


def assert_same(ours, theirs):
    assert [states(tree) for tree in ours.trees] == [states(tree) for tree in theirs.trees]
    assert [tree.prompt_ids for tree in ours.trees] == [tree.prompt_ids for tree in theirs.trees]
    assert [tree.order for tree in ours.trees] == [tree.order for tree in theirs.trees]
    for a, b in zip(ours.given, theirs.given, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert (ours.correct, ours.summary, ours.format) == (theirs.correct, theirs.summary, theirs.format)
    pairs = [np.zeros((0, 2))] * len(ours.trees)
    assert TrainData(ours.trees, pairs).fingerprint() == TrainData(theirs.trees, pairs).fingerprint()


@pytest.mark.parametrize("name", sorted(GOOD))
def test_what_is_read_is_what_was_written(tmp_path, name):
    row = json.dumps(GOOD[name])
    data = read_trees(write(tmp_path / "rows.jsonl", GOOD[name], GOOD[name]), tokenizers_.qwen([row], vocab_size=400))
    made = Encoded.of(data)
    encoded.write(tmp_path / "kept", made)
    found = encoded.read(tmp_path / "kept")
    assert_same(found, made)
    base = found.trees[0].paths.ids
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)  # the ids are not in memory but on disk


def test_all_that_a_node_holds_is_kept(tmp_path):
    nodes = [StepNode(-1, [3, 4], 0.25, visits=3, prior=0.5, ref_logp=-1.5, old_logps=[-0.5, -1.0], text="é\ud800"),
             StepNode(0, path_ids=[1, 2, 3, 9], start=3, text="", value_end=1), StepNode(0, [5], -1.0, terminal=True)]
    made = Encoded([StepTree([1, 2], nodes), siblings((0.5, True, "a"), (None, False, None))],
                   [None, torch.tensor([[0, 1]])], [True, None], "two rows", "flat_tree")
    encoded.write(tmp_path / "kept", made)
    encoded.write(tmp_path / "kept", made)  # over what is there
    assert_same(encoded.read(tmp_path / "kept"), made)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_everything_that_decides_the_ids_changes_the_name(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD["nested_tree"])
    tokenizer, other = (tokenizers_.qwen([json.dumps(GOOD["nested_tree"])], vocab_size=size) for size in (400, 300))
    options = dict(format=None, step_end="", template_date="2024-01-01")
    name = encoded.fingerprint(path, tokenizer, options)
    assert name == encoded.fingerprint(path, tokenizer, options | {"template_date": "2025-01-01"})
    names = {name, encoded.fingerprint(path, other, options),
             encoded.fingerprint(path, tokenizer, options | {"step_end": "x"})}
    tokenizer.chat_template += "{{ strftime_now('%Y') }}"
    names |= {encoded.fingerprint(path, tokenizer, options),
              encoded.fingerprint(path, tokenizer, options | {"template_date": "2025-01-01"})}
    write(tmp_path / "rows.jsonl", GOOD["nested_tree"], GOOD["nested_tree"])
    assert len(names | {encoded.fingerprint(path, tokenizer, options)}) == 6 and None not in names
    assert encoded.fingerprint("a/hub-name", tokenizer, options) is None


def test_a_run_encodes_once_and_a_broken_folder_is_made_anew(tmp_path, monkeypatch):
    path = str(write(tmp_path / "rows.jsonl", with_ids(pairs=[["0.0.0", "0.0.1"]])))
    tokenizer = tokenizers_.qwen(["a text"], vocab_size=400)
    calls, said = [], []
    read = run.read_trees
    monkeypatch.setattr(run, "read_trees", lambda *given, **options: calls.append(1) or read(*given, **options))

    def load(**keys):
        said.clear()
        config = load_config(None, (), output_dir=str(tmp_path / "out"), use_cpu=True, **keys)
        data = load_data(config, path, tokenizer, said.append)
        return data.fingerprint(), [line for line in said if "encoded" in line]

    first, lines = load()
    assert len(calls) == 1 and lines == []
    (folder,) = (tmp_path / "out" / "svpo").iterdir()
    again, lines = load()
    assert again == first and len(calls) == 1
    assert lines == [f"{path}: its 1 trees were encoded before and are mapped from {folder}"]
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-4] + b"\0\0\0\0")
    mended, lines = load()
    assert mended == first and len(calls) == 2
    assert lines == [f"{path}: what lies in {folder} is encoded anew: ids.npy is not what was written"]
    elsewhere, _ = load(data_cache=str(tmp_path / "cache"))
    assert elsewhere == first and len(calls) == 3 and len(list((tmp_path / "cache").iterdir())) == 1
    assert load(data_cache="none") == (first, []) and len(calls) == 4


def test_where_it_cannot_be_kept_the_run_goes_on(tmp_path, monkeypatch):
    path = str(write(tmp_path / "rows.jsonl", GOOD["trl_pairs"]))
    config = load_config(None, (), output_dir=str(tmp_path / "out"), use_cpu=True)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoded.np, "save", full)
    said = []
    data = load_data(config, path, tokenizers_.qwen([json.dumps(GOOD["trl_pairs"])], vocab_size=400), said.append)
    assert data.num_pairs == 1 and list((tmp_path / "out" / "svpo").iterdir()) == []
    assert any("its encoded trees are not kept for the next run: [Errno 28]" in line for line in said)
