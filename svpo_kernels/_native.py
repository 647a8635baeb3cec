"""The native modules, loaded on first use, and what every backend file that calls them needs.

Nothing here runs at import time. `SVPO_CPU_ISA=avx512|avx2|portable` forces an instruction set of the CPU kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch  # the OpenMP runtime that torch brings must be there before `_C` is loaded
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCTIONS = {"sum": 0, "mean": 1, "none": 2}


@functools.cache
def _load() -> ModuleType | str:
    """The module `_C`, or why there is none."""
    try:
        module = importlib.import_module("svpo_kernels._C")
    except ImportError as error:
        return f"the CPU extension svpo_kernels._C is not built or does not load ({error}); run: pip install ."
    isa = os.environ.get("SVPO_CPU_ISA")
    if isa:
        module.set_isa(isa)
    return module


def cpu() -> ModuleType:
    """The module `_C`. Raises ImportError with the reason when it is not there, and RuntimeError or ValueError when
    SVPO_CPU_ISA names an instruction set that this machine does not have or that there is none of."""
    module = _load()
    if isinstance(module, str):
        raise ImportError(module)
    return module


def cpu_reason() -> str | None:
    """None when the CPU kernels can be used, else why not. A wrong SVPO_CPU_ISA raises: it must not pass unnoticed."""
    module = _load()
    return module if isinstance(module, str) else None


def supports_cpu(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What `supports` of a CPU backend file answers: None, or why the call cannot run there."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, these are on {device.type}"
    if dtype not in DTYPES:
        return f"its dtypes are float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return cpu_reason()


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def threads() -> int:
    return torch.get_num_threads()
