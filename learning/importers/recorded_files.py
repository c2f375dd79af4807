"""Recorded files: read the JSON values in a file, a directory or an archive.

It reads JSON lines, arrays and concatenated values; UTF-8 with or without a BOM, UTF-16 and UTF-32; gzip, bzip2, xz and ZIP.
It does not interpret the values.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from bot.errors import DataError

COMPRESSIONS: dict[bytes, Callable[[bytes], bytes]] = {  # by a file's first bytes
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
}
ZIP = b"PK\x03\x04"
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
SUFFIXES = {".json", ".jsonl", ".ndjson", ".gz", ".bz2", ".xz", ".zip"}  # read in a directory or an archive
BETWEEN = re.compile(r"[\s\ufeff,]*")  # between the values of one file
UNSTORABLE = re.compile("[\ud800-\udfff\0]")  # databases refuse these characters
SUSPECT = re.compile(UNSTORABLE.pattern + r"|\\u(?:0000|[dD][89a-fA-F])")
DECODER = json.JSONDecoder(strict=False, parse_constant=lambda _: None)  # Python writes NaN for missing values


@dataclass(frozen=True)
class RecordedRow:
    """A JSON value, its file (relative to the path that was given), and its place for people."""

    file: str
    place: str
    value: Any


@dataclass(frozen=True)
class Oddity:
    """A problem: the noun ("row", "file"), what is wrong with it, its place, and what was found."""

    noun: str
    predicate: str
    place: str
    detail: str = ""


@dataclass
class Contents:
    """All rows of a path, the problems, and the rows in which characters were replaced because they cannot be stored."""

    sha256: str
    rows: list[RecordedRow] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    cleaned: list[RecordedRow] = field(default_factory=list)


def read_contents(path: Path) -> Contents:
    """Read a file, or all JSON files in a directory. Raises DataError if there is nothing to read."""
    try:
        is_directory = path.is_dir()
        files = dict(_read_files_below(path)) if is_directory else {_clean(path.name): path.read_bytes()}
    except OSError as error:
        named = error.filename or path
        raise DataError(f"{named}: cannot be read ({error.strerror}); name an existing file or directory") from error
    if not files:
        raise DataError(f"{path}: has no files; give a directory with recorded conversations")
    found = Contents(_fingerprint(files, is_directory))
    members = [
        member
        for name, raw in files.items()
        for member in _unpack(name, partial(bytes, raw), f"{name}/" if is_directory else "", found)
    ]
    has_several = is_directory or len(members) > 1
    for name, raw in members:
        is_named = not is_directory and name in files  # the path that was given may have any suffix
        if not is_named and _suffix(name) not in SUFFIXES:
            found.oddities.append(Oddity("file", "has an unsupported suffix", name))
        else:
            _read_member(name, raw, name if has_several else "", found)
    return found


def _read_files_below(directory: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(directory.rglob("*")):
        name = _clean(file.relative_to(directory).as_posix())
        if not _is_hidden(name) and file.is_file():
            yield name, file.read_bytes() if file.suffix.lower() in SUFFIXES else b""


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _fingerprint(files: dict[str, bytes], is_directory: bool) -> str:
    if not is_directory:
        (raw,) = files.values()
        return hashlib.sha256(raw).hexdigest()
    parts = [[name, hashlib.sha256(raw).hexdigest()] for name, raw in files.items()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _unpack(name: str, read: Callable[[], bytes], prefix: str, found: Contents) -> Iterator[tuple[str, bytes]]:
    """Yield a file's name and content; for an archive, those of its members, with `prefix` before their names."""
    try:
        raw = read()
        for magic, decompress in COMPRESSIONS.items():
            if raw.startswith(magic):
                yield from _unpack(name, partial(decompress, raw), prefix, found)
                return
        if raw.startswith(ZIP):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                for one in sorted(set(archive.namelist())):
                    if not one.endswith("/") and not _is_hidden(one):
                        inner = partial(archive.read, one) if _suffix(one) in SUFFIXES else bytes
                        yield from _unpack(prefix + one, inner, f"{prefix}{one}/", found)
            return
    except UNREADABLE as error:
        found.oddities.append(Oddity("file", "cannot be unpacked", name, str(error)))
        return
    yield name, raw


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _read_member(name: str, raw: bytes, shown: str, found: Contents) -> None:
    """Add the rows of one file. `shown` is the beginning of their places, "" for a single file."""

    def place(where: str) -> str:
        return f"{shown}, {where}" if shown and where else shown or where or name

    try:
        text = _decode(raw)
    except UnicodeDecodeError as error:
        found.oddities.append(Oddity("file", f"is not {error.encoding.upper()}", name, f"byte {error.start}"))
        return
    if not text.strip("\ufeff"):
        found.oddities.append(Oddity("file", "is empty", name))
        return
    is_suspect = SUSPECT.search(text) is not None
    for where, value in _parse_values(text):
        if isinstance(value, Exception):
            line, detail = _explain(value, where)
            found.oddities.append(Oddity("row", "is not JSON", place(line), detail))
            continue
        try:
            row = RecordedRow(name, place(where), _clean(value) if is_suspect else value)
            if row.value != value:
                found.cleaned.append(row)
            found.rows.append(row)
        except RecursionError:
            found.oddities.append(Oddity("row", "is nested too deeply", place(where)))


def _decode(raw: bytes) -> str:
    """Return the text of a file. Invalid UTF-8 becomes lone surrogates, which are replaced in the values later."""
    encoding = json.detect_encoding(raw)
    return raw.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass").rstrip()


def _parse_values(text: str) -> Iterator[tuple[str, Any]]:
    """Yield each value of a text with its place. For a line that is not JSON, the value is the exception.

    The items of an array are yielded one by one, because many exports are an array of rows.
    """
    try:
        found = list(_parse_sequence(text))
    except (ValueError, RecursionError) as error:
        found = list(_parse_lines(text))
        if not any(isinstance(value, dict | list) for _, value in found):
            found = [("line 1", error)]  # not JSON lines either
    for where, value in found:
        if isinstance(value, list):
            for number, item in enumerate(value, 1):
                yield f"item {number}" if len(found) == 1 else f"{where}, item {number}", item
        else:
            yield where, value


def _parse_sequence(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the concatenated values of a text. Raises ValueError at anything else."""
    at, counted, line = 0, 0, 1
    while (at := BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", counted, at)
        value, end = DECODER.raw_decode(text, at)
        yield f"line {line}", value
        at, counted = end, at


def _parse_lines(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the value of each line, or its exception. Only CR and LF end a line; U+2028 and the like are text."""
    for number, line in enumerate(re.split(r"\r\n?|\n", text), 1):
        line = line.strip("\ufeff \t")
        if line:
            try:
                yield f"line {number}", DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", error


def _explain(error: Exception, where: str) -> tuple[str, str]:
    """Return the place that is not JSON, and the reason."""
    if isinstance(error, RecursionError):
        return where, "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return where, str(error)
    return where if error.lineno == 1 else f"line {error.lineno}", f"{error.msg}, column {error.colno}"


def _clean(value: Any) -> Any:
    """Return a value with U+FFFD for each character that databases refuse."""
    if isinstance(value, str):
        return UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return value
