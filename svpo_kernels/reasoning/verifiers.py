"""Is an answer right? Verifiers take (text of the whole answer, the row's answer) and return a bool.

| name    | right where                                                                              |
| ------- | ---------------------------------------------------------------------------------------- |
| exact   | the final answer (last box, behind "####", or the last line) is the row's, character by character |
| numeric | the last number of the final answer equals the row's                                     |
| boxed   | `math-verify` finds the two equal                                                        |
| code    | the answer's code passes the row's tests, in a process without network                   |
| a.b:f   | one's own callable says so                                                               |
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from .solutions import final_answer

Verifier = Callable[[str, Any], bool]

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
SECONDS, MEGABYTES, FILE_MEGABYTES = 10, 1024, 16  # of one run of code
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET


def verifier(name: str, *, unsafe: bool = False) -> Verifier:
    """The verifier of a name. unsafe: run code where no process without network can be made.

    Raises ValueError for an unknown name, a callable that is not there, math-verify where it is not installed.
    """
    if ":" in name:
        return _imported(name)
    if name == "boxed":
        try:
            importlib.import_module("math_verify")
        except ImportError:
            raise ValueError("verifier: boxed needs the package math-verify: pip install math-verify") from None
    if name == "code":
        if not unsafe and not can_isolate():
            raise ValueError("verifier: code would run with this machine's network: no user namespace can be made "
                             "here; --unsafe-verifier runs it all the same")
        return lambda text, tests: run_tests(text, tests, isolated=not unsafe)
    if name not in _NAMED:
        raise ValueError(f"verifier: must be one of {', '.join([*_NAMED, 'code'])} or package.module:function, got "
                         f"{name!r}")
    return _NAMED[name]


def _imported(name: str) -> Verifier:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier: {name} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"verifier: {name} is no callable")
    return lambda text, answer: bool(found(text, answer))


def stated(text: str) -> str:
    """The final answer of a text: its last box, what stands behind its last "####", else its last line."""
    found = final_answer(text)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return found if found is not None else (lines[-1].strip() if lines else "")


def exact(text: str, answer: Any) -> bool:
    return stated(text) == str(answer).strip()


def numeric(text: str, answer: Any) -> bool:
    ours, theirs = _number(stated(text)), _number(str(answer))
    return ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)


def _number(text: str) -> float | None:
    found = NUMBER.findall(text)
    try:
        return float(found[-1].replace(",", "")) if found else None
    except ValueError:
        return None


def boxed(text: str, answer: Any) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(f"${answer}$"), parse(text)))


_NAMED: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "boxed": boxed}


# -- code -------------------------------------------------------------------------------------------------------------


def run_tests(text: str, tests: Any, *, isolated: bool = True, seconds: float = SECONDS) -> bool:
    """Whether the last fenced block of a text (or all of it) followed by the tests runs to its end.

    A process of its own in an empty folder: no network where isolated, limits on time, memory and the size of files. An
    exit before the tests is no pass: the last line must say a word that the code cannot know.
    """
    word = secrets.token_hex(16)
    blocks = FENCE.findall(text)
    code = (blocks[-1] if blocks else text) + "\n" + ("\n".join(tests) if isinstance(tests, list) else str(tests))
    code += f"\nprint(); print({word!r})"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], cwd=folder, env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: _confine(isolated))
        try:
            process.wait(timeout=seconds)
            said.seek(0)
            return process.returncode == 0 and said.read().splitlines()[-1:] == [word.encode()]
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.poll()  # all of its group are gone already
            process.wait()


def _confine(isolated: bool) -> None:
    if isolated and ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK) != 0:
        os._exit(126)
    for limit, most in ((resource.RLIMIT_CPU, int(SECONDS)), (resource.RLIMIT_AS, MEGABYTES << 20),
                        (resource.RLIMIT_FSIZE, FILE_MEGABYTES << 20), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))


def can_isolate() -> bool:
    """Whether a process without network can be made here."""
    try:
        done = subprocess.run([sys.executable, "-I", "-c", ""], preexec_fn=lambda: _confine(True), timeout=30)
        return done.returncode == 0
    except (subprocess.SubprocessError, OSError):
        return False
