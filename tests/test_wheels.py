"""The wheel that a user gets: made from the sdist, in an isolated build, with and without the CUDA kernels.

The small one is built for one architecture; the full one, for all, is under `-m exhaustive`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import cuda_pins
import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wheels are tagged for Linux here"),
]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command says; the whole of it when it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, made in an isolated build."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT, cwd=folder, SVPO_CUDA="0")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder)
    return Path(str(archive).removesuffix(".tar.gz"))


def build(source: Path, name: str, **environment: str) -> Path:
    """The wheel of an unpacked sdist. A second one finds the CPU objects of the first."""
    began, folder = time.monotonic(), source.parent / name
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, source)
    said = run(*command, cwd=source.parent, **environment)
    warnings = [line for line in said.splitlines() if re.search(r"csrc/.*\bwarning\b", line)]
    assert not warnings, "\n".join(warnings)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name} ({name}): {time.monotonic() - began:.0f} s, {wheel.stat().st_size / 1e6:.1f} MB")
    return wheel


@pytest.fixture(scope="module")
def cpu_wheel(source: Path) -> Path:
    return build(source, "cpu", SVPO_CUDA="0")


@pytest.fixture(scope="module")
def cuda_wheel(source: Path, cpu_wheel: Path) -> Path:
    return build(source, "cuda", SVPO_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")


def contents(wheel: Path) -> set[str]:
    """Files of the package in a wheel, extensions by their module's name."""
    names = zipfile.ZipFile(wheel).namelist()
    return {re.sub(r"\.cpython\S*\.so$", "", name) for name in names if ".dist-info/" not in name and name[-1] != "/"}


def use(wheel: Path, code: str) -> str:
    """What code prints in a process that has the wheel's files, and torch from this environment."""
    folder = wheel.parent / "installed"
    if not folder.exists():
        run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel, cwd=wheel.parent)
    return run(sys.executable, "-c", code, cwd=wheel.parent, PYTHONPATH=str(folder))


USE = """
import torch
import svpo_kernels as sk
from svpo_kernels import _native
assert "installed" in sk.__file__, sk.__file__
logits, labels = torch.randn(2, 9, 300), torch.randint(0, 300, (2, 9))
ours = sk.step_logps(logits, labels, shift=1)
exact = sk.step_logps(logits.double(), labels, shift=1, backend="reference")
assert (ours - exact).abs().max() < 1e-4 and sk.backends("step_logps", device="cpu")["auto"] == "cpu"
print(_native.cuda_reason() or "usable")
"""


@pytest.mark.slow
def test_the_sdist_has_every_source(source: Path) -> None:
    wanted = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"]
    for folder, suffixes in (("csrc", {".h", ".cpp", ".cu", ".cuh"}), ("svpo_kernels", {".py", ".html"})):
        wanted += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert not [name for name in wanted if not (source / name).exists()]


@pytest.mark.slow
def test_without_cuda(source: Path, cpu_wheel: Path) -> None:
    files = contents(cpu_wheel)
    assert "svpo_kernels/_C" in files and "svpo_kernels/_C_cuda" not in files
    sources = {str(path.relative_to(source)) for pattern in ("*.py", "*.html", "py.typed")
               for path in (source / "svpo_kernels").rglob(pattern)}
    assert files - {"svpo_kernels/_C"} == sources, "the package, and nothing beside it"
    assert "svpo_kernels._C_cuda is not in this build" in use(cpu_wheel, USE)


@pytest.mark.slow
@needs_nvcc
def test_with_cuda(cpu_wheel: Path, cuda_wheel: Path) -> None:
    """The same files and one module more; it loads without a driver, and the CPU kernels run as ever."""
    assert contents(cuda_wheel) == contents(cpu_wheel) | {"svpo_kernels/_C_cuda"}
    said = use(cuda_wheel, USE)
    assert re.search(r"usable|built without CUDA|no NVIDIA driver|driver knows CUDA|no code for sm", said), said
    assert use(cuda_wheel, "from svpo_kernels import _native; print(_native.cuda().archs)").split() == ["90"]


@pytest.mark.slow
@needs_nvcc
def test_the_wheel_brings_its_runtime_and_no_other_library(cuda_wheel: Path) -> None:
    """auditwheel finds nothing to add: the CUDA runtime is inside, libcuda is opened when a device is asked for, and
    OpenMP is the one that torch loads."""
    pytest.importorskip("auditwheel", reason="pip install auditwheel")
    said = " ".join(run(sys.executable, "-m", "auditwheel", "show", cuda_wheel, cwd=cuda_wheel.parent).split())
    assert re.search(r'is consistent with the following platform tag: "manylinux_2_\d+_', said), said
    assert not re.search("libgomp|libcud|libtorch|libc10", said), said
    if shutil.which("patchelf") is None:
        pytest.skip("auditwheel show accepts it; repair needs patchelf")
    folder = cuda_wheel.parent / "repaired"
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, cuda_wheel, cwd=cuda_wheel.parent)
    (repaired,) = folder.glob("*manylinux*.whl")
    assert contents(repaired) == contents(cuda_wheel), "no library was copied in"


@pytest.mark.exhaustive
@needs_nvcc
def test_the_full_wheel(source: Path, cpu_wheel: Path) -> None:
    """Machine code for all architectures, under 20 MB, and no kernel of any of them spills."""
    wheel = build(source, "full", SVPO_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    assert wheel.stat().st_size < 20e6
    assert use(wheel, "from svpo_kernels import _native; print(_native.cuda().archs)").strip() == (
        "80 86 89 90 100 120+PTX")
    if cuda_pins.missing_tool():
        pytest.skip(str(cuda_pins.missing_tool()))
    (module,) = (wheel.parent / "installed" / "svpo_kernels").glob("_C_cuda*.so")
    for arch in cuda_pins.archs("80 86 89 90 100 120"):
        found = cuda_pins.kernels(str(module), arch)
        bad = [f"{arch} {name}: {kernel}" for name, kernel in found.items()
               if kernel.stack or kernel.local or kernel.spills]
        assert found and not bad, "\n".join(bad)
