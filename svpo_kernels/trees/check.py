"""Is a model's packed run the same as separate runs? Asked of the model itself, before training on packs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import decoder, num_experts, text_config, unwrap
from .attention import PackingError, model_inputs, why_not
from .masks import run_dtype

NOISE_FACTOR = 4.0  # a packed run may differ this many times more than two separate runs do
# and by this much where those two happen to agree: 8 u in low precision (a wrong mask shows as 0.1 and more)
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8}


class PackingCheck(NamedTuple):
    """error: largest relative difference of a token's hidden state, packed against alone. allowed: what it may be.
    path: rows of the tested path in the pack, (L,) int64."""

    error: float
    allowed: float
    path: Tensor


@torch.no_grad()
def check_packing(model: nn.Module, batch: Any) -> PackingCheck:
    """One path of the batch against its separate run, in the run's own dtype and mode. Raises when they differ.

    First what config and modules tell (see `unpackable`; also dropout and router noise in training mode), then the
    hidden states of the path that most would go wrong for (long, with many other rows in between), packed and alone.
    The difference is judged against that of two separate runs of the path, alone and padded to the pack's length, and
    against what one more rounding of the embeddings comes to: another kernel rounds elsewhere. A padded batch has
    nothing to check.

    Raises PackingError (a ValueError and RuntimeError) with the figures and the layer type.
    """
    if batch.lengths is not None:
        return PackingCheck(0.0, 0.0, torch.zeros(0, dtype=torch.int64))
    model = unwrap(model)
    reason = why_not(model, batch) or random_reason(decoder(model))
    if reason is not None:
        raise PackingError(f"check_packing: {type(model).__name__} cannot run a pack: {reason}")
    path = telling_path(batch)
    inputs = _runs(batch, model, path)

    def layers(every: bool = True) -> list[Runs]:
        runs = [hidden_states(model, each, every) for each in inputs]
        with _rounded_once_more(model, _run_dtype(runs[1][-1])):
            runs.append(hidden_states(model, inputs[1], every))
        return [Runs(*(hidden[0] for hidden in layer)).on(path) for layer in zip(*runs, strict=True)]

    return judged("check_packing", "packed", model, batch, path, layers(every=False)[-1], layers)


class Runs(NamedTuple):
    """Hidden states of a path's tokens: of the run in question, alone, and its noise: alone but padded, alone from
    embeddings that are rounded once more."""

    ours: Tensor
    alone: Tensor
    padded: Tensor
    rounded: Tensor | None = None

    def on(self, path: Tensor) -> Runs:
        """From whole runs (T, D), (L, D), (more than L, D) to the path's tokens, (L, D) each."""
        return self._replace(ours=self.ours[path], padded=self.padded[: len(path)])


def judged(op: str, how: str, model: nn.Module, batch: Any, path: Tensor, runs: Runs,
           layers: Callable[[], Iterable[Runs]], least: float = 0.0) -> PackingCheck:
    """The verdict on a path's last hidden states. layers: gives them layer by layer, the embedding first, for a name.
    least: what is allowed whatever the noise.

    Raises PackingError with the figures and the layer type where they differ by more than noise.
    """
    error, allowed = _judge(model, runs, least)
    if not error <= allowed:  # NaN is a difference too
        raise PackingError(
            f"{op}: {type(model).__name__} gives other hidden states {how} than alone: relative difference "
            f"{error:.2e}, allowed {allowed:.2e} (noise of two separate runs), on a path of {len(path)} tokens among "
            f"{batch.input_ids.shape[1]}, first at {_where(model, layers(), least)}")
    return PackingCheck(error, allowed, path)


def telling_path(batch: Any) -> Tensor:
    """Rows of the path to a step's end that is long and has many rows of other paths before its last: (L,) int64."""
    T = batch.input_ids.shape[1]
    depth = batch.position_ids.reshape(-1)
    ends = batch.step_ends if batch.step_ends.numel() else torch.arange(T, device=depth.device)
    length = depth[ends] + 1
    end = ends[(length * (ends + 2 - length)).argmax()]
    rows = torch.arange(T, device=depth.device)
    return rows[(rows <= end) & (end < batch.subtree_end)]


