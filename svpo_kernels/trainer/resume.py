"""Where a run goes on: which checkpoint of its output_dir, if any, whether it is one of this very run, or its end."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import nn

from svpo_kernels.data import encoded

from . import checkpoint, run_state
from .config import ConfigError, SVPOConfig
from .head_files import FOLDER
from .reference import model_fingerprint

FINISHED = f"{FOLDER}/finished.json"
LOCK = ".svpo-lock"


@contextlib.contextmanager
def owned(output_dir: str, main: bool) -> Iterator[None]:
    """The output directory is this run's alone until it ends, however it ends. Raises ConfigError for a second run."""
    if not main:
        yield
        return
    os.makedirs(output_dir, exist_ok=True)
    lock = FileLock(Path(output_dir) / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"config: {output_dir} is in use by another run; give this one an output_dir of its own, or "
                          "wait until the other has ended") from None
    try:
        yield
    finally:
        lock.release()


def where_to_resume(config: SVPOConfig, say: Any = print) -> str | None:
    """The checkpoint to go on from, None to start anew; asked of one process, told to all.

    Raises ConfigError when one was asked for and there is none, and when a fresh start would mix with an old run.
    """
    return ask_first(config, lambda: _choose(config, say), ConfigError)


def ask_first(config: Any, act: Callable[[], Any], error: type[ValueError] = ValueError) -> Any:
    """What act gives on the first process, told to all; they all raise the error that it raises there."""
    answer: list[Any] = [None, None]
    if config.process_index == 0:
        try:
            answer[0] = act()
        except error as caught:
            answer[1] = str(caught)
    if config.world_size > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise error(answer[1])
    return answer[0]


def _choose(config: SVPOConfig, say: Any) -> str | None:
    asked, output_dir = config.resume_from_checkpoint, config.output_dir
    if asked not in ("auto", "true", "false"):
        return asked
    if asked == "false":
        held = sorted(_held(output_dir)) if os.path.isdir(output_dir) else []
        if held:
            raise ConfigError(
                f"config: resume_from_checkpoint is false, but {output_dir} is not empty (it holds {held[0]}); empty "
                "it or give the run an output_dir of its own"
            )
        return None
    path, notes = checkpoint.newest_complete(output_dir)
    for note in notes:
        say(note)
    if path is None and asked == "true":
        raise ConfigError(f"config: resume_from_checkpoint is true, but {output_dir} has no complete checkpoint")
    return None if path is None else str(path)


def _held(output_dir: str) -> set[str]:
    """What an output directory holds of a run; a lock and encoded data are of none."""
    folder = Path(output_dir) / FOLDER
    data = folder.is_dir() and all(name.startswith(encoded.PREFIX) for name in os.listdir(folder))
    return set(os.listdir(output_dir)) - {LOCK} - ({FOLDER} if data else set())


def begun_on(path: str | None) -> str:
    """The day that the run of a checkpoint began on, YYYY-MM-DD; today for a new one. The chat template says it."""
    settings = Path(path) / "svpo_config.yaml" if path else None
    known = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings and settings.is_file() else {}
    return str((known or {}).get("template_date") or datetime.date.today())


def resolve(asked: str | bool | None, output_dir: str) -> str | None:
    """The path of the checkpoint that `SVPOTrainer.train` was asked to go on from; True: the newest complete one."""
    if asked is not True:
        return asked or None
    path, _ = checkpoint.newest_complete(output_dir)
    if path is None:
        raise ValueError(f"SVPOTrainer: no complete checkpoint in {output_dir}")
    return str(path)


def check(path: str, state: dict[str, Any], say: Any = print) -> None:
    """Raises ValueError for a checkpoint that is incomplete, that holds the model only, or is another run's.

    What differs and decides is named in the error; what differs in rounding, speed or memory only is said.
    """
    reason = checkpoint.why_incomplete(path)
    if reason is not None:
        raise ValueError(f"svpo train: cannot resume from {path}: {reason}")
    theirs = run_state.read(path)
    if theirs["said"].get("save_only_model"):
        raise ValueError(f"svpo train: cannot resume from {path}: it was written with save_only_model and has no "
                         "optimizer; name it as model_name_or_path to start from it")
    differ = run_state.differences(state["decides"], theirs["decides"])
    if differ:
        raise ValueError(f"svpo train: cannot resume from {path}: {'; '.join(differ)}. Give the run an output_dir of "
                         "its own")
    for line in run_state.differences(state["said"], theirs["said"]):
        say(f"resuming with another setting: {line}")


# -- the end ----------------------------------------------------------------------------------------------------------


def sources(config: SVPOConfig, lm: nn.Module | None) -> dict[str, Any]:
    """What a run was made from, cheap to tell: names of models (or the one that was given), hashes of data files."""
    found: dict[str, Any] = {key: getattr(config, key) for key in (
        "model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path")}
    for key in ("train_file", "eval_file"):
        path = getattr(config, key)
        found[key] = file_digest(path) if path and os.path.exists(path) else path
    if lm is not None:
        found["model"] = model_fingerprint(lm)
    return found


def file_digest(path: str) -> str:
    """Name and hash of a file, or of a folder's files with their names."""
    digest = hashlib.sha256()
    inside = sorted(os.path.join(where, name) for where, _, names in os.walk(path) for name in names)
    for name in inside or [path]:
        if inside:
            digest.update(os.path.relpath(name, path).encode() + b"\0")
        with open(name, "rb") as file:
            while block := file.read(checkpoint.BLOCK):
                digest.update(block)
    return f"{os.path.basename(path)} {digest.hexdigest()[:16]}"


def write_finished(config: SVPOConfig, made_from: dict[str, Any], step: int) -> None:
    """The last file of a run: what it was (`sources`), and the files of its model with their sizes, synced before."""
    root = Path(config.output_dir)
    (root / FOLDER).mkdir(exist_ok=True)
    files = {path.relative_to(root).as_posix(): path.stat().st_size
             for path in (*root.iterdir(), *(root / FOLDER).iterdir())
             if path.suffix in (".safetensors", ".json", ".jinja", ".model") and path != root / FINISHED}
    for name in files:
        checkpoint.sync(root / name)
    text = json.dumps({"step": step, "decides": run_state.settings(config)["decides"] | made_from,
                       "files": files}, indent=1)
    checkpoint.write_synced(root / FINISHED, text)


def finished(config: SVPOConfig, made_from: dict[str, Any]) -> int | None:
    """The last step of the run that this configuration has finished in its output_dir; None where there is none.

    Raises ConfigError, naming what differs, where a run with other settings has finished there. One whose model is not
    there any more has not.
    """
    root = Path(config.output_dir)
    try:
        held = json.loads((root / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if config.resume_from_checkpoint == "false":
        return None  # `where_to_resume` refuses, for the directory is not empty
    if any(not (root / name).is_file() or (root / name).stat().st_size != size for name, size in held["files"].items()):
        return None
    differ = run_state.differences(run_state.settings(config)["decides"] | made_from, held["decides"])
    if differ:
        raise ConfigError(f"config: {config.output_dir} holds a finished run of other settings: {'; '.join(differ)}. "
                          "Give the run an output_dir of its own; to train on, name the old one as model_name_or_path")
    return held["step"]
