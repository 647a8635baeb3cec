"""Encoded trees on disk: what tokenising a file gave, as arrays that are mapped into memory instead of read.

A folder holds ids.npy (int32, every id once), nodes.npy, trees.npy, texts.npy, pairs.npy, logps.npy and about.json with
a hash of each. Its name is a fingerprint of the file, the tokenizer, the options and the code that made it, so what is
found under it is what encoding anew would give.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svpo_kernels.trees.pair_counts import pairs_of_all
from svpo_kernels.trees.paths import Paths
from svpo_kernels.trees.tree import StepNode, StepTree

from .load import EncodedData

ABOUT, PREFIX = "about.json", "encoded-"
NUMBERS = ("q_value", "visits", "prior", "ref_logp")  # NaN: None
NODE = np.dtype([("parent", "i4"), ("start", "i4"), ("length", "i4"), ("value_end", "i4"), ("terminal", "?"),
                 ("has_logps", "?"), *((name, "f8") for name in NUMBERS), ("text_end", "i8")])
TREE = np.dtype([("nodes", "i8"), ("ids", "i8"), ("pairs", "i8"), ("given", "?"), ("correct", "i1")])  # ends of each
PACKAGES = ("transformers", "tokenizers", "jinja2")


@dataclass
class Encoded:
    """Token trees of a file: trees; given, the pairs that each row has itself (None: a rule chooses); correct, whether
    the row says that its final answer is; summary, the ledger's line; format, the name of the file's."""

    trees: list[StepTree]
    given: list[Tensor | None]
    correct: list[bool | None]
    summary: str
    format: str

    @classmethod
    def of(cls, data: EncodedData) -> Encoded:
        return cls(data.trees, [example.pairs for example in data.examples],
                   [example.record.meta.get("final_answer_correct") for example in data.examples],
                   data.ledger.summary(), data.examples[0].record.format)

    def counted_pairs(self, rule: str, min_gap: float, max_pairs: int | None, *, dedup: bool,
                      same_kind: bool) -> tuple[list[Tensor], list[str]]:
        """One (P, 2) per tree, and what the rule dropped, in lines."""
        return pairs_of_all(self.trees, self.given, rule, min_gap, max_pairs, dedup=dedup, same_kind=same_kind)


def fingerprint(path: str, tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    """A name for what encoding this file gives; None where that cannot be told: no local file, a slow tokenizer."""
    if not os.path.exists(path) or not getattr(tokenizer, "is_fast", False):
        return None
    digest = hashlib.blake2b(digest_size=12)
    own = Path(__file__).parent
    code = [*own.rglob("*.py"), *(own.parent / "trees" / name for name in ("text.py", "template.py", "tree.py"))]
    for name in sorted(code) + sorted(_files(path)):
        digest.update(f"{name.name} {name.stat().st_size}\n".encode())
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    known = dict(options)
    if "strftime_now" not in str(tokenizer.chat_template):
        known.pop("template_date", None)  # no template asks for the day
    says = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map, known,
            {package: importlib.metadata.version(package) for package in PACKAGES}]
    digest.update(json.dumps(says, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _files(path: str) -> list[Path]:
    return [Path(path)] if os.path.isfile(path) else [found for found in Path(path).rglob("*") if found.is_file()]


def write(folder: Path, data: Encoded) -> None:
    """Write a folder as a whole or not at all. Raises OSError."""
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        arrays = _arrays(data)
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array)
        about = {"summary": data.summary, "format": data.format,
                 "hashes": {name: _hash(scratch / f"{name}.npy") for name in arrays}}
        (scratch / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _arrays(data: Encoded) -> dict[str, np.ndarray]:
    nodes = np.zeros(sum(map(len, data.trees)), dtype=NODE)
    trees = np.zeros(len(data.trees), dtype=TREE)
    texts: list[bytes] = []
    logps: list[float] = []
    end = 0
    steps = [(tree, i) for tree in data.trees for i in range(len(tree))]
    for at, (tree, i) in enumerate(steps):
        step = tree.nodes[i]
        text = b"" if step.text is None else step.text.encode("utf-8", "surrogatepass")
        texts.append(text)
        end += len(text)
        numbers = (np.nan if getattr(step, name) is None else float(getattr(step, name)) for name in NUMBERS)
        logps += () if step.old_logps is None else map(float, step.old_logps)
        nodes[at] = (step.parent, tree.start[i], tree.length[i], -1 if step.value_end is None else step.value_end,
                     step.terminal, step.old_logps is not None, *numbers, ~end if step.text is None else end)
    given = [np.zeros((0, 2), np.int64) if pairs is None else np.asarray(pairs, np.int64) for pairs in data.given]
    trees["nodes"] = np.cumsum([len(tree) for tree in data.trees])
    trees["ids"] = np.cumsum([len(tree.paths.ids) for tree in data.trees])
    trees["pairs"] = np.cumsum([len(pairs) for pairs in given])
    trees["given"] = [pairs is not None for pairs in data.given]
    trees["correct"] = [-1 if correct is None else correct for correct in data.correct]
    return {"ids": np.concatenate([tree.paths.ids for tree in data.trees]), "nodes": nodes, "trees": trees,
            "texts": np.frombuffer(b"".join(texts), np.uint8), "pairs": np.concatenate(given),
            "logps": np.array(logps, np.float64)}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read(folder: Path) -> Encoded | str:
    """What `write` wrote, its ids mapped, or why it cannot be had."""
    if not folder.is_dir():
        return "there is none"
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        for name, known in about["hashes"].items():
            if _hash(folder / f"{name}.npy") != known:
                return f"{name}.npy is not what was written"
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in about["hashes"]}
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read ({str(error).splitlines()[0]})"
    trees, given = [], []
    node_begin = ids_begin = pairs_begin = text_begin = logps_begin = 0
    for node_end, ids_end, pairs_end, known, _ in arrays["trees"].tolist():
        rows = arrays["nodes"][node_begin:node_end]
        tree, text_begin, logps_begin = _tree(rows, arrays["ids"][ids_begin:ids_end], arrays, text_begin, logps_begin)
        trees.append(tree)
        given.append(torch.from_numpy(arrays["pairs"][pairs_begin:pairs_end].copy()) if known else None)
        node_begin, ids_begin, pairs_begin = node_end, ids_end, pairs_end
    correct = [None if value < 0 else bool(value) for value in arrays["trees"]["correct"].tolist()]
    return Encoded(trees, given, correct, about["summary"], about["format"])


def _tree(rows: np.ndarray, ids: np.ndarray, arrays: dict[str, np.ndarray], text_at: int,
          logps_at: int) -> tuple[StepTree, int, int]:
    """The tree of these rows of nodes, and where the next one's texts and log-probs begin."""
    nodes: list[StepNode] = []
    texts, logps = arrays["texts"], arrays["logps"]
    own = rows["length"] - rows["start"]
    first = np.concatenate([[0], len(ids) - int(own.sum()) + np.concatenate([[0], np.cumsum(own)])])
    for parent, start, length, value_end, terminal, has_logps, q, visits, prior, ref, end in rows.tolist():
        text = None
        if end >= 0:
            text, text_at = texts[text_at:end].tobytes().decode("utf-8", "surrogatepass"), end
        old = logps[logps_at:logps_at + length - start].tolist() if has_logps else None
        logps_at += length - start if has_logps else 0
        visits, prior, ref, q = (None if x != x else x for x in (visits, prior, ref, q))
        nodes.append(StepNode(parent, None, q, terminal=terminal, prior=prior, ref_logp=ref,
                              visits=int(visits) if visits is not None and visits == int(visits) else visits,
                              old_logps=old, text=text, value_end=None if value_end < 0 else value_end))
    paths = Paths(ids, first, rows["parent"].tolist(), rows["start"].tolist(), rows["length"].tolist())
    return StepTree.from_paths(paths, nodes), text_at, logps_at
