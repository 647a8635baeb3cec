"""What this machine is and what it can do: its copy, read and product rates, measured in the run that uses them."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .race import Clock

PEERS = ("triton", "transformers", "trl", "liger_kernel", "cut-cross-entropy", "flash-attn", "quack-kernels")
ROUNDS = 7
# (elements of the copied buffer, edge of the square product): out of every cache, and 0.1 s of a CPU's time
SIZES = {"cpu": (1 << 26, 2048), "cuda": (1 << 29, 8192), "tiny": (1 << 20, 256)}


@dataclass(frozen=True)
class Work:
    """What a computation cannot leave out: bytes read, bytes written (no more than are read), FLOPs of products."""

    read: float = 0.0
    write: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Best of a few runs: GB/s of a copy (bytes read plus bytes written) and of a read, TFLOP/s of a product."""

    copy_gbs: float
    read_gbs: float
    tflops: float

    def floor_ms(self, work: Work) -> float:
        """The longer of moving the bytes and doing the products: what is only read goes at the rate of a read."""
        moved = 2 * work.write / self.copy_gbs + (work.read - work.write) / self.read_gbs
        return max(moved / 1e6, work.flops / self.tflops / 1e9)


def measure(device: str = "cpu", dtype: torch.dtype = torch.float32, size: str | None = None) -> Rates:
    """The rates of this machine now. size: a key of SIZES, default the device's own."""
    elements, edge = SIZES[size or device]
    clock = Clock(device)

    def best(function: Callable[[], object]) -> float:
        function()
        return min(clock(function) for _ in range(ROUNDS))

    source = torch.ones(elements, device=device)
    target = torch.ones_like(source)
    gigabytes = source.numel() * source.element_size() / 1e9
    copy, read = best(lambda: target.copy_(source)), best(source.sum)
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = best(lambda: torch.mm(a, b))
    return Rates(2e3 * gigabytes / copy, 1e3 * gigabytes / read, 2 * edge**3 / product / 1e9)


def describe(command: str) -> dict[str, str]:
    """Device, versions, date and the command: what is written beside every figure."""
    threads = f"{torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu()}, {threads}"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "peers": ", ".join(f"{name} {version}" for name in PEERS if (version := installed(name))),
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
