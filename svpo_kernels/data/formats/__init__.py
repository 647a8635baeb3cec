"""Data formats: one reader each, one table of them all.

Read `record.py` (what a reader yields), then `files.py` (rows of a file), then the readers. To add a format, write
`read(row, options) -> Record` and add a line to `FORMATS`; detection, line numbers, counting and the audit follow.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import chains, chats, pairs, process, trees
from .record import DataError, Message, ReadOptions, Record, Row, RowProblem, ValueScale, printable

__all__ = [
    "FORMATS",
    "DataError",
    "Format",
    "Message",
    "ReadOptions",
    "Record",
    "Row",
    "RowProblem",
    "ValueScale",
    "detect",
    "unknown",
]

_ANSWER_LEAF = "a leaf that states an answer (\\boxed, ####, # Answer, 'answer is', <answer>)"
_BOTH = "both completions"


def _no_mark(row: dict[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class Format:
    """One format. keys: groups of keys, one of each group must be in a row. mark: what a row with those keys lacks
    still to be of this format, None when nothing. numeric: its values are numbers on a scale, which `value_range` may
    override. terminal: which steps end a solution, in words. labels: its values are labels of steps, what a process
    reward model is trained on. join: makes one record of rows that belong together, and names those it leaves out."""

    name: str
    title: str
    keys: tuple[tuple[str, ...], ...]
    read: Callable[[dict[str, Any], ReadOptions], Record]
    scale: ValueScale | None = None
    numeric: bool = False
    terminal: str = _ANSWER_LEAF
    mark: Callable[[dict[str, Any]], str | None] = _no_mark
    labels: bool = False
    join: Callable[[list[Record]], tuple[list[Record], list[tuple[Record, RowProblem]]]] | None = None

    def has_keys(self, row: dict[str, Any]) -> bool:
        return all(any(key in row for key in group) for group in self.keys)

    def describe_keys(self) -> str:
        return ", ".join(" or ".join(group) for group in self.keys)

    def includes(self, other: Format) -> bool:
        """Whether a row with these keys has the other's too."""
        own = {key for group in self.keys for key in group}
        return other is not self and all(own & set(group) for group in other.keys)


def _keys(groups: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group.split("|")) for group in groups.split())


def _is(kinds: type | tuple[type, ...], **names: str) -> Callable[[dict[str, Any]], str | None]:
    """A mark: the values under these keys are of these kinds; `names` says each in words."""

    def mark(row: dict[str, Any]) -> str | None:
        return next((f"{key} as {what}" for key, what in names.items() if not isinstance(row.get(key), kinds)), None)

    return mark


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("nested_tree", "nested step tree", _keys("question reasoning_steps"), trees.read_nested, trees.MC_VALUE,
               True, mark=_is(dict, reasoning_steps="one root with text and children")),
        Format("flat_tree", "flat step tree by tag", _keys("question|prompt rstar|react"), trees.read_flat,
               trees.Q_VALUE, True, "a leaf with a final_answer, unless the search gave up there"),
        Format("omegaprm", "OmegaPRM prefixes", _keys("question reasoning_steps"), trees.read_prefixes, trees.MC_VALUE,
               True, mark=trees.mark_prefixes),
        Format("step_dpo", "Step-DPO pairs", _keys("prompt initial_reason_steps chosen rejected"), pairs.read_step_dpo,
               terminal=_ANSWER_LEAF),
        Format("trl_pairs", "TRL pairs", _keys("prompt chosen rejected"), pairs.read_trl, terminal=_BOTH),
        Format("rstar_pairs", "rStar pairs", _keys("prompt pos neg"), pairs.read_rstar,
               terminal="a text that does not stop at <end_of_step>"),
        Format("sharegpt_pairs", "ShareGPT pairs", _keys("conversations|messages chosen rejected"), chats.read_sharegpt,
               terminal=_BOTH, mark=chats.mark_sharegpt),
        Format("swift_pairs", "ms-swift pairs", _keys("messages rejected_response"), chats.read_swift, terminal=_BOTH,
               mark=chats.mark_swift),
        Format("hh_rlhf", "hh-rlhf transcripts", _keys("chosen rejected"), chats.read_hh, terminal=_BOTH,
               mark=chats.mark_hh),
        Format("implicit_pairs", "pairs of messages with the prompt inside", _keys("chosen rejected"),
               chats.read_implicit, terminal=_BOTH, mark=chats.mark_implicit),
        Format("orca_pairs", "orca_dpo pairs", _keys("question|input chosen rejected"), chats.read_orca,
               terminal=_BOTH, mark=chats.mark_orca),
        Format("alpaca_pairs", "Alpaca pairs", _keys("instruction chosen rejected"), chats.read_alpaca, terminal=_BOTH,
               mark=chats.mark_alpaca),
        Format("openai_pairs", "OpenAI preferences", _keys("input preferred_output non_preferred_output"),
               chats.read_openai, terminal=_BOTH, mark=chats.mark_openai),
        Format("helpsteer", "HelpSteer preferences",
               _keys("context|prompt response1|response_1 response2|response_2 overall_preference|preference_strength"),
               chats.read_helpsteer, terminal=_BOTH, mark=chats.mark_helpsteer),
        Format("ultrainteract", "UltraInteract pairs", _keys("trajectory chosen rejected"), chats.read_ultrainteract,
               terminal="both actions", mark=chats.mark_ultrainteract, join=chats.join_trees),
        Format("kto", "KTO", _keys("prompt completion label"), chats.read_kto, chats.JUDGED, terminal="every answer",
               mark=chats.mark_kto, join=chats.join_kto),
        Format("kto_chat", "KTO chats", _keys("messages|conversations label|kto_tag"), chats.read_kto_chat,
               chats.JUDGED, terminal="every answer", mark=chats.mark_kto_chat, join=chats.join_kto),
        Format("prm800k", "PRM800K", _keys("question label"), process.read_prm800k, process.RATING, True,
               mark=_is(dict, question="an object with problem", label="an object with steps"), labels=True),
        Format("math_shepherd", "Math-Shepherd", _keys("input label"), process.read_math_shepherd, process.SIGN,
               mark=_is(str, input="a text with step tags", label="the same text with + and -"), labels=True),
        Format("openr", "OpenR rows", _keys("question process label|labels"), chains.read_openr, process.SIGN,
               mark=chains.mark_openr, labels=True),
        Format("chat_process", "chats of steps and + or -", _keys("conversations|messages"), chains.read_chat_process,
               process.SIGN, mark=chains.mark_chat_process, labels=True),
        Format("stepwise", "stepwise labels", _keys("prompt completions labels"), process.read_stepwise, process.LABEL,
               True, mark=_is(list, completions="a list of steps", labels="a list of labels"), labels=True),
        Format("processbench", "ProcessBench", _keys("problem steps label"), process.read_processbench,
               process.FIRST_ERROR, mark=_is(list, steps="a list of texts"), labels=True),
    )
}

