"""What `svpo bench` does with its options: run or read, compare, and say by the exit code how it went."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import instructions as counting
from . import results, suite

WORSE = 3  # exit code of a comparison that fails; 1 is an error and 2 a wrong option, as everywhere


def run_command(*, quick: bool, ops: str | None, scale: str, output_dir: Path, old: Path | None, new: Path | None,
                noise: float | None, instructions: bool, console: Console | None = None) -> int:
    """Returns the exit code. The old file is read first: a typing mistake shall not cost a run."""
    console = console or Console()
    if new is not None and old is None:
        raise ValueError("svpo bench: --with NEW.json needs --compare OLD.json")
    if noise is not None and not noise >= 0:
        raise ValueError(f"svpo bench: noise must be at least 0, got {noise}")
    before = None if old is None else results.read(old)
    if new is not None:
        now = results.read(new)
    elif instructions:
        why_not = counting.why_not()
        if why_not is not None:
            console.print(f"instruction counts are skipped: {why_not}", highlight=False, soft_wrap=True)
            return 0
        now = counting.run(output_dir, console)
    else:
        command = " ".join(["svpo", *sys.argv[1:]])
        now = suite.run_bench(quick=quick, ops=ops, scale=scale, output_dir=output_dir, command=command,
                              console=console)
    if before is None:
        return 0
    return compare(before, now, _noise(noise, now), console)


def _noise(noise: float | None, now: dict[str, Any]) -> float:
    counted = all(row["unit"] == counting.UNIT for row in now["results"])
    return noise if noise is not None else counting.NOISE if counted else results.NOISE


def compare(before: dict[str, Any], now: dict[str, Any], noise: float, console: Console) -> int:
    """Print new / old of every common case; WORSE when one is beyond the noise."""
    for key in ("device", "python", "torch"):
        if before.get(key) != now.get(key):
            console.print(f"note: {key} was {before.get(key)}, is {now.get(key)}", highlight=False, soft_wrap=True)
    (heads, *lines), failures = results.compare(before, now, noise)
    table = Table(*heads, title="Ours, now against then", title_justify="left")
    for line in lines:
        table.add_row(*line, style="red" if line[-1] else None)
    console.print(table)
    verdict = f"{len(lines)} cases compared, {len(failures)} worse by more than {100 * noise:.3g} % or their own spread"
    console.print("\n".join([verdict, *failures]), highlight=False, soft_wrap=True)
    return WORSE if failures else 0
