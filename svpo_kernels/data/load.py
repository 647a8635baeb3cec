"""From a data file to step trees: detect the format, read every row, count every row, tokenise.

    data = load("trees.jsonl")                        # text trees: data.records, data.ledger, data.scale
    encoded = encode(data, tokenizer)                 # token trees: encoded.examples, encoded.ledger
    trees, pairs = encoded.trees, encoded.pairs(rule="all", min_gap=0.6)

or both at once, with an error when no row is left: `read_trees(path, tokenizer)`. Every row of the file is kept whole,
truncated (a part of it is kept) or dropped: kept + truncated + dropped = read, each with line and reason.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from svpo_kernels.trees.pair_counts import pairs_of_all
from svpo_kernels.trees.template import Template
from svpo_kernels.trees.text import TextOptions, build, own_ids
from svpo_kernels.trees.tree import StepNode, StepTree

from .formats import FORMATS, DataError, Format, ReadOptions, Record, Row, RowProblem, ValueScale, detect, unknown
from .formats.files import RawRow, iterate_rows
from .formats.ledger import Issue, Ledger
from .formats.record import with_template_fields
from .messages import left_out, message_tree

__all__ = ["DataFile", "EncodedData", "Example", "Issue", "Ledger", "encode", "load", "read_trees"]

@dataclass
class DataFile:
    """A file as text trees. scale is None for a format whose rows hold no values."""

    path: str
    format: Format
    scale: ValueScale | None
    records: list[Record]
    ledger: Ledger
    options: ReadOptions


@dataclass
class Example:
    """One row as a token tree. pairs: (P, 2) int64 node indices where the format has its own, else None."""

    tree: StepTree
    pairs: Tensor | None
    record: Record


@dataclass
class EncodedData:
    """A file as token trees, rows in the file's order."""

    examples: list[Example]
    ledger: Ledger

    @property
    def trees(self) -> list[StepTree]:
        return [example.tree for example in self.examples]

    def pairs(
        self,
        rule: str = "best_worst",
        min_gap: float = 0.0,
        max_pairs: int | None = None,
        *,
        dedup: bool = True,
        same_kind: bool = True,
    ) -> list[Tensor]:
        """One (P, 2) int64 per tree: the format's own pairs, else `select_pairs` on the mapped values."""
        return self.counted_pairs(rule, min_gap, max_pairs, dedup=dedup, same_kind=same_kind)[0]

    def counted_pairs(
        self,
        rule: str = "best_worst",
        min_gap: float = 0.0,
        max_pairs: int | None = None,
        *,
        dedup: bool = True,
        same_kind: bool = True,
    ) -> tuple[list[Tensor], list[str]]:
        """`pairs`, and what the rule dropped, in lines to be said before training (`trees/pair_counts.py`)."""
        return pairs_of_all(self.trees, [example.pairs for example in self.examples], rule, min_gap, max_pairs,
                            dedup=dedup, same_kind=same_kind)


