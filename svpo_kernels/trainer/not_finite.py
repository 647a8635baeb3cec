"""A loss or a gradient that is not finite ends the run before it reaches a weight, and what made it is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .head_files import FOLDER
from .sharding import whole

NAMES = 20  # parameters that a report lists


class NotFinite(ValueError):
    """The run ended at a loss or gradient that is not finite; the message says where its batch lies."""


def gradient_norm(model: nn.Module) -> Tensor:
    """() L2 norm of all gradients that are there, whole where they are sharded."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(()))


def stop(trainer: Any, model: nn.Module, packs: list[dict[str, Any]], losses: list[Tensor], norm: Tensor) -> None:
    """Save this process's packs and the cause; raises NotFinite. Every process calls it."""
    step = trainer.state.global_step + 1
    rank = trainer.args.process_index
    folder = Path(trainer.args.output_dir) / FOLDER / f"not-finite-step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    values = [float(loss) for loss in losses]
    weights = [name for name, p in model.named_parameters() if not bool(p.detach().isfinite().all())]
    gradients = [name for name, p in model.named_parameters()
                 if p.grad is not None and not bool(p.grad.isfinite().all())]
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if weights:
        cause = f"{len(weights)} parameters were not finite before it, the first {weights[0]}"
    elif bad:
        cause = f"the loss of pack {bad[0] + 1} of {len(packs)} is {values[bad[0]]}"
    elif gradients:
        cause = f"the losses are finite, the gradients of {len(gradients)} parameters are not, the first {gradients[0]}"
    else:
        cause = "it is on another process"
    report = {"step": step, "process": rank, "cause": cause, "losses": [str(value) for value in values],
              "gradient norm": str(float(norm)), "parameters not finite": weights[:NAMES],
              "gradients not finite": gradients[:NAMES], "learning rate": trainer._get_learning_rate()}
    torch.save([_plain(pack) for pack in packs], folder / f"packs-{rank}.pt")
    (folder / f"cause-{rank}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    newest = next((path for path in checkpoint.checkpoints(trainer.args.output_dir)
                   if (path / checkpoint.MANIFEST).is_file()), None)
    kept = f"the newest complete checkpoint is {newest}" if newest else "there is no checkpoint yet"
    raise NotFinite(f"svpo train: step {step} is not finite: {cause}. No weight was changed; its packs and the cause "
                    f"are in {folder}; {kept}")


def _plain(pack: dict[str, Any]) -> dict[str, Any]:
    """A pack as tensors and numbers, for torch.load(..., weights_only=True)."""
    batch, plan = pack["batch"], pack["batch"].plan
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    tensors |= {"plan.rows": plan.rows.repeat_interleave(plan.row_start.diff()), "plan.labels": plan.labels,
                "plan.step_ids": plan.step_ids}
    own = {name: value for name, value in pack.items() if isinstance(value, (Tensor, tuple, int, float, str))}
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in (own | tensors).items()}
