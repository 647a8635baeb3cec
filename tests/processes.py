"""Processes that tests start: they import the package under test, be it installed or in the tree."""

from __future__ import annotations

import os
from pathlib import Path

import svpo_kernels

TESTS = Path(__file__).parent
PACKAGE = Path(svpo_kernels.__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """Run with `cwd=TESTS`: in the root of the repository Python would find the package's sources, built or not."""
    paths = [str(PACKAGE), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
