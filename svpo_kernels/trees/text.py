"""Step trees from text: every path is tokenised once, jointly, as a model would meet it.

BPE merges across the border of two steps, so a step has no token list of its own. What a node scores is what its own
text adds to the tokens that all children of its parent keep of the parent's path. What a chat template puts around an
answer is learned in `template.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .._checks import fail
from . import joint
from .paths import Paths, common
from .template import MARKUP, REASONING, Template, Turn, turn_end, without_end
from .tree import StepNode, StepTree, node_path

OP = "tree_from_text"
_OF_IDS = ("token_ids", "path_ids", "start", "old_logps", "value_end")
FIELDS = tuple(field.name for field in fields(StepNode) if field.name not in _OF_IDS)


@dataclass(frozen=True)
class TextOptions:
    """How text becomes ids; see `tree_from_text`. template_date: what `strftime_now` says, a datetime.date."""

    step_separator: str = "\n\n"
    step_end: str = ""
    turn_end: str = "auto"
    turn_start: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    prompt_is_rendered: bool | None = None
    template_date: Any = None


def tree_from_text(tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], nodes: Iterable[Any], *,
                   step_separator: str = "\n\n", step_end: str = "", turn_end: str = "auto",
                   chat_template_kwargs: Mapping[str, Any] | None = None, turn_start: str = "auto",
                   prompt_is_rendered: bool | None = None, template_date: Any = None,
                   notes: list[str] | None = None) -> StepTree:
    """A StepTree whose paths are, id by id, the tokenizer's output for their text.

    tokenizer: a Hugging Face tokenizer. prompt: text (one user message, unless it begins and ends as this tokenizer
    renders one) or chat messages. nodes: StepNodes with text, or mappings with a StepNode's fields.

    The steps of a path are the content of one assistant message behind the prompt: context and opening as the chat
    template writes them, then every step's text, step_end, and step_separator where the step is not terminal; a
    terminal step ends in turn_end, once. All of it is tokenised in one call. Children of one parent start after the
    longest prefix of the parent's tokens that all of them keep; the opening is scored with the first step. A value is
    read at the last token of a step's own text (step_end included), never at white space or an end of turn behind it.

    turn_end: "auto", the template's own end up to its last special token, `eos_token` where there is none; "eos";
    "none"; or a text. turn_start: "auto", or "generation": begin behind the generation prompt as it stands, without an
    opening. chat_template_kwargs: arguments of the template, such as enable_thinking or tools. prompt_is_rendered: a
    text prompt has (True) or has not (False) been through a template; None looks. template_date: a datetime.date that
    the template's `strftime_now` says, None: today's. notes: a list that is told what was found on the way.

    Without a chat template the prompt is used as it is, with the special tokens that the tokenizer puts in front.

    Raises ValueError for messages without a chat template, a terminal node that is to end in a missing EOS token, a
    node with a missing or unknown field or whose text adds no token, and what StepNode and StepTree refuse; TypeError
    for an argument or a text of another type; what the chat template itself raises (jinja2.TemplateError).
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        fail(OP, "tokenizer", "a Hugging Face tokenizer", tokenizer, TypeError)
    if not isinstance(nodes, Iterable):
        fail(OP, "nodes", "StepNodes or mappings with their fields", nodes, TypeError)
    for argument, text in (("step_separator", step_separator), ("step_end", step_end), ("turn_end", turn_end)):
        if not isinstance(text, str):
            fail(OP, argument, "a string", text, TypeError)
    if turn_start not in ("auto", "generation"):
        fail(OP, "turn_start", "'auto' or 'generation'", turn_start)
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        fail(OP, "chat_template_kwargs", "a mapping", chat_template_kwargs, TypeError)
    options = TextOptions(step_separator, step_end, turn_end, turn_start, chat_template_kwargs or {},
                          prompt_is_rendered, template_date)
    template = Template(tokenizer, options.chat_template_kwargs, options.template_date)
    tree, said = build(template, prompt, [_as_node(i, node) for i, node in enumerate(nodes)], options)
    if notes is not None:
        notes += said
    return tree


