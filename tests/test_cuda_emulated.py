"""The CUDA kernels without a GPU: compiled as host code, run block by block, under five schedules and two sanitizers.

libasan must be there before Python is, so each run is a process of its own; tests/cuda_emulator.py is its plugin.
"""

from __future__ import annotations

import re
import subprocess
import sys

import cuda_emulator
import pytest
from processes import TESTS, environment


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that runs the CUDA kernels on its CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    faults = cuda_emulator.build(folder, cuda_emulator.EMULATION, (cuda_emulator.CUDA / "status.cu",))
    library = cuda_emulator.build(folder)
    return environment(**cuda_emulator.environment(library), SVPO_EMULATION_FAULTS=str(faults))


def emulate(env: dict[str, str], *arguments: str) -> int:
    """Runs tests with the plugin; how many passed, none failed or skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_emulator", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    summary = done.stdout.splitlines()[-1]
    print(f"emulated: {summary}")
    assert "skipped" not in summary
    return int(re.search(r"(\d+) passed", summary).group(1))


def test_step_logps(emulated: dict[str, str]) -> None:
    """The whole case table, every dtype, and the other tests of the op, each under five schedules."""
    assert emulate(emulated, "test_step_logps.py", "-k", "cuda") >= 350


def test_what_only_the_emulation_shows(emulated: dict[str, str]) -> None:
    assert emulate(emulated, "cuda_checks.py") >= 200


def test_kernels_use_nothing_but_the_common_header() -> None:
    """What of CUDA's own a kernel file names would not run in the emulation, and so not be checked."""
    own = re.compile(r"\b(threadIdx|blockIdx|blockDim|gridDim|__\w+__|__\w+\(|<<<|cuda[A-Z]\w+|asm)")
    for path in cuda_emulator.CUDA.iterdir():
        if path.suffix in (".cu", ".cuh") and path.name not in {"common.cuh", *cuda_emulator.NOT_EMULATED}:
            assert not own.findall(path.read_text()), path.name
