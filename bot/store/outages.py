"""Outages: turn errors of SQLite and PostgreSQL into advice for the operator.

A database that is locked, full, gone or unusable is an outage. Every other error is a bug and stays as it is.
"""

import sqlite3
from typing import Any

import sqlalchemy as sa

from bot.errors import DatabaseUnavailable, quote_error

_LOCKED = "is locked by another program; end that program, or try again when it is done"
_FULL = "has no room left on its disk; free some space, then try again"
_READ_ONLY = "cannot be written; give kibitz permission to write the file and its directory"
_BROKEN = "cannot be opened ({reason}); restore it from a backup (kibitz restore FILE), or move it away"
_GONE = "cannot be read or written ({reason}); check that its disk is there and that kibitz may use the file"
_SILENT = "does not answer ({reason}); check that the server runs, and the config key database.url"

_OF_SQLITE = {  # by primary result code
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CORRUPT: _BROKEN,
    sqlite3.SQLITE_NOTADB: _BROKEN,
    sqlite3.SQLITE_CANTOPEN: _GONE,
    sqlite3.SQLITE_IOERR: _GONE,
}
_OF_POSTGRESQL = {  # by the beginning of the SQLSTATE
    "55P03": _LOCKED,
    "40": _LOCKED,  # a deadlock, or a transaction that cannot be serialized
    "53100": _FULL,
    "25006": _READ_ONLY,
    "53": _SILENT,  # out of connections or memory
    "57": _SILENT,  # it shuts down or starts
    "08": _SILENT,
    "XX00": _BROKEN,
}


def find_outage(error: sa.exc.DBAPIError, url: str) -> DatabaseUnavailable | None:
    """Return the error to raise for an outage of the database at `url`, or None if `error` is a bug."""
    advice = _advise_on_sqlite(error.orig) if isinstance(error.orig, sqlite3.Error) else _advise_on_postgresql(error)
    if advice is None:
        return None
    return DatabaseUnavailable(f"the database {url} {advice.format(reason=quote_error(error))}")


def _advise_on_sqlite(error: Any) -> str | None:
    code = getattr(error, "sqlite_errorcode", 0)
    return _FULL if code == sqlite3.SQLITE_IOERR_SHMSIZE else _OF_SQLITE.get(code & 0xFF)  # no room for the log's index


def _advise_on_postgresql(error: sa.exc.DBAPIError) -> str | None:
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # not the server's error: there is no connection
        return _SILENT if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) else None
    return next((advice for prefix, advice in _OF_POSTGRESQL.items() if state.startswith(prefix)), None)
