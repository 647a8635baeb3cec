"""A `transformers.Trainer` whose micro-batches are packs of step trees.

One item of its data loader is one optimizer step: all packs that this process runs of it. Hugging Face's loop sees
gradient_accumulation_steps = 1; the packs are accumulated here, each over the counts of the whole step, so that loss
and gradient do not depend on micro-batches, packs or processes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from svpo_kernels.trees import flops
from svpo_kernels.trees.cuts import MaxTokens
from svpo_kernels.trees.packing import StepBatch

from . import checkpoint, choosing, memory, not_finite, resume, sharding
from .attention import runs_chains
from .config import SVPOConfig
from .metrics import LENGTH, Sums, as_vector, means
from .model import StepModel
from .objectives import ProcessReward, make_objective
from .planner import EpochPlanner, PackSettings
from .preparing import PreparingMixin
from .sampler import EpochSampler, StepDataset
from .saving import SavingMixin
from .solution_metrics import StepScores, solution_metrics
from .streaming import StreamingMixin
from .train_data import TrainData, longest_alone, neighbours

BLOCK = 1024  # pairs a process that are planned at a time when all of the data are run


class SVPOTrainer(PreparingMixin, SavingMixin, StreamingMixin, Trainer):
    """Trains a StepModel on step trees with `svpo_loss`.

    model: a StepModel. args: SVPOConfig. train_data, eval_data: TrainData. ref_model: a StepModel without value head,
    for reference log-probs; default: the model itself as it is now, adapters off. watch: wraps what has
    a length while it is worked through, for a progress bar.

    Raises ValueError for more than one GPU in one process, and for a model that packing would train wrongly (see
    `check_packing`) unless packing_fallback is distinct.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: StepModel, args: SVPOConfig, train_data: TrainData | None = None,
                 eval_data: TrainData | None = None, processing_class: PreTrainedTokenizerBase | None = None,
                 ref_model: StepModel | None = None, callbacks: list[TrainerCallback] | None = None,
                 watch: Any = None, **options: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"SVPOTrainer: {args.n_gpu} GPUs are visible to one process; start one process a GPU "
                "(`accelerate launch` or `torchrun`), or set CUDA_VISIBLE_DEVICES to one of them"
            )
        self.config = args
        self.objective = make_objective(args)
        if self.wants_reference and args.reference == "online" and ref_model is None and not model.holds_its_start:
            raise ValueError("SVPOTrainer: reference = online needs ref_model, or a model with fresh adapters: the "
                             "model would be its own reference, and every margin 0")
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1  # ours are packs of one optimizer step, see training_step
        if args.ddp_find_unused_parameters is None:
            # DDP parts its buckets anew after a process' first backward unless it looks for unused parameters, and from
            # three processes on the order in which a gradient is summed goes with the place in its bucket: a resumed
            # run would differ in the last bit. Not with checkpointing, whose second forward it takes for a second use.
            resumes_to_the_bit = args.world_size > 2 and not args.gradient_checkpointing
            args.ddp_find_unused_parameters = not self.wants_logps or resumes_to_the_bit
        self.settings = PackSettings(
            packing=args.packing, max_tokens=args.max_tokens, values=args.values, pairs_per_step=args.pairs_per_step,
            min_packs=self.config.gradient_accumulation_steps, world_size=args.world_size,
            visit_smoothing=args.visit_smoothing, trials=args.label_trials,
            gains=args.objective == "dvo", padded=not runs_chains(model.causal_lm),
        )
        self.ref_model, self.watch = ref_model, watch or (lambda items, title: items)
        self.train_data, self.eval_data = train_data, eval_data
        self._sums, self._total = Sums(), torch.zeros(LENGTH, dtype=torch.float64)
        self._packing_checked = False
        self._state: dict[str, Any] | None = None  # of the run; the model's is that before training
        self.args = args  # what choosing reads before Hugging Face's own __init__ sets it
        planner = None if train_data is None else EpochPlanner(
            train_data, self._resolved(train_data, model), self._order_seed)
        super().__init__(
            model=model, args=args, processing_class=processing_class, callbacks=callbacks,
            train_dataset=None if planner is None else StepDataset(planner, args.process_index),
            eval_dataset=eval_data, **options,
        )
        self.planner = planner
        stop = args.max_steps if args.max_steps > 0 else None
        self._sampler = None if planner is None else EpochSampler(planner, stop)
        self.add_callback(_EpochSetter(self))
        if self.is_fsdp2:
            sharding.keep_exact(self.accelerator)
        if self.ref_model is not None:
            self.ref_model.eval().requires_grad_(False)
            if not self.is_fsdp2:
                self.ref_model.to(args.device)

    # -- what is trained --------------------------------------------------------------------------------------

    @property
    def wants_logps(self) -> bool:
        return self.objective.wants_logps

    @property
    def wants_reference(self) -> bool:
        return self.objective.wants_reference and self.config.reference != "none"

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _resolved(self, data: TrainData, model: StepModel) -> PackSettings:
        """The settings with `packing: auto` and `max_tokens: auto` replaced by what they come to."""
        if self.settings.packing == choosing.AUTO:
            given = self.settings
            self.settings, said = choosing.choose(
                self.config, model.causal_lm, data, self._order_seed,
                lambda way: self._sized(replace(given, packing=way), data, model))
            if self.args.process_index == 0:
                print(said)
        self.settings = self._sized(self.settings, data, model)
        return self.settings

    def _sized(self, settings: PackSettings, data: TrainData, model: StepModel) -> PackSettings:
        """Settings with `max_tokens: auto` replaced by the cut with the fewest counted FLOPs, of the training and the
        evaluation data the larger one, and no path that is trained without a pair longer."""
        if settings.max_tokens == "auto":
            tokens = []
            for each in [data] if self.eval_data is None or self.eval_data is data else [data, self.eval_data]:
                pairs = each.pairs if each.num_pairs else [neighbours(tree) for tree in each.trees]
                tokens.append(max(1, longest_alone(each, settings.values)[0]))
                if settings.packing == "stream":  # it cuts nothing: the most of a call of leaves
                    tokens[-1] = max(tokens[-1], *(max(tree.length, default=1) for tree in each.trees))
                elif any(map(len, pairs)):
                    found = flops.choose_max_tokens(each.trees, pairs, model.config, at_most=self._fitting(model))
                    tokens[-1] = found if found >= tokens[-1] else MaxTokens(tokens[-1], found.price)
            settings = replace(settings, max_tokens=max(tokens))
        return settings

    def _fitting(self, model: StepModel) -> int:
        """Tokens of a pack that the smallest device of the run holds by count."""
        fit = memory.tokens_that_fit(model.causal_lm, self.config, memory.device_bytes(self.config.device))
        return min(gather_object([fit]))

    # -- data -------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("SVPOTrainer: training needs train_data")
        args, workers = self.args, {}
        if args.dataloader_num_workers:
            workers = {"persistent_workers": args.dataloader_persistent_workers,
                       "prefetch_factor": args.dataloader_prefetch_factor,
                       "multiprocessing_context": args.dataloader_multiprocessing_context}
        return DataLoader(self.train_dataset, batch_size=1, sampler=self._sampler, collate_fn=_only,
                          num_workers=args.dataloader_num_workers, in_order=args.dataloader_in_order,
                          pin_memory=args.dataloader_pin_memory and args.device.type == "cuda", **workers)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Pairs, not optimizer steps, so that samples per second are pairs per second."""
        return self.train_data.num_pairs if self.train_data is not None else len(dataloader)

    def get_eval_dataloader(self, eval_dataset: TrainData | None = None) -> DataLoader:
        data = self.eval_data if eval_dataset is None else eval_dataset
        if data is None:
            raise ValueError("SVPOTrainer: evaluation needs eval_data")
        planner = self._whole(data)
        return DataLoader(StepDataset(planner, self.args.process_index), batch_size=1, sampler=EpochSampler(planner),
                          collate_fn=_only)

    def _whole(self, data: TrainData) -> EpochPlanner:
        """All of the data in their own order, in blocks that are planned one after the other."""
        settings = self._resolved(data, self.accelerator.unwrap_model(self.model))
        if self.objective.evaluates is not None:  # paths that training does not run may be longer
            longest, _, _ = longest_alone(data, self.objective.evaluates)
            settings = replace(settings, values=self.objective.evaluates, max_tokens=max(settings.max_tokens, longest))
        return EpochPlanner(data, replace(settings, pairs_per_step=BLOCK * settings.world_size, once=True), None)

    # -- before the first step --------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train; resume_from_checkpoint: True for the newest complete checkpoint of output_dir, or a path."""
        resume_from_checkpoint = resume.resolve(resume_from_checkpoint, self.args.output_dir)
        self._sums, self._total = Sums(), torch.zeros(LENGTH, dtype=torch.float64)
        self._cut()
        if resume_from_checkpoint:
            resume.ask_first(self.args, lambda: resume.check(resume_from_checkpoint, self._state))
            windows, total = checkpoint.read_sums(resume_from_checkpoint)
            self._sums.restore(windows, self.args.process_index, self.args.world_size)
            self._total = as_vector(total)
        self.args.eval_on_start = self.config.eval_on_start and not resume_from_checkpoint  # it is in the history
        self.check_packing()
        for data in (self.train_data, self.eval_data):
            self.prepare_reference(data)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    # -- one optimizer step -----------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every pack of an optimizer step; gradients meet other processes' in the last one.

        Returns this process's part of the loss times the number of processes: its mean over processes is the loss.
        """
        model.train()
        packs, counts = inputs["packs"], inputs["counts"]
        streamed = packs[0]["packing"] == "stream"
        losses = self.stream_step(model, packs, counts) if streamed else []
        scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        every_pack = self.is_deepspeed_enabled or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        for index, pack in enumerate(() if streamed else packs):
            last = index == len(packs) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or every_pack else self.accelerator.no_sync(model):
                loss = self.compute_loss(model, pack, num_items_in_batch=counts)
                self.accelerator.backward(loss, **scale)
            losses.append(loss.detach())
        self._check_finite(model, packs, losses)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self._sums.add(steps=1.0 / self.args.world_size)
        return torch.stack(losses).sum()

    def _check_finite(self, model: nn.Module, packs: list[dict[str, Any]], losses: list[Tensor]) -> None:
        """Before the optimizer moves a weight: losses and gradients are finite on every process, or the run ends."""
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16: it skips a step that overflows, and says
        norm = torch.zeros(()) if scaled else not_finite.gradient_norm(model)
        finite = torch.stack(losses).isfinite().all() & norm.isfinite().to(losses[0].device)
        if not bool(self.accelerator.gather(finite[None].float()).min()):
            not_finite.stop(self, model, packs, losses, norm)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        """Loss of one pack over the counts of its step, times the number of processes (DDP and FSDP take the mean)."""
        out, outputs = self.pack_loss(model, inputs, num_items_in_batch, self._sums)
        loss = out.loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def pack_loss(self, model: nn.Module, pack: dict[str, Any], counts: tuple | None, sums: Sums) -> tuple[Any, dict]:
        """(the objective's loss, model outputs) of one pack; its metrics are added to sums."""
        pack, add_counted = self.prepared(pack, sums)
        batch = pack["batch"]
        outputs = model(batch, want_logps=self.wants_logps, labels=self.objective.labels(batch),
                        **self.objective.asked)
        references = self._references_of(batch, outputs["step_logps"] is not None)
        out = self.objective.loss(outputs, pack, references, counts, sums)
        add_counted()
        return out, outputs

    def prepared(self, pack: dict[str, Any], sums: Sums) -> tuple[dict[str, Any], Callable[[], None]]:
        """A pack on this process's device, and what adds its tokens and FLOPs to sums once it is run."""
        counted = self._count_flops(pack)
        moved = {name: value.to(self.args.device) if isinstance(value, (Tensor, StepBatch)) else value
                 for name, value in pack.items()}
        return moved, lambda: sums.add(tokens=_tokens(pack), pairwise_tokens=pack["batch"].pairwise_tokens,
                                       flops=counted[0], pairwise_flops=counted[1])

    def _count_flops(self, pack: dict[str, Any]) -> tuple[int, int]:
        """Training FLOPs of a pack and of the naive run of its pairs, counted from shapes, once a pack."""
        if "flops" not in pack:
            config = self.accelerator.unwrap_model(self.model).config
            count = flops.count_flops(config, pack["batch"], flops.attention_kind(config))
            run = {"distinct": count.distinct, "pairs": count.pairwise}.get(pack["packing"], count.packed)
            if pack["packing"] == "stream":
                run = flops.stream_flops(config, pack["batch"], self.args.gradient_checkpointing)
            elif pack["batch"].lengths is None:
                run = count.packed
            pack["flops"] = (run, count.pairwise)
        return pack["flops"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        return float(sum(self._count_flops(pack)[0] for pack in inputs["packs"]))

    # -- evaluation and logs ----------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
                        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> EvalLoopOutput:
        """Loss and metrics over all of the data, exact whatever the number of packs and processes."""
        model = self._evaluation_model()
        sums, pairs = Sums(), 0
        planner = dataloader.dataset.planner
        self.prepare_reference(planner.data)
        totals = planner.totals()
        scores = self.objective.scores = StepScores() if isinstance(self.objective, ProcessReward) else None
        with torch.no_grad(), self._mode(model, False), self._precision():
            for block in self.watch(dataloader, description.lower()):
                for pack in block["packs"]:
                    self.pack_loss(model, pack, totals, sums)
                pairs += block["counts"][0]
        self.objective.scores = None
        sums.add(steps=1.0 / self.args.world_size)
        found = means(self._reduce(sums.vector()))
        if scores is not None:
            every = {(tree, node): score for tree, node, score in gather_object(scores.rows())}
            found |= solution_metrics(planner.data, every, self.config.label_threshold)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=pairs)

    def _evaluation_model(self) -> nn.Module:
        """The model to evaluate: as it is, or prepared when FSDP or DeepSpeed have to cut it first."""
        self._cut()
        if not self.is_fsdp2 and not self.accelerator._models and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model = self.model_wrapped = self.accelerator.prepare(self.model)
        return self.model

    def _reduce(self, vector: Tensor) -> Tensor:
        """Sum of a float64 vector over processes, on the CPU."""
        return sum(gather_object([vector]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        vector = self._reduce(self._sums.vector())
        found = means(vector)
        if "loss" in logs:  # theirs forgets what of its window came before a resume
            self._sums.clear()
            self._total += vector
            logs = {**logs, **found, "loss": logs["loss"] if self.args.logging_nan_inf_filter else found["loss"]}
        elif "train_runtime" in logs:
            found = means(self._total + vector)
            logs = {**logs, **{name: found[name] for name in found if name.startswith("compute/")}}
            logs["train_loss"] = found.get("loss", logs["train_loss"])
        super().log(logs, start_time)

    # -- optimizer --------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """As Hugging Face's, with the value head in a group of its own when it has its own learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **options)
        model = self.accelerator.unwrap_model(self.model)
        head, rate = getattr(model, "v_head", None), self.config.head_learning_rate(
            model.config.get_text_config().hidden_size)
        if made and rate is not None and head is not None:
            own = set(head.parameters())
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in own]
            optimizer.add_param_group({"params": list(head.parameters()), "lr": rate, "weight_decay": 0.0})
        if made:
            self._trained = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        """As Hugging Face's. Before it accelerate has looked up every sharded parameter by the address of its shard;
        empty shards have none, and all became one: each gets its own back."""
        if self.is_fsdp2:
            for group, trained in zip(self.optimizer.param_groups, self._trained, strict=True):
                group["params"] = trained
        return super().create_scheduler(*args, **options)


def _only(items: list[Any]) -> Any:
    """The one item of a loader whose batch size is 1."""
    return items[0]


def _tokens(pack: dict[str, Any]) -> int:
    """Tokens of a pack as its FLOPs are counted: without padding, which packs have none of."""
    batch = pack["batch"]
    if batch.lengths is None:
        return batch.input_ids.numel()
    return {"distinct": batch.distinct_tokens, "pairs": batch.pairwise_tokens}[pack["packing"]]


class _EpochSetter(TrainerCallback):
    """Tells the sampler which epoch begins, from the step count, so that a resumed run plans the same packs."""

    def __init__(self, trainer: SVPOTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._sampler.set_epoch(state.global_step // len(self.trainer.planner))
