"""Run checks, and return one row for each: its name, its outcome, what was found, and what to do.

A KibitzError makes a failed row. The text after its last semicolon is what to do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bot.errors import KibitzError, quote_error

Outcome = Literal["ok", "not", "skip"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    what: str
    outcome: Outcome
    found: str
    to_do: str = ""


class Skipped(Exception):
    """A check does not apply here. Its text says why."""


Check = tuple[str, Callable[[], str]]


def run_checks(checks: Sequence[Check], tell: Callable[[CheckResult], None] = lambda row: None) -> list[CheckResult]:
    """Run checks in order. Each returns what it found, or raises KibitzError (it failed) or Skipped.

    Any other error is a bug of kibitz or of a library. It makes a failed row too, so that the other checks still run.
    """
    rows = []
    for what, check in checks:
        try:
            row = CheckResult(what, "ok", check())
        except Skipped as reason:
            row = CheckResult(what, "skip", str(reason))
        except KibitzError as error:
            row = _make_failed_result(what, quote_error(error))
        except Exception as error:
            row = CheckResult(what, "not", f"the check crashed ({quote_error(error)})", "report this as a bug of kibitz")
        rows.append(row)
        tell(row)
    return rows


def has_passed(rows: Sequence[CheckResult]) -> bool:
    """Return whether no check failed."""
    return all(row.outcome != "not" for row in rows)


def _make_failed_result(what: str, said: str) -> CheckResult:
    found, _, to_do = said.rpartition("; ")
    return CheckResult(what, "not", found or said, to_do if found else "")
