"""What every Triton kernel costs by configuration, architecture and compiler: measured here, kept in triton_pins.json.

    python tests/triton_pins.py             compile the covering calls of triton_calls.py, show what moved
    python tests/triton_pins.py --update    and keep it; the commit says why it moved

The file holds, by kernel, configuration and version of Triton, one [warps, registers, bytes of shared memory] per
architecture of ARCHITECTURES. Spills and local memory are not in it: there are none, in any combination.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton_calls import calls
from triton_compile import ARCHITECTURES, Launch, Usage, compile_launch, distinct, recording

FILE = Path(__file__).with_suffix(".json")
VERSION = triton.__version__

Measured = list[tuple[Launch, Usage]]
Pins = dict[str, dict[str, dict[str, list[Any]]]]  # kernel -> configuration -> version -> [warps, registers, shared]


def launches(full: bool, architectures: Sequence[int] = ARCHITECTURES) -> list[Launch]:
    """Every compilation that the calls ask for, on each architecture."""
    found: list[Launch] = []
    for arch in architectures:
        with recording(arch, found):
            for call in calls(full):
                call()
    return distinct(found)


def each(function: Callable[[Launch], Any], wanted: Iterable[Launch]) -> list[tuple[Launch, Any]]:
    """function(launch) of all, on every core, in fresh processes: a fork of one with OpenMP threads could hang."""
    wanted, context = list(wanted), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        return list(zip(wanted, pool.map(function, wanted, chunksize=4), strict=True))


def usage(launch: Launch) -> Usage:
    return compile_launch(launch)[0]


def wasteful(measured: Measured) -> list[str]:
    """What spills or uses local memory: nothing may."""
    return [f"sm_{launch.arch} {launch.kernel} [{launch.config}]: {found}" for launch, found in measured
            if found.stack or found.spill_stores or found.spill_loads or found.local]


def load() -> Pins:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def pin(launch: Launch, found: Usage) -> list[int]:
    return [launch.warps, found.registers, found.shared]


def moved(pins: Pins, measured: Measured, version: str = VERSION) -> list[str]:
    """What is not as it was pinned, for better or worse, and what has no pin."""
    lines = []
    for launch, found in measured:
        kept = pins.get(launch.kernel, {}).get(launch.config, {}).get(version)
        was = kept[ARCHITECTURES.index(launch.arch)] if kept else "nothing"
        if was != pin(launch, found):
            where = f"sm_{launch.arch} {launch.kernel} [{launch.config}]"
            lines.append(f"{where}: [warps, registers, shared] {pin(launch, found)}, pinned {was}")
    return lines


def stale(pins: Pins, wanted: list[Launch], version: str = VERSION) -> list[str]:
    """Pins of this version that no call asks for any more."""
    alive = {(launch.kernel, launch.config) for launch in wanted}
    return [f"{kernel} [{config}]: pinned, but nothing launches it" for kernel, configs in pins.items()
            for config, versions in configs.items() if version in versions and (kernel, config) not in alive]


def updated(pins: Pins, measured: Measured) -> Pins:
    """The pins with this version's replaced by what was measured; those of other versions stay."""
    table = {(kernel, config): {v: row for v, row in versions.items() if v != VERSION}
             for kernel, configs in pins.items() for config, versions in configs.items()}
    for launch, found in measured:
        row = table.setdefault((launch.kernel, launch.config), {}).setdefault(VERSION, [None] * len(ARCHITECTURES))
        row[ARCHITECTURES.index(launch.arch)] = pin(launch, found)
    out: Pins = {}
    for (kernel, config), versions in sorted(table.items()):
        if versions:
            out.setdefault(kernel, {})[config] = dict(sorted(versions.items()))
    return out


def save(pins: Pins) -> None:
    """One configuration a line, so that a diff shows what moved."""
    kernels = []
    for kernel, configs in pins.items():
        lines = ",\n".join(f"  {json.dumps(config)}: {json.dumps(versions)}" for config, versions in configs.items())
        kernels.append(f" {json.dumps(kernel)}: {{\n{lines}\n }}")
    FILE.write_text("{\n" + ",\n".join(kernels) + "\n}\n")


def count(measured: Measured) -> str:
    kernels = {launch.kernel for launch, _ in measured}
    configs = {(launch.kernel, launch.config) for launch, _ in measured}
    return (f"{len(measured)} compilations: {len(kernels)} kernels, {len(configs)} configurations, "
            f"{len({launch.arch for launch, _ in measured})} architectures, Triton {VERSION}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write triton_pins.json")
    update = parser.parse_args().update
    wanted = launches(full=False)
    measured, pins = each(usage, wanted), load()
    print(*moved(pins, measured), *stale(pins, wanted), *wasteful(measured), count(measured), sep="\n")
    if wasteful(measured):
        raise SystemExit("a kernel spills or uses local memory: no pin is kept for that")
    if update:
        save(updated(pins, measured))


if __name__ == "__main__":
    main()