def build(template: Template, prompt: str | Sequence[Mapping[str, Any]], nodes: list[StepNode],
          options: TextOptions) -> tuple[StepTree, list[str]]:
    """`tree_from_text` for checked nodes: the tree, and what is to be said of its text.

    template: of the options' chat_template_kwargs and template_date.
    """
    # Any ids do to check the shape of the tree and to learn an order before the texts are put together.
    shape = StepTree([0], [StepNode(node.parent, [0]) for node in nodes])
    turn, messages, said = find_turn(template, prompt, options)
    end, note = turn_end(template, turn, options.turn_end) if any(node.terminal for node in nodes) else ("", "")
    said += [note] if note else []
    known = template.special_tokens & {end, turn.end.strip(), template.tokenizer.eos_token}
    ends = sorted(known | ({end} if end else set()), key=len, reverse=True)
    pieces = [_piece(node, end, ends, turn, options) for node in nodes]
    texts, owns = [turn.generation] * (len(nodes) + 1), [0] * len(nodes)  # index -1 is the prompt's
    for root, own in _subtrees(shape):
        begun = _begin(template, messages, turn, [pieces[i] for i in own], nodes, own, shape, options, said)
        for i in own:
            text, own_length = pieces[i]
            before = begun.context + begun.opening if i == root else texts[nodes[i].parent]
            if i == root:
                kept = text.lstrip(begun.left) if begun.left != "" else text
                own_length, text = own_length - (len(text) - len(kept)), kept
            texts[i], owns[i] = before + text, len(before) + own_length
    return _tree(template.tokenizer, prompt, nodes, texts, owns, turn.special, shape), said


def find_turn(template: Template, prompt: str | Sequence[Mapping[str, Any]],
              options: TextOptions) -> tuple[Turn, list[Any] | None, list[str]]:
    """The assistant's turn behind a prompt, its messages (None for a text that is rendered), what is to be said."""
    messages = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
    if not messages and not isinstance(prompt, str):
        fail(OP, "prompt", "text or chat messages", prompt, TypeError)
    said: list[str] = []
    if not template.exists:
        if not isinstance(prompt, str):
            fail(OP, "prompt", "text for a tokenizer without a chat template", "messages")
        bos = getattr(template.tokenizer, "bos_token", None)
        return Turn(prompt, prompt, special=not (bos and prompt.startswith(bos))), None, said
    given: list[Any] | None = None
    if isinstance(prompt, str):
        turn = template.behind(prompt) if options.prompt_is_rendered else None
        if options.prompt_is_rendered is None:
            turn = template.rendered(prompt)
        if turn is not None:
            said.append("the prompt is rendered already and used as it stands")
        if turn is None:
            given = [{"role": "user", "content": prompt}]
            if MARKUP.search(prompt):
                said.append("the prompt holds chat markup inside its text: it is one user message")
    else:
        turn, given = None, list(prompt)
    if turn is None:
        assert given is not None  # a text that is not rendered is one user message
        turn = template.turn(given)
    if not turn.keeps_generation:
        said.append("the template does not keep its generation prompt in front of an answer: a model generates behind "
                    "another context than the one it is trained on")
    return (turn.as_generated() if options.turn_start == "generation" else turn), given, said


def _piece(node: StepNode, end: str, ends: Sequence[str], turn: Turn, options: TextOptions) -> tuple[str, int]:
    """What a node adds to its parent's text, and the length of its own part, without white space at its end."""
    if not node.terminal:
        own = _text(node) + options.step_end
        return own + options.step_separator, len(own.rstrip())
    own = without_end(_text(node), ends) + options.step_end
    own = own if turn.right == "" else own.rstrip(turn.right)
    return own + end, len(own.rstrip())


def _text(node: StepNode) -> str:
    assert node.text is not None  # `_as_node` has looked
    return node.text


def _subtrees(shape: StepTree) -> Iterable[tuple[int, list[int]]]:
    """(first step, all nodes under it, itself first) for every child of the prompt."""
    for root in shape.roots:
        stack, own = [root], []
        while stack:
            i = stack.pop()
            own.append(i)
            stack.extend(reversed(shape.children[i]))
        yield root, own


