"""Logging: handlers, formats, and the ids in each line.

`working_on` sets the ids: `request` is the platform's id of an event (or one made here), `turn` is the answer. New tasks
inherit them, and `keep_ids` carries them to a task that exists already. People's texts are logged only if `log.text` is
true. Otherwise `log_text` does nothing, and tracebacks do not quote the errors of libraries.
"""

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType

from bot.config import LogConfig
from bot.errors import KibitzError, quote_error

OURS = ("bot", "connectors", "learning")
OPERATOR = logging.getLogger("kibitz")  # announcements to the operator, shown at every level
SAID = logging.getLogger("said")  # texts of people and of kibitz
SHOWN = 200  # characters of a text that are logged

Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_ids: ContextVar[Mapping[str, str]] = ContextVar("ids", default={})  # noqa: B039 (it is never mutated)


@contextlib.contextmanager
def working_on(**ids: str) -> Iterator[None]:
    """Add ids to each line that is logged inside, also by tasks that are created inside."""
    before = _ids.set({**_ids.get(), **ids})
    try:
        yield
    finally:
        _ids.reset(before)


def keep_ids(work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """Return `work` bound to the current ids, for a task that may have others."""
    ids = _ids.get()

    async def kept() -> None:
        before = _ids.set(ids)
        try:
            await work()
        finally:
            _ids.reset(before)

    return kept


def log_text(what: str, text: str) -> None:
    """Log the beginning of somebody's text, if `log.text` is true."""
    SAID.info("%s: %r%s", what, text[:SHOWN], "…" if len(text) > SHOWN else "")


class _Lines(logging.Formatter):
    """A formatter that quotes errors of libraries only with `quotes_people`, because they may contain people's texts."""

    def __init__(self, quotes_people: bool):
        super().__init__()
        self.quotes_people = quotes_people

    def formatException(self, ei: Raised) -> str:
        """Return a traceback with the error's type, and with the text of our own errors."""
        error = ei[1]
        if self.quotes_people or error is None:
            return super().formatException(ei)
        told = quote_error(error) if isinstance(error, KibitzError) else type(error).__name__
        return f"{''.join(traceback.format_tb(error.__traceback__))}{told}"


class TextLines(_Lines):
    """Lines for people: time, level, logger, ids, message. A traceback follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        ids = "".join(f" {name}={value}" for name, value in _ids.get().items())
        line = f"{_time(record)} {record.levelname} {record.name}{ids}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(_Lines):
    """JSON lines: an object with `time` (ISO 8601, UTC), `level`, `logger`, the ids, `message` and `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON."""
        row = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name, **_ids.get()}
        row["message"] = record.getMessage()
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


class StandardError(logging.Handler):
    """A handler that writes to the current `sys.stderr`, which progress bars and prompts replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class Terminal(logging.Handler):
    """A handler that shows announcements on the terminal. It skips errors if the log shows them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            if record.levelno < logging.ERROR:
                print(f"* {record.getMessage()}", flush=True)
            elif not OPERATOR.propagate:
                print(f"kibitz: {record.getMessage()}", file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def set_up(config: LogConfig) -> None:
    """Log to standard error as the config says. Libraries log warnings only, because their details quote people's texts.

    Announcements go to the terminal or to the log. They go to both if the log is redirected away from the terminal.
    """
    root, is_json = logging.getLogger(), config.format == "json"
    for handler in [one for one in root.handlers if isinstance(one, StandardError)]:
        root.removeHandler(handler)
    handler = StandardError()
    handler.setFormatter((JsonLines if is_json else TextLines)(config.text))
    root.addHandler(handler)
    level = logging.getLevelNamesMapping()[config.level.upper()]
    root.setLevel(max(level, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    SAID.disabled = not config.text
    logging.captureWarnings(is_json)
    is_apart = sys.stdout.isatty() and not sys.stderr.isatty()
    _tell_operator(on_terminal=is_apart or not is_json, in_log=is_apart or is_json)


def _tell_operator(on_terminal: bool, in_log: bool) -> None:
    OPERATOR.handlers = [Terminal()] if on_terminal else []
    OPERATOR.propagate = in_log


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


# Until `set_up` is called, announcements are shown and no texts are logged.
for _logger in (OPERATOR, SAID):
    _logger.setLevel(logging.INFO)
SAID.disabled = True
_tell_operator(on_terminal=True, in_log=False)
