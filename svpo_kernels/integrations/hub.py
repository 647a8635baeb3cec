"""The ops as a kernel of the Hugging Face hub: python -m svpo_kernels.integrations.hub FOLDER

Writes build.toml (edition 5, [torch-noarch]), the sources under torch-ext/ and the same as built variants under build/:
Triton kernels and the PyTorch reference, relative imports, nothing beyond torch (numpy only where a StepPlan is built
on the CPU). `kernels.get_local_kernel(FOLDER)` loads it; uploaded, `kernels.get_kernel` does, without a wheel.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from svpo_kernels import __version__

NAME = "svpo_kernels"
FAMILIES = ("step_logps", "linear_step_logps", "step_loss", "step_policy", "prm")
SINGLE = ("_autograd", "_checks", "_memory", "_native", "_scales", "_triton", "dispatch", "models", "plan", "version")
LEFT_OUT = ("cpu.py", "cuda.py")  # backends of compiled code: a family without the file says that it has no such kernel
VARIANTS = ("torch-cpu", "torch-cuda")
NAMESPACE = "svpo_hub_" + re.sub(r"\W", "_", __version__)  # beside the wheel's own in one process
BUILD = """[general]
name = "svpo-kernels"
version = 1
edition = 5
license = "apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
"""
NUMPY = '''"""numpy where it is there; without it a StepPlan cannot be built on the CPU, and all else works."""


class _Absent:
    integer = floating = ndarray = ()

    def __getattr__(self, name):
        raise ImportError("StepPlan: its builders need numpy; run: pip install numpy")


try:
    import numpy as np
except ImportError:
    np = _Absent()
'''
PUBLIC = '''"""Fused ops for step-level training: Triton kernels and their PyTorch reference."""

from .dispatch import backends
from .linear_step_logps import linear_step_logps, linear_top_k
from .models import head
from .plan import StepPlan
from .prm import aggregate_scores, prm_loss, prm_scores, prm_scores_from_lm_head
from .step_logps import step_logps
from .step_loss import PRESETS, dvo_loss, svpo_loss
from .step_policy import POLICY_PRESETS, policy_weights, step_advantages, step_policy_loss
from .version import __version__
'''


def write(folder: str | Path) -> Path:
    """The kernel's folder, made new. Raises FileExistsError where something else lies there."""
    folder, source = Path(folder), Path(__file__).resolve().parents[1]
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").is_file():
        raise FileExistsError(f"hub: {folder} is not empty and holds no kernel; name another folder")
    places = [folder / "torch-ext" / NAME, *(folder / "build" / variant for variant in VARIANTS)]
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
        for path in [source / f"{name}.py" for name in SINGLE] + [
                path for family in FAMILIES for path in sorted((source / family).glob("*.py"))]:
            if path.name not in LEFT_OUT:
                target = place / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                text = _own(path.read_text(encoding="utf-8"), depth=len(path.relative_to(source).parts))
                target.write_text(text, encoding="utf-8")
        (place / "_numpy.py").write_text(NUMPY)
        (place / "__init__.py").write_text(PUBLIC)
    for variant in VARIANTS:
        metadata = {"id": NAMESPACE, "name": "svpo-kernels", "version": 1, "license": "apache-2.0",
                    "python-depends": [], "backend": {"type": variant.removeprefix("torch-")}}
        (folder / "build" / variant / "metadata.json").write_text(json.dumps(metadata, indent=1))
    (folder / "build.toml").write_text(BUILD)
    return folder


def _own(text: str, depth: int) -> str:
    """A file's text under its own op namespace and without numpy at its top. depth: its parts below the package."""
    text = re.sub(r"torch\.ops\.svpo\b", f"torch.ops.{NAMESPACE}", text).replace("svpo::", f"{NAMESPACE}::")
    text = text.replace('Library("svpo"', f'Library("{NAMESPACE}"')
    return re.sub(r"(?m)^import numpy as np$", f"from {'.' * depth}_numpy import np", text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m svpo_kernels.integrations.hub FOLDER")
    print(write(sys.argv[1]))
