"""Variants of one computation, timed side by side in one process, after their answers were compared.

A race is: check every variant's answer, warm up, then run the variants in turn, round after round, so that a slow
moment of the machine falls on all of them. Medians are reported, with the spread of the middle half, the peak memory
where it was weighed, and the floor: the time that this machine's own copy and product rates leave for the work.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .. import _memory

STATM = Path("/proc/self/statm")
FLUSH_BYTES = 256 << 20  # written between GPU runs: twice the largest L2 (50 MB on H100, 126 MB on B200)


@dataclass
class Result:
    """One row of a table: milliseconds (or MiB, tokens, FLOPs) of each variant, and what ratio was to be reached.

    floors: variants that do only what cannot be left out. work: bytes read and written and FLOPs that the computation
    needs; floor_ms: the least time for them on this machine. memory: peak MiB. errors: largest error against fp64,
    relative to the largest entry. skipped: peer -> why it did not run. curves: name -> values, for a plot. headline:
    the README shows it. function: ours, until the result is written.
    """

    case: str
    ours: str
    unit: str
    medians: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)  # (q3 - q1) / median
    targets: dict[str, str] = field(default_factory=dict)  # peer -> ">= 6", floor -> "<= 1.2"
    note: str = ""
    family: str = ""
    floors: list[str] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)
    floor_ms: float | None = None
    memory: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    headline: bool = False
    function: Callable[[], Any] | None = field(default=None, repr=False, compare=False)

    def ratio(self, peer: str) -> float:
        """Against a peer, theirs / ours: above 1 we are ahead. Against a floor, ours / floor: 1 is the limit."""
        ours, theirs = self.medians[self.ours], self.medians[peer]
        return ours / theirs if peer in self.floors else theirs / ours

    def reached(self, peer: str) -> bool | None:
        target = self.targets.get(peer)
        if target is None:
            return None
        relation, value = target.split()
        return self.ratio(peer) >= float(value) if relation == ">=" else self.ratio(peer) <= float(value)

    def share(self, name: str) -> float | None:
        """Share of the floor that a variant reaches: 1 is the limit."""
        return None if self.floor_ms is None else self.floor_ms / self.medians[name]

    def rate(self, name: str) -> tuple[float, str] | None:
        """(TFLOP/s, its unit) of the needed products, or (GB/s, its unit) of the needed bytes when there is none."""
        if not self.work:
            return None
        if self.work["flops"]:
            return self.work["flops"] / self.medians[name] / 1e9, "TFLOP/s"
        return (self.work["read"] + self.work["write"]) / self.medians[name] / 1e6, "GB/s"

    def row(self) -> dict[str, Any]:
        """As JSON, with the ratios and shares that follow from the medians."""
        shares = {} if self.floor_ms is None else {name: self.share(name) for name in self.medians}
        kept = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "function"}
        return {**kept, "ratios": {name: self.ratio(name) for name in self.medians}, "shares": shares}

    @staticmethod
    def from_row(row: dict[str, Any]) -> Result:
        return Result(**{entry.name: row[entry.name] for entry in fields(Result) if entry.name in row})


class Clock:
    """Milliseconds of one call: wall time on the CPU; device time between events on CUDA, the caches flushed before."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, function: Callable[[], Any]) -> float:
        if not self.cuda:
            before = time.perf_counter()
            function()
            return (time.perf_counter() - before) * 1e3
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def race(
    case: str,
    variants: dict[str, Callable[[], Any]],
    *,
    ours: str,
    targets: dict[str, str],
    rounds: int = 9,
    seconds: float = 12.0,
    warm: bool = False,
    weighed: bool = False,
    device: str | torch.device = "cpu",
    **about: Any,
) -> Result:
    """Times the variants in turn: `rounds` rounds, fewer (but 3 of them) when they would take longer than `seconds`.

    warm: every variant has run already, when its answer was checked. weighed: run each once more for its peak memory.
    about: further fields of the Result.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in () if warm else variants.values():
        function()  # warm up: pages, caches, compiled graphs
    if weighed:
        about["memory"] = {name: peak_memory(function, device)[0] for name, function in variants.items()}
    clock = Clock(device)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            for name, function in variants.items():
                times[name].append(clock(function))
    finally:
        gc.enable()
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: _middle_half(values) / medians[name] for name, values in times.items()}
    return Result(case, ours, "ms", medians, spread, targets, function=variants[ours], **about)


def _middle_half(values: list[float]) -> float:
    q1, _, q3 = statistics.quantiles(values, n=4)
    return q3 - q1


def weigh(
    case: str, variants: dict[str, Callable[[], Any]], *, ours: str, targets: dict[str, str], **about: Any
) -> Result:
    """Peak extra memory of each variant in MiB, see `peak_memory`."""
    peaks = {name: peak_memory(function)[0] for name, function in variants.items()}
    return Result(case, ours, "MiB", peaks, {}, targets, **about)


def peak_memory(function: Callable[[], Any], device: str | torch.device = "cpu") -> tuple[float, Any]:
    """(MiB above what was there before while the function runs, what it returns).

    On the CPU the resident set, sampled, after the heap has given back what earlier variants left (NaN without /proc);
    on CUDA the allocator's own peak.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, kept
    with Weigh() as weigh:
        kept = function()
    return weigh.mebibytes, kept


class Weigh:
    """Peak MiB of the resident set while the block runs, above what was there before; NaN without /proc."""

    def __enter__(self) -> Weigh:
        _memory.pool().clear()  # a buffer kept from before would not count as extra
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        self.sampler = _Sampler().__enter__() if STATM.exists() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.sampler is not None:
            self.sampler.__exit__()

    @property
    def mebibytes(self) -> float:
        return float("nan") if self.sampler is None else self.sampler.extra / 2**20


class _Sampler:
    """Largest resident set of this process while the block runs, above the one at its start."""

    def __enter__(self) -> _Sampler:
        self.start = self.most = _resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.001):
            self.most = max(self.most, _resident())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, _resident())

    @property
    def extra(self) -> int:
        return self.most - self.start


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients of a variant, for checking its answer."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], upstream)]


def check_same(expected: list[torch.Tensor], got: list[torch.Tensor], *, rtol: float, atol: float) -> None:
    """A time is never reported for a wrong answer."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)


def error_against(exact: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest difference of any output or gradient from fp64, relative to its largest entry; inf where one is NaN."""
    worst = 0.0
    for a, b in zip(got, exact, strict=True):
        scale = float(b.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
        error = max(float((x.double() - y).abs().max()) for x, y in zip(a.split(4096), b.split(4096), strict=True))
        worst = max(worst, error / scale) if error == error else float("inf")
    return worst