def load(
    path: str | Path,
    *,
    format: str | None = None,
    value_range: Sequence[float] | None = None,
    on_bad: str = "skip",
    step_tag: str = "ки",
    terminal: str = "answer",
    warn: bool = True,
) -> DataFile:
    """Reads a file, a folder or a hub dataset (`formats/files.py`) of any format in `formats.FORMATS`.

    format: a name from FORMATS; None detects it from the keys of the rows. value_range: (low, high) of the file's
    values where they differ from the format's own scale. on_bad: "skip" drops a bad row and records it, "error" raises
    on the first. step_tag: Math-Shepherd's. terminal: "answer" (leaves that state an answer end a solution) or "leaf"
    (all leaves do), for formats without a mark of their own. warn: log bad rows as they come up.

    Raises DataError (a ValueError) naming file and line for a bad row under on_bad="error", for a file of mixed or
    unknown formats, for one without rows and for one of which no row is JSON; ValueError for a bad argument.
    """
    wanted = _named_format(format)
    options = _options(wanted, value_range, on_bad, step_tag, terminal)
    ledger = Ledger(str(path), warn=warn)
    records: list[Record] = []
    found, first = wanted, RawRow(0, 0, None)
    strangers: list[RawRow] = []
    for raw in iterate_rows(path, ledger.facts):
        ledger.read += 1
        try:
            if raw.problem is not None:
                raise raw.problem
            fits = wanted or detect(raw.value) or (found if found and found.has_keys(raw.value) else None)
            if fits is None:
                strangers.append(raw)
                continue
            if found is None:
                found, first = fits, raw
                options = _options(fits, value_range, on_bad, step_tag, terminal)
            elif fits is not found:
                raise DataError(_mixed(ledger, (found, first), (fits, raw)))
            records.append(_read_row(found, raw, options, ledger))
        except RowProblem as problem:
            ledger.record("dropped", raw.row, raw.line, problem.kind, problem.detail, on_bad)
    if ledger.read == 0:
        raise DataError(
            f"{path}: no rows ({ledger.facts.container}, {len(ledger.facts.blank_lines)} blank lines)"
        )
    if found is None:
        raise DataError(_unknown(ledger, strangers))
    for raw in strangers:  # rows in front of the first that told the format
        try:
            if not found.has_keys(raw.value):
                raise RowProblem("missing key", f"expected the keys of {found.title} ({found.describe_keys()}), got "
                                 f"{', '.join(map(str, raw.value)) or 'none'}")
            records.append(_read_row(found, raw, options, ledger))
        except RowProblem as problem:
            ledger.record("dropped", raw.row, raw.line, problem.kind, problem.detail, on_bad)
    records.sort(key=lambda record: record.row)
    if found.join is not None:
        for record in records:
            record.notes = []  # counted already
        records, left = found.join(records)
        ledger.notes.update(note for record in records for note in record.notes)
        for record, problem in left:
            ledger.leave_out("dropped", record, problem.kind, problem.detail, on_bad)
    ledger.issues.sort(key=lambda issue: issue.row)
    return DataFile(str(path), found, options.scale or found.scale, records, ledger, options)


def _read_row(found: Format, raw: RawRow, options: ReadOptions, ledger: Ledger) -> Record:
    row = Row(raw.value)
    record = with_template_fields(found.read(row, options), row)
    record.format, record.row, record.line = found.name, raw.row, raw.line
    record.unread += row.unread()
    ledger.add(record)
    return record


def _named_format(name: str | None) -> Format | None:
    if name is not None and name not in FORMATS:
        raise ValueError(f"load: format must be one of {', '.join(FORMATS)}, got {name!r}")
    return None if name is None else FORMATS[name]


def _options(
    found: Format | None, value_range: Sequence[float] | None, on_bad: str, step_tag: str, terminal: str
) -> ReadOptions:
    if on_bad not in ("skip", "error"):
        raise ValueError(f"load: on_bad must be 'skip' or 'error', got {on_bad!r}")
    if terminal not in ("answer", "leaf"):
        raise ValueError(f"load: terminal must be 'answer' or 'leaf', got {terminal!r}")
    if not isinstance(step_tag, str) or not step_tag:
        raise ValueError(f"load: step_tag must be a text, got {step_tag!r}")
    if value_range is None:
        return ReadOptions(None, step_tag, terminal)
    low, high = value_range if len(value_range) == 2 else (0, 0)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"load: value_range must be (low, high) with low < high, got {value_range!r}")
    if found is not None and not found.numeric:
        raise ValueError(
            f"load: value_range does not apply to {found.title}, whose rows hold no values on a scale"
        )
    what = f"value_range ({found.scale.what})" if found is not None else "value_range"
    return ReadOptions(ValueScale(float(low), float(high), what), step_tag, terminal)


def _mixed(ledger: Ledger, *two: tuple[Format, RawRow]) -> str:
    places = [f"{ledger.place(raw.row, raw.line)} is {f.title} ({f.describe_keys()})" for f, raw in two]
    return (f"{ledger.path}: mixed formats: {', '.join(places)}; split the file, or name the format to drop the other "
            "rows")


