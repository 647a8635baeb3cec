"""How a run is saved and resumed: the part of the trainer that writes checkpoints and reads them back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object, save_fsdp_optimizer
from safetensors import SafetensorError

from svpo_kernels.models import is_peft

from . import checkpoint, head_contract, head_files, run_state, sharding
from .metrics import by_name
from .model import StepModel

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # Hugging Face's names
OPTIMIZER_PARTS = "optimizer_0"  # accelerate's folder of torch.distributed.checkpoint
TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "file write failed")  # torch.save's, which are no OSError


@contextlib.contextmanager
def writing(directory: str, output_dir: str, remove: bool = False) -> Iterator[None]:
    """A full disk, a limit on file sizes, a directory that cannot be written: one OSError that says what is left.

    remove: the half-written directory goes, for it holds the space that was lacking.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        torchs = isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITES)
        if torchs:
            raise
        if remove:
            checkpoint.remove(Path(directory))
        newest, _ = checkpoint.newest_complete(output_dir)
        kept = f"the newest complete checkpoint is {newest}" if newest else "there is no complete checkpoint"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"svpo train: cannot write {directory}: {reason}; {kept}") from error


class SavingMixin:
    """Overrides of `transformers.Trainer`: model and value head in files of their own, the manifest last."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Hugging Face's; under FSDP2 the whole model in every state_dict_type, gathered tensor by tensor."""
        if not self.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        trained = {name for name, parameter in sharding.parameters(self.model) if parameter.requires_grad}
        adapters = is_peft(self.model.lm)  # of a frozen base nothing is written
        state = sharding.whole_state(self.model, self.args.should_save, lambda name: not adapters or name in trained)
        self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model as `AutoModelForCausalLM` reads it, the value head, tokenizer and configuration."""
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model: StepModel = self.accelerator.unwrap_model(self.model)
        head = None if model.v_head is None else model.v_head.state_dict()
        own = None
        if state_dict is not None:
            own = {name.removeprefix("lm."): value for name, value in state_dict.items() if name.startswith("lm.")}
            if head is not None:
                head = {name: state_dict[f"v_head.{name}"] for name in head}
        model.lm.save_pretrained(output_dir, state_dict=own)
        if head is not None or self.config.objective == "implicit_prm":
            start = self.config.ref_model_name_or_path or self.config.model_name_or_path
            contract = head_contract.describe(self.config, model.v_head, self.processing_class, start)
            head_files.write(contract["kind"], head or {}, contract, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        with open(os.path.join(output_dir, "svpo_config.yaml"), "w", encoding="utf-8") as file:
            yaml.safe_dump(self.config.explicit(), file, allow_unicode=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Hugging Face's checkpoint, the plan and the metrics' sums; the manifest comes when every process is done, and
        rotation after it."""
        directory = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        windows = gather_object([self._sums.vector()])
        try:
            with writing(directory, self.args.output_dir, self.args.should_save):
                if self.args.should_save:
                    checkpoint.begin(directory)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    run_state.write(self._state, directory)
                    checkpoint.write_sums([by_name(each) for each in windows], by_name(self._total), directory)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoint.write_manifest(directory)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            checkpoint.rotate(self.args.output_dir, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights and value head, bit by bit as they were saved, by a run of any number of processes."""
        own: StepModel = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp2:
            first = self.args.process_index == 0
            sharding.fill(own.lm, saved_lm_weights(own, resume_from_checkpoint) if first else None)
            if own.v_head is not None and own.v_head.state_dict():
                sharding.fill(own.v_head, saved_head(own.v_head, resume_from_checkpoint) if first else None)
            return
        load_lm_weights(own, resume_from_checkpoint)
        if own.v_head is not None and own.v_head.state_dict():
            head_files.load_into(own.v_head, _head_of(own.v_head, resume_from_checkpoint), exact=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 `optimizer.pt` as a run without shards writes it, or with SHARDED_STATE_DICT a part a process."""
        if not self.is_fsdp2:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self._saves_shards:
            save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model,
                                output_dir)
        else:
            state = sharding.whole_optimizer(self.optimizer.optimizer, self.args.should_save)
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, OPTIMIZER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    @property
    def _saves_shards(self) -> bool:
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What a run of any set-up wrote: one process, DDP, FSDP2 whole or in parts."""
        parts = checkpoint is not None and os.path.isdir(os.path.join(checkpoint, OPTIMIZER_PARTS))
        if checkpoint is None or not (self.is_fsdp2 or parts):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if parts:
            sharding.read_parts(self.model, self.optimizer, os.path.join(checkpoint, OPTIMIZER_PARTS))
        else:
            state = torch.load(os.path.join(checkpoint, OPTIMIZER), map_location="cpu", weights_only=True, mmap=True)
            sharding.cut_optimizer(self.optimizer.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER), weights_only=True))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def load_lm_weights(model: StepModel, directory: str) -> None:
    """Copy the weights of a saved model, or of saved adapters, into the model. Raises for a missing or strange key."""
    if is_peft(model.lm):
        from peft import load_peft_weights, set_peft_model_state_dict

        result = set_peft_model_state_dict(model.lm, load_peft_weights(directory, device="cpu"))
        if result.unexpected_keys:
            raise ValueError(f"svpo train: {directory} holds adapters this model has not: {result.unexpected_keys}")
        return
    with torch.no_grad():
        model.lm.load_state_dict(_saved_lm(model, directory).state_dict(), strict=True)


def saved_lm_weights(model: StepModel, directory: str) -> dict[str, torch.Tensor]:
    """What `load_lm_weights` copies, by the names of the model's parameters."""
    names = [name for name, _ in sharding.parameters(model.lm)]
    if not is_peft(model.lm):
        saved = dict(_saved_lm(model, directory).named_parameters())
        return {name: saved[name] for name in names} | {name: saved[name] for name in saved.keys() - set(names)}
    from peft import load_peft_weights

    saved, adapter = load_peft_weights(directory, device="cpu"), model.lm.active_adapter
    of = {name.replace(f".{adapter}.", "."): name for name in names if f".{adapter}." in name}
    if lost := of.keys() - saved.keys():
        raise ValueError(f"svpo train: {directory} has no {sorted(lost)[0]}; this run's adapters have")
    return {of.get(name, name): tensor for name, tensor in saved.items()}


def _saved_lm(model: StepModel, directory: str) -> Any:
    return type(model.lm).from_pretrained(directory, dtype=next(model.lm.parameters()).dtype)


def _head_of(head: Any, directory: str) -> head_files.Head:
    found = head_files.read(directory)
    if found is None:
        raise ValueError(f"svpo train: {directory} has no {head.kind} head; this run has")
    return found


def saved_head(head: Any, directory: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint's head, by the names of this run's."""
    return {name.removeprefix("v_head."): tensor for name, tensor in _head_of(head, directory).state.items()}
