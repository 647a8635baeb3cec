"""The CUDA kernels without a GPU: compiled as host code, run block by block, under five schedules and two sanitizers.

libasan must be there before Python is, so each run is a process of its own; tests/cuda_emulator.py is its plugin.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import cuda_mutations
import pytest
from processes import TESTS, environment


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that runs the CUDA kernels on its CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    faults, library = cuda_emulator.build_faults(folder), cuda_emulator.build(folder)
    return environment(**cuda_emulator.environment(library), SVPO_EMULATION_FAULTS=str(faults))


def emulate(env: dict[str, str], files: str, chosen: str = "cuda") -> int:
    """Runs the chosen tests of files with the plugin, half of the schedules in each of two processes; how many passed.
    None may fail or be skipped."""
    options = ["-q", "-p", "cuda_emulator", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *files.split(), "-k"]
    halves = [
        subprocess.Popen(
            [*command, f"({chosen}) and ({half})"], env=env, cwd=TESTS, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for half in ("shuffled", "not shuffled")
    ]
    passed = 0
    for half in halves:
        output, _ = half.communicate(timeout=900)
        assert half.returncode == 0, output[-12000:]
        summary = output.splitlines()[-1]
        assert "skipped" not in summary, summary
        passed += int(re.search(r"(\d+) passed", summary).group(1))
    print(f"emulated: {passed} cases of {files} under {len(cuda_emulator.SCHEDULES)} schedules")
    return passed


def test_a_sample_of_every_op(emulated: dict[str, str]) -> None:
    """Few cases of every kernel family under two schedules; all of them, under all schedules, with -m slow."""
    files = "test_step_logps.py test_linear_step_logps.py test_svpo_loss.py test_prm.py test_aggregate.py"
    cases = "branching-cuda or branching-recompute or branching-frozen or branching_bf16-columns or ties or empty"
    assert emulate(emulated, files, f"cuda and (shuffled2 or descending) and ({cases})") >= 20


@pytest.mark.slow
def test_step_logps(emulated: dict[str, str]) -> None:
    """The whole case table, every dtype, and the other tests of the op."""
    assert emulate(emulated, "test_step_logps.py") >= 350


@pytest.mark.slow
def test_linear_step_logps(emulated: dict[str, str]) -> None:
    """Every case frozen and recomputed (which takes every row kernel), the other modes on the branching ones."""
    chosen = "cuda and (frozen or recompute or (values and branching) or form or again or twice)"
    assert emulate(emulated, "test_linear_step_logps.py", chosen) >= 450


@pytest.mark.slow
def test_entropies_and_factors(emulated: dict[str, str]) -> None:
    """What the whole gradient of a chunk is made for: recomputed, and under low-rank factors that train."""
    chosen = "cuda and (not values or recompute or factors or (bf16 and columns))"
    assert emulate(emulated, "test_linear_stats.py test_linear_lora.py", chosen) >= 290


@pytest.mark.slow
def test_small_ops(emulated: dict[str, str]) -> None:
    """The loss, the process reward ops and the aggregates: their own tests, and what only the emulation shows."""
    files = "test_svpo_loss.py test_prm.py test_aggregate.py test_small_ops.py test_small_ops_bad_input.py"
    chosen = "cuda and (ascending or not opcheck)"  # what opcheck looks at is in no kernel
    assert emulate(emulated, f"{files} cuda_small_checks.py", chosen) >= 1700


@pytest.mark.slow
def test_step_policy(emulated: dict[str, str]) -> None:
    """Under two schedules: its blocks meet in the sums alone."""
    chosen = "cuda and (descending or shuffled2) and not (bitwise or (metrics and not many) or autocast or opcheck)"
    assert emulate(emulated, "test_step_policy.py", chosen) >= 120


@pytest.mark.slow
def test_what_only_the_emulation_shows(emulated: dict[str, str]) -> None:
    assert emulate(emulated, "cuda_checks.py", "test and not common_cases") >= 330


@pytest.mark.slow
def test_rows_in_clusters(emulated: dict[str, str]) -> None:
    """On devices that have clusters: sm_90 with one multiprocessor, sm_120 with two."""
    assert emulate(emulated, "cuda_checks.py", "common_cases and (descending or shuffled3)") >= 70


def test_the_sanitizer_sees_the_tensors(emulated: dict[str, str]) -> None:
    """One element past a tensor ends the process."""
    code = (
        "import ctypes, os, torch; data = torch.zeros(64);"
        "ctypes.CDLL(os.environ['SVPO_EMULATION_FAULTS']).svpo_fault(11, ctypes.c_void_p(data.data_ptr()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=emulated, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr and "faults.cu" in done.stderr, done.stderr


def test_kernels_use_nothing_but_the_common_header() -> None:
    """What of CUDA's own a kernel file names would not run in the emulation, and so not be checked."""
    own = re.compile(r"\b(threadIdx|blockIdx|blockDim|gridDim|__\w+__|__\w+\(|<<<|cuda[A-Z]\w+|asm)")
    for path in cuda_emulator.CUDA.iterdir():
        if path.suffix in (".cu", ".cuh") and path.name not in {"common.cuh", *cuda_emulator.NOT_EMULATED}:
            assert not own.findall(path.read_text()), path.name


def test_every_mutant_has_its_place() -> None:
    """Code that moved takes its mutants along."""
    for mutant in cuda_mutations.MUTANTS:
        assert (cuda_emulator.CUDA / mutant.file).read_text().count(mutant.old) == 1, (mutant.file, mutant.old)


@pytest.mark.slow
def test_mutants_are_caught(emulated: dict[str, str], tmp_path: Path) -> None:
    """A sample of the faults of cuda_mutations.py; all of them with -m exhaustive."""
    results = cuda_mutations.run([m for m in cuda_mutations.MUTANTS if m.sample], tmp_path)
    assert len(results) >= 3 and all(result.caught for result in results), results


@pytest.mark.exhaustive
def test_every_mutant_is_caught(emulated: dict[str, str], tmp_path: Path) -> None:
    results = cuda_mutations.run(cuda_mutations.MUTANTS, tmp_path)
    missed = [result for result in results if not result.caught and not result.mutant.survives]
    assert not missed, missed
