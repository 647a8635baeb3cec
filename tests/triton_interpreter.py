"""A pytest plugin: the tests of the ops on the Triton backend, in Triton's interpreter.

Loaded with `-p triton_interpreter` in a process of its own (tests/test_triton_numerics.py), where TRITON_INTERPRET=1
turns every kernel into a Python function over numpy arrays. Three things are put right there:

    - the backend is let run on CPU tensors, and is the one that every parametrised test takes;
    - Triton's own conversion of fp32 to bf16 in the interpreter drops the carry out of the mantissa (1.9961 becomes 1.0
      with an odd exponent) and rounds ties away from even; torch's conversion stands in for it, and the GPU's rounds as
      torch does;
    - Triton 3.6 holds a scalar as an array of one element and takes int() of it, which numpy 2.4 refuses.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import svpo_kernels.dispatch as dispatch

_convert = interpreter._convert_float
_patch_tensor = interpreter._patch_lang_tensor


def _rounded(values, source, target, rounding):
    if str(source) == "fp32" and str(target) == "bf16":
        tensor = torch.from_numpy(np.array(values, copy=True))
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return _convert(values, source, target, rounding)


def _indexed(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def pytest_configure() -> None:
    import cases

    interpreter._convert_float = _rounded
    interpreter._patch_lang_tensor = _indexed
    dispatch.ORDER["cpu"] = ("triton", "cpu", "reference")
    cases.BACKENDS[:] = [pytest.param("triton", "cpu", id="triton")]


def _call(self, *args, **kwargs):
    """A device function in the interpreter, patched once: Triton patches the language at every call (half the time)."""
    if self.fn not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn)
    return self.rewrite()(*args, **kwargs)


_patched: set = set()
interpreter.InterpretedFunction.__call__ = _call
