"""The Triton backend without a GPU: the tests of the row ops in Triton's interpreter, and its traffic.

The interpreter is chosen when Triton is imported, so each run is a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from processes import TESTS, environment

import svpo_kernels as sk

pytest.importorskip("triton", "3.6", reason="no triton from 3.6 on is installed: its backend is not tested here")


def interpret(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "triton_interpreter", "-p", "no:cacheprovider", *arguments]
    env = environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
    return done.stdout


def passed(output: str) -> int:
    return int(re.search(r"(\d+) passed", output).group(1))


def test_step_logps_in_the_interpreter() -> None:
    """The whole case table, every dtype, and the other tests of the op."""
    assert passed(interpret("test_step_logps.py", "-k", "triton")) >= 70


def test_a_sample_of_linear_step_logps_in_the_interpreter() -> None:
    """Rows with several labels in every dtype, each mode."""
    assert passed(interpret("test_linear_step_logps.py", "-k", "triton and values and branching")) >= 8


@pytest.mark.slow
def test_linear_step_logps_in_the_interpreter() -> None:
    """Every case frozen and recomputed (which takes every row kernel), the other modes on the branching ones."""
    chosen = "triton and (frozen or recompute or (values and branching) or form or again or twice)"
    assert passed(interpret("test_linear_step_logps.py", "-k", chosen)) >= 90


def test_svpo_loss_in_the_interpreter() -> None:
    """Every case; thousands of pairs once, for their terms and gradients."""
    assert passed(interpret("test_svpo_loss.py", "-k", "triton and not (many and metrics) and not bitwise")) >= 63


@pytest.mark.slow
def test_step_policy_in_the_interpreter() -> None:
    """Every case of terms and gradients but the longest: a program a step is slow here."""
    chosen = "triton and (clamps or hand or zero or member or (terms and not many and not long))"
    assert passed(interpret("test_step_policy.py", "-k", chosen)) >= 45


@pytest.mark.slow
def test_prm_ops_in_the_interpreter() -> None:
    """Every case but the slowest: a program a step is 50 ms here."""
    assert passed(interpret("test_prm.py", "-k", "triton and not (many and loss) and not bitwise")) >= 90


@pytest.mark.slow
def test_aggregates_and_raw_ops_in_the_interpreter() -> None:
    """Hundreds of sequences in fp32 only; the raw ops, autocast and bad values as everywhere."""
    files = ("test_aggregate.py", "test_small_ops.py", "test_small_ops_bad_input.py")
    chosen = "triton and not (300 and (dtype1 or dtype2))"
    assert passed(interpret(*files, "-k", chosen)) >= 125


@pytest.mark.slow
def test_outputs_are_written_whole_and_nothing_beside_them() -> None:
    chosen = "triton and (written_whole and bfloat16 or stays_inside and float32)"
    assert passed(interpret("test_gpu.py", "-k", chosen)) >= 9


@pytest.mark.slow
def test_entropies_and_low_rank_factors_in_the_interpreter() -> None:
    """The kernels that only they take: a case of each mode of the logits, and every dtype once."""
    names = "three_columns or (softcap_temperature and not fp16) or branching or minus_infinity or spreads or see"
    more = "(wide and adapter) or (branching_bf16 and columns)"
    chosen = f"triton and (({names}) and (store or recompute or spreads or see) or {more})"
    assert passed(interpret("test_linear_stats.py", "test_linear_lora.py", "-k", chosen)) >= 20


@pytest.mark.slow
def test_traffic() -> None:
    """Bytes against their minimum; what does not exist is neither read nor written."""
    output = interpret("triton_traffic.py", "-s")
    assert passed(output) == 54
    print("\n".join(line for line in output.splitlines() if line.startswith("traffic")))


def test_it_is_refused_on_cpu_tensors() -> None:
    with pytest.raises(RuntimeError, match="step_logps: backend 'triton' cannot run this call: it runs on cuda"):
        sk.step_logps(torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), shift=0, backend="triton")
