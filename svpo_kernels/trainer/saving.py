"""How a run is saved and resumed: the part of the trainer that writes checkpoints and reads them back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from safetensors import SafetensorError

from svpo_kernels.models import is_peft

from . import checkpoint, head_contract, head_files, run_state
from .metrics import by_name
from .model import StepModel

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
        """Weights and value head, bit by bit as they were saved; FSDP's own format through Hugging Face's code."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        own: StepModel = self.accelerator.unwrap_model(self.model)
        load_lm_weights(own, resume_from_checkpoint)
        if own.v_head is not None and own.v_head.state_dict():
            head = head_files.read(resume_from_checkpoint)
            if head is None:
                raise ValueError(f"svpo train: {resume_from_checkpoint} has no {own.v_head.kind} head; this run has")
            head_files.load_into(own.v_head, head, exact=True)

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
    parameter = next(model.lm.parameters())
    saved = type(model.lm).from_pretrained(directory, dtype=parameter.dtype)
    with torch.no_grad():
        model.lm.load_state_dict(saved.state_dict(), strict=True)
