"""The README's figures are those of the committed results, and what it says runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import svpo_kernels as sk

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_figures_come_from_the_results() -> None:
    import readme

    text = (ROOT / "README.md").read_text()
    assert readme.render(text, readme.load()) == text, "run: python -m benchmarks.readme"


def test_equivalent_lines_are_equivalent() -> None:
    """The README's own PyTorch lines, run as they stand."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    B, L, D, V, S = 2, 7, 8, 31, 4
    hidden, lm_head = torch.randn(B, L, D), torch.nn.Linear(D, V, bias=False)
    labels, step_ids = torch.randint(0, V, (B, L)), torch.randint(-1, S, (B, L))
    labels[0, 3] = -100
    step_ids[0, 1] = S - 1
    names = {
        "sk": sk,
        "torch": torch,
        "hidden": hidden,
        "lm_head": lm_head,
        "labels": labels,
        "step_ids": step_ids,
        "S": S,
    }
    ours, theirs = dict(names), dict(names)
    exec(blocks[0], ours)
    scored = ((labels != -100) & (step_ids >= 0))[:, 1:]
    labels.clamp_(min=0)  # gather needs an id where nothing is scored
    theirs["scored"] = scored
    exec(blocks[1], theirs)
    torch.testing.assert_close(ours["out"], theirs["out"], rtol=1e-4, atol=1e-4)


def test_it_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
