"""What is done before the first step: the packing check, the noise of two runs, the reference's log-probs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from svpo_kernels.trees.attention import PackingError
from svpo_kernels.trees.check import check_packing
from svpo_kernels.trees.stream_check import check_streaming

from . import reference, run_state, sharding
from .choosing import AUTO
from .head_files import FOLDER
from .train_data import TrainData


class PreparingMixin:
    """The part of the trainer that looks at model and data before it trains, and that scores with the reference."""

    def check_packing(self) -> None:
        """Compare one path of the first batch with its separate run; refuse, or fall back to distinct if asked."""
        packing = self.settings.packing
        checks = {"tree": check_packing, "stream": check_streaming}
        chains = packing not in checks and not self.settings.padded
        if self._packing_checked or self.planner is None or not (chains or packing in checks):
            return
        model = self.accelerator.unwrap_model(self.model)
        batch = self.planner.packs(0, 0)[0]["batch"].to(self.args.device)
        try:
            with self._mode(model, True), self._precision():  # as in training: dropout is looked for
                model.inside(lambda: checks.get(packing, check_packing)(model.causal_lm, batch))
        except PackingError as error:
            if chains:
                self._replan(f"falling back to padded sequences: {error}", padded=True)
            elif self.config.packing_fallback != "distinct" and self.config.packing != AUTO:
                raise PackingError(
                    f"{error}. Set packing=distinct (each distinct sequence once, under the model's own mask), or "
                    "packing_fallback=distinct to do so by itself"
                    + ("; packing=stream runs models with a state" if packing == "tree" else "")
                ) from error
            else:
                self._replan(f"falling back to packing=distinct: {error}", packing="distinct", padded=True)
        self._packing_checked = True

    def _replan(self, said: str, **changes: Any) -> None:
        print(f"svpo train: {said}")
        self.settings = self.planner.settings = replace(self.settings, **changes)

    @property
    def is_fsdp2(self) -> bool:
        return bool(self.is_fsdp_enabled and self.accelerator.is_fsdp2)

    def _precision(self) -> contextlib.AbstractContextManager:
        """Autocast, where the run has it: under FSDP2 the policy of the shards decides, in training too."""
        return contextlib.nullcontext() if self.is_fsdp2 else self.accelerator.autocast()

    def _know_start(self) -> None:
        """What the run starts from, told once, before anything is cut or trained; the first process's word counts."""
        if self._state is None:
            model = self.accelerator.unwrap_model(self.model)
            plan = {} if self.planner is None else self.planner.fingerprint()
            self._state = run_state.run_state(self.config, model, self.ref_model, plan)
            if self.args.world_size > 1:
                broadcast_object_list(told := [self._state])
                self._state = told[0]

    def _cut(self) -> None:
        """Under FSDP2: shard model and second model before the first forward, whatever comes first."""
        self._know_start()
        if self.is_fsdp2:
            sharding.shard(self.accelerator, self.model)
            if self.ref_model is not None:
                sharding.shard(self.accelerator, self.ref_model, trained=False)

    def prepare_reference(self, data: TrainData | None) -> None:
        """Set every referenced node's log-probs: given with the data, cached on disk, or computed now. So are those of
        the policy that sampled rollouts, which is the starting model where they are not given."""
        if data is not None and data.rollouts is not None:
            self._prepare(data, data.rollouts.old, None)
        if data is not None and self.wants_reference and self.config.reference == "cache":
            self._prepare(data, data if data.rollouts is None else data.rollouts.reference, self.ref_model)

    def _prepare(self, data: TrainData, places: Any, model: nn.Module | None) -> None:
        """Fill the places of the data with log-probs of a model; None: of the starting one."""
        if reference.has_references(places):
            return
        scorer = model or self.accelerator.unwrap_model(self.model)
        self._know_start()
        precision = f"{self.accelerator.mixed_precision} {self.settings.packing == 'tree'}"
        fingerprint = self._state["decides"]["model" if model is None else "reference model"]
        path = reference.cache_path(os.path.join(self.args.output_dir, FOLDER), fingerprint, places, precision)
        reason = reference.read_cache(path, places)
        if self._all_agree(reason is None):
            return
        if reason is not None and path.is_file() and self.args.process_index == 0:
            print(f"svpo train: the cache of references {path} is computed anew: {reason}")
        if self.state.global_step > 0 and model is None and not scorer.holds_its_start:
            raise ValueError("SVPOTrainer: the reference is the model before training, which has begun; give ref_model "
                             "or evaluate these data before training")
        found = reference.compute(
            self._whole(data), lambda batch: self._reference_logps(batch.to(self.args.device), scorer),
            self.args.process_index, lambda steps: self.watch(steps, "reference"),
        )
        sharding.reshard(scorer)
        reference.set_references(places, found)
        if self.args.should_save:
            reference.write_cache(path, places)

    @torch.no_grad()
    def _reference_logps(self, batch: Any, scorer: Any = None) -> Tensor:
        """(S,) or (N,) log-probs of the reference: the second model, or the model itself with adapters off."""
        scorer = scorer or self.ref_model or self.accelerator.unwrap_model(self.model)
        with self._mode(scorer, False), scorer.adapters_off(), self._precision():
            return scorer(batch, **{**self.objective.asked, "stats": ()})["step_logps"]

    def _references_of(self, batch: Any, wanted: bool) -> Tensor | None:
        if not self.wants_reference or not wanted:
            return None
        if self.config.reference == "online":  # of an empty pack too: where it is sharded all processes run it
            return self._reference_logps(batch)
        if batch.plan.num_steps == 0:
            return None
        if batch.get("ref_logps") is not None:
            return batch["ref_logps"]
        if batch.ref_step_logps is None and (len(batch.pairs) or self.config.objective in ("dvo", "policy")):
            raise ValueError("SVPOTrainer: this batch has no reference log-probs; call prepare_reference on its data")
        return batch.ref_step_logps

    def _all_agree(self, value: bool) -> bool:
        return all(gather_object([value]))

    @contextlib.contextmanager
    def _mode(self, model: nn.Module, training: bool) -> Iterator[None]:
        before = model.training
        model.train(training)
        try:
            yield
        finally:
            model.train(before)
