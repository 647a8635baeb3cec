"""Instructions that the CPU kernels execute, counted by callgrind: a figure that a busy machine does not change.

Each case calls a public op once, with every native call recorded together with the memory it points to. The records are
then replayed under callgrind by a process without torch, whose start valgrind makes minutes long. Valgrind knows no
AVX-512, so the AVX2 kernels are counted, on one thread; counts belong to a compiler and move with it.
"""

from __future__ import annotations

import ctypes
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

import svpo_kernels as sk

from .. import _native
from . import machine, results
from .race import Result

UNIT = "instructions"
NOISE = 0.005  # two runs of one build agree to the instruction; buffers that lie elsewhere may move the head of a row
JSON = "instructions.json"
REPLAY = Path(__file__).with_name("replay.py")
Call = tuple[str, list[Any]]  # native op, arguments: numbers, and bytes for what a pointer pointed to


def why_not() -> str | None:
    """None when counts can be taken here, else why not."""
    if shutil.which("valgrind") is None:
        return "valgrind is not on PATH"
    return _native.cpu_reason()


def cases() -> dict[str, Callable[[], Any]]:
    """name -> one forward and backward, in sizes of which callgrind takes well below a second."""
    torch.manual_seed(0)
    T, D, V, S, P = 16, 64, 4000, 8, 64
    labels, step_ids = torch.randint(0, V, (T,)), torch.arange(T) * S // T
    plan = sk.StepPlan.from_step_ids(labels, step_ids, shift=0)
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    logps, ref, values = torch.randn(S, requires_grad=True), torch.randn(S), torch.randn(S, requires_grad=True)
    pairs, positions = torch.randint(0, S, (P, 2)), torch.arange(0, T, 2)
    head, scores = torch.randn(1, D, requires_grad=True), torch.rand(S, requires_grad=True)
    offsets = torch.tensor([0, S // 2, S])

    def rows(dtype: torch.dtype) -> Callable[[], Any]:
        logits = torch.randn(T, V).to(dtype).requires_grad_()
        return lambda: sk.step_logps(logits, plan).sum().backward()

    return {
        f"step_logps, {T} x {V}, float32": rows(torch.float32),
        f"step_logps, {T} x {V}, bfloat16": rows(torch.bfloat16),
        f"linear_step_logps, {T} x {D} x {V}, float32":
            lambda: sk.linear_step_logps(hidden, weight, plan).sum().backward(),
        f"svpo_loss, P {P}": lambda: sk.svpo_loss(logps, pairs, ref, values=values, value_targets=ref).loss.backward(),
        f"prm_scores, {S} of {T} x {D}": lambda: sk.prm_scores(hidden, positions, head).sum().backward(),
        f"prm_loss, {S} of {T} x {D}": lambda: sk.prm_loss(hidden, positions, (ref > 0).float(), head).backward(),
        f"aggregate_scores, {S}": lambda: sk.aggregate_scores(scores, offsets, "prod").sum().backward(),
    }


def record(function: Callable[[], Any]) -> list[Call]:
    """The native calls of a function, each with the memory its pointers point to as it was before the call."""
    seen: dict[int, torch.Tensor] = {}
    calls: list[Call] = []
    address = torch.Tensor.data_ptr

    def data_ptr(tensor: torch.Tensor) -> int:
        seen[address(tensor)] = tensor
        return address(tensor)

    class Recorder:
        def __getattr__(self, op: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls.append((op, [_memory(seen[x]) if type(x) is int and x in seen and x else x for x in arguments]))
                return getattr(native, op)(*arguments)

            return call

    native = _native.cpu()
    with mock.patch.object(_native, "cpu", Recorder), mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
        function()
    return calls


def _memory(tensor: torch.Tensor) -> bytes:
    """What lies between a tensor's first element and the end of its storage."""
    size = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size)


def count(calls: list[Call], op: str) -> int:
    """Instructions of all calls of one native op. Raises RuntimeError when callgrind saw none or failed."""
    library = _native.cpu().__file__
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "calls.pickle", Path(folder) / "callgrind.out"
        file.write_bytes(pickle.dumps([call for call in calls if call[0] == op]))
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no",
                   f"--toggle-collect=svpo_cpu_{op}_avx2", f"--toggle-collect=svpo_cpu_{op}_portable",
                   sys.executable, "-I", str(REPLAY), library, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        total = re.search(r"^(?:summary|totals): (\d+)", out.read_text() if out.exists() else "", flags=re.M)
    if done.returncode or total is None or int(total.group(1)) == 0:
        raise RuntimeError(f"svpo bench: callgrind counted nothing in {op} (exit code {done.returncode}; was the "
                           f"extension stripped?): {done.stderr[-500:]}")
    return int(total.group(1))


def run(folder: Path, console: Console, only: str = "") -> dict[str, Any]:
    """Counts of every native op of every case whose name holds `only`; leaves instructions.json in the folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recorded = {name: record(function) for name, function in cases().items() if only in name}
    finally:
        torch.set_num_threads(threads)
    jobs = [(name, op) for name, calls in recorded.items() for op in dict.fromkeys(call[0] for call in calls)]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda job: count(recorded[job[0]], job[1]), jobs))
    found = [Result(f"{op} in {name}", "ours", UNIT, {"ours": n}, family=UNIT)
             for (name, op), n in zip(jobs, counts, strict=True)]
    for result in found:
        console.print(f"{result.medians['ours']:>12,} instructions  {result.case}", highlight=False,
                      soft_wrap=True)
    about = {**machine.describe("svpo bench --instructions"), "isa": "avx2 (valgrind has no AVX-512)"}
    (folder / JSON).unlink(missing_ok=True)
    results.write(folder / JSON, about, found)
    return results.read(folder / JSON)
