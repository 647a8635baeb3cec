"""PRM scores at the step ends: random rows, and 8 responses a problem of best_of_8.jsonl (made ones without it)."""

from __future__ import annotations

import json

import pytest

from svpo_kernels.bench import prm

from .trees import data_folder, tokenizers_

FAMILY = "prm"
SEPARATOR = "\n\n"


def test_race(record, rates, case) -> None:
    record(prm.run(case, rates))


@pytest.mark.skipif(not data_folder().is_dir(), reason="the real samples are not here; set SVPO_DATA to their folder")
def test_best_of_8(record, rates, scale: str) -> None:
    record(prm.run(best_of_8(problems=4 if scale == "cpu" else 1), rates))


def best_of_8(problems: int) -> prm.Responses:
    """The first problems of the file; a step ends where a blank line does, found by character offset."""
    rows = [json.loads(line) for line in (data_folder() / "best_of_8.jsonl").read_text().splitlines()[:problems]]
    texts = [row["question"] + SEPARATOR + code for row in rows for code in row["code"]]
    tokenizer = tokenizers_.qwen(texts)
    ids, ends = [], []
    starts = [len(row["question"]) + len(SEPARATOR) for row in rows for _ in row["code"]]
    for text, start in zip(texts, starts, strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids.append(encoded["input_ids"])
        ends.append(step_ends(text, start, encoded["offset_mapping"]))
    return prm.Responses(ids, ends, f"{problems} problems of best_of_8.jsonl")


def step_ends(text: str, start: int, offsets: list[tuple[int, int]]) -> list[int]:
    """Index of the token that holds the last character of every step."""
    found, at = [], start
    while at < len(text):
        cut = text.find(SEPARATOR, at)
        end = len(text) if cut < 0 else cut
        if text[at:end].strip():
            found.append(next(i for i, (a, b) in enumerate(offsets) if a < end <= b))
        at = end + len(SEPARATOR)
    return list(dict.fromkeys(found))
