"""Writes the README's figures from benchmarks/results/cpu.json: `python -m benchmarks.readme`. Never by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAVED = ("tokens", "FLOPs")


def figure(value: float, unit: str) -> str:
    if unit in SAVED:
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


def measured(about: dict[str, str], results: list[dict[str, Any]]) -> list[str]:
    """One row per race: ours, then every other variant with its ratio and, in brackets, the ratio to be reached."""
    lines = [
        f"{about['device']}, Python {about['python']}, torch {about['torch']}, {about['date']}. Medians of interleaved "
        "runs in one process; every answer is checked first. In brackets: what was to be reached.",
        "",
        "| case | ours | against |",
        "| --- | --- | --- |",
    ]
    for result in results:
        others = []
        for name, value in result["medians"].items():
            if name == result["ours"]:
                continue
            target = result["targets"].get(name)
            ratio = result["ratios"][name]
            goal = f" ({target})" if target else ""
            others.append(f"{name} {figure(value, result['unit'])}: {ratio:.2f}x{goal}")
        ours = f"{figure(result['medians'][result['ours']], result['unit'])} {result['unit']}"
        lines.append(f"| {result['case']} | {ours} | {'; '.join(others)} |")
    return lines


def render(readme: str, data: dict[str, Any]) -> str:
    """The README with the text between its markers made new."""
    blocks = {
        "promise": promise([r for r in data["results"] if r["unit"] in SAVED]),
        "benchmarks": measured(data, [r for r in data["results"] if r["unit"] not in SAVED]),
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
