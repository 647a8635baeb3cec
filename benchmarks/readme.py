"""Writes the README's figures from benchmarks/results/cpu.json: `python -m benchmarks.readme`. Never by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from svpo_kernels.bench.race import Result
from svpo_kernels.bench.results import losses
from svpo_kernels.bench.trees import SAVINGS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def figure(value: float, unit: str) -> str:
    if unit in ("tokens", "FLOPs"):
        return f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def promise(results: list[dict[str, Any]]) -> list[str]:
    """One row per count of what packing saves: packed, and the saving against both baselines."""
    lines = [
        "| what | packed | less than pairwise | less than distinct |",
        "| --- | --- | --- | --- |",
    ]
    for result in results:
        packed, pairwise, distinct = result["medians"].values()
        shares = " | ".join(f"{100 * (1 - packed / other):.1f} %" for other in (pairwise, distinct))
        lines.append(f"| {result['case']} | {figure(packed, result['unit'])} | {shares} |")
    return lines


def measured(about: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """One row per headline: ours, then every other variant with its ratio and, in brackets, the ratio to be reached."""
    races = [Result.from_row(row) for row in results if row["unit"] == "ms"]
    behind = {case for case, _, _ in losses(races)}
    lines = [
        f"{about['device']}, Python {about['python']}, torch {about['torch']}, {about['date']}. Medians of interleaved "
        "runs in one process; every answer is checked first. A peer's ratio is theirs / ours: above 1 we are ahead. A "
        "floor's is ours / floor: 1 is the limit. In brackets: what was to be reached. A peer is ahead in "
        f"{len(behind)} of {len(races)} races; all of them, spread, memory and plots: `{RESULTS}/`.",
        "",
        "| case | ours | against |",
        "| --- | --- | --- |",
    ]
    for result in (Result.from_row(row) for row in results if row["headline"]):
        others = []
        for name, value in result.medians.items():
            if name == result.ours:
                continue
            kind = "floor, " if name in result.floors else ""
            goal = f" ({result.targets[name]})" if name in result.targets else ""
            others.append(f"{kind}{name} {figure(value, result.unit)}: {result.ratio(name):.2f}x{goal}")
        ours = f"{figure(result.medians[result.ours], result.unit)} {result.unit}"
        lines.append(f"| {result.case} | {ours} | {'; '.join(others)} |")
    return lines


def render(readme: str, data: dict[str, Any]) -> str:
    """The README with the text between its markers made new."""
    blocks = {
        "promise": promise([r for r in data["results"] if r["family"] == SAVINGS]),
        "benchmarks": measured(data, data["results"]),
    }
    for name, lines in blocks.items():
        body = "\n".join([f"<!-- {name}:begin -->", *lines, f"<!-- {name}:end -->"])
        readme, count = re.subn(f"<!-- {name}:begin -->.*?<!-- {name}:end -->", lambda _, b=body: b, readme, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md must have the markers of {name!r} once, got {count}")
    return readme


def load() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(), load()))
