"""JSON lines that appear when they are complete, and that a killed run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def as_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


class Lines:
    """The rows of OUT while they are made. They lie in OUT.partial, behind a header that tells one run from another:
    `command` and what decides its rows; rows that a killed run left there come first.

    Raises FileExistsError where OUT is there, ValueError naming what differs where another run left the partial file.
    """

    def __init__(self, out: Path, command: str, made_from: dict[str, Any]) -> None:
        if out.exists():
            raise FileExistsError(f"{out}: is there already; name another file, or remove it")
        self.out, self.partial = out, out.with_name(f"{out.name}.partial")
        self.rows = self._left(command, json.loads(json.dumps(made_from)))
        self._header = {command: made_from}

    def _left(self, command: str, now: dict[str, Any]) -> list[dict[str, Any]]:
        text = self.partial.read_text(encoding="utf-8") if self.partial.is_file() else ""
        whole = [json.loads(each) for each in text.splitlines(keepends=True) if each.endswith("\n")]
        if not whole:
            return []
        before = whole[0].get(command, {})
        other = next((key for key in now if before.get(key) != now[key]), None)
        if other is not None:
            raise ValueError(f"{command}: {self.partial} is what another run left: {other} was {before.get(other)}, is "
                             f"{now[other]}; remove it, or name another file")
        return whole[1:]

    def __enter__(self) -> Lines:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("w", encoding="utf-8")
        self._file.writelines(map(as_line, (self._header, *self.rows)))
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """More rows; they are in the file when this returns."""
        rows = list(rows)
        self._file.writelines(map(as_line, rows))
        self._file.flush()
        self.rows += rows

    def finish(self) -> None:
        """OUT, whole or not at all."""
        finished = self.out.with_name(f"{self.out.name}.finished")
        with finished.open("w", encoding="utf-8") as file:
            file.writelines(map(as_line, self.rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(finished, self.out)
        self.partial.unlink()
