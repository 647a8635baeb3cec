"""Models wholly in fp64: the casts to fp32 that transformers' code makes (norms, RoPE, states, routers) widen too."""

from __future__ import annotations

import contextlib

import pytest
import torch


@contextlib.contextmanager
def all_in_double():
    """While it lasts, torch.float32, torch.float and Tensor.float() mean fp64. Make packs before: they hold fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
