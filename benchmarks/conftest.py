"""Collects the races of a run, prints them as one table and, with --results NAME, keeps them as JSON."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import svpo_kernels as sk

from .race import Result

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="NAME", help="write benchmarks/results/NAME.json; cases not run now stay")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark):
    """`record(result, function)` takes a result into the table and lets pytest-benchmark time the function by itself.

    A test calls it once; further results of the same test go to `record.again(result)`.
    """

    def take(result: Result, function: Callable[[], Any]) -> None:
        take.again(result)
        benchmark.group = result.case
        benchmark.extra_info.update(asdict(result))
        benchmark.pedantic(function, rounds=3)

    take.again = request.config.stash[RESULTS].append
    return take


def pytest_sessionstart(session: pytest.Session) -> None:
    """A benchmark of the reference, taken because the kernels are missing, would be a figure about nothing."""
    plain = [op for op, report in sk.backends().items() if report["auto"] == "reference"]
    if plain:
        raise pytest.UsageError(f"no kernel runs here for {', '.join(plain)}: {sk.backends(plain[0])}")


def machine() -> dict[str, str]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python -m pytest " + " ".join(sys.argv[1:]),
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    about = machine()
    terminalreporter.section("svpo_kernels benchmarks")
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in about.items()))
    for result in results:
        terminalreporter.write_line(f"\n{result.case}  [{result.unit}] {result.note}")
        for name, value in result.medians.items():
            mark = {True: "reached", False: "MISSED", None: ""}[result.reached(name)]
            ratio = "" if name == result.ours else f"{result.ratio(name):8.2f}x"
            spread = f"±{100 * result.spread[name] / 2:.0f}%" if name in result.spread else ""
            target = result.targets.get(name, "")
            terminalreporter.write_line(f"  {name:34s} {value:10.3f} {spread:>5s} {ratio:>9s}  {target:8s} {mark}")
    name = config.getoption("--results")
    if name:
        path = Path(__file__).parent / "results" / f"{name}.json"
        rows = [
            {**asdict(result), "ratios": {p: result.ratio(p) for p in result.medians}, "command": about["command"]}
            for result in results
        ]
        rows = _merge(json.loads(path.read_text())["results"] if path.exists() else [], rows)
        path.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")
        terminalreporter.write_line(f"\nwritten: {path}")


def _merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows in the place of the old ones of the same case; the rest behind."""
    fresh = {row["case"]: row for row in new}
    return [fresh.pop(row["case"], row) for row in old] + list(fresh.values())
