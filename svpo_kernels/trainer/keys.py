"""Every field of `transformers.TrainingArguments`: it works here, another key does its job, or it is refused.

A key that would do nothing, or that would change what packing promises, never passes in silence: `check` refuses every
value but the default, and names the key that does it here. `table` is the same as rows for people.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

WORKS = (
    "output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim "
    "optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "gradient_accumulation_steps bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs "
    "gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode "
    "torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps "
    "save_total_limit save_only_model save_on_each_node enable_jit_checkpoint hub_token load_best_model_at_end "
    "metric_for_best_model greater_is_better restore_callback_states_from_checkpoint full_determinism seed data_seed "
    "use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug "
    "skip_memory_metrics resume_from_checkpoint local_rank"
).split()

NOTES = {
    "gradient_accumulation_steps": "the least number of packs of an optimizer step on each process",
    "accelerator_config": "its gradient_accumulation_kwargs; packs are dealt by the plan, not by the loader",
    "ddp_find_unused_parameters": "by default on from three processes on, but with checkpointing: DDP's buckets keep "
                                  "their layout, so that a resumed run is equal to the bit",
    "hub_token": "for a model of a private or gated repository; nothing is uploaded",
    "fp16": "on a GPU",
    "torch_compile": "every new length may compile again",
    "save_only_model": "such a checkpoint is a model to start from, not one to resume",
    "logging_steps": "also the window over which metrics are means",
}

# key -> (the key that does it here, why)
ELSEWHERE = {
    "per_device_train_batch_size": ("pairs_per_step and max_tokens", "a micro-batch is one pack"),
    "per_device_eval_batch_size": ("max_tokens", "evaluation runs packs too"),
    "auto_find_batch_size": ("max_tokens", "a micro-batch is one pack; a failed step cannot be halved"),
    "label_smoothing_factor": ("label_smoothing", "the loss is svpo_loss"),
    "use_liger_kernel": ("backend", "the ops of this library take the place of those kernels"),
    "liger_kernel_config": ("backend", "the ops of this library take the place of those kernels"),
    "train_sampling_strategy": ("packing", "trees are shuffled by seed and packed without padding"),
    "length_column_name": ("packing", "lengths are counted, there are no columns"),
    "bf16_full_eval": ("bf16 or dtype", "evaluation runs in the precision of training, for metrics that compare"),
    "fp16_full_eval": ("fp16 or dtype", "evaluation runs in the precision of training, for metrics that compare"),
    "do_train": ("train_file", "svpo train trains"),
    "do_eval": ("eval_file and eval_strategy", "data for evaluation are evaluated"),
    "include_num_input_tokens_seen": ("logging_steps", "tokens are counted by packs and logged as compute/saved"),
}

# key -> why
REFUSED = {
    "remove_unused_columns": "a pack has no columns to remove",
    "label_names": "a pack has no columns",
    "neftune_noise_alpha": "noise on embeddings depends on a sequence's length, and shared tokens would draw it once: "
                           "packed training would be another training, as with dropout",
    "average_tokens_across_devices": "every loss is over the counts of the whole optimizer step, on all processes",
    "use_cache": "training keeps no cache",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "dataloader_drop_last": "every pair is trained once an epoch; the loss is over the counts that a step has",
    "ignore_data_skip": "a resumed run goes on where it stopped, at no cost: plans are functions of the step",
    "parallelism_config": "a pack is not cut over devices",
    "prediction_loss_only": "evaluation keeps sums, no predictions",
    "eval_do_concat_batches": "evaluation keeps sums, no predictions",
    "eval_use_gather_object": "evaluation keeps sums, no predictions",
    "eval_accumulation_steps": "evaluation keeps sums, no predictions",
    "include_for_metrics": "evaluation keeps sums, no predictions",
    "batch_eval_metrics": "evaluation keeps sums, no predictions",
    "do_predict": "there is nothing to predict",
    "push_to_hub": "a run uploads nothing; when it is done, `hf upload NAME output_dir` does",
    "hub_private_repo": "a run uploads nothing",
    "hub_model_id": "a run uploads nothing",
    "hub_strategy": "a run uploads nothing",
    "hub_always_push": "a run uploads nothing",
    "hub_revision": "a run uploads nothing",
}

KNOWN = (*WORKS, *ELSEWHERE, *REFUSED)

OPTIMIZERS = {
    "lomo": "it updates inside the backward of each micro-batch, before the packs of a step have met",
    "adalomo": "it updates inside the backward of each micro-batch, before the packs of a step have met",
    "layerwise": "it updates inside the backward of each micro-batch, before the packs of a step have met",
    "schedule_free": "its weights for evaluation and saving are others than those for training",
}


class Key(NamedTuple):
    """One field of TrainingArguments: how is "works", "elsewhere" or "refused"; key: the one that does it here."""

    name: str
    how: str
    key: str
    note: str


def table() -> list[Key]:
    """A row for every field of the installed TrainingArguments, in its order; how is "unknown" for one we never saw."""
    from transformers import TrainingArguments  # heavy; the lists above are read before anything heavy is

    rows = []
    for name in (entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init):
        if name in WORKS:
            rows.append(Key(name, "works", name, NOTES.get(name, "")))
        elif name in ELSEWHERE:
            rows.append(Key(name, "elsewhere", *ELSEWHERE[name]))
        elif name in REFUSED:
            rows.append(Key(name, "refused", "", REFUSED[name]))
        else:
            rows.append(Key(name, "unknown", "", "a newer transformers' key: refused until it is known what it does"))
    return rows


def objection(config: Any) -> str | None:
    """Why a configuration, as it was given, cannot be run as it says; None where it can."""
    defaults = {entry.name: entry for entry in dataclasses.fields(config)}
    for row in table():
        given, default = getattr(config, row.name), _default(defaults[row.name])
        if row.how != "works" and given != default:
            instead = f"; set {row.key} instead" if row.key else ""
            return f"{row.name} must be {default}, got {given!r}: {row.note}{instead}"
    return _optimizer(config) or _evaluation(config) or _others(config)


def _default(entry: dataclasses.Field) -> Any:
    return entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()


def _optimizer(config: Any) -> str | None:
    optim = str(getattr(config.optim, "value", config.optim))
    for word, reason in OPTIMIZERS.items():
        if word in optim.split("_") or optim.startswith(word):
            return f"optim = {optim} cannot be used: {reason}"
    if config.optim_target_modules is not None and not optim.startswith(("galore", "apollo")):
        return f"optim_target_modules is for optim = galore_* and apollo_*, got optim = {optim}"
    return None


def _evaluation(config: Any) -> str | None:
    """Keys that need evaluations, and evaluations that need data: said before anything is read."""
    word = {key: str(getattr(getattr(config, key), "value", getattr(config, key))) for key in ("eval_strategy",
                                                                                               "save_strategy")}
    wanted = [name for name, on in (("load_best_model_at_end", config.load_best_model_at_end),
                                    ("save_strategy = best", word["save_strategy"] == "best"),
                                    ("metric_for_best_model", config.metric_for_best_model is not None)) if on]
    if wanted and word["eval_strategy"] == "no":
        return f"{wanted[0]} needs evaluations: set eval_file and eval_strategy"
    if config.load_best_model_at_end and word["save_strategy"] == "no":
        return "load_best_model_at_end needs checkpoints: set save_strategy as eval_strategy"
    if word["save_strategy"] == "best" and config.metric_for_best_model is None:
        return "save_strategy = best needs metric_for_best_model, the name of a metric of the evaluation"
    return None


def _others(config: Any) -> str | None:
    given = config.accelerator_config
    strange = sorted(set(given) - {"gradient_accumulation_kwargs", "use_configured_state"}) if isinstance(given, dict) \
        else []
    if strange:
        return (f"accelerator_config.{strange[0]} has no effect: packs are dealt to processes by the plan, see "
                "pairs_per_step and max_tokens")
    if not config.dataloader_num_workers:
        for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(config, key):
                return f"{key} needs dataloader_num_workers of at least 1"
    if config.packing == "stream":
        for key in ("fsdp", "deepspeed"):
            if getattr(config, key):
                return (f"packing = stream needs whole parameters on every process, got {key} = "
                        f"{getattr(config, key)!r}: processes run different numbers of segments")
    if "tpu" in str(config.debug):
        return f"debug = {config.debug} needs a TPU; underflow_overflow is known here"
    return None
