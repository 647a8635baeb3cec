"""Builds the native extensions; everything else about the package is in pyproject.toml.

`svpo_kernels._C`: the CPU kernels, always. Each csrc/cpu/*.cpp is compiled once per instruction set (AVX-512, AVX2,
portable; portable alone outside x86-64) and the choice is made at run time, so one wheel serves every machine.
`svpo_kernels._C_cuda`: the CUDA kernels, where csrc/cuda has any and nvcc is found. SVPO_CUDA=1 makes their absence an
error, SVPO_CUDA=0 skips them.

Needs setuptools and pybind11 only: no torch at build time and none linked. OpenMP is not linked either, the kernels
use the runtime that torch has loaded (csrc/runtime.cpp). CXXFLAGS and LDFLAGS are appended, for sanitizers:
    CXXFLAGS="-fsanitize=address,undefined -g -O1" LDFLAGS="-fsanitize=address,undefined" pip install -e .
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
# GCC's own AVX-512 headers trip its uninitialized warnings. No contraction: every fused multiply-add is written as one.
CFLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized",
          "-Wno-maybe-uninitialized", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Kernels emit no symbol that another build of the same source could replace (csrc/cpu/simd.h).
KERNEL_FLAGS = ["-fno-exceptions", "-fno-rtti"]
ISA_FLAGS = {"portable": [], "avx2": ["-mavx2", "-mfma", "-mf16c"],
             "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]}


def is_x86_64() -> bool:
    target = os.environ.get("ARCHFLAGS") or platform.machine().lower()
    return any(name in target for name in ("x86_64", "amd64"))


def cuda_sources() -> list[str]:
    """The .cu files to build: none when skipped, when there are none yet, or without nvcc."""
    wish = os.environ.get("SVPO_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"SVPO_CUDA must be 0 or 1, got {wish!r}")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "cuda").glob("*.cu"))
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if wish == "0":
        return []
    missing = "csrc/cuda/*.cu in this version" if not sources else None if nvcc else "nvcc on PATH or in CUDA_HOME/bin"
    if missing and wish == "1":
        raise SystemExit(f"SVPO_CUDA=1 asks for the CUDA kernels, but there is no {missing}")
    return [] if missing else sources


class BuildExt(build_ext):
    """Compiles each CPU source once per instruction set, in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        isas = ISA_FLAGS if is_x86_64() else {"portable": []}
        defines = ["-DSVPO_X86_ISAS=1"] if is_x86_64() else []
        folders = [CSRC, pybind11.get_include(), *self.compiler.include_dirs]
        includes = [f"-I{folder}" for folder in folders]
        jobs = [(source, "common", includes) for source in ext.sources if Path(source).parent == CSRC]
        for isa, flags in isas.items():
            own = [*KERNEL_FLAGS, f"-I{CSRC}", f"-DSVPO_ISA={isa}", f"-DSVPO_FOR_{isa.upper()}=1", *flags]
            jobs += [(source, isa, own) for source in ext.sources if Path(source).parent == CSRC / "cpu"]
        self.changed = False
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job[:2], [*job[2], *defines]), jobs))
        target = self.get_ext_fullpath(ext.name)
        if self.changed or not up_to_date(Path(target), [Path(name) for name in objects]):
            os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
            self.compiler.link_shared_object(objects, target, target_lang="c++",
                                             extra_postargs=shlex.split(os.environ.get("LDFLAGS", "")))

    def compile_one(self, source: str, variant: str, flags: list[str]) -> str:
        """One object, unless it is newer than all it was made from and was made with the same flags."""
        compiler = shlex.split(os.environ.get("CXX", "")) or list(self.compiler.compiler_so_cxx)[:1]
        command = [*compiler, *CFLAGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        target = Path(self.build_temp) / variant / (Path(source).stem + ".o")
        made, stamp = target.with_suffix(".d"), target.with_suffix(".flags")
        digest = hashlib.sha256("\0".join(command).encode()).hexdigest()
        same = stamp.exists() and stamp.read_text() == digest and made.exists()
        if self.force or not same or not up_to_date(target, read_dependencies(made)):
            target.parent.mkdir(parents=True, exist_ok=True)
            began, unfinished = time.time(), target.with_suffix(f".{os.getpid()}.o")
            self.spawn([*command, "-MMD", "-MF", str(made), "-MT", target.name, "-c", source, "-o", str(unfinished)])
            # Dated when the compiler began to read: an edit made meanwhile counts as newer.
            os.utime(unfinished, (began, began))
            os.replace(unfinished, target)
            stamp.write_text(digest)
            self.changed = True
        return str(target)


def read_dependencies(path: Path) -> list[Path]:
    """The files a make rule written by the compiler (-MMD) depends on."""
    return [Path(name) for name in path.read_text().replace("\\\n", " ").partition(":")[2].split()]


def up_to_date(target: Path, sources: list[Path]) -> bool:
    if not target.exists() or not all(source.exists() for source in sources):
        return False
    return target.stat().st_mtime >= max(source.stat().st_mtime for source in sources)


def extensions() -> list[Extension]:
    if cuda_sources() and os.environ.get("SVPO_CUDA") == "1":
        raise SystemExit("csrc/cuda has kernels but setup.py has no rule for them: add one, or set SVPO_CUDA=0")
    found = [path.relative_to(ROOT) for path in sorted((ROOT / CSRC).rglob("*"))]
    sources = [str(path) for path in found if path.suffix == ".cpp"]
    headers = [str(path) for path in found if path.suffix == ".h"]
    return [Extension("svpo_kernels._C", sources, depends=headers, language="c++")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
