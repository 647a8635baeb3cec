"""The CPU kernels in processes of their own: memory around the tensors, threads, forks, loading, and the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import TESTS, environment

from svpo_kernels import _native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(_native.cpu_reason() is not None, reason=str(_native.cpu_reason()))


def python(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=TESTS,
        env=environment(**more),
    )


# -- memory and threads -----------------------------------------------------------------------------------------------


def test_nothing_outside_the_tensor_is_touched() -> None:
    """Logits and gradient end and begin at a page that may not be read or written, for every dtype and tail length."""
    done = python("""
        import ctypes, mmap, torch
        from svpo_kernels import StepPlan, _native
        from svpo_kernels.step_logps import cpu
        libc, PAGE, BODY = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 8 * mmap.PAGESIZE
        area = mmap.mmap(-1, BODY + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for guard in (start, start + PAGE + BODY):
            assert libc.mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
        for isa in ("portable", "avx2", "avx512"):
            try:
                _native.cpu().set_isa(isa)
            except RuntimeError:
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                size = torch.empty((), dtype=dtype).element_size()
                body = torch.frombuffer(area, dtype=dtype, count=BODY // size, offset=PAGE)
                for V in (*range(1, 70), 127, 2049, 3001):
                    for place in (body[: 2 * V], body[-2 * V :]):
                        place.copy_(torch.randn(2 * V))
                        logits = place.view(1, 2, V)
                        plan = list(StepPlan.from_predictions([0, 1], [0, V - 1], [0, 1], 2).tensors)
                        for softcap in (0.0, 3.0):
                            out, *stats = cpu.step_logps_fwd(logits, plan, V, 1.0, softcap, "sum")
                            cpu.step_logps_bwd(out, logits, *stats, plan, V, 1.0, softcap, "sum", inplace=True)
        print("untouched")
    """)
    assert done.returncode == 0 and "untouched" in done.stdout, f"exit {done.returncode}\n{done.stderr}"


WORK = """
    import os, sys, torch
    torch.manual_seed(0)
    torch.set_num_threads(4)
    import svpo_kernels as sk
    from svpo_kernels import _native
    logits, labels = torch.randn(64, 5000), torch.randint(0, 5000, (64,))
    plan = sk.StepPlan.from_step_ids(labels, torch.arange(64) // 8, shift=0)
    def tasks():
        return len(os.listdir("/proc/self/task"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_runs_on_the_threads_of_torch() -> None:
    done = python(
        WORK
        + """
    before = tasks()
    sk.step_logps(logits, plan, backend="cpu")
    print(_native.cpu().has_openmp(), tasks() - before)
    """
    )
    assert done.stdout.split() == ["True", "3"], done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_serial_and_finishes() -> None:
    done = python(
        WORK
        + """
    expected = sk.step_logps(logits, plan, backend="cpu")
    child = os.fork()
    if child == 0:
        ours = sk.step_logps(logits, plan, backend="cpu")
        os._exit(0 if torch.equal(ours, expected) and tasks() == 1 else 7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    )
    assert done.stdout.split() == ["0"], done.stdout + done.stderr


def test_loads_without_torch_and_runs_serial() -> None:
    """No OpenMP runtime in the process: the module still loads and computes."""
    done = python(f"""
        import array, importlib.machinery, importlib.util
        loader = importlib.machinery.ExtensionFileLoader("_C", {str(_native.cpu().__file__)!r})
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
        loader.exec_module(module)
        x, out = array.array("f", [0.0, 1.0]), array.array("f", [0.0, 0.0])
        module.elementwise(x.buffer_info()[0], out.buffer_info()[0], 2, 0)
        print(module.has_openmp(), round(out[1], 5))
    """)
    assert done.stdout.split() == ["False", "2.71828"], done.stdout + done.stderr


# -- choice and build -------------------------------------------------------------------------------------------------


def test_instruction_set_is_forced_by_the_environment() -> None:
    code = "import svpo_kernels._native as n; print(n.cpu().isa())"
    assert python(code, SVPO_CPU_ISA="portable").stdout.split() == ["portable"]
    assert python(code, SVPO_CPU_ISA="").stdout.split() == [_native.cpu().best_isa()]
    wrong = python(code, SVPO_CPU_ISA="sse9")
    assert wrong.returncode != 0 and "SVPO_CPU_ISA must be avx512, avx2 or portable, got sse9" in wrong.stderr


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="label_dots: dtype must be fp32, bf16 or fp16"):
        _native.cpu().label_dots(0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_links_neither_openmp_nor_torch() -> None:
    listing = subprocess.run(
        ["readelf", "-d", _native.cpu().__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert needed and not [name for name in needed if re.search("omp|torch|c10|python", name)], needed


@pytest.mark.skipif(not all(map(shutil.which, ("g++", "nm"))), reason="needs g++ and nm")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="one instruction set only")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_kernels_share_no_symbol_between_instruction_sets(source: str, tmp_path: Path) -> None:
    """A weak symbol built for AVX-512 could be the one the linker keeps for every CPU. -O0 inlines nothing away."""
    made = tmp_path / "kernel.o"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O0",
            "-w",
            "-fno-exceptions",
            "-fno-rtti",
            "-fPIC",
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mavx2",
            "-mfma",
            "-mf16c",
            "-Icsrc",
            "-DSVPO_ISA=avx512",
            "-DSVPO_FOR_AVX512=1",
            "-DSVPO_X86_ISAS=1",
            "-c",
            f"csrc/cpu/{source}",
            "-o",
            str(made),
        ],
        check=True,
        cwd=ROOT,
    )
    listing = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" T svpo_cpu_\w+_avx512$", listing, re.M), listing
    shared = re.findall(r"^\S* +[WVu] .*$", listing, re.M)
    assert not shared, "\n".join(shared)
    others = [name for name in re.findall(r" [TDB] (.*)$", listing, re.M) if not name.endswith("_avx512")]
    assert not others, others