def _runs(batch: Any, model: nn.Module, path: Tensor) -> tuple[dict[str, Any], ...]:
    """Inputs of the pack, of the path alone, and of the path padded to the pack's length by its last token."""
    return model_inputs(batch, model), *separate_runs(batch, path, batch.input_ids.shape[1])


def separate_runs(batch: Any, path: Tensor, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of a path alone, and of it padded to that length by its last token."""
    L = len(path)
    positions = torch.arange(length, device=path.device)[None]
    ids = batch.input_ids[:, path]
    padded = torch.cat([ids, ids[:, -1:].expand(1, length - L)], dim=1)
    return ({"input_ids": ids, "position_ids": positions[:, :L]},
            {"input_ids": padded, "position_ids": positions.clamp_max(L - 1), "attention_mask": (positions < L).long()})


@contextlib.contextmanager
def _rounded_once_more(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model's embeddings off by half a unit of a dtype, up or down: what one rounding comes to in the end."""
    def off(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        up = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device) < 0.5
        return out * torch.where(up, 1 + torch.finfo(dtype).eps / 2, 1 - torch.finfo(dtype).eps / 2).to(out.dtype)

    whole: Any = model
    hook = whole.get_input_embeddings().register_forward_hook(off)
    try:
        yield
    finally:
        hook.remove()


def hidden_states(model: nn.Module, inputs: dict[str, Any], every: bool = False) -> tuple[Tensor, ...]:
    output = decoder(model)(**inputs, use_cache=False, output_hidden_states=every, return_dict=True)
    if every:
        return output.hidden_states
    return (output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits,)


def _run_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that products were taken in: autocast and TF32 round more than the hidden states' dtype says."""
    tf32 = hidden.is_cuda and hidden.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return run_dtype(hidden.device, torch.float16 if tf32 else hidden.dtype)


def _judge(model: nn.Module, runs: Runs, least: float) -> tuple[float, float]:
    """(error, allowed). Per token, then the largest; under rounding a router may send single tokens elsewhere, so a
    mixture of experts in low precision is judged by the token nine tenths up."""
    config, floor = text_config(model), max(FLOOR[_run_dtype(runs.alone)], least)
    q = 0.9 if num_experts(config) and floor > 1e-4 else 1.0

    def difference(a: Tensor) -> float:
        a, b = a.double(), runs.alone.double()
        each = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
        return float(torch.quantile(each, q)) if bool(each.isfinite().all()) else float("nan")

    rounding = 0.0 if runs.rounded is None else difference(runs.rounded)
    return difference(runs.ours), max(NOISE_FACTOR * difference(runs.padded), rounding) + floor


def _where(model: nn.Module, layers: Iterable[Runs], least: float) -> str:
    """The first layer whose output differs, with its type."""
    config = text_config(model)
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    modules = getattr(decoder(model), "layers", None) or getattr(decoder(model), "h", None) or ()
    for i, runs in enumerate(layers):
        error, allowed = _judge(model, runs, least)
        if not error <= allowed:
            if i == 0:
                return "the embedding (position ids)"
            kind = types[i - 1] if i - 1 < len(types) else "attention"
            name = type(modules[i - 1]).__name__ if i - 1 < len(modules) else "unnamed"
            return f"layer {i - 1}, of type {kind!r} ({name})"
    return f"the last layer, of type {types[-1] if types else 'attention'!r}"


def random_reason(module: nn.Module) -> str | None:
    """Dropout or router noise that is on: shared tokens draw it once where separate runs draw it for each path."""
    for name, part in module.named_modules():
        if not part.training:
            continue
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{name} is of type 'dropout' (p = {part.p}) in training mode; see disable_dropout"
        for key, value in vars(part).items():
            noisy = "dropout" in key or "jitter" in key or "layerdrop" in key
            if noisy and isinstance(value, float) and value > 0:
                return f"{name}.{key} is of type 'dropout' (= {value}) in training mode; see disable_dropout"
    return None
