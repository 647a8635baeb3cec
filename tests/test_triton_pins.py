"""Every Triton kernel compiled for GPUs that are not here: what it costs, and that its rows move 16 bytes at a time.

The calls of triton_calls.py that cover every kernel, dtype, mode and alignment have pins: looked at with
`-m slow`. All combinations, which must spill nothing either, with `-m exhaustive`.
"""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton", "3.6", reason="no triton from 3.6 on is installed: nothing to compile")

import triton_pins as pins  # noqa: E402
from triton_compile import ARCHITECTURES, Usage, instructions, triton_kernels  # noqa: E402


@pytest.fixture(scope="module", params=[pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES])
def covering(request):
    return pins.launches(full=False, architectures=(request.param,))


@pytest.fixture(scope="module")
def measured(covering):
    return pins.each(pins.usage, covering)


def test_every_kernel_is_compiled(covering) -> None:
    missing = triton_kernels() - {launch.function for launch in covering}
    assert not missing, f"tests/triton_calls.py has no call that launches {sorted(missing)}"


def test_nothing_spills(measured) -> None:
    """Nor uses local memory, whatever the version of Triton."""
    print(pins.count(measured))
    assert not pins.wasteful(measured), "\n".join(pins.wasteful(measured))


def test_registers_and_shared_memory_are_as_pinned(covering, measured) -> None:
    kept = pins.load()
    known = {version for configs in kept.values() for versions in configs.values() for version in versions}
    if pins.VERSION not in known:
        pytest.skip(f"Triton {pins.VERSION} has no pins ({', '.join(sorted(known))} have): only spills are judged")
    changed = pins.moved(kept, measured) + pins.stale(kept, covering)
    assert not changed, "\n".join([*changed, "better or worse: python tests/triton_pins.py --update, and say why"])


@pytest.mark.exhaustive
def test_nothing_spills_in_any_combination() -> None:
    measured = pins.each(pins.usage, pins.launches(full=True))
    print(pins.count(measured))
    assert not pins.wasteful(measured), "\n".join(pins.wasteful(measured))


def test_pins_move_both_ways(covering) -> None:
    """One register more or less, a configuration without a pin, and a pin without a launch are all seen."""
    launch = covering[0]
    found = Usage(40, 32, 0, 0, 0, 0)
    kept = pins.updated({}, [(launch._replace(arch=arch), found) for arch in ARCHITECTURES])
    assert not pins.moved(kept, [(launch, found)])
    for other in (found._replace(registers=39), found._replace(registers=41), found._replace(shared=0)):
        assert len(pins.moved(kept, [(launch, other)])) == 1
    assert "pinned nothing" in pins.moved({}, [(launch, found)])[0]
    assert len(pins.stale(kept, [])) == 1 and not pins.stale(kept, [launch])
    for field in ("stack", "spill_stores", "spill_loads", "local"):
        assert len(pins.wasteful([(launch, found._replace(**{field: 4}))])) == 1


# Reads and writes of whole rows, in loads of 16 bytes a thread: (loads, stores) of a span, in both branches of a span
# kernel (full and masked); a kernel over D reads two rows (label_dots, branch_hidden) or one and its gradient.
WIDE = {
    "step_logps_fwd_kernel": (2, 0),
    "step_logps_bwd_kernel": (2, 2),
    "label_dots_kernel": (2, 0),
    "branch_hidden_kernel": (2, 1),
    "branch_weight_kernel": (2, 1),
}


def test_aligned_rows_move_16_bytes_at_a_time(covering) -> None:
    def aligned(launch) -> bool:
        words = dict(re.findall(r"(\w+)=(\w+)", launch.config))
        aligns = {value for name, value in words.items() if name.endswith("ALIGN")}
        dtypes = set(re.findall(r":(\w+)", launch.config))
        return launch.kernel in WIDE and len(aligns) == 1 and len(dtypes) == 1 and "1" not in aligns and (
            words.get("MODE", "0") == "0" and words.get("WEIGHT") != "False")

    found = pins.each(instructions, filter(aligned, covering))
    assert {launch.kernel for launch, _ in found} == set(WIDE)
    for launch, count in found:
        words = dict(re.findall(r"(\w+)=(\d+)", launch.config))
        itemsize = 4 if "fp32" in launch.config else 2
        each = int(words["BLOCK"]) * itemsize // (launch.warps * 32 * 16)
        loads, stores = (n * each for n in WIDE[launch.kernel])
        where = f"sm_{launch.arch} {launch.kernel} [{launch.config}]: {dict(count)}"
        # Unrolled loops hold a multiple of what one round takes.
        assert count["LDG.E.128"] >= loads and count["LDG.E.128"] % loads == 0, where
        assert count["STG.E.128"] == stores, where
        assert not any(name.startswith(("STG.E.U16", "LDL", "STL")) for name in count), where
        # One number of 16 bits is read alone: the bias of a label.
        alone = sum(times for name, times in count.items() if name.startswith("LDG.E.U16"))
        has_bias = launch.kernel == "label_dots_kernel" and "BIAS=True" in launch.config
        assert alone == (1 if has_bias and itemsize == 2 else 0), where
