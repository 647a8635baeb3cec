"""What decides the numbers of a run, written into every checkpoint, and how two runs differ in it.

Every key of the configuration decides unless it stands in FREE (it changes no number) or in SAID (it changes rounding,
speed or memory: a resumed run says so and goes on). So a key that is new decides until somebody has thought about it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from .config import LOSS_KEYS
from .reference import model_fingerprint

RUN = "svpo_run.json"
CONSTANT = ("constant", "constant_with_warmup")  # schedules that do not know a run's length

FREE = set((
    "output_dir resume_from_checkpoint model_name_or_path ref_model_name_or_path tokenizer_name_or_path train_file "
    "eval_file trust_remote_code preset preference "  # files by their content, losses by their values
    "packing_fallback on_bad hub_token logging_strategy logging_steps logging_first_step log_on_each_node log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps "
    "save_total_limit save_on_each_node enable_jit_checkpoint load_best_model_at_end metric_for_best_model "
    "greater_is_better restore_callback_states_from_checkpoint do_eval num_train_epochs max_steps data_seed seed "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics local_rank "
    "torch_empty_cache_steps data_cache template_date"  # its ids are the data's
).split())
SAID = set((
    "packing max_tokens gradient_accumulation_steps backend logits_budget_mb attn_implementation use_cpu tf32 "
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode accelerator_config fsdp fsdp_config deepspeed "
    "full_determinism save_only_model"
).split())
PACKAGES = ("svpo_kernels", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "torchao")


def settings(config: Any) -> dict[str, dict[str, Any]]:
    """decides and said, from a configuration alone: before data and model are read."""
    decides: dict[str, Any] = dict(config.loss_arguments())
    said: dict[str, Any] = {"processes": config.world_size}
    for name in (entry.name for entry in dataclasses.fields(config) if entry.init):
        if name in SAID:
            said[name] = getattr(config, name)
        elif name not in FREE and name not in LOSS_KEYS:
            decides[name] = getattr(config, name)
    decides["seed"] = config.seed
    decides["data_seed"] = config.seed if config.data_seed is None else config.data_seed
    if config.lr_scheduler_type not in CONSTANT:  # the schedule runs to the run's end
        by_steps = config.max_steps > 0
        decides["max_steps" if by_steps else "num_train_epochs"] = (config.max_steps if by_steps
                                                                    else config.num_train_epochs)
    for package in PACKAGES:
        try:
            said[f"version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _plain({"decides": decides, "said": said})


def run_state(config: Any, model: Any, ref_model: Any, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`settings`, and what model, reference and data are: their fingerprints. model: as it is before training."""
    found = settings(config)
    lm = model.causal_lm
    fresh = model.holds_its_start  # their weights are the checkpoint's, or random ones of the seed
    found["decides"] |= _plain({
        **{key: value for key, value in plan.items() if key not in ("seed",)},
        "model": model_fingerprint(lm, lambda name: not (fresh and "lora_" in name)),
        "adapters": _adapters(model.lm), "head": getattr(model.v_head, "kind", None),
        "reference model": None if ref_model is None else model_fingerprint(ref_model.causal_lm),
    })
    return found


def _adapters(lm: Any) -> dict[str, Any]:
    """The shape of every adapter of a PEFT model."""
    shapes = {}
    for name, adapter in (getattr(lm, "peft_config", None) or {}).items():
        targets = adapter.target_modules
        shapes[name] = {"type": str(getattr(adapter.peft_type, "value", adapter.peft_type)),
                        "targets": sorted(targets) if isinstance(targets, (set, list)) else targets,
                        **{key: getattr(adapter, key, None) for key in ("r", "lora_alpha", "lora_dropout", "use_dora")}}
    return shapes


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What was and what is, for every key that differs, ours in front."""
    return [f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in (*ours, *(theirs.keys() - ours.keys()))
            if ours.get(key) != theirs.get(key)]


def write(state: dict[str, Any], directory: str | os.PathLike) -> None:
    (Path(directory) / RUN).write_text(json.dumps(state, indent=1), encoding="utf-8")


def read(directory: str | os.PathLike) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError where there is none: a checkpoint of an older version."""
    path = Path(directory) / RUN
    if not path.is_file():
        raise ValueError(f"svpo train: cannot resume from {directory}: it has no {RUN}, so what wrote it is not known. "
                         "Start from it instead: name it as model_name_or_path, with an output_dir of its own")
    return json.loads(path.read_text(encoding="utf-8"))