def _unknown(ledger: Ledger, strangers: list[RawRow]) -> str:
    """Of a file without a row in a known format: its first row with other keys, or its first that is no object."""
    if strangers:
        return f"{ledger.where(strangers[0].row, strangers[0].line)}: {unknown(strangers[0].value)}"
    first, rows = ledger.issues[0], "its only row" if ledger.read == 1 else f"none of its {ledger.read} rows"
    verb = "cannot" if ledger.read == 1 else "can"
    return (f"{ledger.path}: {rows} {verb} be read (line {first.line}: {first.detail}); read are JSONL, one object a "
            f"line, JSON, Parquet, and these with gzip, in the formats {', '.join(FORMATS)}")


def encode(
    data: DataFile,
    tokenizer: Any,
    *,
    max_path_tokens: int | None = None,
    on_bad: str = "skip",
    **text: Any,
) -> EncodedData:
    """Tokenises every record as `tree_from_text` does, rows of messages as TRL's DPO does.

    text: the fields of `TextOptions` (step_separator, step_end, turn_end, turn_start, chat_template_kwargs,
    prompt_is_rendered, template_date). step_separator and step_end hold where the format does not carry its own white
    space (pairs do); a row's own chat_template_kwargs and tools come on top. max_path_tokens: a step whose path, prompt
    included, is longer is left out with all that follows it, and the row counts as truncated; a row of which no step is
    left, or not the pair it is there for, is dropped.

    Raises DataError on the first row dropped under on_bad="error", ValueError for a bad argument.
    """
    if max_path_tokens is not None and max_path_tokens < 1:
        raise ValueError(f"encode: max_path_tokens must be at least 1 or None, got {max_path_tokens}")
    if on_bad not in ("skip", "error"):
        raise ValueError(f"encode: on_bad must be 'skip' or 'error', got {on_bad!r}")
    options = TextOptions(**text)
    ledger = copy.deepcopy(data.ledger)
    shared = Template(tokenizer, options.chat_template_kwargs, options.template_date)
    examples = []
    for record in data.records:
        own = _row_options(record, options)
        template = shared
        if record.template_kwargs:
            template = Template(tokenizer, own.chat_template_kwargs, own.template_date)
        try:
            examples.append(_encode_row(record, template, own, max_path_tokens, ledger))
        except RowProblem as problem:
            ledger.leave_out("dropped", record, problem.kind, problem.detail, on_bad)
    ledger.issues.sort(key=lambda issue: issue.row)
    return EncodedData(examples, ledger)


def _row_options(record: Record, options: TextOptions) -> TextOptions:
    own = {} if record.step_separator is None else {"step_separator": record.step_separator, "step_end": ""}
    kwargs = {**options.chat_template_kwargs, **record.template_kwargs}
    return dataclasses.replace(options, chat_template_kwargs=kwargs, **own)


def _encode_row(
    record: Record, template: Template, options: TextOptions, max_path_tokens: int | None, ledger: Ledger
) -> Example:
    tree, said = _tree(template, record, record.nodes, options)
    pairs = record.pairs
    if max_path_tokens is not None and (long := beyond(tree, max_path_tokens)):
        kind = "longer than max_path_tokens"
        what = f"{len(long)} of {len(tree)} steps end beyond {max_path_tokens} tokens on their path"
        nodes, pairs = _without(record, long)
        if not nodes or (record.pairs and not pairs):
            raise RowProblem(kind, f"{what}; no {'pair' if nodes else 'step'} is left")
        sides = record.completions and [side for i, side in enumerate(record.completions) if i not in long]
        tree, said = _tree(template, dataclasses.replace(record, nodes=nodes, completions=sides), nodes, options)
        ledger.leave_out("truncated", record, kind, f"{what} and were left out")
        lost = len(record.pairs or ()) - len(pairs or ())
        ledger.notes.update({"pairs lost with steps beyond max_path_tokens": lost} if lost else {})
    ledger.notes.update(said)
    return Example(tree, pair_tensor(pairs), record)


