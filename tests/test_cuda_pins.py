"""Registers, shared memory and vector loads of every kernel in the built module, held to cuda_pins.json both ways.

A number that moved, to the better or the worse, is red until `python tests/cuda_pins.py --update` moves the pin, in the
commit that says why. Spills and local memory are never allowed, pinned or not.
"""

from __future__ import annotations

import json

import cuda_pins
import pytest

from svpo_kernels import _native

_module = _native._load_cuda()
_archs = [] if isinstance(_module, str) else cuda_pins.archs(_module.archs)

pytestmark = [
    pytest.mark.skipif(isinstance(_module, str), reason=str(_module)),
    pytest.mark.skipif(cuda_pins.missing_tool() is not None, reason=str(cuda_pins.missing_tool())),
]


@pytest.fixture(params=_archs)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(arch: str) -> dict[str, cuda_pins.Kernel]:
    found = cuda_pins.kernels(_module.__file__, arch)
    assert found, f"no kernel for {arch} in {_module.__file__}"
    return found


def test_no_kernel_spills(kernels: dict[str, cuda_pins.Kernel]) -> None:
    bad = [f"{name}: {kernel}" for name, kernel in kernels.items() if kernel.stack or kernel.local or kernel.spills]
    assert not bad, "\n".join(bad)


def test_rows_move_16_bytes_at_a_time(arch: str, kernels: dict[str, cuda_pins.Kernel]) -> None:
    for family, (loads, stores) in cuda_pins.ROW_KERNELS.items():
        found = {name: kernel for name, kernel in kernels.items() if name.partition("<")[0] == family}
        assert found, f"no kernel is called {family}"
        if family in cuda_pins.CLUSTER_KERNELS and int(arch.removeprefix("sm_")) < 90:
            assert all(kernel.wide_loads == kernel.wide_stores == kernel.shared == 0 for kernel in found.values())
            continue
        for name, kernel in found.items():
            assert kernel.wide_loads or not loads, f"{name} has no 16-byte load"
            assert kernel.wide_stores or not stores, f"{name} has no 16-byte store"


def test_resources_are_as_pinned(arch: str, kernels: dict[str, cuda_pins.Kernel]) -> None:
    pins = json.loads(cuda_pins.PINS.read_text())
    if arch not in pins.get(_module.toolkit, {}):
        pytest.skip(f"nothing is pinned for nvcc {_module.toolkit} and {arch}; run: python tests/cuda_pins.py --update")
    found = {name: kernel.pin for name, kernel in kernels.items()}
    lines = cuda_pins.differences(pins[_module.toolkit][arch], found)
    assert not lines, "\n".join([*lines, "if this is meant: python tests/cuda_pins.py --update"])


# -- the checks themselves --------------------------------------------------------------------------------------------


def test_a_pin_that_moved_either_way_is_seen() -> None:
    pinned = {"a<float, 3>": [32, 0, 4, 0], "b": [16, 0, 0, 0], "same": [1, 2, 3, 4]}
    found = {"a<float, 3>": [30, 0, 2, 0], "c": [8, 0, 0, 0], "same": [1, 2, 3, 4]}
    assert cuda_pins.differences(pinned, found) == [
        "a<float, 3>: registers 32 -> 30, 16-byte loads 4 -> 2", "b: gone, was [16, 0, 0, 0]", "c: new, [8, 0, 0, 0]"]


def test_names_do_not_depend_on_the_file() -> None:
    symbol = "_ZN33_GLOBAL__N__5e0d9974_7_cb_k_cu_go3rowIfLi3EEEvPK6float4PS1_PT_l"
    assert cuda_pins.names_of([symbol]) == {symbol: "row<float, 3>"}
