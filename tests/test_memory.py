"""Large CPU buffers that are used again: never while somebody holds them, never with what was in them."""

from __future__ import annotations

import gc
import mmap
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import TESTS, environment

import svpo_kernels as sk
from svpo_kernels import _memory

SIZE = 5_000_000  # fp32 elements: 20 MB
LIKE = torch.zeros(1)

pytestmark = pytest.mark.skipif(_memory.pool().limit < 2**28, reason="no buffers are kept here")


@pytest.fixture(autouse=True)
def empty_pool():
    _memory.pool().clear()
    yield
    _memory.pool().clear()


def idle() -> int:
    gc.collect()
    return len(_memory.pool().idle)


def test_a_buffer_is_used_again_only_when_nobody_holds_it() -> None:
    first, written = _memory.empty(LIKE, (SIZE,))
    assert not written and first.is_contiguous() and not first._is_view()
    address, view = first.data_ptr(), first[17:]
    del first
    assert idle() == 0
    other, written = _memory.empty(LIKE, (SIZE,))
    assert not written and other.data_ptr() != address
    del view
    assert idle() == 1
    again, written = _memory.empty(LIKE, (2, SIZE // 2 - 5))
    assert written and again.data_ptr() == address and again.shape == (2, SIZE // 2 - 5)


def test_small_buffers_and_much_smaller_ones_do_not_take_a_large_block() -> None:
    _memory.empty(LIKE, (4 * SIZE,))
    assert idle() == 1
    assert not _memory.empty(LIKE, (SIZE,)).written
    assert _memory.empty(LIKE, (1000,)).tensor.untyped_storage().nbytes() == 4000


def test_the_system_may_take_idle_pages_and_the_limit_holds() -> None:
    pool = _memory.Pool(limit=3 * mmap.PAGESIZE * 16)
    views = [pool.take(mmap.PAGESIZE * 16)[0] for _ in range(5)]
    for view in views:
        view[:] = b"x" * len(view)
    blocks = [view.obj for view in views]
    del view
    while views:
        views.pop(0)
    assert pool.idle == blocks[-3:]
    huge, _ = pool.take(mmap.PAGESIZE * 64)
    del huge
    gc.collect()
    assert pool.idle == blocks[-3:]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of a process")
def test_idle_pages_are_given_to_the_system() -> None:
    def lazily_free() -> int:
        lines = open("/proc/self/smaps").read().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree"))

    buffer = _memory.empty(LIKE, (SIZE,)).tensor.fill_(1.0)
    before = lazily_free()
    del buffer
    assert idle() == 1
    assert lazily_free() - before > 0.9 * SIZE * 4 / 1024


@pytest.mark.skipif(not _memory.HUGE_PAGES.exists(), reason="the system has no huge pages")
def test_a_large_buffer_asks_for_huge_pages() -> None:
    tensor = _memory.empty(LIKE, (SIZE,)).tensor
    own, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (area := re.match("([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            own = int(area[1], 16) <= tensor.data_ptr() < int(area[2], 16)
        elif own and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert "hg" in flags


def test_a_step_does_not_see_what_was_in_its_buffer() -> None:
    T, V = 70, 65536
    logits = torch.randn(T, V, requires_grad=True)
    labels = torch.randint(0, V, (T,))
    labels[::3] = -100
    upstream = torch.randn(1)

    def gradient() -> torch.Tensor:
        out = sk.step_logps(logits, labels, shift=0, backend="cpu")
        return torch.autograd.grad(out, logits, upstream)[0]

    expected = gradient().clone()
    for poison in (torch.nan, torch.inf, 1.0):
        gc.collect()
        (block,) = _memory.pool().idle
        torch.frombuffer(block, dtype=torch.float32).fill_(poison)
        again = gradient()
        assert torch.equal(again, expected) and idle() == 0
        del again


def test_threads_never_share_a_buffer() -> None:
    wrong = []

    def work(number: float) -> None:
        for _ in range(30):
            buffer = _memory.empty(LIKE, (SIZE,)).tensor
            buffer[::4096] = number
            if not (buffer[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("wish", "expected"), [("0", "False"), ("100", "True"), ("much", "SVPO_CPU_CACHE_MB")])
def test_the_environment_bounds_what_is_kept(wish: str, expected: str) -> None:
    code = f"""
import torch
from svpo_kernels import _memory
_memory.empty(torch.zeros(1), ({SIZE},))
print(_memory.empty(torch.zeros(1), ({SIZE},)).written)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(SVPO_CPU_CACHE_MB=wish), cwd=TESTS,
                          capture_output=True, text=True)
    assert expected in done.stdout + done.stderr
