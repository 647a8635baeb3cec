"""TRL's trainers with this library's vocabulary head: `use_fused_head(trainer)`, and no other change.

TRL's trainers put a forward of their own on the model they train (and on their reference), which calls one kernel for
log-probs, entropies and the rest. That forward is what is exchanged, on these instances, for its own code over our
kernel: data-parallel wrappers, PEFT, losses and metrics stay TRL's, and nothing of its modules is patched.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOTrainer

from svpo_kernels import (
    StepBatch,
    StepNode,
    StepTree,
    check_packing,
    head,
    linear_step_logps,
    pack_trees,
    select_pairs,
)

from .._checks import fail
from ..data.load import encode, load
from ..models import unwrap
from ..trainer.sharding import whole

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
    if not hasattr(trainer, "fused_head"):
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
        if isinstance(trainer, SVPODPOTrainer) and hasattr(trainer, "fused_head"):
            fail("use_fused_head", "trainer", "one without our head: it has it from the start", type(trainer).__name__)
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
            self.put(model, _with_globals(forward, names))

    def restore(self) -> None:
        for model in self.models:
            if _lora(model):
                fail("use_fused_head", "the trainer's model", "without LoRA on its vocabulary head to get TRL's kernel "
                     "back, which ignores it", type(model).__name__)
        for model, forward in zip(self.models, self.theirs, strict=True):
            self.put(model, forward)

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def put(self, model: nn.Module, forward: Callable) -> None:
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
    return {} if parts["lora_a"] is None else {name: whole(value) for name, value in parts.items()}


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


# -- step trees -------------------------------------------------------------------------------------------------------


class StepDPOTrainer(SVPODPOTrainer):
    """TRL's DPOTrainer on pairs of steps: batches are packed, what their pairs share runs once; loss and metrics TRL's.

    train_dataset, eval_dataset: a list of StepTree, whose pairs `select_pairs(tree, rule, min_gap)` gives; a file of
    any format that `svpo data` reads; a Dataset of step rows (prompt, initial_reason_steps, chosen, rejected); or what
    DPOTrainer takes. A batch has per_device_train_batch_size pairs; those of one tree follow each other, trees are
    shuffled. The first batch is checked (`check_packing`).

    Raises ValueError for what packing would change: truncation_mode="keep_end", a router loss, prompt-learning
    adapters; PackingError, in the first step, for models and dropout that packs are not exact for.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *, train_dataset: Any,
                 eval_dataset: Any = None, processing_class: Any = None, rule: str = "best_worst", min_gap: float = 0.0,
                 **options: Any):
        made = [_pair_rows(data, processing_class, rule, min_gap) for data in (train_dataset, eval_dataset)]
        super().__init__(model, ref_model, args, train_dataset=made[0], eval_dataset=made[1],
                         processing_class=processing_class, **options)
        peft = getattr(self.model, "peft_config", None) or {}
        kept = "one that packing leaves as it is (keep_start, no router loss, adapters of the weights)"
        for what, got, right in (
            ("truncation_mode", self.args.truncation_mode, self.args.truncation_mode == "keep_start"),
            ("router_aux_loss_coef", self.router_aux_loss_coef, not self.aux_loss_enabled),
            ("peft_config", sorted(peft), not any(config.is_prompt_learning for config in peft.values())),
        ):
            if not right:
                fail("StepDPOTrainer", what, kept, got)
        self.data_collator = _Packing(self.data_collator)
        logged = [ours for theirs, ours in STATS.items() if self.use_weighting or theirs != "log_sum_sq_probs"]
        for at, inner in enumerate(self.fused_head.models):  # the policy, then its reference, which logs nothing
            self.fused_head.put(inner, _packed(_fused_forward(inner), logged if at == 0 else []))

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        if "chosen_ids" not in (dataset.column_names or ()):
            return super()._prepare_dataset(dataset, *args)
        longest = args[1].max_length  # a prompt that fills it leaves nothing to score: dropped, as TRL drops it
        return dataset if longest is None else dataset.filter(lambda row: len(row["prompt_ids"]) < longest)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if "tree" not in (getattr(self.train_dataset, "column_names", None) or ()):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _TreeSampler(self.train_dataset["tree"], seed)


class _TreeSampler(torch.utils.data.Sampler):
    """Trees in a random order, the same on every process; the pairs of one follow each other."""

    def __init__(self, trees: Any, seed: int):
        self.rows: dict[int, list[int]] = {}
        for row, tree in enumerate(trees):
            self.rows.setdefault(tree, []).append(row)
        self.seed, self.epoch, self.size = seed, 0, len(trees)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        groups = list(self.rows.values())
        return iter([row for index in order.tolist() for row in groups[index]])


