"""How a command ends when something is wrong."""

from __future__ import annotations

import os

import typer


class errors_in_one_line:
    """Errors of settings, data, files and model names end in their message; all others keep their traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, (ValueError, OSError)) and os.environ.get("SVPO_TRACEBACK") != "1":
            typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1)
        return False
