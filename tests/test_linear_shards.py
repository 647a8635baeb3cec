"""A vocabulary shared by 2 and 3 gloo processes equals the whole one, forward and backward, in every mode."""

from __future__ import annotations

import pytest
import torch
from test_distributed import launch

from svpo_kernels.linear_step_logps.modes import Options
from svpo_kernels.linear_step_logps.shards import share


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_equal_the_whole(processes, tmp_path):
    """Uneven shards, empty ones, padding, DTensors; the cases are in the worker."""
    launch(processes, "shards_worker.py", tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True) >= 120


@pytest.mark.slow
def test_triton_kernels_of_a_shard(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: its backend is not tested here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch(2, "shards_worker.py", tmp_path / "out.pt", "triton")
    assert torch.load(tmp_path / "out.pt", weights_only=True) == 3


def test_without_a_group_all_columns_are_ones_own():
    assert share(Options(9, 1.0, 0.0, "sum", 512.0, "store")) == (0, 9, 9)