def _begin(template: Template, messages: list[Any] | None, turn: Turn, pieces: list[tuple[str, int]],
           nodes: list[StepNode], own: list[int], shape: StepTree, options: TextOptions, said: list[str]) -> Turn:
    """The turn for a first step and what follows it. Text that holds reasoning markup is compared with the template's
    own rendering of the whole message, with and without the opening."""
    if messages is None or options.turn_start == "generation" or not any(REASONING.search(text) for text, _ in pieces):
        return turn
    ways: list[set[str | None]] = []
    for i in own:
        if shape.children[i]:
            continue
        content = options.step_separator.join(_text(nodes[j]) + options.step_end for j in node_path(nodes, i))
        if not nodes[i].terminal and turn.opening.strip() and content.lstrip().startswith(turn.opening.split()[0]):
            ways.append({turn.context})  # a thought that is still open: the opening would close it before it began
        else:
            whole = template.render([*messages, {"role": "assistant", "content": content}])
            ways.append(_contexts(whole, content, turn))
    shared = set.intersection(*ways)
    if None in shared:
        return turn
    if shared:
        return replace(turn, context=max((each for each in shared if each is not None), key=len), opening="")
    said.append("the template rewrites this text's reasoning: it is scored as it stands, behind the generation prompt")
    begun, first = turn.as_generated(), _text(nodes[own[0]])
    tail = turn.generation[len(turn.context):]
    if tail and first.startswith(tail):  # the text says itself what the generation prompt says last
        begun = replace(begun, context=turn.context)
    return begun


def _contexts(whole: str, content: str, turn: Turn) -> set[str | None]:
    """What may stand before this content so that the template's own rendering comes out: None for the usual context and
    opening, or a beginning of the generation prompt without an opening."""
    text = content if turn.left == "" else content.lstrip(turn.left)
    text = text if turn.right == "" else text.rstrip(turn.right)
    found: set[str | None] = {None} if turn.context + turn.opening + text + turn.end == whole else set()
    before = whole.removesuffix(text + turn.end)
    if before != whole and turn.generation.startswith(before):
        found.add(before)
    return found


