"""Checkpoints that count only when they are whole: a manifest of sizes and hashes of every byte, written last.

A directory is marked while it is written. One that was killed half-way keeps the mark, has no manifest, is never
resumed from, and goes with the next complete one. Files are synced to the disk before the manifest says that they are
there. Hashing whole files reads what was just written: about a second a gigabyte and thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "svpo_manifest.json"
MARK = "svpo_incomplete"
SCRATCH = ".svpo-scratch-"  # names of directories that are being made or deleted
SUMS = "svpo_sums.json"
BLOCK = 1 << 22
THREADS = 4  # of hashing: it releases the interpreter's lock


def begin(directory: str | os.PathLike) -> None:
    """An empty, marked directory; what an earlier run left there goes first."""
    directory = Path(directory)
    remove(directory)
    scratch = directory.with_name(f"{SCRATCH}{directory.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / MARK).touch()
    scratch.rename(directory)  # at no moment is it there without its mark


def write_manifest(directory: str | os.PathLike) -> None:
    """Sync every file, record its size and hash in one atomic rename, take the mark away."""
    directory = Path(directory)
    names = _files(directory)
    with ThreadPoolExecutor(THREADS) as pool:
        files = dict(zip(names, pool.map(lambda name: _entry(directory / name, sync=True), names), strict=True))
    for folder in {(directory / name).parent for name in names} | {directory}:
        sync(folder)
    write_synced(directory / MANIFEST, json.dumps({"version": 2, "files": files}, indent=1))
    (directory / MARK).unlink(missing_ok=True)
    sync(directory)
    sync(directory.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file so that it is either there whole or not at all, whatever ends the machine."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync(path.parent)


def why_incomplete(directory: str | os.PathLike) -> str | None:
    """None for a complete checkpoint, else what is wrong with it. Reads every byte."""
    directory = Path(directory)
    if not directory.is_dir():
        return "it is not a directory"
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["version"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: the run ended while it was written"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    if version != 2:
        return f"its {MANIFEST} is of version {version}, which does not hash every byte; expected 2"
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(files, pool.map(lambda name: _entry(directory / name), files), strict=True):
            if found != files[name]:
                return f"{name} does not match its hash"
    return None


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Directories checkpoint-N of a run, newest (largest N) first, complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_complete(output_dir: str | os.PathLike) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, or None, and a line for every newer one that was passed over."""
    notes = []
    for path in checkpoints(output_dir):
        reason = why_incomplete(path)
        if reason is None:
            return path, notes
        notes.append(f"{path.name} is passed over: {reason}")
    return None, notes


def rotate(output_dir: str | os.PathLike, keep: int | None, best: str | None) -> None:
    """After a complete one: delete the incomplete ones, and the oldest complete ones beyond `keep`; the newest and the
    best one stay. A directory without mark or manifest is somebody else's and stays too."""
    for path in Path(output_dir).glob(f"{SCRATCH}*"):
        shutil.rmtree(path)
    for path in checkpoints(output_dir):
        if (path / MARK).is_file() and not (path / MANIFEST).is_file():
            remove(path)
    if keep is None or keep <= 0:
        return
    complete = [path for path in checkpoints(output_dir) if (path / MANIFEST).is_file()]
    for path in complete[max(keep, 1) :]:
        if best is None or path.resolve() != Path(best).resolve():
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint: first it loses its name, so that a half-deleted one never counts, and never stays."""
    if path.is_dir():
        scratch = path.with_name(f"{SCRATCH}{path.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        path.rename(scratch)
        shutil.rmtree(scratch)


Named = dict[str, float | list[float]]


def write_sums(windows: list[Named], total: Named, directory: str | os.PathLike) -> None:
    """Sums of the metrics: every process' own of the logging window that the checkpoint falls into, so that they are
    added up in the same order after a resume, and those of all processes before it."""
    (Path(directory) / SUMS).write_text(json.dumps({"windows": windows, "total": total}, indent=1), encoding="utf-8")


def read_sums(directory: str | os.PathLike) -> tuple[list[Named], Named]:
    """What write_sums wrote; nothing where an older version did not."""
    path = Path(directory) / SUMS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found.get("windows", [found["window"]] if "window" in found else []), found.get("total", {})


def _files(directory: Path) -> list[str]:
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST, MANIFEST + ".tmp", MARK))


def _entry(path: Path, sync: bool = False) -> dict[str, int | str]:
    """Size and sha256 of a file; sync: it is on the disk first."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """What a file holds, or a directory's entries, is on the disk; Windows cannot open a directory and needs not."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
