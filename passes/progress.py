"""What `compile` shows while it runs: one line per pass."""

from __future__ import annotations

import os

from rich.console import Console

from ..runtime.processes import is_main
from .report import Row, short


def make_console() -> Console:
    """A console on standard error; quiet where that is no terminal, unless FXPRESS_PROGRESS is 1 (0: always quiet).

    Under `torchrun` only the first process speaks.
    """
    console = Console(stderr=True, highlight=False)
    wish = os.environ.get("FXPRESS_PROGRESS", "")
    console.quiet = not is_main() or wish == "0" or (wish != "1" and not console.is_terminal)
    return console


def show_row(console: Console, row: Row, before: Row | None) -> None:
    """One line: what the pass did to the counts, how far the outputs moved, how long it took."""
    old = before or row
    facts = [_change("parameters", row.parameters, old.parameters), _change("MACs", row.macs, old.macs)]
    if row.accuracy is not None:
        facts.append(f"accuracy {row.accuracy:.2%}")
    if row.distance is not None:
        facts.append(f"distance {row.distance:.0e}")
    console.print(f"[bold]{row.name:<18}[/] {'  '.join(facts)}  [dim]{row.seconds:.1f} s[/]", soft_wrap=True)


def _change(what: str, now: int, before: int) -> str:
    return f"{what} {short(now)}" if now == before else f"{what} {short(before)} → {short(now)}"
