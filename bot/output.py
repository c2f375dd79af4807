"""Output of commands: announcements, tables, progress bars and JSON files."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bot import logs, output_files
from bot.types import Progress

console = Console()


def announce(text: str) -> None:
    """Tell the operator something, on the terminal or in the log, as `logs.set_up` decided."""
    logs.OPERATOR.info("%s", text)


def make_log_progress(tell: Callable[[str], None]) -> Progress:
    """Return a progress callable that calls `tell` with one line per tenth."""
    told: dict[str, int] = {}

    def report(stage: str, done: int, total: int) -> None:
        if done * 10 // total > told.get(stage, 0):
            told[stage] = done * 10 // total
            tell(f"{stage}: {done:,} of {total:,}")

    return report


def write_json(path: Path | None, name: str, figures: dict[str, Any], setup: dict[str, Any]) -> None:
    """Write `{"name", "figures", "setup"}` to a file, whole or not at all. Do nothing if `path` is None."""
    if path is None:
        return
    output_files.write_text(path, json.dumps({"name": name, "figures": figures, "setup": setup}, indent=1, sort_keys=True))
    console.print(f"figures: {path}")


def print_figures(figures: dict[str, Any]) -> None:
    """Print figures as a table."""
    table = Table("figure", "value")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = "\n".join(f"{count} {reason}" for reason, count in value.items()) or "nothing"
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text as a table."""
    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def check_writable(*paths: Path | None) -> None:
    """Raise DataError if an output file cannot be written. Call this before the work."""
    for path in paths:
        if path is not None:
            output_files.check_replaceable(path)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a progress bar on standard error, if that is a terminal. Yield its progress callable."""
    text = progress.TextColumn("{task.description}")
    columns = text, progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
    terminal = Console(stderr=True, force_terminal=sys.stderr.isatty())  # FORCE_COLOR makes no terminal of a file
    # Elsewhere a bar is disabled: it would leave an empty line at its end, in a log perhaps.
    with progress.Progress(*columns, console=terminal, transient=True, disable=not terminal.is_interactive) as shown:
        task = shown.add_task("starting", total=None)
        current = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                current = stage
                shown.reset(task, description=stage, total=total)
            shown.update(task, completed=done, total=total, description=stage)

        yield report


@contextmanager
def interruptible(report: Progress) -> Iterator[Progress]:
    """Yield a progress callable that raises KeyboardInterrupt after Ctrl-C, even if a library swallowed the exception.

    Many libraries have a bare `except` around their imports. Only the first Ctrl-C raises it at once, so that a second one
    does not interrupt the removal of unfinished files. For work in the main thread, outside an event loop.
    """
    pressed = False
    before = signal.getsignal(signal.SIGINT)

    def press(*_: Any) -> None:
        nonlocal pressed
        if not pressed:
            pressed = True
            raise KeyboardInterrupt

    def report_or_interrupt(stage: str, done: int, total: int) -> None:
        if pressed:
            raise KeyboardInterrupt
        report(stage, done, total)

    signal.signal(signal.SIGINT, press)
    try:
        yield report_or_interrupt
    finally:
        signal.signal(signal.SIGINT, before)
