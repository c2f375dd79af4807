"""How an error is quoted: one line, whoever raised it."""

import sqlite3

import pytest
import sqlalchemy as sa

from bot.errors import ConfigError, quote_error, quote_first_line


class Rows(Exception):
    """What PostgreSQL's driver says: a line, and the rows that broke a rule."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("the key is gone;\nlook under the mat" + "!" * 300), "the key is gone; look under the mat" + "!" * 300),
        (ValueError("2 errors\n  for a field"), "ValueError: 2 errors for a field"),
        (ValueError(), "ValueError"),
        (ValueError("\n"), "ValueError"),
        (KeyError("x" * 300), "KeyError: '" + "x" * 229),
        (sa.exc.IntegrityError("INSERT", {}, Rows("a key is there twice\nDETAIL: Key (text)=(secret)")), None),
        (sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("no room")), "no room"),
    ],
)
def test_every_error_is_one_line_and_of_a_databases_rows_nothing_is_quoted(error, line):
    assert quote_error(error) == (line or "a key is there twice")


def test_of_an_error_that_may_quote_people_only_the_first_line_is_told():
    error = ValueError("no such tone\nin: what somebody wrote")
    assert quote_first_line(error) == "ValueError: no such tone"
    assert "somebody" in quote_error(error), "the control"


def test_an_error_that_holds_what_somebody_wrote_is_named_without_it():
    with pytest.raises(UnicodeEncodeError) as raised:
        "my secret \ud83d".encode()
    assert "secret" not in quote_first_line(raised.value)
    assert "secret" in repr(raised.value), "the control: this is what a log line must not hold"
