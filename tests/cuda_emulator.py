"""The CUDA kernels as host code: how they are built, loaded, and put in the place of the CUDA backend.

`build` compiles csrc/cuda/*.cu as C++ with the emulation of cuda_emulation/ under AddressSanitizer and
UndefinedBehaviorSanitizer; `Emulated` calls the library through the C ABI that csrc/api.h declares.

As a pytest plugin, `-p cuda_emulator` in a process of its own (tests/test_cuda_emulated.py): `backend="cuda"` runs on
CPU tensors there, is the backend that every parametrised test takes, and every test runs under every schedule. The
environment says which library (SVPO_EMULATION); libasan is preloaded, so torch's tensors are watched too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulation"
NOT_EMULATED = {"device.cu"}  # asks the driver, has no kernel
# -O0: the compiler takes 3 s for rows.cu and 13 s at -O1, the tests run as fast (they wait for Python).
FLAGS = [
    "-std=c++17", "-O0", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-ffp-contract=off",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
]

# (order, multiprocessors, compute capability): 0 ascending, 1 descending, others shuffled by this seed. With one
# multiprocessor a block takes all panels of a row, with 132 of them there is a block for every panel; from 9.0 on a
# cluster may hold the row.
SCHEDULES = {
    "ascending": (0, 132, 80), "descending": (1, 1, 90), "shuffled2": (2, 132, 80), "shuffled3": (3, 2, 120),
    "shuffled4": (4, 1, 90),
}


# -- build ------------------------------------------------------------------------------------------------------------


def build(folder: Path, files: list[Path] | None = None, root: Path = ROOT) -> Path:
    """The library of these .cu files, by default all of csrc/cuda below `root`, compiled into `folder`; what did not
    change is not compiled again."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the CUDA kernels are not run as host code")
    cuda, emulation = root / "csrc" / "cuda", root / "tests" / "cuda_emulation"
    if files is None:
        files = sorted(path for path in cuda.glob("*.cu") if path.name not in NOT_EMULATED)
    headers = sorted([*cuda.glob("*.cuh"), *emulation.glob("*.h"), *(root / "csrc").rglob("*.h")])
    shared = b"".join(path.read_bytes() for path in headers)

    def compile_one(path: Path) -> Path:
        digest = hashlib.sha256(shared + path.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
        target = folder / f"{path.stem}.{digest}.o"
        if not target.exists():
            command = [compiler, *FLAGS, f"-I{emulation}", "-x", "c++", "-c", str(path), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, f"{path.name} as host code:\n{done.stderr[-4000:]}"
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, [*files, emulation / "emulation.cpp"])]
    library = folder / f"libsvpo_emulated.{hashlib.sha256(' '.join(objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        subprocess.run([compiler, "-shared", "-fsanitize=address,undefined", *objects, "-o", str(library)], check=True)
    return library


def build_faults(folder: Path) -> Path:
    """The library of the kernels that have a fault each."""
    return build(folder, [EMULATION / "faults.cu", CUDA / "status.cu"])


def environment(library: Path) -> dict[str, str]:
    """What a process needs to load the library: the sanitizer's runtime first, and the C++ runtime it hooks."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "SVPO_EMULATION": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        # Python's own leaks are not ours; the emulation announces no fake stacks to its fibres.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


# -- call -------------------------------------------------------------------------------------------------------------

TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double, "float": ctypes.c_float}
# Statuses as csrc/bindings.h raises them.
ERRORS = {1: ValueError, 2: MemoryError, 3: IndexError, 4: ValueError, 5: RuntimeError}


def declared(header: Path = ROOT / "csrc" / "api.h") -> dict[str, list[Any]]:
    """The argument types of every CUDA op of the C ABI, device and stream included."""
    text = re.sub(r"//.*|^\s*#(?:.*\\\n)*.*", "", header.read_text(), flags=re.MULTILINE)
    ops = {}
    for name, arguments in re.findall(r"SVPO_CUDA_OP\((\w+),([^)]*)\)", text):
        kinds = [argument.replace("const", "").split() for argument in arguments.split(",")]
        pointer = [any("*" in word for word in words) for words in kinds]
        ops[name] = [
            ctypes.c_void_p if is_pointer else TYPES[words[0]] for words, is_pointer in zip(kinds, pointer, strict=True)
        ] + [ctypes.c_int, ctypes.c_void_p]
    return ops


class Emulated:
    """The emulated library as the module `_C_cuda`: one function for each op, statuses as exceptions."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.library.svpo_cuda_last_error.restype = ctypes.c_char_p
        for name, types in declared().items():
            if hasattr(self.library, f"svpo_cuda_{name}"):
                setattr(self, name, self.bind(name, types))

    def bind(self, name: str, types: list[Any]) -> Any:
        function = self.library[f"svpo_cuda_{name}"]
        function.argtypes = types

        def call(*arguments: Any) -> None:
            status = function(*arguments)
            if status:
                why = self.library.svpo_cuda_last_error().decode() if status == 5 else f"status {status}"
                raise ERRORS[status](f"{name}: {why}")

        return call

    def schedule(self, name: str) -> None:
        self.library.svpo_emulation_schedule(*SCHEDULES[name])


# -- pytest plugin ----------------------------------------------------------------------------------------------------


def supports(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    from svpo_kernels import _native

    return None if dtype in _native.DTYPES else f"its dtypes are float32, bfloat16 and float16, not {dtype}"


def pytest_configure() -> None:
    import cases

    from svpo_kernels import _native, dispatch

    emulated = Emulated(os.environ["SVPO_EMULATION"])
    _native.cuda = lambda: emulated
    _native.supports_cuda = supports
    _native.device_and_stream = lambda tensor: (0, 0)
    dispatch.ORDER["cpu"] = ("cuda", "cpu", "reference")
    cases.BACKENDS[:] = [pytest.param("cuda", "cpu", id="cuda")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.fixturenames.append("schedule")
    metafunc.parametrize("schedule", list(SCHEDULES), indirect=True)


@pytest.fixture
def schedule(request: pytest.FixtureRequest) -> str:
    from svpo_kernels import _native

    _native.cuda().schedule(request.param)
    return request.param
