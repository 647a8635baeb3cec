"""`svpo_head.json`: all that somebody who serves a head has to know, so that nobody has to read this source.

kind, outputs, hidden_layer, activation, good, range, weights: what the head is, and the file with its tensors beside.
hidden, position: which row of what it reads. chat_template, chat_template_kwargs, opening, generation_dropped,
step_separator, step_end, end_of_turn, add_special_tokens: how problem and steps become one text:

    generation prompt without its last `generation_dropped` characters + opening
    + step + step_end + step_separator + ... + last step + step_end + end_of_turn (step_separator if it ends nothing)
"""

from __future__ import annotations

from typing import Any

from svpo_kernels.trees.template import Template, turn_end
from svpo_kernels.trees.text import TextOptions, find_turn

from .objectives import IMPLICIT_BETA

VERSION = 1
HIDDEN = "the decoder's last hidden states, as lm_head takes them"
POSITION = "the last token that begins before the end of the step's own text, step_end included"


def describe(config: Any, head: Any, tokenizer: Any, reference: str | None = None) -> dict[str, Any]:
    """The contract of a head of `heads.py`; of implicit rewards where head is None."""
    found = {"version": VERSION, **_of_head(config, head, reference), "step_separator": config.step_separator,
             "step_end": config.step_end, "turn_end": config.turn_end, "turn_start": config.turn_start,
             "chat_template": getattr(tokenizer, "chat_template", None),
             "chat_template_kwargs": config.chat_template_kwargs or {}}
    return found if tokenizer is None else found | _of_text(config, tokenizer)


def _of_head(config: Any, head: Any, reference: str | None) -> dict[str, Any]:
    if head is None:
        beta = IMPLICIT_BETA if config.beta is None else config.beta
        return {"kind": "implicit", "activation": "sigmoid", "beta": beta, "reference": reference, "range": [0.0, 1.0],
                "weights": None, "position": "log-probabilities of all tokens from the opening to the end of the step"}
    tokens = {name: getattr(head, name) for name in ("good_token", "bad_token") if hasattr(head, name)}
    outputs = {"value": 1, "token": 2}.get(head.kind) or head.last.out_features
    return {"kind": head.kind, "outputs": outputs, "hidden_layer": "score.0.weight" in head.state_dict(),
            "activation": head.activation, "good": 1, **tokens,
            "range": [-1.0, 1.0] if head.kind == "value" else [0.0, 1.0],
            "weights": f"{head.kind}_head.safetensors" if head.state_dict() else None,
            "hidden": HIDDEN, "position": POSITION}


def _of_text(config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the chat template comes to, for a problem that is one user's message."""
    options = TextOptions(**config.text_options())
    template = Template(tokenizer, options.chat_template_kwargs, options.template_date)
    turn, _, _ = find_turn(template, "?", options)
    ends = options.turn_end not in ("auto", "eos") or turn.end.strip() or tokenizer.eos_token is not None
    return {"opening": turn.opening, "generation_dropped": len(turn.generation) - len(turn.context),
            "end_of_turn": turn_end(template, turn, options.turn_end)[0] if ends else "",
            "add_special_tokens": turn.special}