class _Packing:
    """TRL's collator, and beside its padded rows one pack of them; cells (N,): where in (2 B, L - 1) each
    prediction of the plan stands."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        lengths, scored = batch["attention_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()
        B, L = len(examples), batch["input_ids"].shape[1]
        paths = [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        starts = [length - count for length, count in zip(lengths, scored, strict=True)]
        trees = [StepTree(paths[b][:starts[b]], [StepNode(-1, path_ids=paths[row], start=starts[row])
                                                 for row in (b, b + B)]) for b in range(B)]
        pack, = pack_trees(trees, [[(0, 1)]] * B, max_tokens=sum(lengths))
        rows = (pack.node_of_step[:, 0] + B * pack.node_of_step[:, 1]).tolist()
        cells = torch.empty(pack.plan.num_predictions, dtype=torch.int64)
        cells[pack.plan.step_order] = torch.cat(
            [(L - 1) * row + torch.arange(starts[row] - 1, lengths[row] - 1) for row in rows])
        return batch | {"pack": StepBatch(pack, cells=cells)}


def _packed(theirs: types.FunctionType, stats: list[str]) -> types.FunctionType:
    """A fused forward that runs packs, over one that serves every other call. stats: what it gives beside log-probs."""
    from trl.trainer.utils import FusedCausalLMOutput

    unchecked = [True]

    @functools.wraps(theirs)
    def forward(self: nn.Module, *args: Any, pack: StepBatch | None = None, **options: Any) -> Any:
        if pack is None or not options.get("fused_lm_head"):
            return theirs(self, *args, **options)
        labels = options["labels"]
        pack = pack.to(labels.device)
        if unchecked:
            check_packing(self, pack)
            unchecked.clear()
        hidden = self.base_model(**pack.model_inputs(self), use_cache=False).last_hidden_state
        parts = {name: whole(value) for name, value in head(self).items()}
        parts |= {name: parts[name].to(hidden.dtype) for name in ("weight", "bias") if parts[name] is not None}
        out = linear_step_logps(hidden, labels=pack.plan, reduction="none", stats=stats, **parts)
        logps, found = out if stats else (out, {})
        cells = {name: value.new_zeros(labels[:, 1:].numel()).index_put((pack.cells,), value).view(labels[:, 1:].shape)
                 for name, value in {"log_probs": logps, **found}.items()}
        return FusedCausalLMOutput(log_probs=cells["log_probs"], label_mask=labels[:, 1:] != -100,
                                   **{name: cells.get(ours) for name, ours in STATS.items()})

    return forward


def _pair_rows(data: Any, tokenizer: Any, rule: str, min_gap: float) -> Any:
    """Trees, files and step rows as a Dataset of prompt_ids, chosen_ids, rejected_ids and tree; all else as it is."""
    if getattr(data, "column_names", None) and "initial_reason_steps" in data.column_names:
        with tempfile.TemporaryDirectory() as folder:
            data.to_json(Path(folder) / "rows.jsonl")
            return _pair_rows(Path(folder) / "rows.jsonl", tokenizer, rule, min_gap)
    if isinstance(data, str | Path):
        if tokenizer is None:
            fail("StepDPOTrainer", "processing_class", "a tokenizer, to read a file or step rows with", "None")
        encoded = encode(load(data), tokenizer)
        trees, pairs = encoded.trees, encoded.pairs(rule, min_gap)
    elif isinstance(data, list) and data and isinstance(data[0], StepTree):
        trees, pairs = data, [select_pairs(tree, rule, min_gap) for tree in data]
    else:
        return data
    rows = []
    for t, (tree, chosen_rejected) in enumerate(zip(trees, pairs, strict=True)):
        for w, l in chosen_rejected.tolist():
            prompt = tree.path(w, tree.start[w])
            if tree.path(l, tree.start[l]) != prompt:
                fail("StepDPOTrainer", "pairs", "of two steps after one prefix", f"nodes {w} and {l} of tree {t}")
            rows.append({"prompt_ids": prompt, "chosen_ids": tree.step_ids(w), "rejected_ids": tree.step_ids(l),
                         "tree": t})
    if not rows:
        fail("StepDPOTrainer", "train_dataset", f"trees with pairs under rule={rule!r}, min_gap={min_gap}",
             f"{len(trees)} trees without one")
    return Dataset.from_list(rows)
