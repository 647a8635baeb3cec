"""Imports run downwards only: the floors of the package, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import svpo_kernels

ROOT = Path(svpo_kernels.__file__).parent
FAMILIES = ("step_logps", "linear_step_logps", "step_loss", "step_policy", "prm", "tree_attention")
# The top floor first. Names on one floor do not import each other, but for these, in their own order.
FLOORS = (("cli",), ("bench",), ("reasoning", "integrations"), ("public",), ("trainer",), ("data",), ("trees",),
          ("models",), FAMILIES, ("plan",), ("dispatch",))
WITHIN = {"linear_step_logps": {"step_logps"}}  # its row kernels are step_logps' own
LOWEST = len(FLOORS)  # underscored files and the version
ABOVE_ALL = "svpo_kernels"  # the bare package: the public names
MAY_USE_PUBLIC_NAMES = ("cli", "bench", "reasoning", "integrations")


def module_name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of this package that a file imports, anywhere in it, as parts below the package; () is the package.

    What is imported for type checking alone counts too.
    """
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name.split(".") for alias in node.names]
            found |= {tuple(parts[1:]) for parts in named if parts[0] == ABOVE_ALL}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level == 0:
                if base[:1] != [ABOVE_ALL]:
                    continue
                target = tuple(base[1:])
            else:
                target = (*package[: len(package) - node.level + 1], *base)
            for alias in node.names:
                longer = (*target, alias.name)
                is_module = (ROOT.joinpath(*longer).is_dir() or ROOT.joinpath(*longer).with_suffix(".py").exists())
                found.add(longer if is_module else target)
    return found


def floor(name: str) -> int:
    return next((index for index, names in enumerate(FLOORS) if name in names), LOWEST)


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_top_level_name_has_a_floor():
    names = {module_name(path)[0] for path in FILES}
    lowest = {name for name in names if floor(name) == LOWEST}
    assert all(name.startswith("_") or name == "version" for name in lowest), lowest


@pytest.mark.parametrize("path", FILES, ids=lambda path: ".".join(module_name(path)))
def test_imports_run_downwards(path):
    own = module_name(path)
    for target in imports(path):
        if not target:
            assert own[0] in MAY_USE_PUBLIC_NAMES, f"{path} imports from the bare package"
            continue
        if target[0] == own[0] or target == ("version",):
            continue
        down = floor(target[0]) > floor(own[0]) or floor(own[0]) == LOWEST
        assert down or target[0] in WITHIN.get(own[0], ()), f"{path} imports {'.'.join(target)} above or beside it"


def graph() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    known = {module_name(path) for path in FILES}
    edges = {}
    for path in FILES:
        own = module_name(path)
        edges[own] = {target for target in imports(path) if target in known and target != own}
    return edges


def test_no_circles():
    edges, done, under = graph(), set(), []

    def visit(name: tuple[str, ...]) -> None:
        if name in done:
            return
        assert name not in under, " -> ".join(".".join(part) for part in [*under[under.index(name):], name])
        under.append(name)
        for target in sorted(edges[name]):
            visit(target)
        under.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)


def test_the_test_sees_a_circle_and_a_step_upwards(tmp_path, monkeypatch):
    for name, text in (("trees/a.py", "from ..trainer import b"), ("trainer/b.py", "import svpo_kernels.trees.a")):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
        (path.parent / "__init__.py").write_text("")
    files = sorted(tmp_path.rglob("*.py"))
    monkeypatch.setattr("test_layers.ROOT", tmp_path)
    monkeypatch.setattr("test_layers.FILES", files)
    with pytest.raises(AssertionError, match="above or beside"):
        test_imports_run_downwards(tmp_path / "trees/a.py")
    with pytest.raises(AssertionError, match="trainer.b -> trees.a -> trainer.b"):
        test_no_circles()
