"""Which backend runs an op, and how a raw op is registered with PyTorch.

A backend is a file in the op's folder (`reference.py`, `cpu.py`, `triton_.py`, `cuda.py`) with

    supports(op, device, dtype) -> None | reason
    <op>_fwd(...), <op>_bwd(...)        tensors in, tensors out, no autograd

One name goes all the way down: `step_logps_fwd` is the schema, the fake, the function of each backend file and the
symbol of the native code. Nothing is chosen at import time and nothing is patched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native
from ._checks import describe, fail

FILES = {"reference": "reference", "cpu": "cpu", "triton": "triton_", "cuda": "cuda"}
# The first backend that supports the call is taken. The CPU kernels beat plain PyTorch on every op (README, table).
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
BACKENDS = ("auto", *FILES)

library = torch.library.Library("svpo", "FRAGMENT")
_families: dict[str, str] = {}
_same_kernels = {
    "dvo_loss": "svpo_loss",
    "prm_scores_from_lm_head": "prm_scores",
}  # public ops that run another's kernels


def define(
    family: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    check: Callable[..., None] | None = None,
    call: Callable[..., Any] | None = None,
) -> None:
    """Register `svpo::<op>_fwd` or `svpo::<op>_bwd`; the last argument of its schema is `str backend`.

    family: the package of the op family (`__name__` of its `__init__.py`). fake: shapes and dtypes of the results from
    the arguments without `backend`. check: looks at values (CPU index tensors) before any backend runs; it lives here,
    not in the public function, because reading a value there would break a compiled graph. call: how to run it on a
    backend file, by default that file's function of the same name.
    """
    name = schema.partition("(")[0]
    op = re.sub(r"_(fwd|bwd_?)$", "", name)
    _families[op] = family
    call = call or (lambda module, *args: getattr(module, name)(*args))

    def run(*given: Any) -> Any:
        *args, backend = given
        if check is not None:
            check(*args)
        probe = next(arg for arg in args if isinstance(arg, Tensor))
        return call(load(op, resolve(op, backend, probe.device, probe.dtype)), *args)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svpo::{name}", lambda *args: fake(*args[:-1]), lib=library)


def call(name: str, backend: str, probe: Tensor, args: tuple[Any, ...]) -> Any:
    """`torch.ops.svpo.<name>(*args, backend)`, without the dispatcher where nothing listens to it.

    Eager mode on plain tensors needs the backend file only; the dispatcher takes 20 us to box two dozen arguments for a
    kernel of 5 us (svpo_loss, P = 64). No autograd either way: a backend file detaches what it would differentiate.
    Under vmap it runs the op once for each entry. probe: the first tensor of args. Not for ops with a `check` or a
    `call`.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or probe.is_meta
        or (type(probe) is not Tensor and type(probe) is not torch.nn.Parameter)
    ):
        with torch.no_grad():
            return getattr(torch.ops.svpo, name)(*args, backend)
    return _function(name, backend, probe.device, probe.dtype)(*args)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise RuntimeError(f"{re.sub(r'_(fwd|bwd)$', '', name)}: forward-mode derivatives are not implemented")


def check_backend(op: str, backend: str, probe: Tensor) -> None:
    """What `resolve` raises, under the name of a public op that runs another's kernels."""
    if not torch.compiler.is_compiling():
        resolve(op, backend, probe.device, probe.dtype)


@functools.cache
def _function(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    op = re.sub(r"_(fwd|bwd)$", "", name)
    return getattr(load(op, resolve(op, backend, device, dtype)), name)


@functools.cache
def load(op: str, backend: str) -> ModuleType | None:
    """The backend file of an op, or None when the op has no such file."""
    name = f"{_families[_same_kernels.get(op, op)]}.{FILES[backend]}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@functools.cache
def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when `backend` can run `op` on this device and dtype, else the reason."""
    if backend == "reference":
        return None
    module = load(op, backend)
    if module is None:
        return f"it has no {backend} kernel in this version"
    if backend in ORDER.get(device.type, ()):
        return module.supports(op, device, dtype)
    homes = [kind for kind, order in ORDER.items() if backend in order]
    reason = f"it runs on {' and '.join(homes)} tensors, these are on {device.type}"
    # Moving the tensors would not be enough: say so at once.
    return f"{reason}, and {here}" if backend == "cuda" and (here := _native.cuda_reason()) else reason


@functools.cache
def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs the call. `auto` takes the first usable one; an explicit name never falls back."""
    if backend not in BACKENDS:
        fail(op, "backend", "one of " + ", ".join(map(repr, BACKENDS)), describe(backend))
    if backend == "auto":
        return next(name for name in ORDER.get(device.type, ("reference",)) if not why_not(op, name, device, dtype))
    reason = why_not(op, backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {reason}")
    return backend


def backends(op: str | None = None, *, device: str | torch.device | None = None) -> dict[str, Any]:
    """What is usable here, what `auto` would take, and why not the others.

    op: one op's name; None reports every op. device: the device of the tensors, by default "cuda" where there is one,
    else "cpu". Returns `{"auto": name, "cpu": "usable" | reason, ...}` for fp32 tensors, or one such dict per op.
    Raises ValueError for an unknown op.
    """
    known = sorted([*_families, *_same_kernels])
    if op is None:
        return {name: backends(name, device=device) for name in known}
    if op not in known:
        fail("backends", "op", "one of " + ", ".join(map(repr, known)), describe(op))
    op = _same_kernels.get(op, op)
    home = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = {"auto": resolve(op, "auto", home, torch.float32)}
    for name in FILES:
        report[name] = why_not(op, name, home, torch.float32) or "usable"
    return report
