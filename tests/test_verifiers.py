"""Verifiers: answers by text, by number and by code that is kept from the network, from time and from memory."""

from __future__ import annotations

import importlib.util

import pytest

from svpo_kernels.reasoning import verifiers
from svpo_kernels.reasoning.verifiers import can_isolate, run_tests, verifier


def judge(text, answer):
    return "yes" in text and answer == "yes"


@pytest.mark.parametrize("name, text, answer, right", [
    ("exact", "so \\boxed{x + 1}", "x + 1", True), ("exact", "so \\boxed{x+1}", "x + 1", False),
    ("exact", "one\n#### 7", "7", True), ("exact", "it is\n 7 ", "7", True), ("exact", "", "7", False),
    ("numeric", "the answer is 1,234.0.", 1234, True), ("numeric", "\\boxed{-3}", "-3", True),
    ("numeric", "first 7, then 8", "7", False), ("numeric", "none", "7", False), ("numeric", "x = 1e3", "1000", True),
    (f"{__name__}:judge", "yes!", "yes", True), (f"{__name__}:judge", "no", "yes", False)])
def test_by_text(name, text, answer, right):
    assert verifier(name)(text, answer) is right


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_boxed():
    assert verifier("boxed")("it is \\boxed{\\frac{1}{2}}", "0.5") and not verifier("boxed")("\\boxed{3}", "2")


def test_boxed_names_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        verifier("boxed")


@pytest.mark.parametrize("name, said", [("guess", "must be one of"), ("no.such:f", "cannot be imported"),
                                        (f"{__name__}:nothing", "cannot be imported"), ("math:pi", "is no callable")])
def test_names_are_checked(name, said):
    with pytest.raises(ValueError, match=said):
        verifier(name)


FUNCTION = "Here it is:\n```python\ndef f(n):\n    return n + 1\n```\n"


@pytest.mark.parametrize("text, tests, right", [
    (FUNCTION, "assert f(1) == 2", True), (FUNCTION, ["assert f(1) == 2", "assert f(2) == 4"], False),
    ("def f(n): return n", "assert f(1) == 1", True), ("no code at all", "assert True", False),
    ("import sys; sys.exit(0)", "assert False", False),  # an exit is no pass
    ("print('done')\nimport os; os._exit(0)", "assert False", False),
    ("x = 'a' * (3 << 30)", "", False), ("open('x', 'wb').write(b'0' * (64 << 20))", "", False)])
def test_code(text, tests, right):
    assert run_tests(text, tests, isolated=can_isolate()) is right


def test_code_is_stopped_in_time():
    assert not run_tests("while True: pass", "", isolated=can_isolate(), seconds=1)


@pytest.mark.skipif(not can_isolate(), reason="no user namespace can be made here")
def test_code_has_no_network():
    listens = "import socket\ns = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
    assert not run_tests("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", "")
    assert run_tests(listens, "assert not any(name != 'lo' for _, name in socket.if_nameindex())")


def test_code_without_a_namespace_is_refused(monkeypatch):
    monkeypatch.setattr(verifiers, "can_isolate", lambda: False)
    with pytest.raises(ValueError, match="--unsafe-verifier"):
        verifier("code")
    assert verifier("code", unsafe=True)("def f(): return 1", "assert f() == 1")
