"""Every backend that the small ops are tested with; the CPU kernels once per instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from cases import BACKENDS

from svpo_kernels import _native

ISAS = ("avx512", "avx2", "portable")


class Engine(NamedTuple):
    backend: str
    device: str


ENGINES = [
    *(pytest.param(param.values, id=param.id, marks=param.marks) for param in BACKENDS if param.id != "cpu"),
    *(pytest.param(("cpu:" + isa, "cpu"), id="cpu-" + isa) for isa in ISAS),
]


@contextmanager
def running(name: str, device: str) -> Iterator[Engine]:
    """The engine of one row of ENGINES; an instruction set that this machine lacks skips the test."""
    backend, _, isa = name.partition(":")
    if not isa:
        yield Engine(backend, device)
        return
    reason = _native.cpu_reason()
    if reason:
        pytest.skip(reason)
    native = _native.cpu()
    before = native.isa()
    try:
        native.set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        assert native.isa() == isa
        yield Engine(backend, device)
    finally:
        native.set_isa(before)
