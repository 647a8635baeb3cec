"""Fixtures that every test file may use."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if not any((ROOT / "svpo_kernels").glob("_C.*")):
    # `python -m pytest` puts the clone before the installed package, whose native code is built.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    if importlib.util.find_spec("svpo_kernels") is None:
        pytest.exit("the native code of this folder is not built and svpo_kernels is not installed; "
                    'run: pip install ".[test]"', returncode=4)

import svpo_kernels as sk  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WORKERS, DEFAULT = 2, "not slow and not exhaustive"
# Minutes each: they begin first, so that at the end no process waits for the other.
LONGEST = ("test_triton_numerics.py", "test_cuda_emulated.py", "test_triton_pins.py", "test_wheels.py", "test_kills.py")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(int(os.environ.get("SVPO_TEST_SEED", "0")))  # tests/matrix.py draws others


@pytest.fixture
def one_thread():
    """Tiny models on a busy machine: threads that wait for each other cost more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real samples beside the checkout (or SVPO_DATA); tests that need it are skipped without it."""
    folder = Path(os.environ.get("SVPO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real samples are not here; set SVPO_DATA to their folder")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU backend that is not there (CUDA kernels not built, no Triton) skips its rows of the tables."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    backend, device = given.get("engine", (given.get("backend"), given.get("device")))
    if device == "cuda" and torch.cuda.is_available():
        op = given.get("op", getattr(item.module, "OP", "step_logps"))
        reason = sk.backends(op, device=device).get(backend, "usable")
        if reason != "usable":
            pytest.skip(f"{op}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# -- the whole suite --------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` and `pytest -m slow` without files run in two processes (pytest-xdist, a file to each); -n 0: in one."""
    if hasattr(config, "workerinput"):
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr in (DEFAULT, "slow")
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.collectonly:
        config.option.numprocesses, config.option.dist = WORKERS, "loadfile"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # a core each: threads that wait for each other cost more than they compute


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == DEFAULT:
        terminalreporter.write_line("long tests were left out; they run with: pytest -m slow")
