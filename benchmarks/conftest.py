"""Collects the races of a run, prints them as one table and, with --results NAME, keeps them as JSON, Markdown, PNG."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from svpo_kernels.bench import machine, plots, results, suite
from svpo_kernels.bench.race import Result

FOUND = pytest.StashKey[list]()
RATES = pytest.StashKey[machine.Rates]()
FOLDER = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="NAME", help="write benchmarks/results/NAME.json; cases not run now stay")
    parser.addoption("--scale", choices=suite.SCALES, default="cpu", help="sizes of the cases; tiny: a smoke test")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = []


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--scale")


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest, scale: str) -> machine.Rates:
    """The floors of this machine, measured in this run."""
    return request.config.stash.setdefault(RATES, suite.measure_rates(scale))


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """`record(results)` takes the results of one case into the table; pytest-benchmark times ours of the first once
    more by itself, where it is one function."""

    def take(found: Result | Iterable[Result]) -> None:
        found = [found] if isinstance(found, Result) else list(found)
        request.config.stash[FOUND].extend(found)
        if found[0].function is not None:
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = found[0].family
            benchmark.pedantic(found[0].function, rounds=3)
        for result in found:
            result.function = None  # it holds the inputs, up to gigabytes

    return take


def pytest_sessionstart(session: pytest.Session) -> None:
    try:
        suite.require_kernels()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs over the family that the file names as FAMILY, at the scale that was asked for."""
    family = getattr(metafunc.module, "FAMILY", None)
    if "case" in metafunc.fixturenames and family:
        metafunc.parametrize("case", suite.FAMILIES[family].cases(metafunc.config.getoption("--scale")), ids=str)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[FOUND]
    if not found:
        return
    about = machine.describe("python -m pytest " + " ".join(sys.argv[1:]))
    about["rates"] = vars(config.stash.get(RATES, None) or suite.measure_rates(config.getoption("--scale")))
    terminalreporter.section("svpo_kernels benchmarks")
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in about.items()))
    for result in found:
        terminalreporter.write_line(f"\n{result.case}  [{result.unit}] {result.note}")
        (heads, *lines) = results.table(result)
        for line in [heads, *lines]:
            target = result.targets.get(line[0], "")
            mark = {True: "reached", False: "MISSED", None: ""}[result.reached(line[0]) if target else None]
            cells = " ".join(f"{cell:>13s}" for cell in line[1:])
            terminalreporter.write_line(f"  {line[0]:36s} {cells}  {target:8s} {mark}")
        for name, why in result.skipped.items():
            terminalreporter.write_line(f"  skipped: {name}: {why}")
    lost = results.lost_lines(results.losses(found))
    terminalreporter.write_line("\n".join(["\nWhere a peer wins:", *lost] if lost else ["\nNo peer wins in this run."]))
    name = config.getoption("--results")
    if name:
        path = FOLDER / f"{name}.json"
        results.write(path, about, found)
        kept = results.read(path)
        rows = [Result.from_row(row) for row in kept.pop("results")]
        path.with_suffix(".md").write_text(results.markdown(kept, rows))
        drawn = plots.draw(rows, path.parent)
        terminalreporter.write_line(f"\nwritten: {path}, {path.with_suffix('.md').name}, "
                                    f"{', '.join(plot.name for plot in drawn)}")
