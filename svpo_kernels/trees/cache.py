"""The caches that segments hand on: transformers' own layers, with states that are assigned and never copied in place.

transformers writes convolution and recurrent states with `copy_` into tensors that it keeps; a graph that reads the
state before the update would be wrong. Ours assign. `fork` gives a segment the cache of its parent as leaves of its
own graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TENSORS = ("keys", "values")  # attributes of attention layers
STATES = ("conv_states", "recurrent_states")  # dicts of layers with a state


def _assign_conv_state(self: Any, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None,
                       **kwargs: Any) -> Tensor:
    """The state before, if any, and the new columns, side by side; the last conv_kernel_size of them are kept."""
    if self.conv_kernel_size[state_idx] is None:
        self.conv_kernel_size[state_idx] = conv_kernel_size or conv_states.shape[-1]
    size = self.conv_kernel_size[state_idx]
    if self.has_previous_state[state_idx]:
        conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
    elif conv_states.shape[-1] < size:
        conv_states = F.pad(conv_states, (size - conv_states.shape[-1], 0))
    self.conv_states[state_idx] = conv_states[..., -size:]
    self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
    return conv_states


def _assign_recurrent_state(self: Any, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
    self.recurrent_states[state_idx] = recurrent_states
    self.is_recurrent_states_initialized[state_idx] = True
    return recurrent_states


@cache
def _classes() -> dict[type, type | None]:
    """transformers' layer class -> ours; None: theirs assigns already."""
    from transformers import cache_utils as theirs

    plain = (theirs.DynamicLayer, theirs.DynamicSlidingWindowLayer, theirs.DummyLayer)
    states = (theirs.LinearAttentionLayer, theirs.LinearAttentionAndFullAttentionLayer,
              theirs.LinearAttentionAndSlidingWindowAttentionLayer)
    updates = {"update_conv_state": _assign_conv_state, "update_recurrent_state": _assign_recurrent_state}
    found: dict[Any, type | None] = dict.fromkeys(plain)
    return found | {kind: type(f"Assigned{kind.__name__}", (kind,), updates) for kind in states}


def empty(config: Any) -> Any:
    """An empty cache for a model with this config. Raises ValueError naming a layer whose cache is not known here."""
    from transformers import DynamicCache

    try:
        made = DynamicCache(config=config)
    except KeyError as error:
        raise ValueError(f"no cache is known for layers of type {error}") from None
    for index, layer in enumerate(made.layers):
        if type(layer) not in _classes():
            types = getattr(config, "layer_types", None) or []
            name = f"of type {types[index]!r}" if index < len(types) else "without a type"
            raise ValueError(f"layer {index}, {name}, keeps a {type(layer).__name__}, which is not known here")
        ours = _classes()[type(layer)]
        if ours is not None:
            layer.__class__ = ours
    return made


def holds_state(made: Any) -> bool:
    """Whether any layer carries a state from token to token, beside or in place of keys and values."""
    return any(hasattr(layer, "conv_states") for layer in made.layers)


def unwritten(made: Any) -> int | None:
    """The first layer without a tensor after a run, but for layers that keep none by design; None: there is none."""
    from transformers.cache_utils import DummyLayer

    for index, layer in enumerate(made.layers):
        if not isinstance(layer, DummyLayer) and not any(True for _ in _slots([layer])):
            return index
    return None


def states(made: Any) -> list[Tensor]:
    """The tensors of a cache, in an order of their own that `fork` keeps."""
    return [tensor for _, _, tensor in _slots(made.layers)]


def fork(made: Any, copies: int, leaves: bool) -> tuple[Any, list[Tensor]]:
    """A cache for `copies` sequences that go on from one; with leaves, from detached tensors that require grad.

    Returns it and those tensors, in the order of `states`. The given cache stays as it is.
    """
    new = copy.copy(made)
    new.layers = [_copied(layer) for layer in made.layers]
    taken = []
    for owner, key, tensor in list(_slots(new.layers)):
        leaf = tensor.detach()
        taken.append(leaf.requires_grad_() if leaves else leaf)
        owner[key] = taken[-1].expand(copies, *tensor.shape[1:]) if copies > 1 else taken[-1]
    return new, taken


def _copied(layer: Any) -> Any:
    new = copy.copy(layer)
    for name, value in vars(new).items():
        if isinstance(value, dict):
            setattr(new, name, dict(value))
    return new


def _slots(layers: list[Any]) -> Iterator[tuple[dict, Any, Tensor]]:
    """(dict that holds it, its key, tensor) of every tensor of a cache's layers."""
    for layer in layers:
        own = vars(layer)
        for name in TENSORS:
            if isinstance(own.get(name), Tensor) and own[name].dim() == 4:
                yield own, name, own[name]
        for name in STATES:
            for key, tensor in own.get(name, {}).items():
                if tensor is not None:
                    yield own[name], key, tensor
