"""The entry point: load all commands, run one, and report its error."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

# Ctrl-C during the imports ends the process at once: libraries swallow the exception or print a traceback.
_usual = signal.getsignal(signal.SIGINT)
if _usual is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
try:
    import typer

    from bot import environment, logs

    # Importing a module registers its commands. This order is that of `kibitz --help`.
    # isort: off
    from bot.cli import serve, people, versions, train, simulate, bench, doctor, backups, fit  # noqa: F401

    # isort: on
    from bot.cli.options import BAD_INPUT, INTERRUPTED, app
    from bot.errors import KibitzError, quote_error
finally:
    signal.signal(signal.SIGINT, _usual)

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main(application: typer.Typer = app) -> None:
    """Run a command. Report a KibitzError in one line with exit code 2; any other error is a traceback.

    SIGTERM does what Ctrl-C does, in every command.
    """
    os.umask(0o077)  # files that we and our children write may contain people's messages
    environment.open_standard_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        environment.check_arguments(sys.argv[1:])
        code = application(standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this return value
            raise KeyboardInterrupt
        _end_at_once_on_signals(code)
    except BaseException as error:
        _set_signal_handlers(signal.SIG_IGN)  # a second Ctrl-C must not interrupt the report of the first
        line = _describe_for_people(_unwrap_group(error))
        if line is None:
            raise
        if line:
            logs.OPERATOR.error("%s", line)
        _end_at_once_on_signals(BAD_INPUT)
        sys.exit(BAD_INPUT)
    sys.exit(code)


def _interrupt(sign: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does at this moment. Raise KeyboardInterrupt if it is ignored, as in a shell's background commands."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(sign, frame)
    else:
        raise KeyboardInterrupt


def _end_at_once_on_signals(code: int) -> None:
    """Have signals end the process at once from now on: the work is done, and libraries that end print tracebacks."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
        sys.stdout.flush()
    _set_signal_handlers(lambda *_: os._exit(code))


def _set_signal_handlers(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, handler)


def _describe_for_people(error: BaseException) -> str | None:
    """Return the line to show for an error ("" for none), or None for a bug."""
    if isinstance(error, KibitzError):
        return quote_error(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted; all that was stored is kept, an unfinished training run left nothing behind"
    if hasattr(error, "format_message"):  # typer's usage error; typer has its own copy of click
        said = error.format_message()  # empty if the help was shown instead
        return said and f"{said} (kibitz --help lists commands and options)"
    return None


def _unwrap_group(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
