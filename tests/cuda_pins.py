"""What each CUDA kernel takes of the machine, read from the built module; and the pins that it is held to.

    python tests/cuda_pins.py --update [MODULE]        write what the module (by default the one in use) has

cuda_pins.json: toolkit -> architecture -> kernel -> [registers, bytes of shared memory, 16-byte loads, 16-byte stores].
An update touches only the toolkit and the architectures that the module was built with.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from svpo_kernels import _native

PINS = Path(__file__).with_name("cuda_pins.json")
# The kernels that move rows of V or D columns: (16-byte loads, 16-byte stores) they must have.
ROW_KERNELS = {
    "statistics_kernel": (True, False), "gradient_kernel": (True, True), "head_kernel": (True, False),
    "head_hidden_kernel": (True, True), "head_weight_kernel": (True, False), "cluster_rows_kernel": (True, True),
}
# Kernels of thread-block clusters: empty before sm_90.
CLUSTER_KERNELS = {"cluster_rows_kernel"}


class Kernel(NamedTuple):
    registers: int
    shared: int
    wide_loads: int
    wide_stores: int
    stack: int
    local: int
    spills: int  # instructions that read or write local memory

    @property
    def pin(self) -> list[int]:
        return list(self[:4])


def cuobjdump() -> str | None:
    """The disassembler: of the toolkit, on PATH, or the one that Triton ships."""
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def missing_tool() -> str | None:
    """Why machine code cannot be read here, or None."""
    if cuobjdump() is None:
        return "no cuobjdump here: it comes with the CUDA toolkit and with triton"
    return None if shutil.which("c++filt") else "no c++filt here: it comes with binutils"


def output(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def names_of(mangled: list[str]) -> dict[str, str]:
    """`gradient_kernel<bf16, 256>` of a mangled name: without return type, parameters and nvcc's unnamed namespaces,
    whose names change with the source."""
    found = {}
    for symbol, text in zip(mangled, output("c++filt", text="\n".join(mangled)).splitlines(), strict=True):
        text = re.sub(r"_GLOBAL__N__\w+::|\(anonymous namespace\)::", "", text).removeprefix("void ")
        depth, end = 0, len(text)
        for place, letter in enumerate(text):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0:
                end = place
                break
        found[symbol] = text[:end]
    return found


@functools.cache
def kernels(module: str, arch: str) -> dict[str, Kernel]:
    """Every kernel of one architecture ("sm_90") in a built module."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
                       output(cuobjdump(), "-res-usage", "-arch", arch, module))
    code = re.split(r"^\s*Function : (\S+)$", output(cuobjdump(), "-sass", "-arch", arch, module), flags=re.M)
    code = dict(zip(code[1::2], code[2::2], strict=True))
    names, found = names_of([symbol for symbol, *_ in usage]), {}
    for symbol, *numbers in usage:
        registers, stack, shared, local = map(int, numbers)
        count = {kind: len(re.findall(pattern, code[symbol])) for kind, pattern in (
            ("loads", r"\bLDG\S*\.128\b"), ("stores", r"\bSTG\S*\.128\b"), ("spills", r"\b(?:LDL|STL)\b"))}
        assert names[symbol] not in found, f"two kernels are called {names[symbol]}"
        found[names[symbol]] = Kernel(registers, shared, count["loads"], count["stores"], stack, local, count["spills"])
    return found


def archs(module_archs: str) -> list[str]:
    """["sm_80", "sm_90"] of the "80 90+PTX" that a module carries."""
    return [f"sm_{arch.removesuffix('+PTX')}" for arch in module_archs.split()]


def differences(pinned: dict[str, list[int]], found: dict[str, list[int]]) -> list[str]:
    """One line a kernel that is not as pinned, better or worse."""
    columns = ("registers", "shared bytes", "16-byte loads", "16-byte stores")
    lines = [f"{name}: new, {found[name]}" for name in found if name not in pinned]
    lines += [f"{name}: gone, was {pinned[name]}" for name in pinned if name not in found]
    for name in pinned.keys() & found.keys():
        changed = zip(columns, pinned[name], found[name], strict=True)
        moved = [f"{column} {before} -> {after}" for column, before, after in changed if before != after]
        lines += [f"{name}: {', '.join(moved)}"] * bool(moved)
    return sorted(lines)


def update(module) -> None:
    pins = json.loads(PINS.read_text()) if PINS.exists() else {}
    for arch in archs(module.archs):
        pins.setdefault(module.toolkit, {})[arch] = {
            name: kernel.pin for name, kernel in sorted(kernels(module.__file__, arch).items())}
    text = json.dumps(pins, indent=1, sort_keys=True)
    PINS.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] != "--update":
        raise SystemExit(__doc__)
    update(_native.cuda())
    print(f"pinned {_native.cuda().toolkit}: {_native.cuda().archs}")
