"""The op tests under every path that torch's libraries and our kernels can take.

    python tests/matrix.py [--sample | --full] [--seed N] [WORD ...]

    MKL_ENABLE_INSTRUCTIONS=AVX2|AVX512, ONEDNN_MAX_CPU_ISA=AVX2|AVX512_CORE, ATEN_CPU_CAPABILITY=avx2|default,
    SVPO_CPU_ISA=portable|avx2|avx512 (our own kernels), 1 and 2 threads, --seed of the inputs

A path is a setting of all five, and every value of each meets every value of every other in some path (--full: each
with each). WORDs choose test files by name. One line a path: what passed, failed and was skipped; exit code 1 when
anything failed. MKL takes a path of its own on processors that are not Intel's and ignores the setting: there a
library of one function, made with cc, tells it otherwise, and without cc the lines say "MKL's own".
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import TESTS, environment

FILES = ("accuracy", "aggregate", "linear_lora", "linear_shards", "linear_stats", "linear_step_logps", "linear_top_k",
         "prm", "small_ops", "step_logps", "step_policy", "svpo_loss", "tree_attention")
SETTINGS = {
    "MKL_ENABLE_INSTRUCTIONS": ("AVX2", "AVX512"),
    "ONEDNN_MAX_CPU_ISA": ("AVX2", "AVX512_CORE"),
    "ATEN_CPU_CAPABILITY": ("avx2", "default"),
    "SVPO_CPU_ISA": ("portable", "avx2", "avx512"),
    "OMP_NUM_THREADS": ("1", "2"),
}
# What one CI step runs: the two ends, on the files whose results depend on a library's products.
SAMPLE_FILES = ("accuracy", "linear_lora", "linear_step_logps")
INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"

Path_ = dict[str, str]


def pairwise() -> list[Path_]:
    """A greedy cover: every two values of two settings meet in one of these paths at least."""
    everything = [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]

    def meetings(path: Path_) -> set[tuple[tuple[str, str], ...]]:
        return set(itertools.combinations(path.items(), 2))

    missing, chosen = set().union(*map(meetings, everything)), []
    while missing:
        chosen.append(max(everything, key=lambda path: len(meetings(path) & missing)))
        missing -= meetings(chosen[-1])
    return chosen


def full() -> list[Path_]:
    return [dict(zip(SETTINGS, values, strict=True)) for values in itertools.product(*SETTINGS.values())]


def sample() -> list[Path_]:
    return [dict(zip(SETTINGS, values, strict=True)) for values in (
        ("AVX2", "AVX2", "avx2", "avx2", "1"), ("AVX512", "AVX512_CORE", "default", "avx512", "2"),
        ("AVX512", "AVX2", "default", "portable", "1"),
    )]


def flags() -> str:
    """The processor's line in /proc/cpuinfo, "" elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def usable(path: Path_) -> bool:
    """Without AVX-512 in the processor a path that asks for it is another path's double."""
    return "avx512" in flags() or not any("512" in value.lower() for value in path.values())


def persuade_mkl(folder: Path) -> tuple[dict[str, str], str]:
    """What makes MKL honour MKL_ENABLE_INSTRUCTIONS here, and in words what it takes."""
    if "GenuineIntel" in flags():
        return {}, "MKL on Intel"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return {}, "MKL's own"
    source, library = folder / "intel.c", folder / "intel.so"
    source.write_text(INTEL)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}, "MKL as on Intel"


def mkl_path(env: dict[str, str]) -> str:
    """What MKL says of itself in this environment: "Advanced Vector Extensions 512"."""
    code = "import torch; torch.ones(9, 9) @ torch.ones(9, 9)"
    done = subprocess.run([sys.executable, "-c", code], env={**env, "MKL_VERBOSE": "1"}, cwd=TESTS,
                          capture_output=True, text=True, check=True)
    found = re.search(r"for Intel\(R\) 64 architecture (.*?),? Lnx", done.stdout)
    return re.sub(r"Intel\(R\) |\(R\)| enabled processors", "", found[1]) if found else "no MKL"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--sample", action="store_true", help="three paths, three files")
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--seed", type=int, default=0, help="of the tests' inputs")
    given = parser.parse_args()
    gone = [name for name in FILES if not (TESTS / f"test_{name}.py").exists()]
    if gone:
        parser.error(f"there is no tests/test_{gone[0]}.py: pytest would run nothing at all")
    files = [name for name in (SAMPLE_FILES if given.sample else FILES) if not given.words or
             any(word in name for word in given.words)]
    paths = [path for path in (sample() if given.sample else full() if given.full else pairwise()) if usable(path)]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        more, whose = persuade_mkl(Path(folder))
        print(f"{len(paths)} paths, {whose}, seed {given.seed}: {' '.join(files)}", flush=True)
        for path in paths:
            env = environment(**path, **more, SVPO_TEST_SEED=str(given.seed))
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m",
                       "not gpu and not slow", *(f"test_{name}.py" for name in files)]
            began = time.monotonic()
            done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True)
            lines = done.stdout.splitlines() or [done.stderr.strip()[-300:]]
            setting = " ".join(f"{name.partition('_')[0]}={value}" for name, value in path.items())
            print(f"{setting} ({mkl_path(env)}): {lines[-1]} [{time.monotonic() - began:.0f} s]", flush=True)
            failed += done.returncode != 0
            for line in lines if done.returncode else []:
                if line.startswith(("FAILED", "ERROR")):
                    print("   ", line, flush=True)
    print(f"{len(paths) - failed} of {len(paths)} paths green")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