def pair_tensor(pairs: list[tuple[int, int]] | None) -> Tensor | None:
    """A record's own pairs as (P, 2) int64."""
    return None if pairs is None else torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _tree(template: Template, record: Record, nodes: list[StepNode],
          options: TextOptions) -> tuple[StepTree, list[str]]:
    """The tree of a row and what is to be said of it. What a chat template raises is the row's problem."""
    if record.prompt_ids is not None:  # ids that a model generated are the truth
        return _of_ids(template.tokenizer, record.prompt_ids, nodes), []
    try:
        if record.completions is not None:
            return message_tree(template, record)
        _check_rendered_once(template, record)
        extra = isinstance(record.prompt, list) and any(len(message) > 2 for message in record.prompt)
        if record.template_kwargs.get("tools") and not template.exists:
            raise RowProblem("left out by the template", "the row's tools need a tokenizer with a chat template")
        said = left_out(template, record) if extra or record.template_kwargs.get("tools") else []
        tree, more = build(template, record.prompt, list(nodes), options)
        return tree, said + more
    except RowProblem:
        raise
    except (ValueError, TypeError, TemplateError) as error:
        raise RowProblem("cannot be tokenised", str(error)) from error


def _of_ids(tokenizer: Any, prompt_ids: list[int], nodes: list[StepNode]) -> StepTree:
    """The tree of generated ids, each step's value read at the last token of its own text, as where text is read."""
    tree = StepTree(prompt_ids, nodes)
    ends = [tree.start[i] + own_ids(tokenizer, tree.step_ids(i)) for i in range(len(nodes))]
    return StepTree(prompt_ids, [dataclasses.replace(node, value_end=end) if node.value_end is None else node
                                 for node, end in zip(nodes, ends, strict=True)])


def _check_rendered_once(template: Template, record: Record) -> None:
    """Raises RowProblem for a rendered text beside a system column: the template would put it inside a user's turn."""
    if not isinstance(record.prompt, list) or [m["role"] for m in record.prompt] != ["system", "user"]:
        return
    text = record.prompt[1]["content"]
    if template.exists and isinstance(text, str) and template.rendered(text) is not None:
        raise RowProblem("rendered twice", "the prompt is rendered already, and the row has a system message beside it")


def beyond(tree: StepTree, limit: int) -> set[int]:
    """Nodes whose path is longer than limit tokens, and all nodes under them."""
    long: set[int] = set()
    for i in tree.order:
        if tree.length[i] > limit or tree.nodes[i].parent in long:
            long.add(i)
    return long


def _without(record: Record, gone: set[int]) -> tuple[list[StepNode], list[tuple[int, int]] | None]:
    place = {-1: -1}
    nodes = []
    for i, node in enumerate(record.nodes):
        if i not in gone:
            place[i] = len(nodes)
            nodes.append(dataclasses.replace(node, parent=place[node.parent]))
    pairs = record.pairs
    if pairs is not None:
        pairs = [(place[w], place[l]) for w, l in pairs if w in place and l in place]
    return nodes, pairs


def read_trees(
    path: str | Path,
    tokenizer: Any,
    *,
    format: str | None = None,
    value_range: Sequence[float] | None = None,
    on_bad: str = "skip",
    step_tag: str = "ки",
    terminal: str = "answer",
    max_path_tokens: int | None = None,
    **text: Any,
) -> EncodedData:
    """`load` and `encode` in one; raises DataError with the reasons when no row is left to train on."""
    data = load(
        path, format=format, value_range=value_range, on_bad=on_bad, step_tag=step_tag, terminal=terminal
    )
    encoded = encode(data, tokenizer, max_path_tokens=max_path_tokens, on_bad=on_bad, **text)
    if not encoded.examples:
        raise DataError(f"no row is left to train on: {encoded.ledger.summary()}")
    return encoded
