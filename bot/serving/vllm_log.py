"""vLLM's log: find the error that ended vLLM among the errors that followed from it."""

import re
from collections.abc import Iterator

# vLLM's processes put their name before each line, its logger level, time and place.
LOG_PREFIX = re.compile(r"^(\(\w+(?: \w+)* pid=\d+\) ?)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?)?")
EXCEPTION = re.compile(r"^(?:[\w]+\.)*(\w*(?:Error|Exception|Interrupt)): ?(.*)$")
WRAPPERS = ("Engine core initialization failed", "cancelled", "Engine process failed to start")


def find_first_cause(log: str) -> str:
    """Return the first error in a log of vLLM, except those that its other processes raise because of it; "" without one."""
    lines = [LOG_PREFIX.sub("", line, count=1).rstrip() for line in log.splitlines()]
    found = list(_find_exceptions(lines))
    own = [text for text in found if not any(wrapper in text for wrapper in WRAPPERS)]
    return next(iter(own or found), "")[:400]


def _find_exceptions(lines: list[str]) -> Iterator[str]:
    """Yield the last lines of tracebacks, and the usage errors of vLLM's command line."""
    in_traceback = False
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif re.match(r"^[\w.-]+: error: ", line):
            yield line.partition(": error: ")[2]
        elif in_traceback and line and not line.startswith(" ") and (match := EXCEPTION.match(line)):
            in_traceback = False
            kind, text = match.groups()
            if re.match(r"\d+ validation errors? for", text):  # pydantic's reason is in the next line
                text = lines[number + 1].strip().partition(" [type=")[0] if number + 1 < len(lines) else text
            yield f"{kind}: {text}" if text else kind