def own_ids(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many of a generated step's ids come before the white space and the special tokens (an end of turn) behind its
    own text; all of them where there is nothing else."""
    for end in range(len(ids), 0, -1):
        if tokenizer.decode([ids[end - 1]], skip_special_tokens=True).strip():
            return end
    return len(ids)


def _tree(tokenizer: Any, prompt: Any, nodes: list[StepNode], texts: list[str], owns: list[int],
          special: bool, shape: StepTree) -> StepTree:
    paths, value_ends = _grown(tokenizer, texts, owns, special, shape) or _tokenize(tokenizer, texts, owns, special)
    starts = _starts(nodes, paths)
    made, own = [], [paths[-1]]
    for i, node in enumerate(nodes):
        start = starts[node.parent]
        if start == 0:
            fail(OP, "prompt", "text of which every first step keeps the first token", f"{texts[-1]!r}")
        if start >= len(paths[i]):
            fail(OP, f"nodes[{i}].text", "text that adds a token to its parent's path", node.text)
        made.append(replace(node, value_end=max(start + 1, value_ends[i])))
        own.append(paths[i][start:])
    if not len(paths[-1]):
        fail(OP, "prompt", "text of at least one token", f"{texts[-1]!r}")
    parents = [node.parent for node in nodes]
    return StepTree.from_paths(Paths(np.concatenate(own), np.cumsum([0, *map(len, own)]), parents,
                                     [starts[parent] for parent in parents], list(map(len, paths[:-1]))), made)


def _grown(tokenizer: Any, texts: list[str], owns: list[int], special: bool,
           shape: StepTree) -> tuple[list[np.ndarray], list[int]] | None:
    """What `_tokenize` gives, made step by step where that pays; None where it does not, or cannot be had so."""
    n = len(shape)
    parents = [node.parent for node in shape.nodes]
    pieces = sum(len(texts[i]) - (len(texts[parent]) if parent >= 0 else 0) for i, parent in enumerate(parents))
    if not n or not joint.pays(tokenizer, texts, pieces):
        return None
    ends = joint.compared(texts, [i for i in range(n) if not shape.children[i]], joint.PAYS * pieces)
    whole = [*shape.roots, *(i for i in ends if parents[i] != -1), n]
    paths, value_ends, places = _tokenized(tokenizer, [texts[i] for i in whole], [owns[i] for i in whole[:-1]],
                                           special)
    known = {i: joint.Tokens(paths[at], value_ends[at], [
        (k, first) for k, (first, stop) in enumerate(places[at]) if stop > first][-joint.TAIL:])
        for at, i in enumerate(shape.roots)}
    found = joint.grow(tokenizer, texts, owns, parents, shape.order, known)
    if found is None or any(not np.array_equal(found[i].ids, path) for i, path in zip(whole[:-1], paths, strict=False)):
        return None
    return [*(found[i].ids for i in range(n)), paths[-1]], [found[i].own for i in range(n)]


def _as_node(i: int, node: Any) -> StepNode:
    if isinstance(node, Mapping):
        node = _from_fields(i, node)
    if not isinstance(node, StepNode):
        fail(OP, f"nodes[{i}]", "a StepNode or a mapping with its fields", node, TypeError)
    if not isinstance(node.text, str):
        fail(OP, f"nodes[{i}].text", "a string", node.text, TypeError)
    if node.token_ids is not None or node.path_ids is not None:
        fail(OP, f"nodes[{i}]", "text without ids (ids are never re-tokenised; use StepTree)", "both")
    return node


def _from_fields(i: int, node: Mapping[str, Any]) -> StepNode:
    if "parent" not in node:
        fail(OP, f"nodes[{i}]", "a mapping with a parent, -1 for the prompt", f"the fields {', '.join(map(str, node))}")
    for name in node:
        if name not in FIELDS:
            fail(OP, f"nodes[{i}]", f"a mapping with fields of {', '.join(FIELDS)}", f"the field {name!r}")
    try:
        return StepNode(**node)
    except (ValueError, TypeError) as error:  # StepNode does not know which one it is
        raise type(error)(f"{OP}: nodes[{i}].{str(error).removeprefix('StepNode: ')}") from None


def _tokenize(tokenizer: Any, texts: list[str], owns: Sequence[int],
              special: bool) -> tuple[list[np.ndarray], list[int]]:
    """One joint tokenisation per text; special tokens in front stay, those that go behind a text (an EOS) are cut.
    And for each text but the last the number of tokens up to the character that its own part ends before."""
    return _tokenized(tokenizer, texts, owns, special)[:2]


def _tokenized(tokenizer: Any, texts: list[str], owns: Sequence[int],
               special: bool) -> tuple[list[np.ndarray], list[int], list[Any]]:
    """`_tokenize`, and the places of the tokens in each text where the tokenizer tells them."""
    offsets = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False,
                      return_offsets_mapping=offsets)
    paths = [np.array(path, dtype=np.int32) for path in found["input_ids"]]
    if special:
        probe = tokenizer(max(texts, key=len), return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
        behind = probe[::-1].index(0) if 0 in probe else 0
        paths = [path[:len(path) - behind] for path in paths]
    if not offsets:  # a slow tokenizer: what the text up to there becomes, as far as the path keeps it
        cut = tokenizer([text[:own] for text, own in zip(texts, owns, strict=False)], add_special_tokens=special,
                        return_attention_mask=False, verbose=False)["input_ids"]
        return paths, [common(path, np.array(part, np.int32)) for path, part in zip(paths, cut, strict=False)], []
    ends = []
    for path, places, own in zip(paths, found["offset_mapping"], owns, strict=False):
        # The last token that begins before the end of the step's own text.
        ends.append(next((k + 1 for k in range(len(path) - 1, -1, -1) if places[k][0] < own and places[k][1] > 0),
                         len(path)))
    return paths, ends, [places[:len(path)] for path, places in zip(paths, found["offset_mapping"], strict=True)]


def _starts(nodes: Sequence[StepNode], paths: Sequence[np.ndarray]) -> dict[int, int]:
    """For every parent, the number of its tokens that all of its children keep."""
    starts: dict[int, int] = {}
    for node, path in zip(nodes, paths, strict=False):  # the prompt's path, the last, is nobody's child
        parent = node.parent
        starts[parent] = min(starts.get(parent, len(paths[parent])), common(paths[parent], path))
    return starts
