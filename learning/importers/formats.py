"""Formats: read recorded conversations with their reactions from files of any known format.

It detects the format of each row and passes the rows to the format's reader. A file is read completely before anything is
stored. Rows that cannot be read are left out and counted by reason.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bot.chat.reactions import Reactions
from bot.config import ReactionsConfig
from bot.errors import ConfigError, DataError
from bot.wording import count_noun
from learning.importers.chat_messages import read_rated_chat
from learning.importers.discord_export import read_discord
from learning.importers.kibitz_export import EXPORT_KEY, read_export
from learning.importers.oasst import read_oasst
from learning.importers.open_webui import read_open_webui
from learning.importers.preferences import read_completion, read_preference
from learning.importers.ratings import convert_ratings
from learning.importers.recorded_files import RecordedRow, read_contents
from learning.importers.recording import Recording
from learning.importers.slack_export import LIST_FILES, read_slack

FormatReader = Callable[[Sequence[RecordedRow], Recording], None]


@dataclass(frozen=True)
class Format:
    """A file format. Its rows have all keys of one of `marks`, or are in a file whose name is in `files`."""

    name: str
    marks: tuple[set[str], ...]
    read: FormatReader
    files: frozenset[str] = frozenset()

    def matches(self, row: RecordedRow) -> bool:
        """Whether a row has this format."""
        is_marked = isinstance(row.value, dict) and any(mark <= row.value.keys() for mark in self.marks)
        return is_marked or PurePosixPath(row.file).name in self.files


def _make_row_reader(read: Callable[[RecordedRow, Recording], None]) -> FormatReader:
    """Make a reader for a format with independent rows."""

    def read_all(rows: Sequence[RecordedRow], recording: Recording) -> None:
        for row in rows:
            with recording.leaving_out(row.place):
                read(row, recording)

    return read_all


FORMATS = (  # a row has the first one that matches
    Format("kibitz", ({EXPORT_KEY}, {"conversation", "turns", "feedback"}), _make_row_reader(read_export)),
    Format("oasst", ({"message_tree_id"},), read_oasst),
    Format("open-webui", ({"chat"}, {"data", "meta"}), read_open_webui),
    Format("discord", ({"channel", "messages"},), read_discord),
    Format("dpo", ({"chosen", "rejected"},), _make_row_reader(read_preference)),
    Format("kto", ({"prompt", "completion"}, {"prompt", "response"}), _make_row_reader(read_completion)),
    Format("openai", ({"messages"},), _make_row_reader(read_rated_chat)),
    Format("sharegpt", ({"conversations"}, {"conversation"}), _make_row_reader(read_rated_chat)),
    Format("slack", ({"ts", "type"}, {"ts", "text"}), read_slack, frozenset(LIST_FILES)),
)
NAMES = [one.name for one in FORMATS]


def read_recording(path: Path, format: str = "auto", reactions: ReactionsConfig | None = None) -> Recording:
    """Read recorded conversations from a file, or from all files of a directory or an archive.

    `reactions` says which emoji are opinions. Raises ConfigError if `format` is unknown, and DataError if nothing can be
    read, with the first problem.
    """
    if format not in ("auto", *NAMES):
        raise ConfigError(f"--format has value '{format}'; it must be auto or one of {', '.join(NAMES)}")
    contents = read_contents(path)
    recording = Recording(contents.sha256[:16], Reactions(reactions or ReactionsConfig()))
    for odd in contents.oddities:
        recording.leave_out(f"{odd.noun} that {odd.predicate}", odd.place, odd.detail)
    for row in contents.cleaned:
        recording.leave_out("row with invalid characters, which were replaced", row.place)
    rows: dict[str, list[RecordedRow]] = defaultdict(list)
    for row in contents.rows:
        found = format if format != "auto" else next((one.name for one in FORMATS if one.matches(row)), "")
        if not isinstance(row.value, dict):
            recording.leave_out("row that is not a JSON object", row.place)
        elif not found:
            recording.leave_out("row that has no known format", row.place)
        else:
            rows[found].append(row)
    for one in FORMATS:
        if one.name in rows:
            recording.row_counts[one.name] = len(rows[one.name])
            one.read(rows[one.name], recording)
    convert_ratings(recording)
    if not recording.dialogues:
        raise DataError(f"{path}: {_explain_nothing_read(recording, format)}")
    return recording


def _explain_nothing_read(recording: Recording, format: str) -> str:
    """Return why nothing was read: the first problem, how many rows were left out besides, and what to give."""
    reasons = list(recording.dropped)
    if not reasons:
        return "has no conversations; give a file that has some"
    others = recording.dropped.total() - recording.dropped[reasons[0]]
    more = f", and {count_noun(others, 'other')} left out" if others else ""
    keys = [" and ".join(map(repr, sorted(mark))) for one in FORMATS if one.name == format for mark in one.marks]
    wanted = f"JSON objects with {' or '.join(keys)}" if keys else f"a file in one of the formats {', '.join(NAMES)}"
    return f"has no conversation that can be read: {recording.explain(reasons[0])}{more}; give {wanted}"
