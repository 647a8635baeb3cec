"""Both passes of `stream_backward` over a pack that is cut into the calls of a model; see `stream.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import fail, is_integer
from ..linear_step_logps import linear_step_logps
from ..linear_step_logps.modes import DIFFERENTIABLE
from ..models import cache_argument, decoder, head, text_config, unwrap
from ..plan import StepPlan
from . import cache as caches
from .attention import PackingError
from .segments import Part, Unit, parts, segments, units
from .streamable import require_streamable

HeadCall = Callable[[Tensor, Tensor], Tensor]  # (rows (k, D), places (k,) in its positions) -> (k, ...)


class StreamOutputs(NamedTuple):
    """What a loss is made of, in the order of a packed run.

    logps: (S,), or (N,) with reduction="none", as `linear_step_logps` gives them. stats: {name: (N,)}. heads: {name:
    (K, ...)}, one row a position.
    """

    logps: Tensor
    stats: dict[str, Tensor]
    heads: dict[str, Tensor]


class Stream:
    """A pack cut for a model: both passes over it. heads: {name: (HeadCall, positions)}; options: of the op."""

    def __init__(self, op: str, model: nn.Module, batch: Any,
                 heads: Mapping[str, tuple[HeadCall, Tensor]] | None = None, *, stats: Sequence[str] = (),
                 max_tokens: int | None = None, **options: Any) -> None:
        if max_tokens is not None and (not is_integer(max_tokens) or max_tokens < 1):
            fail(op, "max_tokens", "an int >= 1, or None", max_tokens)
        self.model = unwrap(model)
        self.op, self.batch, self.stats, self.options = op, batch, tuple(stats), options
        require_streamable(op, model, batch)
        self.decoder, self.config = decoder(self.model), text_config(self.model)
        self.cache_name = cache_argument(self.decoder)
        self.calls = {name: call for name, (call, _) in (heads or {}).items()}
        positions = {name: at.detach().cpu().to(torch.int64) for name, (_, at) in (heads or {}).items()}
        T = batch.input_ids.shape[1]
        for name, at in positions.items():
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < T:
                fail(op, f"heads[{name!r}]", f"positions below T = {T}", f"{int(at.max())}", IndexError)
        stateful = caches.holds_state(caches.empty(self.config))
        self.units = units(segments(op, batch), stateful=stateful, max_tokens=max_tokens)
        self.parts = parts(self.units, T, batch.plan, positions)
        self.sizes = {name: len(at) for name, at in positions.items()}
        self.parts = [Part(part.plan.to(batch.input_ids.device), part.places, part.heads) for part in self.parts]

    @property
    def tokens(self) -> int:
        """Tokens that one walk computes."""
        return sum(unit.rows.numel() for unit in self.units)

    # -- one segment ------------------------------------------------------------------------------------------

    def run(self, unit: Unit, parent: Any, leaves: bool) -> tuple[Tensor, Any, list[Tensor]]:
        """(hidden states (b L, D), the cache behind the unit, the states it goes on from, as leaves of its graph)."""
        output, made, taken = self.call(unit, parent, leaves)
        return output.last_hidden_state.flatten(0, 1), made, taken

    def call(self, unit: Unit, parent: Any, leaves: bool, **more: Any) -> tuple[Any, Any, list[Tensor]]:
        """As `run`, with all that the decoder returns."""
        made = caches.empty(self.config)
        taken: list[Tensor] = []
        if parent is not None:
            made, taken = caches.fork(parent, unit.rows.shape[0], leaves)
        device = self.batch.input_ids.device
        rows = unit.rows.to(device)
        inputs = {"input_ids": self.batch.input_ids[0, rows], "position_ids": self.batch.position_ids[0, rows]}
        output = self.decoder(**inputs, use_cache=True, return_dict=True, **{self.cache_name: made}, **more)
        if unit.inner and (silent := caches.unwritten(made)) is not None:
            raise PackingError(f"{self.op}: {type(self.model).__name__} cannot be streamed: layer {silent} leaves "
                               "nothing in the cache it is given")
        return output, made, taken

    def score(self, hidden: Tensor, part: Part) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(log-probs (n,), stats {name: (n,)}, heads {name: (k, ...)}) of what a unit owns."""
        found: Any = linear_step_logps(hidden, labels=part.plan.to(hidden.device), reduction="none", stats=self.stats,
                                       **self.options, **head(self.model))
        logps, stats = found if self.stats else (found, {})
        heads = {}
        for name, (rows, places) in part.heads.items():
            if len(rows):
                heads[name] = self.calls[name](hidden[rows.to(hidden.device)], places.to(hidden.device))
        return logps, stats, heads

    # -- pass 1 -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self) -> StreamOutputs:
        """Every prediction's log-prob (N,), statistics and head rows, without gradients; in the plan's order."""
        kept: dict[int, Any] = {}
        plan = self.batch.plan
        found: list[tuple[Part, tuple]] = []

        def enter(index: int) -> None:
            unit = self.units[index]
            hidden, made, _ = self.run(unit, kept.get(unit.parent), leaves=False)
            found.append((self.parts[index], self.score(hidden, self.parts[index])))
            if unit.inner:
                kept[index] = made

        with self.uncheckpointed():
            walk(self.units, enter, kept.pop)
            device = plan.labels.device
            logps = _gathered([(part.places, own[0]) for part, own in found], plan.num_predictions, device)
            stats = {name: _gathered([(part.places, own[1][name]) for part, own in found], plan.num_predictions, device)
                     for name in self.stats}
            heads = {}
            for name, size in self.sizes.items():
                rows = [(part.heads[name][1], own[2][name]) for part, own in found if name in own[2]]
                heads[name] = _gathered(rows or [self._no_rows(name)], size, device)
        return StreamOutputs(logps, stats, heads)

    def _no_rows(self, name: str) -> tuple[Tensor, Tensor]:
        """The (0, ...) that a head without positions gives."""
        weight = head(self.model)["weight"]
        none = torch.zeros(0, dtype=torch.int64)
        return none, self.calls[name](weight.new_zeros(0, weight.shape[1]), none.to(weight.device))

    def outputs(self, reduction: str) -> StreamOutputs:
        """What `forward` gives, log-probs reduced to steps."""
        found = self.forward()
        return found._replace(logps=_reduced(found.logps, self.batch.plan, reduction))

    # -- pass 2 -----------------------------------------------------------------------------------------------

    def backward(self, loss_fn: Callable[[StreamOutputs], Any], *, reduction: str = "sum", recompute: bool = False,
                 loss_scale: float | Tensor = 1.0) -> Any:
        """Both passes, with the loss between them; returns what loss_fn returned, detached."""
        found = self.forward()
        with torch.enable_grad():
            stats = {name: _leaf(values, name in DIFFERENTIABLE) for name, values in found.stats.items()}
            ours = StreamOutputs(_leaf(found.logps), stats, {name: _leaf(x) for name, x in found.heads.items()})
            shown = _leaf(_reduced(found.logps, self.batch.plan, reduction))
            result = loss_fn(ours._replace(logps=shown))
            loss = getattr(result, "loss", result)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                fail(self.op, "loss_fn", "a function whose result, or its .loss, is a scalar with a gradient", loss)
            torch.autograd.backward(loss, torch.as_tensor(loss_scale, dtype=loss.dtype, device=loss.device)
                                    .expand(loss.shape))
            if shown.grad is not None:
                ours.logps.grad = self._of_predictions(shown.grad, reduction)
            _BackwardWalk(self, ours, recompute).walk()
        return _detached(result)

    def _of_predictions(self, grad: Tensor, reduction: str) -> Tensor:
        """Gradient of the reduced log-probs -> of every prediction's, (N,)."""
        if reduction == "none":
            return grad
        plan = self.batch.plan
        if reduction == "mean":
            grad = grad / plan.counts.clamp_min(1)
        return grad[plan.step_ids] if len(grad) else grad.new_zeros(plan.num_predictions)

    # -- what holds during a walk -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def uncheckpointed(self) -> Iterator[None]:
        """transformers' checkpointing drops the cache: it is off. So is autocast's cache of cast weights: one made
        without gradients would be used with them."""
        on = [module for module in self.model.modules() if getattr(module, "gradient_checkpointing", False)]
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)
        for module in on:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            for module in on:
                module.gradient_checkpointing = True


