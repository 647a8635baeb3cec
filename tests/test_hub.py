"""The kernel folder of the Hugging Face hub: made, imported from there alone, equal to the wheel's ops."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from processes import TESTS, environment

from svpo_kernels.integrations import hub

ALONE = """
import importlib.abc, importlib.util, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "svpo_kernels", "transformers", "accelerate"):
            raise ModuleNotFoundError(f"{name} is not there", name=name)

sys.meta_path.insert(0, Blocked())
import torch
place = sys.argv[1]  # as kernels.get_local_kernel does
spec = importlib.util.spec_from_file_location("svpo_kernel", place + "/__init__.py")
ops = importlib.util.module_from_spec(spec)
sys.modules["svpo_kernel"] = ops
spec.loader.exec_module(ops)

torch.manual_seed(0)
hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
labels = torch.randint(0, 97, (2, 5))
labels[0, 2] = -100
logps = ops.linear_step_logps(hidden, weight, labels, shift=1)
z = (hidden @ weight.T)[:, :-1].log_softmax(-1)
truth = (z.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0] * (labels[:, 1:] != -100)).sum(-1)
torch.testing.assert_close(logps, truth, rtol=1e-5, atol=1e-5)
torch.testing.assert_close(torch.autograd.grad(logps[0], weight)[0], torch.autograd.grad(truth[0], weight)[0],
                           rtol=1e-5, atol=1e-5)
pairs = torch.tensor([[0, 1]])
assert ops.svpo_loss(logps, pairs, reference_free=True, **{k: v for k, v in ops.PRESETS["step_dpo"].items()}).loss > 0
assert ops.step_policy_loss(logps, logps.detach(), torch.ones(2)).ratio_mean == 1
scores = ops.prm_scores(hidden.detach(), torch.tensor([1, 4]), weight.detach()[:1], activation="sigmoid")
torch.testing.assert_close(scores, torch.sigmoid(hidden.detach().reshape(-1, 16)[[1, 4]] @ weight.detach()[0]))
try:
    ops.StepPlan.from_step_ids([[1, 2]], [[0, 0]], shift=1)
except ImportError as error:
    assert "StepPlan: its builders need numpy" in str(error)
else:
    raise AssertionError("built without numpy")
print([name for name in sys.modules if name.startswith(("svpo_kernels", "numpy", "transformers"))])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hub.write(tmp_path_factory.mktemp("hub") / "kernel")


def test_imports_are_relative_or_torchs(folder):
    files = sorted((folder / "torch-ext").rglob("*.py"))
    assert len(files) > 40 and not [path for path in files if path.name in hub.LEFT_OUT]
    outside = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                outside |= {(alias.name.split(".")[0], path.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outside.add((node.module.split(".")[0], path.name))
        assert "torch.ops.svpo." not in path.read_text() and 'Library("svpo"' not in path.read_text()
    strange = {(name, file) for name, file in outside if name not in sys.stdlib_module_names | {"torch", "triton"}}
    assert strange == {("numpy", "_numpy.py")}


@pytest.mark.parametrize("variant", hub.VARIANTS)
def test_it_runs_alone(folder, variant):
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder / "build" / variant)], capture_output=True,
                          text=True, env=environment(), cwd=TESTS, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "[]"


def test_made_by_one_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "svpo_kernels.integrations.hub", str(tmp_path / "out")],
                          capture_output=True, text=True, env=environment(), cwd=TESTS, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[torch-noarch]" in (tmp_path / "out" / "build.toml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    with pytest.raises(FileExistsError, match="holds no kernel"):
        hub.write(tmp_path / "mine")


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="kernels is not installed")
def test_kernels_loads_it_beside_the_wheel(folder):
    import torch
    from kernels import get_local_kernel

    import svpo_kernels as sk

    ops = get_local_kernel(Path(folder))
    logits, labels = torch.randn(2, 5, 97), torch.randint(0, 97, (2, 5))
    assert ops.step_logps is not sk.step_logps
    torch.testing.assert_close(ops.step_logps(logits, labels, shift=1), sk.step_logps(logits, labels, shift=1))
