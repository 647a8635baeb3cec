"""The tokens of many texts that go on from one another, without tokenising their common beginnings again.

A step's text is its parent's and a piece behind it. What a tokenizer makes of the end of a text may change when the
text goes on, what it makes of the beginning does not; so the parent's tokens are kept up to a border in front of its
end, and the rest of its text is tokenised together with the piece. A border serves when the parent's own rest,
tokenised alone, gives the parent's own last tokens. The longest texts are tokenised whole as well and compared: where
one differs (a tokenizer that merges over any distance), all texts are tokenised whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MARGIN = 24  # characters between a border and the end of a text: more than any word looks ahead
TAIL = 64  # last tokens of a text among which a border is looked for
TRIES = 3  # borders that are tried
PAYS = 4  # times longer than their pieces the texts have to be; as long may be those that are compared
LEAST = 20_000  # characters


class Tokens(NamedTuple):
    """A text's ids, how many of them begin before the end of its own part, and where its last tokens begin: (token,
    character)."""

    ids: np.ndarray
    own: int
    tail: list[tuple[int, int]]


def pays(tokenizer: Any, texts: Sequence[str], pieces: int) -> bool:
    """Whether texts of so many characters, of which `pieces` are in no other's beginning, are worth it."""
    return bool(getattr(tokenizer, "is_fast", False)) and sum(map(len, texts)) > max(LEAST, PAYS * pieces)


def grow(tokenizer: Any, texts: Sequence[str], owns: Sequence[int], parents: Sequence[int], order: Sequence[int],
         known: dict[int, Tokens]) -> dict[int, Tokens] | None:
    """The tokens of all texts from those that are known; None where some cannot be had so.

    parents: of each text the one it goes on from; order: parents first.
    """
    encode = tokenizer.backend_tokenizer.encode
    found, borders = dict(known), {}
    for i in order:
        if i in found:
            continue
        above = parents[i]
        if above not in borders:
            borders[above] = _border(encode, texts[above], found[above])
        if borders[above] is None or owns[i] <= borders[above][1]:
            return None
        kept, begin = borders[above]
        more = encode(texts[i][begin:], add_special_tokens=False)
        starts = [begin + first for first, _ in more.offsets]
        own = kept + next(k + 1 for k in range(len(starts) - 1, -1, -1) if starts[k] < owns[i])
        tail = [place for place in found[above].tail if place[0] < kept]
        tail += [(kept + k, first) for k, first in enumerate(starts)]
        found[i] = Tokens(np.concatenate([found[above].ids[:kept], np.array(more.ids, np.int32)]), own, tail[-TAIL:])
    return found


def _border(encode: Any, text: str, tokens: Tokens) -> tuple[int, int] | None:
    """(tokens to keep, character behind them) of a text that goes on."""
    within = [place for place in tokens.tail if place[1] <= len(text) - MARGIN and place[0] > 0]
    blank = [place for place in within if text[place[1]].isspace() != text[place[1] - 1].isspace()]
    for kept, begin in (blank or within)[:-TRIES - 1:-1]:
        if encode(text[begin:], add_special_tokens=False).ids == tokens.ids[kept:].tolist():
            return kept, begin
    return None


def compared(texts: Sequence[str], ends: Sequence[int], most: int) -> list[int]:
    """The longest of the texts that none goes on from, of so many characters together."""
    chosen: list[int] = []
    for i in sorted(ends, key=lambda i: -len(texts[i])):
        most -= len(texts[i])
        if chosen and most < 0:
            break
        chosen.append(i)
    return chosen
