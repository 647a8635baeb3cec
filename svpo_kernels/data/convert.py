"""Writes a data file in one of the three formats of our own: step trees, step pairs, or stepwise labels.

    lines = convert(load("prm800k.jsonl"), "stepwise.jsonl")

What is written reads back as what was read: `trees` holds everything (`flat_tree`), `pairs` every pair with the steps
before it (`step_dpo`), `stepwise` every labelled path from the prompt to a leaf. What a format cannot hold is said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svpo_kernels.trees.pair_counts import PairCounts, count_pairs
from svpo_kernels.trees.tree import StepNode, StepTree, node_path

from .formats import DataError, Record
from .load import DataFile, pair_tensor

KINDS = ("trees", "pairs", "stepwise")
_NODE_KEYS = {"q_value": "q_value", "visits": "visit_count", "prior": "prior", "ref_logp": "ref_logp",
              "token_ids": "token_ids", "old_logps": "old_logps"}


def target(to: str | os.PathLike) -> tuple[str, Path]:
    """(kind, path) of "pairs", "pairs.jsonl" or "out/my_pairs.jsonl". ValueError for another name."""
    path = Path(to)
    stem = path.name.removesuffix(".jsonl")
    kind = next((kind for kind in KINDS if stem.endswith(kind)), None)
    if kind is None or "." in stem:
        raise ValueError(f"convert: to must end in trees.jsonl, pairs.jsonl or stepwise.jsonl, got {to}")
    return kind, path.with_name(f"{stem}.jsonl")


def convert(data: DataFile, to: str | os.PathLike, *, rule: str = "all", min_gap: float = 0.0,
            same_kind: bool = True, step_separator: str = "\n\n") -> list[str]:
    """Writes the records of a file, and says in lines what was written and what was left out.

    rule, min_gap, same_kind: of the pairs, where the rows hold none of their own. step_separator: what stands behind
    every step, where the format does not carry its own white space. The file appears whole or not at all.

    Raises FileExistsError for a path that is there, ValueError for a name that says no kind, DataError for no row.
    """
    kind, path = target(to)
    if path.exists():
        raise FileExistsError(f"{path}: is there already; name another file, or remove it")
    written, notes = {"trees": _trees, "pairs": _pairs, "stepwise": _stepwise}[kind](
        data.records, rule=rule, min_gap=min_gap, same_kind=same_kind, step_separator=step_separator)
    if not written:
        raise DataError(f"{data.path}: nothing to write as {kind}: {'; '.join(notes) or 'no row is left'}")
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    os.replace(partial, path)
    return [f"{path}: {len(written):,} rows of {len(data.records):,} records", *notes]


def text_tree(record: Record) -> StepTree:
    """The tree of a record with a made-up id for every step: pairs are chosen by text and value, not by tokens."""
    return StepTree([0], [
        StepNode(node.parent, [0], node.q_value, terminal=node.terminal, visits=node.visits, text=node.text)
        for node in record.nodes
    ])


def _trees(records: list[Record], **_: Any) -> tuple[list[dict[str, Any]], list[str]]:
    return [_tree_row(record) for record in records], []


def _tree_row(record: Record) -> dict[str, Any]:
    tags, states = _tags(record), {"0": {"text": ""}}
    for tag, node in zip(tags, record.nodes, strict=True):
        state: dict[str, Any] = {"text": node.text, "terminal": node.terminal}
        values = {key: getattr(node, name) for name, key in _NODE_KEYS.items()}
        states[tag] = state | {key: list(value) if isinstance(value, Sequence) else value
                               for key, value in values.items() if value is not None}
    row: dict[str, Any] = {"question" if isinstance(record.prompt, str) else "prompt": record.prompt}
    answer = record.meta.get("answer", record.meta.get("final_answer"))
    more = {"answer": answer, "step_separator": record.step_separator, "prompt_ids": record.prompt_ids}
    if record.pairs is not None:
        more["pairs"] = [[tags[chosen], tags[rejected]] for chosen, rejected in record.pairs]
    return row | {key: value for key, value in more.items() if value is not None} | {"rstar": states}


def _tags(record: Record) -> list[str]:
    """"0.2.1" for every node: its place among its siblings, below its parent's."""
    count, tags = [0] * (len(record.nodes) + 1), []
    for node in record.nodes:
        tags.append(f"{tags[node.parent] if node.parent >= 0 else '0'}.{count[node.parent]}")
        count[node.parent] += 1
    return tags


def _pairs(records: list[Record], *, rule: str, min_gap: float, same_kind: bool,
           step_separator: str) -> tuple[list[dict[str, Any]], list[str]]:
    rows, without, chosen, given = [], 0, PairCounts(), PairCounts()
    for record in records:
        own = pair_tensor(record.pairs)
        used, counts = count_pairs(text_tree(record), rule, min_gap, same_kind=same_kind, given=own)
        chosen, given = (chosen + counts, given) if own is None else (chosen, given + counts)
        without += not len(used)
        rows += _pair_rows(record, used.tolist(), step_separator)
    notes = [f"{without:,} records hold no pair and were left out"] if without else []
    notes += _said_of_ids(records) + chosen.lines(same_kind=same_kind) + given.lines(given=True)
    return rows, notes


def _pair_rows(record: Record, pairs: list[list[int]], separator: str) -> Iterator[dict[str, Any]]:
    separator = separator if record.step_separator is None else record.step_separator
    texts = [node.text + ("" if node.terminal else separator) for node in record.nodes]
    for chosen, rejected in pairs:
        prefix = "".join(texts[i] for i in node_path(record.nodes, record.nodes[chosen].parent))
        ends = {f"{name}_terminal": record.nodes[i].terminal
                for name, i in (("chosen", chosen), ("rejected", rejected))}
        yield {"prompt": record.prompt, "initial_reason_steps": prefix, "chosen": texts[chosen],
               "rejected": texts[rejected], **ends}


def _stepwise(records: list[Record], **_: Any) -> tuple[list[dict[str, Any]], list[str]]:
    rows, bare, repeated = [], 0, 0
    for record in records:
        inner, seen = {node.parent for node in record.nodes}, set()
        leaves = [node_path(record.nodes, i) for i in range(len(record.nodes)) if i not in inner]
        paths = [path for path in leaves if any(record.nodes[i].q_value is not None for i in path)]
        bare += len(leaves) - len(paths)
        for path in paths:
            repeated += sum(i in seen and record.nodes[i].q_value is not None for i in path)
            seen.update(path)
            rows.append(_chain_row(record, path))
    notes = [f"{bare:,} solutions hold no label and were left out"] if bare else []
    if repeated:
        notes.append(f"{repeated:,} labels stand more than once: paths of one tree share their first steps "
                     "(trees.jsonl holds each once)")
    return rows, notes + _said_of_ids(records)


def _chain_row(record: Record, path: list[int]) -> dict[str, Any]:
    nodes = [record.nodes[i] for i in path]
    labels = [None if node.q_value is None else round((node.q_value + 1) / 2, 12) for node in nodes]
    row = {"prompt": record.prompt, "completions": [node.text for node in nodes], "labels": labels,
           "terminal": nodes[-1].terminal}
    if any(node.visits is not None for node in nodes):
        row["trials"] = [node.visits for node in nodes]
    if record.step_separator is not None:
        row["step_separator"] = record.step_separator
    return row


def _said_of_ids(records: list[Record]) -> list[str]:
    held = sum(record.prompt_ids is not None for record in records)
    text = f"{held:,} records hold generated ids, which only trees.jsonl keeps: their text was written"
    return [text] if held else []