# Rows that people bring and that no one rule makes into pairs or trees: (keys, what to make of them).
_CONVERSIONS = (
    (("helpfulness", "correctness"), "five scores an answer: choose one, and write better and worse answers of a "
     "prompt as prompt, chosen, rejected"),
    (("instruction", "response", "parent_id"), "right actions only: UltraInteract_pair has the wrong ones beside them"),
    (("instruction", "completions"), "scored completions: choose a score, and write prompt, chosen, rejected"),
    (("chosen", "rejected"), "texts without their prompt: split what both begin with off, as prompt"),
    (("question", "responses"), "several answers to a question: `svpo score` reads them; or write the better and the "
     "worse as prompt, chosen, rejected"),
    (("question", "pred", "score"), "scored answers to a question: `svpo score` reads them; or write the better and "
     "the worse as prompt, chosen, rejected"),
    (("label",), "one label a row: with the answer's text it is prompt, completion, label (true or false)"),
    (("messages",), "one answer and no judgement: a second, worse answer makes it prompt, chosen, rejected"),
    (("conversations",), "one answer and no judgement: a second, worse answer makes it conversations, chosen, "
     "rejected"),
    (("instruction", "output"), "one answer and no judgement: a second, worse answer makes it instruction, chosen, "
     "rejected"),
    (("prompt", "completion"), "one answer and no judgement: label (true or false) makes it KTO"),
)


@functools.lru_cache(maxsize=1024)
def _with_keys(keys: frozenset[str]) -> tuple[Format, ...]:
    return tuple(f for f in FORMATS.values() if all(any(key in keys for key in group) for group in f.keys))


def detect(row: dict[str, Any]) -> Format | None:
    """The format whose keys and marks the row has, None when there is none.

    Raises RowProblem when two formats fit and neither's keys include the other's.
    """
    found = [f for f in _with_keys(frozenset(row)) if f.mark(row) is None]
    found = [f for f in found if not any(g.includes(f) and not f.includes(g) for g in found)]
    if len(found) > 1:
        names = " and ".join(f"{f.title} ({f.describe_keys()})" for f in found)
        raise RowProblem("two formats in one row", f"the row has the keys of {names}; name the format")
    return found[0] if found else None


def unknown(row: dict[str, Any]) -> str:
    """What to say of a row of no known format: its keys, the nearest format and what it lacks, what to make of it."""
    near = max(FORMATS.values(), key=lambda f: _closeness(f, row))
    missing = [" or ".join(group) for group in near.keys if not any(key in row for key in group)]
    if missing:
        lack = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    else:
        lack = f"it needs {near.mark(row)}"
    text = (f"unknown format: the row has the keys {printable(', '.join(map(str, row))) or 'none'}; the nearest is "
            f"{near.name} ({near.title}: {near.describe_keys()}), {lack}")
    for keys, advice in _CONVERSIONS:
        if all(key in row for key in keys):
            text += f"; this looks like {advice}"
            break
    return f"{text}; known are {', '.join(FORMATS)}"


def _closeness(found: Format, row: dict[str, Any]) -> tuple[float, int]:
    """Share of a format's keys that a row has, a similar key counting half; of equals, the one with more keys."""
    share = 0.0
    for group in found.keys:
        if any(key in row for key in group):
            share += 1.0
        else:
            share += 0.5 * max((difflib.SequenceMatcher(None, key, str(own)).ratio() for key in group for own in row),
                               default=0.0)
    return share / len(found.keys), len(found.keys)
