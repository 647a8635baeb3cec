"""Reference log-probs: one pass over the pairs' steps, written to every StepNode and cached on disk.

The cache's name is a fingerprint of the reference model and of the data, so a changed model, tokenizer or pair rule
never meets old numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from accelerate.utils import gather_object
from torch import nn

from svpo_kernels.plan import StepPlan

from .planner import EpochPlanner
from .train_data import TrainData

NOT_THE_MODEL = ("transformers_version", "use_cache", "architectures", "dtype", "torch_dtype")  # dtypes: below
SAMPLE = 1 << 16  # elements of a tensor that enter the fingerprint, evenly spread


def model_fingerprint(model: nn.Module, counts: Callable[[str], bool] = bool) -> str:
    """Hash of the config (RoPE, norms, softcap...) and of names, shapes, dtypes and an even sample of the elements of
    every parameter whose name counts."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict() if hasattr(model, "config") else {}
    told = {key: value for key, value in config.items() if not key.startswith("_") and key not in NOT_THE_MODEL}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        if not counts(name):
            continue
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLE)
        sample = flat[::stride].to("cpu", copy=True).contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def places(data: TrainData) -> list[tuple[int, int]]:
    """(tree, node) of every step whose reference is read, in the data's order."""
    return [(tree, node) for tree, nodes in enumerate(data.referenced()) for node in nodes.tolist()]


def has_references(data: TrainData) -> bool:
    return all(data.reference(*place) is not None for place in places(data))


def data_fingerprint(data: TrainData) -> str:
    """Hash of the steps whose references are read and of the ids of their trees."""
    digest = hashlib.blake2b(b"tokens" if data.per_token else b"", digest_size=16)
    for tree, nodes in zip(data.trees, data.referenced(), strict=True):
        if len(nodes):
            paths = tree.paths
            digest.update(json.dumps([data.paths, nodes.tolist(), paths.parent, paths.start, paths.length]).encode())
            digest.update(paths.ids.tobytes())
    return digest.hexdigest()


def cache_path(directory: str | os.PathLike, model: str, data: TrainData, precision: str) -> Path:
    """Where the log-probs of the model of this fingerprint on this data lie. precision: what the forward computes in,
    beside dtypes."""
    key = f"{model} {data_fingerprint(data)} {precision}"
    return Path(directory) / f"reference-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.safetensors"


def compute(planner: EpochPlanner, score: Callable[[Any], torch.Tensor], rank: int,
            watch: Callable[[Any], Any] = iter) -> dict[tuple[int, int], Any]:
    """Log-probs by (tree, node) of all referenced steps. Each process scores its share, and all get all of them.

    score: a StepBatch -> step log-probs (S,), or per prediction (N,) of rollouts. watch: wraps the steps of the
    planner, for a progress bar.
    """
    found = {}
    by_token = planner.data.rollouts is not None
    for step in watch(range(len(planner))):
        for pack in planner.share(0, step, rank)["packs"]:
            batch = pack["batch"]  # of one token and no step where this process has no work left
            logps = score(batch).double().cpu()
            each = by_step(batch.plan, logps) if by_token else logps.tolist()
            for place, logp in zip(batch.node_of_step.tolist(), each, strict=True):
                found[tuple(place)] = logp
    return {place: logp for part in gather_object([found]) for place, logp in part.items()}


def by_step(plan: StepPlan, logps: torch.Tensor) -> list[np.ndarray]:
    """(N,) by prediction -> one array a step."""
    return [own.numpy() for own in logps[plan.step_order.cpu()].split(plan.counts.tolist())]


def set_references(data: TrainData, logps: dict[tuple[int, int], Any]) -> None:
    """Write every one that is wanted. Raises ValueError naming the first that is not finite: it would end the run."""
    for place in places(data):
        if not np.isfinite(logps[place]).all():
            raise ValueError(f"svpo train: the reference's log-prob of node {place[1]} of tree {place[0]} is "
                             f"{logps[place]}; the reference model cannot run this text")
        data.set_reference(*place, logps[place])


def write_cache(path: Path, data: TrainData) -> None:
    """Save the references of all referenced steps, in one atomic rename."""
    values = np.concatenate([np.zeros(0), *(np.atleast_1d(data.reference(*place)) for place in places(data))])
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    safetensors.numpy.save_file({"logps": values}, scratch)
    os.replace(scratch, path)


def read_cache(path: Path, data: TrainData) -> str | None:
    """Set the references from a cache. Returns None, or why it cannot be: then they are to be computed anew."""
    if not path.is_file():
        return "there is none"
    wanted = places(data)
    try:
        values = safetensors.numpy.load_file(path)["logps"]
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        return f"it cannot be read ({str(error).splitlines()[0]})"
    sizes = [data.size(*place) for place in wanted]
    if values.shape != (sum(sizes),):
        return f"it holds {values.size} log-probs, expected {sum(sizes)}"
    if not np.isfinite(values).all():
        return f"{(~np.isfinite(values)).sum()} of its {values.size} log-probs are not finite"
    found = np.split(values, np.cumsum(sizes)[:-1]) if data.per_token else values.tolist()
    set_references(data, dict(zip(wanted, found, strict=True)))
    return None
