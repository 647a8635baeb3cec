"""Variants of one computation, timed side by side in one process, after their answers were compared.

A race is: check every variant's answer, warm up, then run the variants in turn, round after round, so that a slow
moment of the machine falls on all of them. Medians are reported, with the spread of the middle half.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from svpo_kernels import _memory


@dataclass
class Result:
    """One row of a table: milliseconds (or MiB) of each variant, and what ratio was to be reached."""

    case: str
    ours: str
    unit: str
    medians: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)  # (q3 - q1) / median
    targets: dict[str, str] = field(default_factory=dict)  # peer -> "x >= 6" or "x <= 1.2"
    note: str = ""

    def ratio(self, peer: str) -> float:
        """How many times faster (smaller) than the peer ours is; for a floor ("<="), how many times the floor."""
        ours, theirs = self.medians[self.ours], self.medians[peer]
        return ours / theirs if "<=" in self.targets.get(peer, "") else theirs / ours

    def reached(self, peer: str) -> bool | None:
        target = self.targets.get(peer)
        if target is None:
            return None
        relation, value = target.split()
        return self.ratio(peer) >= float(value) if relation == ">=" else self.ratio(peer) <= float(value)


def race(
    case: str,
    variants: dict[str, Callable[[], Any]],
    *,
    ours: str,
    targets: dict[str, str],
    rounds: int = 9,
    seconds: float = 12.0,
    warm: bool = False,
    note: str = "",
) -> Result:
    """Times the variants in turn: `rounds` rounds, fewer (at least 3) when they would take longer than `seconds`.

    warm: every variant has run already, when its answer was checked.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in () if warm else variants.values():
        function()  # warm up: pages, caches, compiled graphs
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            for name, function in variants.items():
                before = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - before) * 1e3)
    finally:
        gc.enable()
    medians = {name: statistics.median(values) for name, values in times.items()}
    spread = {name: _middle_half(values) / medians[name] for name, values in times.items()}
    return Result(case, ours, "ms", medians, spread, targets, note)


def _middle_half(values: list[float]) -> float:
    q1, _, q3 = statistics.quantiles(values, n=4)
    return q3 - q1


def weigh(
    case: str, variants: dict[str, Callable[[], Any]], *, ours: str, targets: dict[str, str], note: str = ""
) -> Result:
    """Peak extra memory of each variant in MiB: resident memory above what was there before, sampled while it runs."""
    peaks = {}
    for name, function in variants.items():
        gc.collect()
        _memory.pool().clear()  # a buffer kept from before would not count as extra
        torch.ones(1)  # the allocator is awake
        with _Sampler() as sampler:
            kept = function()
        peaks[name] = sampler.extra / 2**20
        del kept
    return Result(case, ours, "MiB", peaks, {}, targets, note)


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
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
