"""The results of a run: written as JSON and as a Markdown table, merged into older ones, compared with older ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .race import Result

NOISE = 0.15  # twice the median spread of the races in benchmarks/results/cpu.json, 7.5 %


def write(path: Path, about: dict[str, Any], results: list[Result]) -> None:
    """JSON of a run. Rows of an older file whose cases did not run now stay as they are."""
    old = read(path)["results"] if path.exists() else []
    new = {result.case: {**result.row(), "command": about["command"]} for result in results}
    rows = [new.pop(row["case"], row) for row in old] + list(new.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file when it is not one of ours."""
    try:
        data = json.loads(path.read_text())
        data["results"] = [{**row} for row in data["results"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"svpo bench: {path} is not a file of results: {error}") from error
    return data


def figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def table(result: Result) -> list[list[str]]:
    """One line a variant: name, median, spread, ratio, GB/s or TFLOP/s, share of the floor, peak MiB, error."""
    rate_unit = rate[1] if (rate := result.rate(result.ours)) else "GB/s"
    lines = [["", result.unit, "spread", "ratio", rate_unit, "of floor", "MiB", "error"]]
    for name, value in result.medians.items():
        spread = f"±{50 * result.spread[name]:.0f} %" if name in result.spread else ""
        times = f"{result.ratio(name):.2f}x" + (" floor" if name in result.floors else "")
        rate, share = result.rate(name), result.share(name)
        lines.append([name, figure(value), spread, "" if name == result.ours else times,
                      figure(rate[0]) if rate else "", f"{100 * share:.0f} %" if share else "",
                      figure(result.memory[name]) if name in result.memory else "",
                      f"{result.errors[name]:.1e}" if name in result.errors else ""])
    used = [column for column in range(8) if any(line[column] for line in lines[1:])]
    return [[line[column] for column in used] for line in lines]


def losses(results: Iterable[Result]) -> list[tuple[str, str, float]]:
    """(case, peer, ours / theirs) wherever a peer is ahead, widest first. Floors are not peers."""
    found = [(result.case, name, 1 / result.ratio(name)) for result in results for name in result.medians
             if name != result.ours and name not in result.floors and not name.startswith("ours")
             and result.ratio(name) < 1]
    return sorted(found, key=lambda entry: -entry[2])


def lost_lines(lost: list[tuple[str, str, float]]) -> list[str]:
    return [f"{case}: {peer} needs {100 / ratio:.0f} % of what ours does" for case, peer, ratio in lost]


def markdown(about: dict[str, Any], results: list[Result]) -> str:
    rates = about.get("rates", {})
    told = ", ".join(f"{key} {value}" for key, value in about.items() if key != "rates")
    lines = ["# svpo bench", "", f"{told}.", ""]
    lines += [f"Rates of the machine, measured in the run: copy {figure(rates['copy_gbs'])} GB/s, read "
              f"{figure(rates['read_gbs'])} GB/s, products {figure(rates['tflops'])} TFLOP/s.", ""] if rates else []
    for result in results:
        rows = table(result)
        lines += [f"## {result.case}", "", *([result.note, ""] if result.note else [])]
        lines += ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
        lines += ["", *(f"Skipped: {name}: {why}" for name, why in result.skipped.items())]
        lines += [""] if result.skipped else []
    lines += ["## Where a peer wins", ""]
    lines += [f"- {line}" for line in lost_lines(losses(results))] or ["Nowhere in this run."]
    return "\n".join(lines) + "\n"


def compare(old: dict[str, Any], new: dict[str, Any], noise: float = NOISE) -> tuple[list[list[str]], list[str]]:
    """(table, failures): new / old of ours for every case in both, in ms and MiB.

    A case fails above 1 + noise, or above 1 + its own spread in either run where that is wider.
    """
    before = {row["case"]: row for row in old["results"]}
    lines, failures = [["case", "unit", "old", "new", "new / old", "allowed", ""]], []
    for row in new["results"]:
        past = before.get(row["case"])
        if past is None or row["unit"] != past["unit"] or past["ours"] not in row["medians"]:
            continue
        ours = past["ours"]
        ratio = row["medians"][ours] / max(past["medians"][ours], 1e-9)
        band = 1 + max(noise, *(run.get("spread", {}).get(ours, 0.0) for run in (past, row)))
        slower = not ratio <= band
        if slower:
            failures.append(f"{row['case']}: {ratio:.2f}x the old {row['unit']} (allowed {band:.2f}x)")
        lines.append([row["case"], row["unit"], figure(past["medians"][ours]), figure(row["medians"][ours]),
                      f"{ratio:.2f}", f"{band:.2f}", "WORSE" if slower else ""])
    if len(lines) == 1:
        raise ValueError("svpo bench: the two files have no case in common, so there is nothing to compare")
    return lines, failures
