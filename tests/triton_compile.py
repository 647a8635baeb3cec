"""Triton kernels compiled for GPUs that are not here: what the launchers ask for, and what the compiler makes of it.

`recording(arch)` puts a driver in place that claims to be a GPU of that architecture and launches nothing. The public
ops then run on CPU tensors, and Triton itself turns every launch into the signature, the constants and the options that
it would compile; the hook that sees them keeps them. `compile_launch` compiles one and reads ptxas' own account of it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from svpo_kernels import _triton, dispatch

ARCHITECTURES = (80, 90, 100, 120)
TOOLS = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One compilation: `function` is "module:name", `config` says in words what sets it apart from its siblings."""

    function: str
    config: str
    arch: int
    warps: int
    registers: int | None  # the most that the launcher allows, None: no limit of its own
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]

    @property
    def kernel(self) -> str:
        return self.function.partition(":")[2]


class Usage(NamedTuple):
    """What one kernel costs on one architecture; the last four are bytes of ptxas' report and must be 0."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    local: int


class _Driver:
    """Stands where Triton's CUDA driver would: a device of one architecture, numbered by it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def recording(arch: int, keep: list[Launch]) -> Iterator[list[str]]:
    """Inside, ops on CPU tensors take the Triton backend as on a GPU of `arch`, and every launch lands in `keep`.

    Yields the list of Triton's cache keys, one a launch: an equal key means that nothing is compiled again. No kernel
    runs, so results are whatever the memory held.
    """
    keys: list[str] = []

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        keys.append(f"{fn.name}{key}")
        keep.append(_launch(fn.jit_function, arch, compile))
        return True  # do not compile

    home, hooks = driver._active, triton.knobs.runtime.jit_cache_hook
    interpreted, order = _triton.interpreted, dispatch.ORDER["cpu"]
    caches = (dispatch.why_not, dispatch.resolve, dispatch._function)
    driver.set_active(_Driver(arch))
    triton.knobs.runtime.jit_cache_hook = hook
    _triton.interpreted, dispatch.ORDER["cpu"] = (lambda: True), ("triton", *order)
    for cache in caches:
        cache.cache_clear()
    try:
        yield keys
    finally:
        driver.set_active(home)
        triton.knobs.runtime.jit_cache_hook = hooks
        _triton.interpreted, dispatch.ORDER["cpu"] = interpreted, order
        for cache in caches:
            cache.cache_clear()


def _launch(function: Any, arch: int, compile: dict[str, Any]) -> Launch:
    signature, constants, attributes = compile["signature"], compile["constants"], compile["configs"][0]
    words = []
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            words.append(f"{name}={constants[(i,)]}")
        elif name in _triton.LARGE or kind.startswith("*") and kind not in ("*fp32", "*i64"):
            words.append(f"{name}:{kind.lstrip('*')}" + ("/16" if attributes.get((i,)) else ""))
    name = f"{function.module}:{function.fn.__name__}"
    limit = json.loads(compile["specialization_data"])["options"].get("maxnreg")
    return Launch(name, " ".join(words), arch, compile["num_warps"], limit, signature, constants, attributes)


def distinct(launches: list[Launch]) -> list[Launch]:
    """Each compilation once. Two that differ must not be called the same."""
    found: dict[tuple[str, str, int], Launch] = {}
    for launch in launches:
        same = found.setdefault((launch.function, launch.config, launch.arch), launch)
        assert same == launch, f"{launch.kernel}: two compilations are both called {launch.config!r}"
    return list(found.values())


def compile_launch(launch: Launch) -> tuple[Usage, bytes]:
    """ptxas' account of one compilation, and its machine code; nothing is taken from Triton's cache."""
    module, _, name = launch.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, triton.knobs.nvidia.scope(), triton.knobs.cache.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.cache.dir = folder
        with contextlib.redirect_stdout(log):
            options = {"num_warps": launch.warps, "maxnreg": launch.registers}
            made = triton.compile(source, GPUTarget("cuda", launch.arch, 32), options)
        shared, code = made.metadata.shared, made.asm["cubin"]
    return _usage(log.getvalue(), shared), code


def _usage(log: str, shared: int) -> Usage:
    def number(pattern: str, default: int | None = None) -> int:
        found = re.search(pattern, log)
        assert found or default is not None, f"ptxas did not say {pattern!r}:\n{log}"
        return int(found.group(1)) if found else default

    return Usage(
        number(r"Used (\d+) registers"),
        shared,
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes lmem", 0),
    )


def instructions(launch: Launch) -> Counter[str]:
    """How often each instruction stands in the machine code, by its name with modifiers, as nvdisasm prints it."""
    _, cubin = compile_launch(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing, re.M))


def triton_kernels() -> set[str]:
    """"module:name" of every kernel in the package, launched by anybody or not."""
    found = set()
    package = Path(dispatch.__file__).parent
    for path in sorted(package.glob("*/triton_*.py")):
        module = importlib.import_module(f"svpo_kernels.{path.parent.name}.{path.stem}")
        for value in vars(module).values():
            # A helper is inlined where it is called; a kernel says what it must not specialise on.
            if isinstance(value, triton.JITFunction) and value.fn.__name__.endswith("_kernel"):
                found.add(f"{value.module}:{value.fn.__name__}")
    return found