class _Held:
    """A unit between the way down and the way up: its cache, what it ran on, and its children's gradients so far."""

    def __init__(self, made: Any, hidden: Tensor | None, taken: list[Tensor]) -> None:
        self.cache, self.hidden, self.taken = made, hidden, taken
        self.grads: list[Tensor | None] = [None] * len(caches.states(made))

    def take(self, taken: list[Tensor]) -> None:
        """Add a child's gradients of this cache; low precision is added up in fp32."""
        for place, leaf in enumerate(taken):
            if leaf.grad is not None:
                had = self.grads[place]
                self.grads[place] = leaf.grad if had is None else had.to(
                    torch.promote_types(had.dtype, torch.float32)).add_(leaf.grad)
                leaf.grad = None


class _BackwardWalk:
    """Pass 2, given the outputs as leaves that hold the loss's gradient."""

    def __init__(self, stream: Stream, outputs: StreamOutputs, recompute: bool) -> None:
        self.stream, self.outputs, self.recompute = stream, outputs, recompute
        self.held: dict[int, _Held] = {}

    def walk(self) -> None:
        with self.stream.uncheckpointed():
            walk(self.stream.units, self.enter, self.leave)

    def enter(self, index: int) -> None:
        unit, again = self.stream.units[index], self.recompute
        if unit.inner and again:
            with torch.no_grad():
                _, made, _ = self._run(index, leaves=False)
            self.held[index] = _Held(made, None, [])
            return
        hidden, made, taken = self._run(index, leaves=True)
        if unit.inner:
            self.held[index] = _Held(made, hidden, taken)
        else:
            self.up(index, hidden, taken, [], [])

    def leave(self, index: int) -> None:
        held = self.held.pop(index)
        made, hidden, taken = held.cache, held.hidden, held.taken
        if hidden is None:
            hidden, made, taken = self._run(index, leaves=True)
        self.up(index, hidden, taken, caches.states(made), held.grads)

    def _run(self, index: int, leaves: bool) -> tuple[Tensor, Any, list[Tensor]]:
        unit = self.stream.units[index]
        parent = self.held[unit.parent].cache if unit.parent >= 0 else None
        return self.stream.run(unit, parent, leaves)

    def up(self, index: int, hidden: Tensor, taken: list[Tensor], states: list[Tensor],
           grads: list[Tensor | None]) -> None:
        """The backward of one unit: own upstreams and its children's gradients in, its parent's out."""
        pairs = [*self._own(index, hidden), *((state, None if grad is None else grad.to(state.dtype))
                                              for state, grad in zip(states, grads, strict=True))]
        pairs = [(tensor, grad) for tensor, grad in pairs if grad is not None and tensor.requires_grad]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        parent = self.stream.units[index].parent
        if parent >= 0:
            self.held[parent].take(taken)

    def _own(self, index: int, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What the unit scores, with the loss's gradient of it."""
        part = self.stream.parts[index]
        logps, stats, heads = self.stream.score(hidden, part)
        made = [(logps, self.outputs.logps, part.places),
                *((stats[name], self.outputs.stats[name], part.places) for name in stats),
                *((heads[name], self.outputs.heads[name], part.heads[name][1]) for name in heads)]
        for tensor, leaf, places in made:
            yield tensor, None if leaf.grad is None else leaf.grad[places.to(leaf.device)].to(tensor.device)


def walk(made: list[Unit], enter: Callable[[int], None], leave: Callable[[int], Any]) -> None:
    """Depth first over units in their order; leave: of an inner unit, when all that goes on from it is done."""
    above: list[int] = []
    for index, unit in enumerate(made):
        while above and above[-1] != unit.parent:
            leave(above.pop())
        enter(index)
        if unit.inner:
            above.append(index)
    while above:
        leave(above.pop())


def _reduced(logps: Tensor, plan: StepPlan, reduction: str) -> Tensor:
    """(N,) -> (S,), added up in fp64, step by step: no float atomics. reduction "none" gives (N,) back."""
    if reduction == "none":
        return logps
    total = torch.segment_reduce(logps[plan.step_order].double(), "sum", offsets=plan.step_start, unsafe=True,
                                 initial=0)
    return (total / plan.counts.clamp_min(1) if reduction == "mean" else total).to(logps.dtype)


def _gathered(rows: list[tuple[Tensor, Tensor]], size: int, device: torch.device) -> Tensor:
    """[(places (n,), values (n, ...))] of all units -> (size, ...), 0 where no unit has a place."""
    first = rows[0][1]
    whole = torch.zeros(size, *first.shape[1:], dtype=first.dtype, device=device)
    places = torch.cat([own for own, _ in rows]).to(device)
    whole[places] = torch.cat([values.to(device) for _, values in rows])
    return whole


def _leaf(values: Tensor, differentiable: bool = True) -> Tensor:
    """Values as a leaf of the loss's graph."""
    values = values.detach()
    return values.requires_grad_() if values.is_floating_point() and differentiable else values


def _detached(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.detach()
    if hasattr(result, "_fields"):
        return type(result)(*map(_detached, result))
    return result
