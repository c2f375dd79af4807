"""Importers: recorded conversations with their reactions, from whatever file people have.

Finds out the format of each row and hands the rows to the format's reader. A file is read whole before anything is stored;
a row that cannot be read is left out and counted under its reason. It knows no tokenizer and no training.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bot.chat.reactions import Reactions
from bot.config import ReactionsConfig
from bot.errors import ConfigError, DataError
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
    """A way to record conversations: a row of it has all keys of one of `marks`, or is in a file with one of these names."""

    name: str
    marks: tuple[set[str], ...]
    read: FormatReader
    files: frozenset[str] = frozenset()

    def matches(self, row: RecordedRow) -> bool:
        """Whether a row is of this format."""
        is_marked = isinstance(row.value, dict) and any(mark <= row.value.keys() for mark in self.marks)
        return is_marked or PurePosixPath(row.file).name in self.files


def _make_row_reader(read: Callable[[RecordedRow, Recording], None]) -> FormatReader:
    """A reader of a format in which each row stands for itself."""

    def read_all(rows: Sequence[RecordedRow], recording: Recording) -> None:
        for row in rows:
            with recording.leaving_out(row.place):
                read(row, recording)

    return read_all


FORMATS = (  # the first that fits is a row's format
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

    `reactions` says which emoji are opinions. Raises DataError where nothing can be read, with what was wrong first.
    """
    if format not in ("auto", *NAMES):
        raise ConfigError(f"--format has value '{format}'; it must be auto or one of {', '.join(NAMES)}")
    contents = read_contents(path)
    recording = Recording(contents.sha256[:16], Reactions(reactions or ReactionsConfig()))
    for odd in contents.oddities:
        recording.leave_out(f"{odd.noun} that {odd.predicate}", odd.place, odd.detail)
    for row in contents.cleaned:
        recording.leave_out("row with characters that are no text, which were replaced", row.place)
    rows: dict[str, list[RecordedRow]] = defaultdict(list)
    for row in contents.rows:
        found = format if format != "auto" else next((one.name for one in FORMATS if one.matches(row)), "")
        if not isinstance(row.value, dict):
            recording.leave_out("row that is no JSON object", row.place)
        elif not found:
            recording.leave_out("row that is of no known format", row.place)
        else:
            rows[found].append(row)
    for one in FORMATS:
        if one.name in rows:
            recording.row_counts[one.name] = len(rows[one.name])
            one.read(rows[one.name], recording)
    convert_ratings(recording)
    if not recording.dialogues:
        raise DataError(f"{path}: {_explain_nothing_read(recording)}")
    return recording


def _explain_nothing_read(recording: Recording) -> str:
    """Say why nothing was read: what was wrong first."""
    reasons = list(recording.dropped)
    if not reasons:
        return "holds no conversation; give a file with at least one"
    others = recording.dropped.total() - recording.dropped[reasons[0]]
    more = f", and {others:,} others are left out" if others else ""
    return f"holds nothing to replay: {recording.explain(reasons[0])}{more}; known formats are {', '.join(NAMES)}"
