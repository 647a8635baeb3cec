"""TRL's trainers with this library's vocabulary head: `use_fused_head(trainer)`, and no other change.

TRL's trainers put a forward of their own on the model they train (and on their reference), which calls one kernel for
log-probs, entropies and the rest. That forward is what is exchanged, on these instances, for its own code over our
kernel: data-parallel wrappers, PEFT, losses and metrics stay TRL's, and nothing of its modules is patched.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import trl
from torch import Tensor, nn
from trl import DPOTrainer

from svpo_kernels import head, linear_step_logps

from .._checks import fail
from ..models import unwrap

KERNEL, COMPACT = "_ChunkedLogProbFunction", "_use_triton"  # the two globals of TRL's forward that are exchanged
ARGUMENTS = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
             "logit_scale", "outputs")
STATS = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "top1"}


def use_fused_head(trainer: Any, *, logits_budget_mb: float = 512, backend: str = "auto") -> FusedHead:
    """TRL's SFT, DPO, KTO, GRPO or RLOO trainer with `linear_step_logps` in the place of TRL's own head kernel.

    trainer: any trainer of TRL 1.16 that puts a fused head on its model, built and not yet trained. Its model and
    reference model get the same forward over our op: prompt and padding rows never reach the head, LoRA on the head is
    part of it (`with_lora_on_head`). logits_budget_mb, backend: as in `linear_step_logps`.

    Returns the switch: `.restore()` puts TRL's forward back, and so does the end of a `with` block.

    Raises ValueError for a TRL whose fused head has another form than that of 1.16, for a trainer without one, and
    under DeepSpeed ZeRO-3, which takes the head's weight away before the backward.
    """
    switch = FusedHead(trainer, {"logits_budget_mb": logits_budget_mb, "backend": backend})
    switch.on()
    return switch


def with_lora_on_head(kind: type, model: nn.Module, *args: Any, peft_config: Any = None, **options: Any) -> Any:
    """A TRL trainer `kind(model, ...)` whose LoRA reaches the vocabulary head, with the fused head on.

    TRL refuses an adapter there, as its own kernel would ignore it. model: a PEFT model, or a plain one with
    peft_config. The adapter is out of sight while the constructor runs, on this instance; the switch is
    `trainer.fused_head`. Raises ValueError as `use_fused_head` and `head`.
    """
    from peft import get_peft_model

    model = get_peft_model(model, peft_config) if peft_config is not None else model
    head(model)  # says what is wrong with an adapter that is more than two factors
    layer = unwrap(model).get_output_embeddings()
    model.get_output_embeddings = lambda: getattr(layer, "base_layer", layer)
    try:
        trainer = kind(model, *args, **options)
    finally:
        del model.get_output_embeddings
    trainer.fused_head = use_fused_head(trainer)
    return trainer


class FusedHead:
    """What `use_fused_head` exchanged: the models and TRL's own forward of each."""

    def __init__(self, trainer: Any, options: dict[str, Any]):
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        _check_kernel()
        if is_deepspeed_zero3_enabled():
            fail("use_fused_head", "the trainer's parameters", "whole in the backward (DDP, FSDP, ZeRO-1 or 2)",
                 "DeepSpeed ZeRO-3")
        self.trainer, self.options = trainer, options
        models = (getattr(trainer, "model", None), getattr(trainer, "ref_model", None))
        self.models = list({id(m): m for m in (unwrap(m) for m in models if m is not None)}.values())
        self.theirs = [_fused_forward(model) for model in self.models]
        if None in self.theirs or not self.models:
            fail("use_fused_head", "trainer", "a TRL trainer whose model has TRL's fused head (SFT, DPO, KTO, GRPO, "
                 "RLOO)", f"{type(trainer).__name__} of TRL {trl.__version__} with "
                 f"{', '.join(type(model).__name__ for model in self.models) or 'no model'}")

    def on(self) -> None:
        for model, forward in zip(self.models, self.theirs, strict=True):
            names = {KERNEL: _Kernel(model, self.options), COMPACT: lambda device: True}  # scored rows alone
            self._put(model, _with_globals(forward, names))

    def restore(self) -> None:
        for model in self.models:
            if _lora(model):
                fail("use_fused_head", "the trainer's model", "without LoRA on its vocabulary head to get TRL's kernel "
                     "back, which ignores it", type(model).__name__)
        for model, forward in zip(self.models, self.theirs, strict=True):
            self._put(model, forward)

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _put(self, model: nn.Module, forward: Callable) -> None:
        """In the place of the fused forward, inside accelerate's mixed-precision wrapper where there is one."""
        if "_original_forward" in vars(model):
            from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager

            accelerator = self.trainer.accelerator
            cast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
            model._original_forward = types.MethodType(forward, model)
            forward = convert_outputs_to_fp32(cast(forward))
        model.forward = types.MethodType(forward, model)


class _Kernel:
    """`linear_step_logps` with the call of TRL's autograd function."""

    def __init__(self, model: nn.Module, options: dict[str, Any]):
        self.model, self.options = model, options

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
              chunk_size: int, softcap: float | None, logit_scale: float, outputs: tuple[str, ...]) -> tuple:
        """hidden (N, D) of the scored rows, targets (N,); chunk_size is TRL's own way to bound memory."""
        weight, bias = (None if t is None else t.to(hidden.dtype) for t in (weight, bias))
        stats = [ours for theirs, ours in STATS.items() if theirs in outputs]
        out = linear_step_logps(
            hidden, weight, targets, shift=0, reduction="none", bias=bias, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, stats=stats, **_lora(self.model), **self.options)
        logps, found = out if stats else (out, {})
        return logps, *(found.get(ours) for ours in STATS.values())


def _lora(model: nn.Module) -> dict[str, Any]:
    """LoRA in force on a model's vocabulary head, as arguments of the op; {} for none."""
    if not hasattr(model.get_output_embeddings(), "base_layer"):
        return {}
    parts = {name: value for name, value in head(model).items() if name.startswith("lora")}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in parts.items()} \
        if parts["lora_a"] is not None else {}


def _check_kernel() -> None:
    """That TRL's kernel takes and gives what `_Kernel` does."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS
        arguments = tuple(inspect.signature(ChunkedLogProbFunction.forward).parameters)
        got = f"{', '.join(arguments)}; outputs {', '.join(OPTIONAL_OUTPUTS)}"
        known = arguments == ARGUMENTS and tuple(OPTIONAL_OUTPUTS) == tuple(STATS)
    except ImportError:
        known, got = False, "one without it"
    if not known:
        fail("use_fused_head", "trl", f"a version whose ChunkedLogProbFunction.forward takes {', '.join(ARGUMENTS)} "
             f"and gives {', '.join(STATS)} (tested: 1.16)", f"TRL {trl.__version__}: {got}")


def _fused_forward(model: nn.Module) -> types.FunctionType | None:
    """TRL's forward on a model, below accelerate's wrapper of it; None where there is none."""
    forward = getattr(model.forward, "__func__", model.forward)
    while forward is not None:
        if {KERNEL, COMPACT} <= set(getattr(getattr(forward, "__code__", None), "co_names", ())):
            return forward
        forward = getattr(forward, "__wrapped__", None)
    return None


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """The same code with other globals of its own."""
    new = types.FunctionType(function.__code__, function.__globals__ | names, function.__name__, function.__defaults__,
                             function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    vars(new).update(vars(function))
    return new


class SVPODPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, all of its losses and settings, with the fused head on from the start."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.fused_head = use_fused_head(self)
