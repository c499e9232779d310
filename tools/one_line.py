"""Errors of the command line: exit status 1 and one line on standard error; `--debug` shows the traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from ..ir.errors import FxpressError


class OneLineErrors(TyperGroup):
    """A group of commands whose every failure, also of its own arguments, is one line and exit status 1.

    `--debug` is understood wherever it stands.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002 - this method is what standalone mode means here
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and end the process."""
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        try:
            status = super().main(arguments, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:  # the last line of defence: whatever it is, it becomes one line
            print(traceback.format_exc() if debug else f"error: {one_line(error)}", file=sys.stderr)
            status = 1
        sys.exit(status if isinstance(status, int) else 0)


def one_line(error: Exception) -> str:
    """What went wrong, on one line: our own errors in their words, others with their type and what to do next."""
    if isinstance(error, FxpressError):
        text = str(error)
    elif hasattr(error, "format_message"):  # wrong arguments, as typer reports them
        text = f"{error.format_message().rstrip('.')}. {_try_help(error)}"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {error} (unexpected; rerun with --debug for the traceback)"
    return " ".join(text.split())


def _try_help(error: Exception) -> str:
    path = getattr(getattr(error, "ctx", None), "command_path", "fxpress")
    return f"Try '{path} --help'"
